"""What ``--kv-…`` options there are: plain data, since every project with kvsuite installed declares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvsuite.presets import PRESETS, SMOKE

if TYPE_CHECKING:
    import pytest

HELP = {
    "preset": f"how much is done: {', '.join(PRESETS)}; the defaults of all other options",
    "model": "a model folder in Hugging Face's layout, or a name on its hub, org/model (default: "
    "SmolLM2-135M-Instruct, fetched once); for throughput shape:NAME or shape:NAME:layers=N, a known model's shape "
    "with random weights, such as shape:llama-3.1-8b:layers=2",
    "methods": "methods, comma-separated, e.g. kivi:bits=4,h2o:budget=256+int8; full and jitter always take part",
    "compress": "what is compressed: the whole prompt, or the context, the question being fed through the cache",
    "batch": "widths of decoding batches, comma-separated; answers are decoded at the largest, on a CPU all methods "
    "together in steps of 8 times as many rows",
    "length": "prompt lengths in tokens, comma-separated",
    "cells": "what is timed, BATCHxLENGTH comma-separated, such as 1x4096,16x1024 (default: every --kv-batch with "
    "every --kv-length)",
    "modes": "what decoding is timed with beside kvsuite's own kernels, `paged`: eager, sdpa and flash-attn are "
    "transformers' attention over the same caches",
    "tasks": "tasks, comma-separated; jsonl:FILE or jsonl:FILE#SCORER is a task of your own prompts, "
    "hub:NAME a published benchmark, reference:TASK a task's reference answers, forced through every cache",
    "samples": "samples per task: a number for all, and others for some of them, such as 48,chat=8",
    "cap": "most tokens of a chat answer",
    "temperature": "of chat answers; 0 is greedy",
    "repeats": "answers of each method to each chat, with other noise; prompts are what counts, repeats make each "
    "prompt's figure sharper",
    "reference-temperatures": "temperatures at which the uncompressed cache answers chats, too, e.g. 0.9,1.1: a known "
    "effect on length, beside the methods'; nothing judges it",
    "rounds": "pairs of rounds per timed cell",
    "timeout": "seconds a method may take for a task or a cell beyond 10 times what the baseline takes; seconds a "
    "server has for an answer",
    "memory": "GiB that the caches of all methods may reserve; fewer sequences are decoded together where it is scarce "
    "(default: a quarter of this machine's)",
    "seed": "seed of samples and noise",
    "dtype": "what the model computes in: auto (what is measured to be fast here), bfloat16 or float32; K and V are "
    "stored in the checkpoint's own",
    "device": "cpu or cuda",
    "backend": "who computes on the caches: auto (the fastest that supports a method), reference (PyTorch) or "
    "triton; where one refuses, the reference does, and records say why",
    "margins": "how much worse a method may be before it counts as harmful; what is left out stays as in the preset; "
    "veto=A+B names endpoints that can convict but need not be within margin",
    "gate": "ENDPOINT[METHOD]>=NUMBER or <=: what the run must keep, such as quality[kivi*]>=-0.01 or "
    "speed[int8]>=1.0@b8-l4096; may be given several times, and adds to [tool.kvsuite.gates] (docs/ci.md)",
    "against": "an earlier run: what is worse than there beyond its margin fails",
    "strict": "yes: a server that is BROKEN, FAILED or DIFFERS ends the run with exit code 1; no: it is told alone",
    "undecided": "what a gate does that nothing decides: passes, warns or fails",
    "acknowledged": "a TOML file of failures that are known and borne: gate, reason, date",
    "run": "the folder this run leaves (default: runs/ and the time)",
    "resume": "the folder of a run that was cut off: what it has recorded is not done again, what failed is",
    "learn": "runs that -m tools learns from, comma-separated (default: this run's own cells and chats)",
    "executor": "who answers: here (this process, or pytest-xdist's workers with -n), or ray (the GPUs of a cluster)",
    "ray-address": "the Ray cluster's address (default: one is started on this machine)",
    "plugin": "a Python file of yours with methods, tasks, readers or reports; may be given several times, and adds to "
    "those of the configuration file",
    "baseline": "what serves the uncompressed model: a URL, openvino:kv=f16, or a command with {port} and {model}; "
    "compares servers instead of methods",
    "variant": "NAME=SPEC: what serves the same model with a compressed cache; may be given several times",
    "profile": "what is known of the servers: a name or your own .toml (default: recognised by command or /metrics)",
    "serve": "alone: one server at a time, restarted A B B A; together: all at once, used in turn",
    "arrivals": "closed (as many at a time as --kv-batch says), constant:RATE, poisson:RATE, bursts:N@RATE or trace",
    "workload": "what is timed: a trace (.jsonl, OpenAI messages), ShareGPT's .json, or multi-turn: conversations "
    "about texts of --kv-length, whose later turns find the earlier ones in the prefix cache (default: single turns)",
    "prefix": "cold: no prompt finds itself in the prefix cache; warm: every one does",
    "end": "natural: timed answers end where the model ends them; forced: they go on to --kv-cap (ignore_eos)",
    "requests": "requests per timed cell and leg (default 0: twice the concurrency)",
    "goodput": "find the highest rate that meets p95 targets in seconds, e.g. ttft=2,itl=0.2",
    "startup": "seconds a server may take until it answers",
}
REPEATED = ("gate", "plugin", "variant")
"""Options that may be given several times."""
UNSHOWN = ("model", "methods", "run", "memory", "resume")
"""Options whose help says their defaults in other words."""


def add(parser: pytest.Parser) -> None:
    """Declare ``--kv-…`` and ``kv_suites``. Defaults are filled in later, so that the configuration file can come
    between."""
    group = parser.getgroup("kvsuite", "KV-cache compression")
    for key, text in HELP.items():
        default = SMOKE.get(key, "smoke")
        shown = "" if key in UNSHOWN or not default or "default" in text else f" (default: {default})"
        how = "append" if key in REPEATED else "store"
        group.addoption(
            f"--kv-{key}", dest=f"kv_{key}", action=how, default=None, metavar=key.upper(), help=text + shown
        )
    parser.addini(
        "kv_suites", "collect kvsuite's evaluations, too, where -m chooses one (pytest -m samples)", "bool", False
    )
