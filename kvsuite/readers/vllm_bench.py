"""vllm-bench: a load test by ``vllm bench serve --save-result --save-detailed``.

``vllm-bench:PATH`` is the JSON file it leaves; without ``--save-detailed`` there is nothing about single requests in
it. All its times are seconds. Its lists have an entry for every request, in the order of sending, failed ones
included: those have an error or, where the server gave no reason, no first token. The time between tokens is counted
per token, as vLLM's TPOT, since one chunk may bring several; time in the client's own queue (``--max-concurrency``)
counts nowhere. A file of ``--append-result`` is several results, which is no JSON.
github.com/vllm-project/vllm, vllm/benchmarks/serve.py (009e6d4a) and lib/endpoint_request_func.py (02cfb534).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from kvsuite.errors import UsageError
from kvsuite.readers.base import MOST, Load, files, load_json

LISTS = ("ttfts", "itls", "input_lens", "output_lens", "errors")
SETTING = ("model_id", "num_prompts", "request_rate", "max_concurrency")


def read(spec: str, path: str, which: str) -> Load:
    """One load test."""
    if which:
        raise UsageError(f"{spec}: a result of vllm bench holds one load test, there is nothing after '#'")
    file = _one(spec, path)
    result = load_json(file)
    lists = _lists(file, result)
    answered = [at for at, error in enumerate(lists["errors"]) if not error and lists["ttfts"][at] != 0]
    if result.get("completed", len(answered)) != len(answered):
        said = f"{len(answered)} answered requests, but says that {result['completed']} were"
        raise UsageError(f"{file} has {said}; is it whole?")
    if not answered:
        raise UsageError(f"{file}: none of its {len(lists['errors'])} requests was answered")
    ttft, prompt, tokens, start = (
        np.array([_number(file, name, at, lists[name][at]) for at in answered])
        if name in lists
        else np.full(len(answered), math.nan)
        for name in ("ttfts", "input_lens", "output_lens", "start_times")
    )
    after = np.array([_after(file, at, lists["itls"][at]) for at in answered])
    return Load(
        source=spec,
        ttft=ttft,
        itl=np.array([_between(spent, n) for spent, n in zip(after, tokens, strict=True)]),
        e2e=ttft + after,
        prompt_tokens=prompt,
        tokens=tokens,
        start=start,
        failed=len(lists["errors"]) - len(answered),
        duration=_duration(file, result),
        setting={name: result[name] for name in SETTING if name in result},
    )


def _one(spec: str, path: str) -> Path:
    found = files(path)
    if len(found) > 1 or found[0].is_dir():
        what = f"{len(found)} files, {found[0]} the first" if len(found) > 1 else "a folder"
        raise UsageError(f"{spec}: {path} is {what}; name one file")
    return found[0]


def _lists(file: Path, result: Any) -> dict[str, list[Any]]:
    """The lists of the requests, all of one length."""
    if not isinstance(result, dict) or "duration" not in result:
        raise UsageError(f"{file} is not a result of vllm bench serve")
    if "errors" not in result:
        raise UsageError(f"{file} says nothing about single requests; run vllm bench serve with --save-detailed")
    lists: dict[str, list[Any]] = {}
    for name in LISTS + (("start_times",) if "start_times" in result else ()):
        if not isinstance(result.get(name), list):
            raise UsageError(f"{file} has no list {name}; only a load test of generated answers has all of them")
        lists[name] = result[name]
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError(f"{file}: its lists are not of one number of requests: {said}")
    return lists


def _number(file: Path, name: str, at: int, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST:
        raise UsageError(f"{file}: request {at}: {name} has {value!r}, not a number from 0")
    return float(value)


def _after(file: Path, at: int, gaps: Any) -> float:
    """Seconds from a request's first token to its last."""
    if not isinstance(gaps, list):
        raise UsageError(f"{file}: request {at}: itls has {gaps!r}, not a list of seconds")
    return math.fsum(_number(file, "itls", at, gap) for gap in gaps)


def _between(after: float, tokens: float) -> float:
    """Seconds between tokens; NaN where there is one token or all came in one chunk."""
    return after / (tokens - 1) if tokens > 1 and after else math.nan


def _duration(file: Path, result: dict[str, Any]) -> float:
    duration = result["duration"]
    if isinstance(duration, bool) or not isinstance(duration, (int, float)) or not 0 < duration < MOST:
        raise UsageError(f"{file}: its duration is {duration!r}, not a number over 0")
    return float(duration)
