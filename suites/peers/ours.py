"""kvsuite's side, one process: ``python ours.py JOB RESULT``. Times the cells of a job, or writes what is kept."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import kvsuite  # noqa: E402
from kvsuite.cache.layer import highest  # noqa: E402
from kvsuite.cache.observations import AttentionMass  # noqa: E402
from kvsuite.engines.request import Request, Response  # noqa: E402
from kvsuite.engines.transformers import TransformersEngine  # noqa: E402
from kvsuite.methods import parse_all  # noqa: E402
from kvsuite.methods.base import share  # noqa: E402

NOTHING: frozenset[Any] = frozenset()


def load(job: dict[str, Any], dtype: str) -> TransformersEngine:
    engine = TransformersEngine.load(Path(job["model"]), dtype)
    engine.stop = frozenset()  # every answer has as many tokens as the cap
    return engine


def faster(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of a short prefill in each dtype, the best of three after one that is not counted."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        engine = load(job, dtype)
        request = asked(job["warm"], 1)
        context, suffix = engine.encode(request, "context")
        found[dtype] = min([engine.prefill(request, context, suffix, NOTHING).seconds for _ in range(4)][1:])
    return found


def asked(prompt: dict[str, str], new: int) -> Request:
    return Request(prompt["id"], prompt["context"], prompt["question"], new)


def answer(
    engine: TransformersEngine, requests: list[Request], names: list[str], width: int
) -> tuple[float, list[Response]]:
    """Seconds from texts to all answers, and the answers."""
    methods = parse_all(names)
    start = time.perf_counter()
    responses = list(engine.generate(requests, methods, width=width, compress="context"))
    seconds = time.perf_counter() - start
    failed = {r.error for r in responses if r.error}
    if failed or len(responses) != len(requests) * len(names):
        raise SystemExit(f"kvsuite failed: {', '.join(sorted(failed))}")
    if any(len(r.tokens) != requests[0].max_new_tokens for r in responses):
        raise SystemExit("an answer of kvsuite is shorter than its cap")
    return seconds, responses


def timed(job: dict[str, Any]) -> dict[str, Any]:
    dtypes = faster(job) if job["dtype"] == "auto" else {}
    dtype = min(dtypes, key=dtypes.__getitem__) if dtypes else job["dtype"]
    engine, width = load(job, dtype), job["width"]
    requests = [asked(prompt, job["new"]) for prompt in job["prompts"]]
    every = max(job["cells"].values(), key=len)
    answer(engine, [asked(job["warm"], 4)], [arm["name"] for arm in every], width)
    result: dict[str, Any] = {"dtype": dtype, "dtypes": dtypes, "cells": {}, "batched": {}}
    for cell, arms in job["cells"].items():
        seconds, responses = answer(engine, requests, [arm["name"] for arm in arms], width)
        result["cells"][cell] = seconds
        result["batched"][cell] = sum(r.decode_share for r in responses) / len(responses)
    return {**result, **parts(engine, requests[0], [arm["name"] for arm in every])}


def parts(engine: TransformersEngine, request: Request, names: list[str]) -> dict[str, float]:
    """What the ceiling is made of: the prefill of one context, its observation, and the steps of an answer alone."""
    context, suffix = engine.encode(request, "context")
    observes = [observation for method in parse_all(names) for observation in method.observes]
    prefill = sum(engine.prefill(request, context, suffix, NOTHING).seconds for _ in range(2)) / 2
    observing = sum(engine.prefill(request, context, suffix, observes).observing.values())
    alone = [answer(engine, [request], [name], 1)[1][0].decode_seconds for name in names[:2]]
    return {"prefill": prefill, "observing": observing, "alone": sum(alone) / len(alone)}


def compared(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Which tokens stay, in float32: one file of tensors, layers x heads x tokens."""
    engine = load(job, "float32")
    request = asked(job["prompts"][0], job["new"])
    context, suffix = engine.encode(request, "context")
    arms = min(job["cells"].values(), key=len)
    methods = dict(zip([arm["name"] for arm in arms], parse_all([arm["name"] for arm in arms]), strict=True))
    observes = [observation for method in methods.values() for observation in method.observes]
    seen = engine.prefill(request, context, suffix, observes).context
    tensors: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for name, method in methods.items():
            if method.selector is None:
                continue
            tokens = method.tokens(len(context))
            scores = [method.selector.score(one, tokens) for one in seen]
            counts = method.budget.allot(scores, tokens).tolist()
            kept = [torch.stack(highest(*layer)) for layer in zip(scores, counts, strict=True)]
            tensors[f"{name} kept"] = torch.stack(kept)
        if AttentionMass() in seen[0].observed:
            tensors["mass"] = torch.stack([one[AttentionMass()] for one in seen])
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, str(folder / "ours.safetensors"))
    text = answer(engine, [request], ["full"], 1)[1][0].text
    return {"context": context, "question": suffix, "full": text, "share": share(0.2, len(context))}


def main(job_file: Path, result_file: Path) -> None:
    job = json.loads(job_file.read_text())
    result = compared(job, result_file.parent) if job["mode"] == "parity" else timed(job)
    versions = {"kvsuite": kvsuite.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    assert all(math.isfinite(s) for s in result.get("cells", {}).values())
    result_file.write_text(json.dumps({**result, "versions": versions, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
