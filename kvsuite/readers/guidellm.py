"""guidellm: a load test by GuideLLM, from its JSON report.

``guidellm:PATH#N`` is benchmark N, from 0, of the report in the file PATH or in the folder's ``benchmarks.json``; N may
be left out where there is one. Reports of versions 0.2 to 0.8 are read. Of their times, those to the first token and
between tokens are milliseconds, the others seconds; all become seconds.

As in GuideLLM's own numbers, what counts is a request that was under way between the end of the warm-up and the start
of the cool-down; where there were such, the duration is from the first of these requests to the end of the last, since
all their tokens count. Failed are those with an error; a request that the end of the test cut short is neither failed
nor timed. The time to the last token is ``request_latency``, which ends with the response. A report that holds a sample
of its requests is refused: throughput is not in it (versions 0.4 and 0.5 keep 10 unless told otherwise).

github.com/vllm-project/guidellm, src/guidellm/schemas/request_stats.py and benchmark/schemas/, 0.8.1; of 0.2 and 0.3,
src/guidellm/benchmark/benchmark.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from kvsuite.columns import Floats
from kvsuite.errors import UsageError
from kvsuite.readers.base import MOST, Load, files, load_json

FILE = "benchmarks.json"
MILLISECONDS = 1e-3
LIMITS = ("max_requests", "max_number")
"""What the limit of requests is called, by version."""
Requests = list[dict[str, Any]]


def read(spec: str, path: str, which: str) -> Load:
    """One load test."""
    file = _one(spec, path)
    benchmark = _chosen(file, load_json(file), which)
    try:
        return _load(spec, file, benchmark)
    except UsageError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UsageError(
            f"{file} is not a report of guidellm as known here ({type(error).__name__}: {error})"
        ) from error


def _one(spec: str, path: str) -> Path:
    found = [file / FILE if file.is_dir() else file for file in files(path)]
    if len(found) > 1:
        raise UsageError(f"{spec}: {path} is {len(found)} files, {found[0]} the first; name one file")
    return found[0]


def _chosen(file: Path, report: Any, which: str) -> dict[str, Any]:
    """The benchmark of that number."""
    benchmarks = report.get("benchmarks") if isinstance(report, dict) else None
    if not isinstance(benchmarks, list) or not benchmarks or not all(isinstance(b, dict) for b in benchmarks):
        raise UsageError(f"{file} is not a report of guidellm with a benchmark in it")
    if not which and len(benchmarks) == 1:
        return dict(benchmarks[0])
    if not which.isdecimal() or len(which) > 9 or int(which) >= len(benchmarks):
        held = "; ".join(f"#{at} {_named(benchmark)}" for at, benchmark in enumerate(benchmarks))
        raise UsageError(f"{file} holds {held}; choose one, guidellm:PATH#N")
    return dict(benchmarks[int(which)])


def _named(benchmark: dict[str, Any]) -> str:
    strategy = _strategy(benchmark)
    rates = [
        f"{name} {strategy[name]:g}" for name in ("rate", "streams") if isinstance(strategy.get(name), (int, float))
    ]
    return ", ".join([str(strategy.get("type_", "unknown")), *rates])


def _strategy(benchmark: dict[str, Any]) -> dict[str, Any]:
    """How requests were sent; 0.2 and 0.3 say it elsewhere."""
    said = (benchmark.get("config") or benchmark.get("args") or {}).get("strategy")
    return said if isinstance(said, dict) else {}


def _load(spec: str, file: Path, benchmark: dict[str, Any]) -> Load:
    totals = benchmark["metrics"].get("request_totals") or benchmark["request_totals"]
    requests = [r for r in benchmark["requests"]["successful"] if _counts(file, benchmark, r)]
    if len(requests) != totals["successful"]:
        held = f"holds {len(requests)} of {totals['successful']} answered requests"
        raise UsageError(f"{file} {held}; run guidellm without sampling them (sample_size, formerly sample-requests)")
    if not requests:
        raise UsageError(f"{file}: none of its {totals['total']} requests was answered")
    tokens, start = _column(file, requests, "output_tokens"), _column(file, requests, _start(requests[0]))
    e2e = _column(file, requests, "request_latency")
    between = _column(file, requests, "inter_token_latency_ms") * MILLISECONDS
    return Load(
        source=spec,
        ttft=_column(file, requests, "time_to_first_token_ms") * MILLISECONDS,
        itl=np.where(tokens > 1, between, math.nan),
        e2e=e2e,
        prompt_tokens=_column(file, requests, "prompt_tokens"),
        tokens=tokens,
        start=start,
        failed=totals["errored"],
        duration=_duration(file, benchmark, start, start + e2e),
        setting=_setting(benchmark),
    )


def _start(request: dict[str, Any]) -> str:
    """What the time of sending is called: before 0.4 without ``request_``."""
    return "request_start_time" if "request_start_time" in request else "start_time"


def _counts(file: Path, benchmark: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether a request was under way while the test measured."""
    name = _start(request)
    start, end = (_column(file, [request], n)[0] for n in (name, name.replace("start", "end")))
    return bool(end >= benchmark["start_time"] and not start > benchmark["end_time"])


def _column(file: Path, requests: Requests, name: str) -> Floats:
    """One field of all requests; NaN where it is null."""
    column = [math.nan if request[name] is None else request[name] for request in requests]
    for request, value in zip(requests, column, strict=True):
        wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST
        if wrong and request[name] is not None:
            raise UsageError(f"{file}: request {request.get('request_id')}: {name} is {value!r}, not a number from 0")
    return np.array(column, dtype=np.float64)


def _duration(file: Path, benchmark: dict[str, Any], start: Floats, end: Floats) -> float:
    if benchmark.get("warmup_duration") or benchmark.get("cooldown_duration"):
        return float(np.nanmax(end) - np.nanmin(start))
    duration = benchmark["duration"]
    if isinstance(duration, bool) or not isinstance(duration, (int, float)) or not 0 < duration < MOST:
        raise UsageError(f"{file}: its duration is {duration!r}, not a number over 0")
    return float(duration)


def _setting(benchmark: dict[str, Any]) -> dict[str, Any]:
    strategy = _strategy(benchmark)
    known = {
        "model": (benchmark.get("config") or {}).get("backend", {}).get("model")
        or (benchmark.get("worker") or {}).get("backend_model"),
        "strategy": strategy.get("type_"),
        "rate": strategy.get("rate"),
        "streams": strategy.get("streams"),
        "num_prompts": _limit(benchmark),
    }
    return {name: value for name, value in known.items() if value is not None}


def _limit(benchmark: dict[str, Any]) -> Any:
    """How many requests the test was to send, where that was limited."""
    if "args" in benchmark:
        return benchmark["args"].get("max_number")
    constraints = benchmark["config"].get("constraints") or {}
    for constraint in (constraints[name] for name in LIMITS if name in constraints):
        most = constraint.get("max_num", constraint.get("args", {}).get("count"))
        return most[constraint.get("current_index", 0)] if isinstance(most, list) else most
    return None
