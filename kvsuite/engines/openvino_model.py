"""A model as OpenVINO GenAI compiles it from the options of openvino.py, and what can be found out about it."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kvsuite import disk

LOG = "OPENVINO_LOG_LEVEL"
PLAIN = frozenset(("f16", "bf16", "f32"))
PROBE = 2 * 32 + 2
"""Tokens of the first request: enough to see two blocks of the CPU's cache begin."""
START, RECENT, WINDOW = 32, 128, 8
"""What eviction keeps where nothing else is said: GenAI's own defaults."""
TEXT, ARRAY = 8, 9
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's types of values, as `struct` calls them."""
LONGEST, MOST = 1 << 24, 1 << 53
"""Bytes of a text of GGUF's metadata, and what is no size of a model any more."""


class Model:
    """A running pipeline. ``facts``: what runs; ``limit``: tokens that one request can have, its prompt included;
    ``fatal``: lengths of prompts that would end the engine; ``batched``: most tokens in one step."""

    def __init__(self, path: Path, options: Mapping[str, str]) -> None:
        self.genai = importlib.import_module("openvino_genai")
        scheduler = self._scheduler(options)
        self.batched = scheduler.max_num_batched_tokens
        with _printed() as log:
            self.pipeline = self.genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", _properties(options))
        self.tokenizer = self.pipeline.get_tokenizer()
        self.stops = frozenset(self.pipeline.get_config().stop_token_ids)
        self.blocks, self.block, counted = self._probe()
        numbers, context = shape(path)
        said = dict(re.findall(r"^ *(\w+): *(\S+)$", log[0].rpartition("Model: LLM")[2], re.MULTILINE))
        dtypes = [said.get("KEY_CACHE_PRECISION", "unknown"), said.get("VALUE_CACHE_PRECISION", "unknown")]
        tokens = self.blocks * self.block
        # OpenVINO counts a byte for a number of 4 bits, so such a cache takes half the memory it was given (seen in
        # RSS). Where only keys or only values have 4 bits, its count is an upper bound.
        size = counted // 2 if set(dtypes) == {"u4"} else counted
        bits = 8 * size / tokens / numbers if numbers else None
        self.limit = self._longest(min(tokens, context or tokens))
        start, window = (int(options.get(name, usual)) for name, usual in (("start", START), ("window", WINDOW)))
        # GenAI 2026.4: fewer tokens after the first ones than in the window fail a check, and the batch with it
        self.fatal = range(start + 1, start + window if options.get("scores") == "norm-sum" else 0)
        self.facts = {
            "version": self.genai.__version__,
            "openvino": importlib.import_module("openvino").__version__,
            "kv_dtype": "/".join(dict.fromkeys(dtypes)),
            "kv_tokens": tokens,
            "kv_bytes": size,
            "kv_bytes_counted": counted,
            "kv_bytes_per_token": size / tokens,
            "kv_bits": bits,
            "block_size": self.block,
            "max_len": context,
            "threads": int(said.get("INFERENCE_NUM_THREADS", 0)),
            "scheduler": " ".join(scheduler.to_string().split()),
            "eviction": scheduler.use_cache_eviction,
            "sparse": scheduler.use_sparse_attention,
            "features": {
                "prefix caching": str(scheduler.enable_prefix_caching).lower(),
                "chunked prefill": str(scheduler.dynamic_split_fuse).lower(),
                "inference precision": said.get("INFERENCE_PRECISION_HINT", "not said"),
                "device": said.get("EXECUTION_DEVICES", "CPU"),
            },
            "compressed": not (set(dtypes) <= PLAIN and (bits is None or bits >= 16))
            or scheduler.use_cache_eviction
            or scheduler.use_sparse_attention,
        }

    def _scheduler(self, options: Mapping[str, str]) -> Any:
        genai, config = self.genai, self.genai.SchedulerConfig()
        number = {name: int(value) for name, value in options.items() if value.isdecimal()}
        config.cache_size = 0 if "blocks" in number else number.get("cache", 1)
        config.num_kv_blocks = number.get("blocks", 0)
        config.max_num_batched_tokens = number.get("batched_tokens", 256)
        config.enable_prefix_caching = options.get("prefix") == "on"
        if "eviction" in number:
            mode = getattr(genai.AggregationMode, _upper(options.get("scores", "sum")))
            anchor = getattr(genai.KVCrushAnchorPointMode, _upper(options.get("anchor", "random")))
            crush = genai.KVCrushConfig(number.get("crush", 0), anchor)
            kept = number.get("start", START), number.get("recent", RECENT), number["eviction"]
            window = number.get("window", WINDOW)
            config.use_cache_eviction = True
            config.cache_eviction_config = genai.CacheEvictionConfig(*kept, mode, False, window, crush)
        if "sparse" in options:
            sparse = genai.SparseAttentionConfig(getattr(genai.SparseAttentionMode, _upper(options["sparse"])))
            sparse.num_retained_start_tokens_in_cache = number.get("sparse_start", 128)
            sparse.num_retained_recent_tokens_in_cache = number.get("sparse_recent", 1920)
            sparse.xattention_threshold = float(options.get("threshold", 0.8))
            config.use_sparse_attention, config.sparse_attention_config = True, sparse
        return config

    def _longest(self, limit: int) -> int:
        """GenAI's tokenizer cuts off what is longer than it was made for, without a word, whatever ``truncation`` says.
        A prompt as long as that has no room for an answer, so it is refused."""
        return min(limit, int(self.tokenizer.encode(" a" * (limit + 1), add_special_tokens=False).input_ids.shape[-1]))

    def _probe(self) -> tuple[int, int, int]:
        """Blocks, tokens in a block, and bytes of the cache as the scheduler counts them: seen in a first request,
        whose every token but those that begin a block leaves the share in use as it was."""
        config = self.genai.GenerationConfig(max_new_tokens=PROBE)
        config.ignore_eos = True
        handle = self.pipeline.add_request(
            0, self.tokenizer.encode("Hello", add_special_tokens=False).input_ids, config
        )
        used = []
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            used.append(self.pipeline.get_metrics().cache_usage)
        began = [at for at in range(1, len(used)) if used[at] != used[at - 1]]
        if len(began) < 2:
            raise RuntimeError(f"its first request ended as {handle.get_status().name} after {len(used)} tokens")
        return round(100 / used[0]), began[1] - began[0], self.pipeline.get_metrics().cache_size_in_bytes


def _properties(options: Mapping[str, str]) -> dict[str, Any]:
    names = {"compute": "INFERENCE_PRECISION_HINT", "threads": "INFERENCE_NUM_THREADS"}
    found = {names[name]: value for name, value in options.items() if name in names}
    keys, _, values = options.get("kv", "").partition("/")
    if values:
        found |= {"KEY_CACHE_PRECISION": keys, "VALUE_CACHE_PRECISION": values}
    elif keys:
        found["KV_CACHE_PRECISION"] = keys
    if "keys" in options:
        found["KEY_CACHE_QUANT_MODE"] = _upper(options["keys"])
    if "group" in options:
        found |= {"KEY_CACHE_GROUP_SIZE": options["group"], "VALUE_CACHE_GROUP_SIZE": options["group"]}
    return found


def _upper(word: str) -> str:
    return word.upper().replace("-", "_")


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
    """Afterwards what was printed meanwhile: GenAI tells its compiled model's properties in no other way. What comes
    later is dropped."""
    told: list[str] = []
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.environ[LOG] = "3"
        try:
            yield told
        finally:
            del os.environ[LOG]
            file.seek(0)
            told.append(file.read().decode(errors="replace"))
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)


def shape(model: Path) -> tuple[int | None, int | None]:
    """How many numbers K and V of one token are, all layers, and the model's context in tokens, from a GGUF file or a
    folder's config.json. None for what it does not say in the usual way."""
    try:
        if model.is_file():
            with model.open("rb") as file:
                own = _gguf(file)
            layers, context = own["block_count"], own.get("context_length")
            width = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
            numbers = own["attention.head_count_kv"] * (width + own.get("attention.value_length", width))
        else:
            own = disk.parsed(disk.text(model / "config.json"))
            own = own.get("text_config", own)
            layers, context = own["num_hidden_layers"], own.get("max_position_embeddings")
            width = own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"]
            numbers = 2 * width * own.get("num_key_value_heads", own["num_attention_heads"])
        sizes = layers, numbers, 0 if context is None else context
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, struct.error):
        return None, None
    if not all(type(size) is int and 0 <= size < MOST for size in sizes):
        return None, None
    return layers * numbers, context


def _gguf(file: BinaryIO) -> dict[str, Any]:
    """The metadata of a GGUF file that are about its architecture, without arrays. (The gguf package takes seconds over
    the vocabulary.) Raises ValueError for what is none, struct.error where it is cut off."""

    def number(form: str) -> Any:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

    def text() -> str:
        if (size := number("Q")) > LONGEST:
            raise ValueError("a text of so many bytes is none")
        return file.read(size).decode(errors="replace")

    def value(kind: int) -> Any:
        if kind == TEXT:
            return text()
        if kind != ARRAY:
            return number(FORMS[kind])
        inner, count = number("I"), number("Q")
        if inner == TEXT:
            for _ in range(count):  # the vocabulary; where the file ends, so does this
                text()
        else:  # an array in an array is in no file that is known
            file.seek(min(count * struct.calcsize(FORMS[inner]), MOST), os.SEEK_CUR)
        return None

    magic, _, _, count = file.read(4), number("I"), number("Q"), number("Q")
    if magic != b"GGUF":
        raise ValueError("not GGUF")
    found: dict[str, Any] = {}
    for _ in range(count):
        name = text()
        found[name] = value(number("I"))
    return {name.removeprefix(f"{found['general.architecture']}."): value for name, value in found.items()}
