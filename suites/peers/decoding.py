"""One cache of each engine in this process, full of sequences of one text: what beside.py times a step of."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from kvsuite import models

CHUNK = 2048
"""Tokens that OpenVINO and llama.cpp prefill at once."""


class OpenVino:
    """A cache of OpenVINO GenAI's continuous batching: paged, every sequence with blocks of its own."""

    def __init__(self, arm: str, ids: list[int], batch: int, steps: int, threads: int) -> None:
        import openvino

        from kvsuite.engines.openvino_model import Model

        room = steps + batch * math.ceil(len(ids) / CHUNK) + batch  # the first sequences decode while others prefill
        blocks = str(batch * math.ceil((len(ids) + room) / 32))
        options = {"kv": arm, "blocks": blocks, "batched_tokens": str(CHUNK), "threads": str(threads)}
        self.model = Model(models.default_gguf(), options)
        config = self.model.genai.GenerationConfig(max_new_tokens=room)
        config.ignore_eos = True
        tensor = openvino.Tensor(np.array([ids]))
        self.handles = [self.model.pipeline.add_request(n + 1, tensor, config) for n in range(batch)]
        while 0 in [self._came(handle) for handle in self.handles]:
            self.model.pipeline.step()
        self.facts = {
            name: self.model.facts[name] for name in ("kv_dtype", "kv_bytes_per_token", "threads", "features")
        }

    def step(self) -> float:
        """Seconds of one step. Raises RuntimeError where not every sequence got a token."""
        start = time.perf_counter()
        self.model.pipeline.step()
        seconds = time.perf_counter() - start
        if [self._came(handle) for handle in self.handles] != [1] * len(self.handles):
            raise RuntimeError("a step gave other than one token to each sequence")
        return seconds

    def _came(self, handle: Any) -> int:
        return sum(len(o.generated_ids) for o in handle.read().values()) if handle.can_read() else 0


class LlamaCpp:
    """A cache of llama.cpp with flash attention: a buffer for each sequence, copied from the first one's prefill."""

    def __init__(self, arm: str, ids: list[int], batch: int, steps: int, threads: int) -> None:
        import llama_cpp as api

        self.silent = api.llama_log_callback(lambda *said: None)  # C keeps no reference
        api.llama_log_set(self.silent, None)
        self.api, self.batch, self.position = api, batch, len(ids)
        how = api.llama_context_default_params()
        how.n_ctx, how.n_seq_max, how.kv_unified = batch * 256 * math.ceil((len(ids) + steps) / 256), batch, False
        how.n_threads, how.n_threads_batch, how.n_batch = threads, threads, CHUNK
        how.type_k = how.type_v = getattr(api, f"GGML_TYPE_{arm.upper()}")
        how.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        model = api.llama_model_load_from_file(str(models.default_gguf()).encode(), api.llama_model_default_params())
        self.context = api.llama_init_from_model(model, how)
        self.words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        for first in range(0, len(ids), CHUNK):
            self._decode([(token, first + n, 0) for n, token in enumerate(ids[first : first + CHUNK])])
        for row in range(1, batch):
            api.llama_memory_seq_cp(api.llama_get_memory(self.context), 0, row, -1, -1)
        self.tokens = [self._best(-1)] * batch
        stored = [api.llama_state_seq_get_size(self.context, row) / len(ids) for row in (0, batch - 1)]
        self.facts = {"kv_bytes_per_token": min(stored), "threads": api.llama_n_threads(self.context)}

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self._decode([(token, self.position, row) for row, token in enumerate(self.tokens)])
        self.tokens = [self._best(row) for row in range(self.batch)]
        self.position += 1
        return time.perf_counter() - start

    def _decode(self, items: list[tuple[int, int, int]]) -> None:
        batch = self.api.llama_batch_init(len(items), 0, 1)
        for at, (token, position, row) in enumerate(items):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, position, 1, row
            batch.logits[at] = True
        batch.n_tokens = len(items)
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {code}")
        self.api.llama_batch_free(batch)

    def _best(self, at: int) -> int:
        return int(np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, at), (self.words,)).argmax())


class Kvsuite:
    """A cache of kvsuite, the very cell that `pytest -m throughput` times."""

    def __init__(self, arm: str, ids: list[int], batch: int, steps: int, threads: int) -> None:
        import torch

        from kvsuite.engines.request import Request
        from kvsuite.engines.timing import ENDLESS, DecodeCell
        from kvsuite.engines.transformers import TransformersEngine
        from kvsuite.methods import parse

        torch.set_num_threads(threads)
        engine = TransformersEngine.load(models.default_model())
        prompt = engine.prefill(Request("text", "", "", ENDLESS), ids, [])
        cell = DecodeCell(engine, parse(arm), prompt, batch, steps)
        cell.check()
        self.step, worker = cell.round, cell.worker
        self.facts = {"path": worker.path, "kv_bytes_per_token": worker.nbytes / batch / len(ids), "threads": threads}


ENGINES = {"openvino_genai": OpenVino, "llama_cpp": LlamaCpp, "kvsuite": Kvsuite}
"""By the package that each is imported from."""
