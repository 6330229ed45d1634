"""Writes ``kvsuite/analysis/shipped.json`` from the published runs: ``python -m suites.checks.shipped``."""

import json
import statistics
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from kvsuite.analysis import forced, shipped
from kvsuite.analysis.effects import compare
from kvsuite.analysis.minutes import Speeds
from kvsuite.analysis.runs import noise
from kvsuite.analysis.shipped import Shipped, Spread
from kvsuite.analysis.speed import log_speeds
from kvsuite.analysis.verdict import decide
from kvsuite.margins import Margins
from kvsuite.records import Answer, Forced, Timing, read

REPORTS = Path(__file__).parents[2] / "reports" / "cpu"
HARMFUL = ("kl", "harmful")
WIDTH = 8
"""Of the timed batches."""


def spreads():
    """By endpoint, the widest: of forced text those of methods within the margins, of reference answers those of
    methods that the score finds nothing of, of answers those of controls."""
    found = {}
    smoke, other, right = (read(REPORTS / name) for name in ("smoke", "noise", "references"))
    judged = [e for _, e in decide(forced.effects(smoke, Margins()))]
    harmless = [e for e in judged if e.verdict == "within margin"]
    harmful = [Spread.of(e, "smoke").spread / e.estimate.mean for e in judged if (e.endpoint, e.verdict) == HARMFUL]
    controls = [e for part in noise(other) for row in compare([part]) for e in row.effects]
    forced_answers = [e for _, e in decide(forced.effects(right, Margins())) if e.verdict != "harmful"]
    named = {"smoke": harmless, "references": forced_answers, "noise": controls}
    for e, run in ((e, run) for run, effects in named.items() for e in effects):
        spread = Spread.of(e, run)
        if spread.spread > 0 and spread.spread > getattr(found.get(e.endpoint), "spread", 0):
            found[e.endpoint] = spread
    timed = [r for r in smoke.records if isinstance(r, Timing) and r.phase == "decode" and r.method != "full"]
    blocks = [statistics.stdev(log_speeds(t)) for t in timed if log_speeds(t)]
    found["kl"] = replace(found["kl"], relative=float(f"{statistics.median(harmful):.4g}"))
    return found | {"speed": Spread(float(f"{statistics.median(blocks):.4g}"), 1.0, 0.0, True, "smoke")}


def speeds(run):
    """A token's from the prefill that was timed; a row's and a step's from the steps of ``WIDTH`` rows and of those in
    which the arms of a chat were decoded together."""
    timed = [r for r in run.records if isinstance(r, Timing) and r.method == "full"]
    token = statistics.median(s / r.tokens for r in timed for s in r.seconds if r.phase == "prefill")
    narrow = statistics.median(WIDTH * s / r.tokens for r in timed for s in r.seconds if r.phase == "decode")
    chats = [r for r in run.records if isinstance(r, Answer) and r.task == "chat" and not r.repeat]
    wide = len(run.facts["methods"]) * WIDTH
    each = sum(r.decode_share for r in chats) / sum(len(r.tokens) for r in chats)
    row = (wide * each - narrow) / (wide - WIDTH)
    return Speeds(*(float(f"{x:.3g}") for x in (token, narrow - (WIDTH - 1) * row, row)))


def measured() -> Shipped:
    """From the records."""
    run = read(REPORTS / "smoke")
    where, facts = run.facts["environment"], run.facts
    chats = [r for r in run.records if isinstance(r, Answer) and r.task == "chat"]
    needles = [r for r in run.records if isinstance(r, Answer) and r.task == "needle"]
    documents = [r for r in run.records if isinstance(r, Forced)]
    answers = {
        "document": statistics.fmean(len(r.kl) for r in documents),
        "needle": statistics.fmean(len(r.tokens) for r in needles),
        "chat": statistics.fmean(len(r.tokens) / r.cap for r in chats),
    }
    began, ended = (datetime.fromisoformat(facts[key]) for key in ("started", "finished"))
    return Shipped(
        model=facts["model"]["name"],
        machine=f"{where['cores']} cores of {where['cpu']}, {where['compute_dtype']}",
        took=(ended - began).total_seconds(),
        speeds=speeds(run),
        prompt=round(statistics.fmean(r.prompt_tokens for r in chats), 1),
        answers={task: float(f"{tokens:.3g}") for task, tokens in answers.items()},
        spreads=spreads(),
    )


def main() -> None:
    """Write the file."""
    file = Path(shipped.__file__).with_name(shipped.FILE)
    file.write_text(json.dumps(asdict(measured()), indent=2) + "\n")


if __name__ == "__main__":
    main()
