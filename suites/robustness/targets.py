"""Where kvsuite takes in what others wrote: for each place valid examples, and the code that reads them."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import struct
import tempfile
import typing
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from kvsuite import configs, ifeval, models, readers, records, scorers, shapes, workloads
from kvsuite.analysis import gates, negative_set
from kvsuite.analysis.report import analyse
from kvsuite.analysis.table import Table
from kvsuite.engines import openvino_model, probe, profile
from kvsuite.engines.openai import Client
from kvsuite.engines.request import Ask, Reply
from kvsuite.engines.stream import Events, Failure, StreamParser
from kvsuite.errors import UsageError, printable
from kvsuite.kernels.context import LayerContext
from kvsuite.margins import Margins
from kvsuite.methods import parse_all
from kvsuite.methods.budgets import headwise
from kvsuite.methods.selectors import kvzap
from kvsuite.plugin import options, serving
from kvsuite.plugin.declared import HELP
from kvsuite.predict import cells, length, prompts, tables, throughput, types
from kvsuite.readers import aiconfigurator
from kvsuite.readers.run import arms, documents
from kvsuite.report import as_json, html, markdown, terminal
from kvsuite.tasks import rows
from kvsuite.tasks.base import SCORED
from kvsuite.tasks.jsonl import Jsonl
from suites.checks import test_readers as made
from suites.checks.said import LLAMA_METRICS
from suites.robustness import mutated

ROOT = Path(__file__).parents[2]
OURS = (UsageError, Failure)
"""What may be raised: one sentence for the user, or why a server's answer is none."""


@dataclass(frozen=True)
class Target:
    """One place. ``read(given, folder)`` takes an input; it may leave files in the folder."""

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], object]
    dear: int = 1
    """How many times as few inputs it gets."""
    taken: bool = True
    """Whether any of them is valid."""


def _file(
    name: str, inputs: st.SearchStrategy[bytes], read: Callable[[Path], object], file: str = "", dear: int = 1
) -> Target:
    """One that reads a file."""

    def given(content: bytes, folder: Path) -> object:
        (folder / (file or "input")).write_bytes(content)
        return read(folder / (file or "input"))

    return Target(name, inputs, given, dear)


def _text(*seeds: str, words: tuple[str, ...] = ()) -> st.SearchStrategy[str]:
    """Texts like these."""
    pieces = tuple(word.encode() for word in words)
    found = mutated.data(tuple(seed.encode() for seed in seeds), pieces)
    return found.map(lambda content: content.decode(errors="surrogateescape"))


# methods, options


METHODS = ("full", "jitter", "kivi:bits=4", "h2o:budget=64+int8", "snapkv:budget=0.25,window=16", "quest:budget=128")
GRAMMAR = (
    "+",
    ":",
    ",",
    "=",
    "budget",
    "bits",
    "int4",
    "uniform",
    "headwise:shares=x",
    "1e9",
    ".5",
    "h2o",
    "layer_bits",
)


def _grammar(text: str, _: Path) -> None:
    for method in parse_all([text]):
        method.check_context(1024)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"preset": "smoke", "methods": "int8,h2o:budget=64", "length": "512,1024", "batch": [1, 8], "samples": "8,chat=4"},
    {"cells": "1x512", "modes": "paged,eager", "temperature": 0.7, "repeats": 2, "reference-temperatures": [0.9]},
    {"margins": "quality=0.1,veto=length", "gate": ["speed[int8]>=1.0@b8-l4096"], "undecided": "fails", "seed": 3},
    {"baseline": "http://127.0.0.1:1", "variant": ["fp8=http://127.0.0.1:2"], "arrivals": "poisson:2", "end": "forced"},
    {"baseline": "openvino:kv=f16", "goodput": "ttft=2,itl=0.2", "workload": "tools", "profile": "vllm", "timeout": 5},
    {"model": "shape:llama-3.1-8b:layers=2", "tasks": ["needle", "chat"], "memory": 2, "dtype": "float32", "cap": 16},
    {"model": ".", "resume": "a", "learn": "a,b", "acknowledged": "a.toml", "against": "a", "serve": "together"},
)


def _options(given: Any, _: Path) -> None:
    if isinstance(given, dict):
        options.check({key: value for key, value in given.items() if key in HELP and key != "plugin"})


CONFIGURED = b"""[tool.kvsuite]
preset = "smoke"
methods = ["int8", "h2o:budget=64"]
samples = 8
length = [512, 1024]
temperature = 0.5

[tool.kvsuite.gates]
fast = "speed[int8]>=1.0@b8-l4096"
"""
KEYS = (*(f"\n{key} = ".encode() for key in HELP), b"[1, 2]", b"{a = 1}", b"1979-05-27", b"[tool]", b"'''")


def _configured(file: Path) -> None:
    _options(options._configured(file), file.parent)


# what runs left, and other tools


def _records() -> tuple[dict[str, Any], ...]:
    """Three lines of each kind of the smoke run's."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in (ROOT / "reports/cpu/smoke/records.jsonl").read_text().split("\n")[:-1]:
        found = json.loads(line)
        kinds.setdefault(found["kind"], []).append(found)
    served = records.Served("fp8", task="chat", sample="1", text="a", count=3, gaps=[0.1])
    probe = records.Probe("fp8", profile="vllm", facts={"kv_tokens": 8}, counters={"preemptions": 0.0})
    more = (json.loads(records.encode(record)) for record in (served, probe))
    return (*(line for kind in kinds.values() for line in kind[:3]), *more)


def _small() -> list[dict[str, Any]]:
    """Of the smoke run three methods' first samples and cells."""
    found = []
    held: dict[tuple[str, ...], int] = {}
    for line in (ROOT / "reports/cpu/smoke/records.jsonl").read_text().split("\n")[:-1]:
        record = json.loads(line)
        if record["method"] in METHODS_SHOWN:
            key = record["kind"], record["method"], record.get("task", "")
            held[key] = held.get(key, 0) + 1
            if held[key] <= 4:
                found.append(record)
    return found


RECORDS = _records()
METHODS_SHOWN = ("full", "jitter", "int8")
SMALL = _small()
FACTS = json.loads((ROOT / "reports/cpu/smoke/run.json").read_text())


def _run(content: bytes, folder: Path, file: str) -> None:
    (folder / "run.json").write_text(json.dumps(FACTS))
    (folder / "records.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    (folder / file).write_bytes(content)
    run = records.read(folder)
    for record in run.records:
        records.decode(records.encode(record))
    arms(run)
    documents(run)


@st.composite
def _measured(draw: Any) -> bytes:
    """Those records, some with strange texts."""
    found = [dict(record) for record in SMALL]
    for _ in range(draw(st.integers(0, 4))):
        record = draw(st.sampled_from(found))
        name = draw(st.sampled_from(sorted(key for key in record if isinstance(record[key], str) and key != "kind")))
        known = typing.get_args(typing.get_type_hints(records.KINDS[record["kind"]])[name])  # of a Literal
        texts = [text for text in mutated.STRANGE if isinstance(text, str)]
        record[name] = draw(st.sampled_from(known or [record[name], *texts]))
    return "".join(json.dumps(record) + "\n" for record in found).encode()


ODD = (0, 1, 3, 1000, 2**62, -1), (0.0, 0.5, 1.5, 1e-300, 1e300, -0.001)
"""Numbers that fit the type of a figure, and not always its sense."""


@st.composite
def _figures(draw: Any) -> bytes:
    """Those records, some with odd numbers, alone and in lists, and with lists of other lengths."""
    found = [dict(record) for record in SMALL]
    for _ in range(draw(st.integers(0, 4))):
        record = draw(st.sampled_from(found))
        name = draw(st.sampled_from(sorted(key for key in record if key != "schema" and _numbers(record[key]))))
        kind = typing.get_type_hints(records.KINDS[record["kind"]])[name]
        number = draw(st.sampled_from(ODD["float" in str(kind)]))
        if isinstance(record[name], list):
            at = draw(st.integers(0, len(record[name]) - 1))
            record[name] = [number if k == at else x for k, x in enumerate(record[name])]
            record[name] = draw(st.sampled_from((record[name], record[name][:at], [number] * 3)))
        else:
            record[name] = number
    return "".join(json.dumps(record) + "\n" for record in found).encode()


def _numbers(found: Any) -> bool:
    some = found if isinstance(found, list) else [found]
    return bool(some) and all(type(x) in (int, float) for x in some)


def _report(file: str) -> Callable[[bytes, Path], None]:
    """A whole run, of which one file is hostile, as everyone sees it."""

    def read(content: bytes, folder: Path) -> None:
        (folder / "run.json").write_text(json.dumps(FACTS))
        (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SMALL))
        (folder / file).write_bytes(content)
        report = analyse(records.whole(folder))
        shown = io.StringIO()
        terminal.write([*report.tables, *report.appendix], shown, 100, report.notes)
        for text in (shown.getvalue(), markdown.render(report), as_json.render(report), html.render([report])):
            if any(not sign.isprintable() and sign not in "\n\t\xa0\xad" for sign in text):
                raise AssertionError("a terminal could take this for a command")
        text = markdown.render(report)
        titles = {printable(markdown.plain(f"## {t.title}")) for t in (*report.tables, *report.appendix)}
        if (
            re.search(r"<[A-Za-z/!?]|[^\\]\]\(", text.replace("\\](", ""))
            or {line for line in text.split("\n")[1:] if line.startswith("#")} - titles
        ):
            raise AssertionError("this is more than text in a report's markdown")

    return read


def _reader(form: str, file: str) -> Callable[[bytes, Path], object]:
    def read(content: bytes, folder: Path) -> object:
        (folder / file).write_bytes(content)
        return readers.read(f"{form}:{folder / file}")

    return read


def _artifact(content: bytes, folder: Path) -> None:
    (folder / "a_trec_eval.json").write_bytes(content)
    readers.read(f"artifact:{folder}/a_")


PREDICTIONS = (
    b"predicted_answer,answer,task,question\n\"12, and\n34\",\"['12' '34']\",niah_1,q\na,['b'],qa_1,q\n",
    b"_id,answers,all_classes,task,length,predicted_answer\n7,['Food'],\"['Food', 'Animal']\",trec,3000,Food\n",
    b"predicted_answer,question,score\na,q,0.5\nb,r,True\n",
)


def _kvpress(content: bytes, folder: Path) -> None:
    config, _, rest = content.partition(b"\0\0")
    (folder / "config.yaml").write_bytes(config if rest else b"dataset: ruler\n")
    _reader("kvpress", "predictions.csv")(rest or content, folder)


LM_EVAL = tuple(made.sample(at, acc=at % 2, f1=0.5) for at in range(3))
LOAD = (made.serving(),)
GUIDELLM = ({"benchmarks": [made.benchmark(made.request(0), made.request(1))]},)
TRACE: tuple[dict[str, Any], ...] = (
    {"id": "a", "at": 0.5, "conversation": "c", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    {"messages": [{"role": "user", "content": "x"}], "tools": [{}], "temperature": 0.5, "seed": 3},
)
SHAREGPT = ([{"id": "1", "conversations": [{"from": "human", "value": "hello you"}, {"from": "gpt", "value": "yes"}]}],)


def _trace(file: Path) -> None:
    turns = workloads.read(file)
    workloads.schedule(turns, workloads.Arrivals("trace"))


def _sharegpt(file: Path) -> None:
    workloads.sharegpt(file, 1, 0, lambda text: 4 * len(text.split()))


NEGATIVE = {
    "task": "needle", "id": "1", "fell": ["h2o"], "prompt_hash": "0", "baseline_score": 1.0, "baseline_answer": "a",
    "cluster": "c", "type": "qa",
}  # fmt: skip
NEGATIVES = {"version": negative_set.VERSION, "jurors": ["h2o", "snapkv"], "quorum": 1}


def _negatives(content: bytes, folder: Path) -> None:
    facts, _, lines = content.partition(b"\n\n")
    (folder / negative_set.FACTS).write_bytes(facts)
    (folder / negative_set.ROWS).write_bytes(lines)
    negative_set.read(folder)


TASK: tuple[dict[str, Any], ...] = (
    {"id": "a", "prompt": "Say hi", "reference": "hi", "max_new_tokens": 3},
    {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "reference": "z"},
)
CELLS = (b"model,method,stage,bsz,prompt_len,thr\nm,full,prefill,1,512,100.5\nm,int8,decoding,2,512,7\n",)
ACKNOWLEDGED = (
    b'[[acknowledged]]\ngate = "speed[int8]>=1"\nreason = "known"\ndate = 2026-11-28\nuntil = 2027-01-31\n',
)


BENCHED = {
    "machine_info": {"cpu": {"brand_raw": "a"}},
    "benchmarks": [
        {"name": "b", "stats": {"median": 0.5}, "extra_info": {
            "model": "m", "method": "full", "stage": "prefill", "bsz": 1, "prompt_len": 512}},
    ],
}  # fmt: skip


def _saved(predictor: throughput.Predictor | length.Predictor) -> dict[str, Any]:
    """What is in the file of a saved predictor."""
    with tempfile.TemporaryDirectory() as folder:
        predictor.save(Path(folder) / "a")
        found: dict[str, Any] = json.loads((Path(folder) / "a").read_text())
    return found


def _timed() -> list[cells.Cell]:
    """Enough cells of two methods for all terms."""
    factors = (("full", 1.0), ("int8", 0.7))
    return [
        cells.Cell("here", "m", method, "decoding", b, n, k * (0.01 + b * n / 1e6), method == "full")
        for method, k in factors for b in (1, 4) for n in (256, 1024)
    ]  # fmt: skip


def _throughput(file: Path) -> None:
    predictor = throughput.Predictor.load(file)
    for cell in predictor.cells[-1:]:
        key = cell.setting, cell.model, cell.method, cell.stage
        answers = predictor.ask(*key, [(cell.batch, cell.length), (1, 512)], extrapolate=True)
        _printed(tables.answers(cell.method, answers), [tables.answer_json(a) for a in answers])


EMBEDDED = 3


def _embed(texts: Sequence[str]) -> tuple[Any, list[int]]:
    return np.ones((len(texts), EMBEDDED), np.float32) / len(texts), [1] * len(texts)


def _lengths() -> length.Predictor:
    """One that knows lengths, changes and types."""
    x = prompts.features(["a", "b?", "c d"], [1, 2, 3], _embed)
    known = length.Quantiles.learned(x, ["full", "int8", "full"], np.array([1.0, 2.0, 3.0]))
    return length.Predictor("m", "f", 64, known, known, types.Classifier.learned(x, ["qa", "code", "qa"]))


def _length(file: Path) -> None:
    predictor = length.Predictor.load(file)
    answers = predictor.ask("Say hi", 2, _embed)
    _printed(tables.asked(predictor.cap, answers), answers)


def _printed(table: Table, figures: Any) -> None:
    """As `kvsuite predict` shows them."""
    terminal.write([table], io.StringIO(), 100)
    json.dumps(figures, allow_nan=False)


GPU = b"gpu:\n  mem_bw: 4000000000000\n  mem_capacity: 150000000000\n  sm_version: 90\n"
ALIASES = b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\n", b"!!python/object/apply:os.system [ls]", b"&a [*a]", b"2026-11-30"


def _gpus(content: bytes, folder: Path) -> None:
    """A GPU's YAML, and behind two zero bytes its table of attention, which is that of products, too."""
    facts, _, table = content.partition(b"\0\0")
    data = folder / "data" / "h200"
    for file in (data / "attention/vllm/1.0" / aiconfigurator.ATTENTION, data / "gemm/vllm/1.0" / aiconfigurator.GEMM):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(table or KERNELS)
    (folder / "h200.yaml").write_bytes(facts)
    aiconfigurator.measured(folder, "h200", "vllm", shapes.shape("llama-3.1-8b"))
    aiconfigurator.formats(folder, "vllm")


def parquet(columns: dict[str, list[Any]], **options: Any) -> bytes:
    from pyarrow import parquet as written
    from pyarrow import table

    file = io.BytesIO()
    written.write_table(table(columns), file, **options)
    return file.getvalue()


KERNEL = {
    "kernel_source": "k", "batch_size": 1, "isl": 1, "beam_width": 1, "num_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "attn_dtype": "bfloat16", "step": 63, "latency": 0.5, "gemm_dtype": "bfloat16", "m": 1, "n": 8,
    "k": 8,
}  # fmt: skip
FORMATS = {"kv_cache_dtype": ["bfloat16", "fp8"]}
KERNELS = parquet({name: [value] * 2 for name, value in KERNEL.items()} | FORMATS)


@st.composite
def _kernels(draw: Any) -> bytes:
    """A table of which some columns hold other values, or bytes of which some are others."""
    if draw(st.booleans()):
        return draw(mutated.data((KERNELS,)))
    odd = [[None, 1], ["x", "1"], [-1, 0], [2**62, 1], [1e300, math.nan], [[1], []], [{"a": 1}, None], [b"\xff", b""]]
    columns = {name: [value] * 2 for name, value in KERNEL.items()} | FORMATS
    for name in draw(st.lists(st.sampled_from(sorted(columns)), max_size=2)):
        columns[name] = draw(st.sampled_from(odd))
    return parquet(columns)


PUBLISHED = parquet({"a": [1, 2], "b": ["x", None], "c": [["y"], []]}), parquet({"a": ["x"] * 99}, compression="zstd")


def _rows(file: Path) -> None:
    """By `datasets`, whose cache is then in this folder."""
    from datasets import config

    before, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, file.parent / "cache"
    try:
        rows.fingerprint(rows.load(rows.Where("d", "c", "s", place=str(file))))
    finally:
        config.HF_DATASETS_CACHE = before


def _zipped(content: bytes, folder: Path) -> None:
    (folder / "a.zip").write_bytes(content)
    rows.load(rows.Where("d", "c", "s", "a.zip", "b.jsonl", str(folder / "a.zip")))


def _archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.jsonl", '{"a": 1}\n' * 100)
    return file.getvalue()


# models


def _gguf() -> bytes:
    def text(said: str) -> bytes:
        return struct.pack("<Q", len(said)) + said.encode()

    numbers = {"block_count": 2, "head_count": 4, "embedding_length": 64, "attention.head_count_kv": 2}
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    pairs += [text(f"llama.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()]
    pairs.append(text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"))
    pairs.append(text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 1) + bytes(4))
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


ARRAYS = struct.pack("<IQ", 9, 1) * 50_000
"""An array in an array in an array."""


def safetensors(header: dict[str, Any], size: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def _tensors(name: str) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}


def _biased(*shape: int) -> dict[str, Any]:
    """A layer's matrix, or what has its name, and its bias."""
    bias = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "layers.0.weight": {"dtype": "F32", "shape": shape, "data_offsets": [8, 8 + 4 * math.prod(shape)]},
        "layers.0.bias": bias,
    }


WEIGHTS = (_biased(2, 2), _tensors("layers.0.weight"), _biased(2))


@st.composite
def _weights(draw: Any) -> bytes:
    if draw(st.booleans()):
        return draw(mutated.data((safetensors(WEIGHTS[0], 24), safetensors(WEIGHTS[1], 16))))
    header = json.dumps(draw(mutated.documents(WEIGHTS))).encode()
    length = draw(st.sampled_from((len(header),) * 3 + (0, 2**63, 2**64 - 1, len(header) + 1)))
    return struct.pack("<Q", length) + header + bytes(draw(st.sampled_from((24, 24, 16, 16, 0, 8))))


def _whole(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    models.check_whole(folder)


def _index(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(safetensors(_tensors("a"), 16))
    (folder / "model.safetensors.index.json").write_bytes(content)
    models.check_whole(folder)


def _config(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_bytes(content)
    configs.refuse(models.model_config(folder))
    models.model_limit(folder)
    openvino_model.shape(folder)


CONFIG = (
    {"model_type": "llama", "max_position_embeddings": 64, "layer_types": ["full_attention"], "num_hidden_layers": 1,
     "num_attention_heads": 2, "hidden_size": 8, "rope_parameters": {"rope_type": "default"}},
    {"text_config": {"model_type": "x", "head_dim": 4, "num_hidden_layers": 1, "num_attention_heads": 2}},
)  # fmt: skip


TOKENIZER = {
    "version": "1.0", "added_tokens": [], "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": " ?a+"}, "behavior": "Isolated", "invert": False},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"},
}  # fmt: skip


# servers


DELTAS: tuple[Any, ...] = (
    {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}], "prompt_token_ids": [1, 2]},
    {"choices": [{"delta": {"content": "hi", "reasoning": "hm"}, "token_ids": [7]}], "object": "chat.completion.chunk"},
    {"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
    },
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"error": {"message": "the engine died", "code": 500}},
)


@st.composite
def _events(draw: Any) -> list[bytes]:
    """A stream, cut anywhere."""
    said = draw(st.lists(mutated.documents(DELTAS[:5]) | st.sampled_from(DELTAS), max_size=5))
    stream = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in said) + b"data: [DONE]\n\n"
    stream = draw(mutated.data((stream,)))
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def _stream(chunks: list[bytes], _: Path) -> None:
    events, heard = Events(), StreamParser(Reply("a"))
    try:
        for at, chunk in enumerate(chunks):
            for event in events.feed(chunk):
                heard.hear(event, float(at))
    finally:
        heard.close()
        _believed(heard.reply)


def _believed(reply: Reply) -> None:
    """What was taken over is of the kinds that records have."""
    answer = records.Served("a", text=reply.text, reasoning=reply.reasoning, calls=reply.tool_calls,
                            finish=reply.finish, prompt_tokens=reply.prompt_tokens or 0, gaps=reply.gaps,
                            cached_tokens=reply.cached_tokens, tokens=[*reply.ids, *reply.prompt_ids],
                            count=reply.tokens, error=reply.error)  # fmt: skip
    records.decode(records.encode(answer))


BODY = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in DELTAS[:5]) + b"data: [DONE]\n\n"
RESPONSES = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
    b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
)
HEADERS = (
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: -1\r\n", b"Content-Encoding: gzip\r\n",
    b"HTTP/1.1 100 C\r\n\r\n", b"Retry-After: 1e999\r\n", b"Content-Type: text/html; charset=utf-7\r\n",
    b"ffffffffffffffff\r\n",
)  # fmt: skip


class _Writer:
    """Stands for a socket that takes everything."""

    def write(self, _: bytes) -> None: ...
    async def drain(self) -> None: ...

    @property
    def transport(self) -> _Writer:
        return self

    def abort(self) -> None: ...


def _http(content: bytes, _: Path) -> None:
    """A whole answer of a server, as it comes from its socket, which it then closes."""
    from kvsuite.engines import wire

    async def connect(_: Any, __: Any) -> wire.Connection:
        reader = wire._Reader(limit=1 << 30)
        for at in range(0, len(content), wire.READ):
            reader.feed_data(content[at : at + wire.READ])
        reader.feed_eof()
        return wire.Connection(reader, _Writer())  # type: ignore[arg-type]

    async def go() -> None:
        client = Client("http://127.0.0.1:9", "m", retries=0, first=5, between=5, total=5)
        client._http._transport._connect = connect.__get__(client._http._transport)  # type: ignore[union-attr, attr-defined]
        _believed(await client.ask(Ask("a", ({"role": "user", "content": "hi"},))))
        try:
            await client.get("/metrics")
            await client.models()
            await client.likelihoods("prompt_logprobs", [1], [2])
        except OSError:
            pass
        await client.close()

    asyncio.run(go())


PAGES = (
    b'{"data": [{"id": "m"}]}', b'{"choices": [{"prompt_logprobs": [null, {"7": {"logprob": -0.5}}]}]}',
    LLAMA_METRICS.encode(),
)  # fmt: skip


def _pages(content: bytes, _: Path) -> None:
    """What a server's pages and its log say, through every profile."""
    text = content.decode(errors="replace")

    async def get(_: str) -> tuple[int, str]:
        return 200, text

    async def go() -> None:
        for known in profile.profiles().values():
            json.dumps(await probe.facts(known, get, text), allow_nan=False)
            json.dumps(await probe.counters(known, get), allow_nan=False)

    asyncio.run(go())


PROFILES = tuple(file.read_bytes() for file in sorted(profile.FOLDER.glob("*.toml")))


SCORERS: dict[str, Callable[[str], object]] = {
    **{name: lambda answer, rule=rule: rule(answer, "Paragraph 5") for name, (rule, _) in scorers.BY_NAME.items()},
    **{f"longbench {name}": lambda answer, name=name: scorers.longbench(name, answer, ["Paragraph 5, a b."], ["a b"])
       for name in scorers.LONGBENCH_RULES},
    "scbench mf": lambda answer: scorers.scbench("mf", answer, 5),
    "scbench choice_eng": lambda answer: scorers.scbench("choice_eng", answer, "a", ["a", "b", "c", "d"]),
    "mrcr": lambda answer: scorers.after_prefix("p" + answer, "pa b a b" * 100, "p"),
    "ruler": lambda answer: scorers.ruler("niah_1", answer, ["a"]),
    "first choice": lambda answer: scorers.first_choice(answer, "A"),
    **{rule: lambda answer, rule=rule: ifeval.followed(rule, 3 if "number" in rule else "a", answer)
       for rule in ifeval.RULES},
}  # fmt: skip
"""Each alone: an answer has one scorer."""
LETTERS = (
    "ab",
    "a. ",
    "9",
    "1.",
    "\n",
    "\n ",
    " ",
    "<<",
    "* ",
    "{",
    "[",
    '"a": ',
    "boxed{",
    "(A) ",
    "The correct answer is ",
    "\0",
)


@st.composite
def _answers(draw: Any) -> tuple[str, str]:
    """A scorer, and an answer as a damaged cache gives them: pieces again and again, as long as what is scored."""
    pieces = draw(st.lists(st.tuples(st.sampled_from(LETTERS), st.sampled_from([1, 3, 400, SCORED])), max_size=4))
    return draw(st.sampled_from(sorted(SCORERS))), "".join(piece * n for piece, n in pieces)[:SCORED]


def _scored(given: tuple[str, str], _: Path) -> None:
    SCORERS[given[0]](given[1])


NAMES = ("artifact:a/b#c", "kvpress:*", "lm-eval:a#b,c", "a#b")


def targets() -> list[Target]:
    """All of them."""
    line = mutated.lines
    return [
        Target("methods", _text(*METHODS, words=GRAMMAR), _grammar),
        Target("options", mutated.documents(OPTIONS), _options),
        _file("[tool.kvsuite]", mutated.data((CONFIGURED,), KEYS), _configured, "pyproject.toml"),
        Target("margins", _text("quality=0.1,veto=quality+length"), lambda text, _: Margins.parse(text)),
        Target("gates", _text("speed[int8]>=1.0@b8-l4096", "quality[kivi*]>=-0.01"), lambda t, _: gates.Gate.parse(t)),
        Target("arrivals", _text("closed:8", "poisson:2.5", "bursts:8@0.5"), lambda t, _: workloads.Arrivals.parse(t)),
        Target("names of results", _text(*NAMES), lambda text, _: readers.read(text), taken=False),
        Target("records", line(RECORDS), lambda content, folder: _run(content, folder, "records.jsonl")),
        Target("run.json", mutated.texts((FACTS,)), lambda content, folder: _run(content, folder, "run.json")),
        Target("report of records", _measured(), _report("records.jsonl"), 50),
        Target("figures of a report", _figures(), _report("records.jsonl"), 50),
        Target("report of run.json", mutated.texts((FACTS,)), _report("run.json"), 50),
        Target("artifact", mutated.texts(([{"id": 0, "score": 0.5}, {"id": "b", "score": 1}],)), _artifact),
        Target("kvpress", mutated.data(PREDICTIONS, (b"dataset: longbench\0\0", b"'\\x'", b"['a' 'b']")), _kvpress),
        Target("lm-eval", line(LM_EVAL), _reader("lm-eval", "samples_t.jsonl")),
        Target("vllm-bench", mutated.texts(LOAD), _reader("vllm-bench", "a.json")),
        Target("guidellm", mutated.texts(GUIDELLM), _reader("guidellm", "a.json")),
        _file("trace", line(TRACE), _trace),
        _file("ShareGPT", mutated.texts(SHAREGPT), _sharegpt),
        _file("jsonl task", line(TASK), lambda file: Jsonl.parse(f"jsonl:{file}")),
        Target("rows in a zip", mutated.data((_archive(),)), _zipped),
        _file("rows in Parquet", mutated.data(PUBLISHED), _rows, "a.parquet", dear=50),
        Target("negative set", _both(mutated.texts((NEGATIVES,)), line((NEGATIVE,))), _negatives),
        _file("predictor's cells", mutated.data(CELLS), lambda file: cells.read(file), "a.csv"),
        _file("benchmarks", mutated.texts((BENCHED,)), cells.read, "a.json"),
        _file("throughput predictor", mutated.texts((_saved(throughput.Predictor(_timed())),)), _throughput),
        _file("length predictor", mutated.texts((_saved(_lengths()),)), _length),
        Target("a GPU's facts", mutated.data((GPU,), ALIASES), _gpus),
        Target("a GPU's tables", _kernels().map(lambda content: GPU + b"\0\0" + content), _gpus),
        _file("acknowledged", mutated.data(ACKNOWLEDGED), gates.acknowledged),
        _file("profile", mutated.data(PROFILES, (b"facts = ", b"'log (a+)+$'")), profile.Profile.load, "a.toml"),
        _file("headwise shares", mutated.texts(([[0.5, 1], [0.1, 0.2]],)), lambda file: _headwise(file)),
        _file("GGUF", mutated.data((_gguf(),), (ARRAYS,)), openvino_model.shape),
        Target("safetensors", _weights(), _whole),
        Target("safetensors index", mutated.texts(({"weight_map": {"a": "model.safetensors"}},)), _index),
        _file("KVzap weights", _weights(), lambda file: _kvzap(file)),
        Target("config.json", mutated.texts(CONFIG), _config),
        _file("tokenizer.json", mutated.texts((TOKENIZER,)), lambda file: serving.tokens_by(file)("a b aa\ud800")),
        Target("events", _events(), _stream),
        Target("answers that are scored", _answers(), _scored, 10),
        Target("HTTP", mutated.data(RESPONSES, HEADERS), _http),
        Target("pages of a server", mutated.data(PAGES) | mutated.texts(tuple(map(json.loads, PAGES[:2]))), _pages),
    ]  # fmt: skip


def _both(one: st.SearchStrategy[bytes], other: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(one, other).map(b"\n\n".join)


LAYER = LayerContext(0, 2, 2, 2, torch.float32, torch.float32, torch.device("cpu"), hidden_size=2)


def _headwise(file: Path) -> None:
    headwise.loaded.cache_clear()
    headwise.loaded(str(file))


def _kvzap(file: Path) -> None:
    kvzap.loaded.cache_clear()
    given = kvzap.KVzap(weights=str(file), budget=64)
    given.artifact.hash  # noqa: B018
    given.check_model([LAYER])
    kvzap.Predicted(str(file)).note(torch.ones(3, 2), 0)
