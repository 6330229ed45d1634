"""What kvsuite uses of openvino_genai 2026.4, without a model: a prompt's tokens are its words, an answer counts up.

The last word of a prompt says what happens: a number is how many tokens come before the end; "crash", "raise" and
"ignored" are ways in which an engine fails, in the second step; "late" is one in the hundredth; "waits" gets no token
after its second for two steps, as if it was preempted. A block has 4 tokens;
a step reads 50 of a prompt. 13 threads crash it at once; 14 make it hang, with its id in the model's ``pid``."""

import math
import os
import pathlib
import time
import types

__version__ = "fake"
BLOCK, STOP, CHUNK = 4, 2, 50
LOG = """\
Model: OV Tokenizer
  KEY_CACHE_PRECISION: u8
Model: LLM with Paged Attention
  INFERENCE_NUM_THREADS: 2
  INFERENCE_PRECISION_HINT: bf16
  KEY_CACHE_PRECISION: {0}
  VALUE_CACHE_PRECISION: {1}
  EXECUTION_DEVICES: CPU
"""
AggregationMode = types.SimpleNamespace(SUM=0, NORM_SUM=1)
KVCrushAnchorPointMode = types.SimpleNamespace(RANDOM=0, ZEROS=1, ONES=2, MEAN=3, ALTERNATING=4)
SparseAttentionMode = types.SimpleNamespace(TRISHAPE=0, XATTENTION=1)
named = types.SimpleNamespace


class SchedulerConfig:
    enable_prefix_caching = use_cache_eviction = use_sparse_attention = False
    dynamic_split_fuse = True
    cache_eviction_config = None

    def to_string(self):
        return "SchedulerConfig {\n " + " ".join(
            f"{k}: {v}" for k, v in vars(self).items() if k != "cache_eviction_config"
        )


class GenerationConfig:
    ignore_eos = do_sample = False
    top_p = 1.0

    def __init__(self, max_new_tokens):
        self.max_new_tokens = max_new_tokens


def KVCrushConfig(budget, anchor):
    return budget, anchor


def CacheEvictionConfig(*given):
    return given


def SparseAttentionConfig(mode):
    return named(mode=mode)


class Tokenizer:
    def apply_chat_template(self, messages, add_generation_prompt, tools=None):
        return " ".join(m["content"] for m in messages)

    def encode(self, text, add_special_tokens=True):
        words = text.split()[:200]  # the longest it takes: it cuts off the rest
        return named(input_ids=named(shape=(1, len(words)), words=words))

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(i) for i in ids if i != STOP)


class Handle:
    def __init__(self, words, config):
        self.words, self.config, self.status = words, config, "RUNNING"
        self.made, self.known, self.unread, self.waited = 0, 0, [], 0

    def can_read(self):
        return bool(self.unread)

    def read(self):
        return {0: self.unread.pop(0)}

    def get_status(self):
        return named(name=self.status)

    def cancel(self):
        self.status = "CANCEL"

    def step(self):
        self.known = min(len(self.words), self.known + CHUNK)
        if self.known < len(self.words):
            return
        word = self.words[-1]
        if word == "waits" and self.made == 2 and self.waited < 2:
            self.waited += 1
            return
        self.made += 1
        if self.made > 1 and word == "crash":
            os._exit(3)
        if (self.made > 1 and word == "raise") or (self.made == 100 and word == "late"):
            raise RuntimeError("Exception from a.cpp:1:\nCheck 'x' failed at /home/me/b.cpp:2:\nno luck\n")
        if self.made > 1 and word == "ignored":
            self.status = "IGNORED"
            return
        end = word.isdecimal() and self.made > int(word) and not self.config.ignore_eos
        finish = "STOP" if end else "LENGTH" if self.made == self.config.max_new_tokens else "NONE"
        self.unread.append(named(generated_ids=[STOP if end else 10 + self.made], finish_reason=named(name=finish)))
        if finish != "NONE":
            self.status = "FINISHED"


class ContinuousBatchingPipeline:
    def __init__(self, path, scheduler, device, properties):
        if properties.get("KV_CACHE_PRECISION") == "f32":
            raise RuntimeError("Exception from core.cpp:117:\nexpect kvcache type bf16, current: f32")
        if properties.get("INFERENCE_NUM_THREADS") == "13":
            os._exit(4)
        if properties.get("INFERENCE_NUM_THREADS") == "14":
            pathlib.Path(path, "pid").write_text(str(os.getpid()))
            time.sleep(3600)
        stored = properties.get("KV_CACHE_PRECISION", "u8")
        types = properties.get("KEY_CACHE_PRECISION", stored), properties.get("VALUE_CACHE_PRECISION", stored)
        if os.environ.get("OPENVINO_LOG_LEVEL"):
            os.write(1, LOG.format(*types).encode())
        self.counted = sum({"f16": 16, "u8": 9, "u4": 12}[t] for t in types) // 2  # bytes a token
        self.scheduler, self.requests = scheduler, []
        self.blocks = scheduler.num_kv_blocks or 250

    def get_tokenizer(self):
        return Tokenizer()

    def get_config(self):
        return named(stop_token_ids={STOP})

    def has_non_finished_requests(self):
        return bool(self.requests)

    def add_request(self, number, ids, config):
        self.requests.append(Handle(ids.words, config))
        return self.requests[-1]

    def step(self):
        kept = self.scheduler.cache_eviction_config[2] if self.scheduler.use_cache_eviction else math.inf
        there = [min(len(r.words), r.known + CHUNK) + r.made for r in self.requests]
        held = [min(n, kept) if r.made else n for n, r in zip(there, self.requests, strict=True)]
        used = sum(math.ceil(n / BLOCK) for n in held)
        self.used = 100 * used / self.blocks
        time.sleep(0.002)
        for request in self.requests:
            request.step()
        self.requests = [r for r in self.requests if r.status == "RUNNING"]

    def get_metrics(self):
        return named(cache_usage=self.used, cache_size_in_bytes=self.blocks * BLOCK * self.counted)
