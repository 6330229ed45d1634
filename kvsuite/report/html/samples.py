"""The answers of a run as the page carries them: gzip and base64, opened by its script.

Unpacked, they are ``{"run", "baseline", "verdicts", "left_out", "samples"}``: the run's name, the baseline's, the words
for what became of an answer (the worst first), and how many answers were left out. A sample has ``task``, ``type``,
``sample``, ``prompt`` (its end), ``bases`` (the baseline's answers) and ``pairs``. A pair has ``arm``, ``verdicts``,
``base`` (its place in ``bases``, or null), ``token`` and ``character`` (places of the first difference, from 0, or
null) and ``answer``, with ``loss`` where that was looked at. Figures of an answer that are nothing are left out.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.analysis.pairs import VERDICTS, Pair, perplexity
from kvsuite.analysis.report import Report
from kvsuite.records import Answer, Forced, Job, Loss, Served

LIMIT = 3_500_000
"""Characters that the answers of all runs of a page may take."""
COLUMNS = (
    "text", "error", "finish", "cap", "score", "prompt_tokens", "nbytes", "nbytes_end", "dense_end", "read_end", "kept",
    "fragmentation", "path",
)  # fmt: skip
"""What is told of an answer as its record has it."""
LOST = (
    "kept",
    "span",
    "span_kept",
    "span_gone",
    "attention",
    "parting",
    "k_error",
    "v_error",
    "span_k_error",
    "span_v_error",
)


def payload(report: Report, limit: int = LIMIT) -> str:
    """A run's answers in ``limit`` characters of base64 at most. Where all are more, what changed least is left out,
    and counted."""
    ranked = sorted(report.pairs, key=lambda pair: VERDICTS.index(pair.verdicts[0]))
    count = len(ranked)
    while True:
        packed = _packed(_document(report, ranked[:count]))
        if len(packed) <= limit or not count:
            return packed
        count = min(int(0.97 * count * limit / len(packed)), count - 1)


def _packed(document: dict[str, Any]) -> str:
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _document(report: Report, chosen: Sequence[Pair]) -> dict[str, Any]:
    """Answers to one sample stand together: what they have in common is then packed once."""
    samples: dict[tuple[str, str], dict[str, Any]] = {}
    places: dict[int, int] = {}
    losses = {r.job: r for r in report.run.records if isinstance(r, Loss) and r.status == "ok"}
    for pair in chosen:
        a, b = pair.answer, pair.base
        new = {"task": a.task, "type": a.type, "sample": a.sample, "prompt": "", "bases": [], "pairs": []}
        sample = samples.setdefault((a.task, a.sample), new)
        sample["prompt"] = sample["prompt"] or a.prompt or (b.prompt if b else "")
        if b is not None and id(b) not in places:
            places[id(b)] = len(sample["bases"])
            sample["bases"].append(_answer(b))
        place = None if b is None else places[id(b)]
        where = {"token": pair.token, "character": pair.character}
        sample["pairs"].append(
            {
                "arm": pair.arm,
                "verdicts": pair.verdicts,
                "base": place,
                **where,
                "answer": _answer(a) | _loss(losses, a),
            }
        )
    return {
        "run": report.run.folder.resolve().name,
        "baseline": report.run.baseline,
        "verdicts": VERDICTS,
        "left_out": len(report.pairs) - len(chosen),
        "samples": list(samples.values()),
    }


def _loss(losses: Mapping[Job | None, Loss], a: Answer) -> dict[str, Any]:
    """What the cache had lost (``kvsuite why``), where that was looked at."""
    loss = losses.get(Job("why", a.method, a.task, a.sample, a.repeat))
    if loss is None:
        return {}
    found = {name: getattr(loss, name) for name in LOST}
    return {"loss": {name: x for name, x in found.items() if x not in (None, "")}}


def _answer(a: Answer) -> dict[str, Any]:
    found = {name: getattr(a, name) for name in COLUMNS}
    if isinstance(a, Forced):
        found |= {"text": "", "finish": "", "kl": [float(f"{x:.3g}") for x in a.kl], "perplexity": perplexity(a)}
        found["flips"] = [at for at, flip in enumerate(a.flips) if flip]
    else:
        found["tokens"] = a.length if a.status == "ok" else None
    if isinstance(a, Served):
        found |= {"reasoning": a.reasoning, "calls": a.calls, "ttft": round(a.ttft, 4), "e2e": round(a.e2e, 4)}
    return {name: x for name, x in found.items() if x not in (None, "", []) and (x or name in ("score", "tokens"))}
