"""kvpress's side, one process: ``python theirs.py JOB RESULT``. Runs where kvpress is installed; knows no kvsuite."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from kvpress import KVPressTextGenerationPipeline
from kvpress.utils import compute_n_kept
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

EAGER = {"ObservedAttentionPress"}
"""Presses that read the attention matrix, which only transformers' eager attention returns."""


def load(job: dict[str, Any], dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, local_files_only=True)
    model.generation_config.eos_token_id = -1  # every answer has as many tokens as the cap
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    return KVPressTextGenerationPipeline(model=model.eval(), tokenizer=tokenizer, device="cpu")


def encoded(pipe: Any, prompt: dict[str, str]) -> tuple[Any, Any]:
    """Context and question as token ids (1, n)."""
    found = pipe.preprocess(prompt["context"], [prompt["question"]], "", int(1e10))
    return found["context_ids"], found["questions_ids"][0]


def press(arm: dict[str, Any], length: int) -> Any:
    """A press that keeps the arm's tokens of a context: half a token more, since the product is truncated."""
    if arm["press"] is None:
        return None
    kept = min(arm["tokens"], length - 1)
    return getattr(kvpress, arm["press"])(compression_ratio=1 - (kept + 0.5) / length)


def attend(pipe: Any, arm: dict[str, Any]) -> None:
    """The faster attention, except where a press needs to see the weights."""
    pipe.model.set_attn_implementation("eager" if arm["press"] in EAGER else "sdpa")


def faster(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of a short prefill in each dtype, the best of three after one that is not counted."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        pipe = load(job, dtype)
        ids = encoded(pipe, job["warm"])[0]
        found[dtype] = min([prefill(pipe, ids)[0] for _ in range(4)][1:])
    return found


@torch.inference_mode()
def prefill(pipe: Any, ids: Any) -> tuple[float, Any]:
    cache = DynamicCache()
    start = time.perf_counter()
    pipe.model.model(input_ids=ids, past_key_values=cache)
    return time.perf_counter() - start, cache


def answer(pipe: Any, prompt: dict[str, str], arm: dict[str, Any], length: int, new: int) -> tuple[float, str]:
    """Seconds of one call of the pipeline, from texts to the answer."""
    attend(pipe, arm)
    chosen = press(arm, length)
    start = time.perf_counter()
    found = pipe(prompt["context"], question=prompt["question"], press=chosen, max_new_tokens=new)
    return time.perf_counter() - start, found["answer"]


def timed(job: dict[str, Any]) -> dict[str, Any]:
    dtypes = faster(job) if job["dtype"] == "auto" else {}
    dtype = min(dtypes, key=dtypes.__getitem__) if dtypes else job["dtype"]
    pipe = load(job, dtype)
    lengths = [encoded(pipe, prompt)[0].shape[1] for prompt in job["prompts"]]
    every = max(job["cells"].values(), key=len)
    short = encoded(pipe, job["warm"])[0].shape[1]
    for arm in {arm["press"]: arm for arm in every}.values():
        answer(pipe, job["warm"], arm, short, 4)
    each: dict[str, float] = {}
    for arm in every:  # calls share nothing, so one call counts in every cell its arm is in
        pairs = zip(job["prompts"], lengths, strict=True)
        each[arm["name"]] = sum(answer(pipe, prompt, arm, length, job["new"])[0] for prompt, length in pairs)
    cells = {cell: sum(each[arm["name"]] for arm in arms) for cell, arms in job["cells"].items()}
    calls = {arm["name"]: each[arm["name"]] / len(lengths) for arm in every}
    return {"dtype": dtype, "dtypes": dtypes, "cells": cells, "calls": calls}


@torch.inference_mode()
def chosen(pipe: Any, ids: Any, arm: dict[str, Any]) -> tuple[Any, Any]:
    """Positions kept (layers, heads, n), ascending, and scores (layers, heads, T), of one prefill."""
    attend(pipe, arm)
    one, kept, scores, cache = press(arm, ids.shape[1]), [], [], DynamicCache()
    score = one.score

    def record(module: Any, hidden: Any, keys: Any, *rest: Any) -> Any:
        found = score(module, hidden, keys, *rest)
        n = compute_n_kept(keys.shape[2], one.compression_ratio)
        index = found.topk(n, dim=-1).indices
        kept.append((index[0], keys.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, keys.shape[3]))))
        scores.append(found[0].float())
        return found

    one.score = record
    with one(pipe.model):
        pipe.model.model(input_ids=ids, past_key_values=cache)
    for layer, (_, keys) in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys), "the cache does not hold what the scores say"
    return torch.stack([index.sort(dim=-1).values for index, _ in kept]), torch.stack(scores)


def compared(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Which tokens stay, in float32: one file of tensors."""
    pipe = load(job, "float32")
    ids, question = encoded(pipe, job["prompts"][0])
    tensors: dict[str, Any] = {}
    for arm in min(job["cells"].values(), key=len):
        if arm["press"] is not None:
            tensors[f"{arm['name']} kept"], scores = chosen(pipe, ids, arm)
            if arm["press"] == "ObservedAttentionPress":
                tensors["observed"] = scores
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, str(folder / "theirs.safetensors"))
    whole = {"press": None, "tokens": None}
    text = answer(pipe, job["prompts"][0], whole, ids.shape[1], job["new"])[1].strip()
    n = compute_n_kept(ids.shape[1], 0.8)
    return {"context": ids[0].tolist(), "question": question[0].tolist(), "full": text, "share": n}


def main(job_file: Path, result_file: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    job = json.loads(job_file.read_text())
    result = compared(job, result_file.parent) if job["mode"] == "parity" else timed(job)
    versions = {
        "kvpress": importlib.metadata.version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    result_file.write_text(json.dumps({**result, "versions": versions, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
