"""``kvsuite negatives build`` and ``score``: a benchmark of samples that methods broke, for methods of other families.

What ``build`` writes and ``score`` reads: see `kvsuite.analysis.negative_set`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite import records
from kvsuite.errors import UsageError

if TYPE_CHECKING:
    from kvsuite.analysis.samples import Broken

BUILD, SCORE = "negatives build", "negatives score"


def add(commands: Any) -> None:
    """Declare these commands among argparse's subparsers; `joined` makes one word of the first two of an argv."""
    building = commands.add_parser(BUILD, help="a benchmark of the samples that a run's methods broke")
    building.add_argument(
        "folder", type=Path, metavar="RUN", help="a run folder with scores: replicate 1, which chooses"
    )
    building.add_argument("--into", required=True, type=Path, metavar="FOLDER", help="where the benchmark is written")
    building.add_argument(
        "--juror", action="append", default=[], metavar="METHOD", help="who chooses; else all methods"
    )
    building.add_argument("--task", action="append", default=[], metavar="TASK", help="of the run's; else all")
    building.add_argument("--quorum", type=int, metavar="N", help="so many jurors must fall on a sample; else all")
    building.add_argument("--model", type=Path, metavar="FOLDER", help="the model that answered, if not the default")
    rule_options(building)
    building.set_defaults(run=_build)
    scoring = commands.add_parser(SCORE, help="a run's methods on the samples that other families broke")
    scoring.add_argument("benchmark", type=Path, metavar="FOLDER", help="what negatives build wrote")
    scoring.add_argument("folder", type=Path, metavar="RUN", help="a run folder of any engine: replicate 2")
    scoring.add_argument("--family", action="append", default=[], metavar="METHOD=FAMILY", help="where a name hides it")
    scoring.add_argument("--allow-missing", action="store_true", help="score the samples that all arms have")
    form = scoring.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="for a document")
    form.add_argument("--json", action="store_true", help="figures for a program")
    scoring.set_defaults(run=_score)


def joined(words: list[str]) -> list[str]:
    """An argv whose first two words are one command."""
    two = " ".join(words[:2])
    return [two, *words[2:]] if two in (BUILD, SCORE) else words


def rule_options(parser: argparse.ArgumentParser) -> None:
    """When a sample is negative; see `rule`."""
    parser.add_argument("--theta", type=float, default=0.10, help="a score this much below the baseline's is negative")
    parser.add_argument(
        "--benign", choices=("mean", "median"), default="mean", help="eligible from here on, by dataset"
    )
    parser.add_argument("--inclusive", action="store_true", help="scores of exactly (1 - θ) × baseline count, too")
    parser.add_argument(
        "--absolute", action="store_true", help="θ is points of the score, not a part of the baseline's"
    )


def rule(asked: argparse.Namespace) -> Broken:
    """Raises UsageError."""
    from kvsuite.analysis.samples import Broken

    return Broken(asked.theta, asked.benign, asked.inclusive, asked.absolute)


def _build(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.negative_set import FACTS, ROWS, build, card, write
    from kvsuite.runs.again import texts

    run = records.told(asked.folder)
    benchmark, stable = build(run, asked.juror, asked.quorum, rule(asked), asked.task)
    known, why = texts(run, asked.model, benchmark.votes.base.keys)
    write(asked.into, benchmark, known, card(benchmark, stable))
    if why:
        print(f"without the prompts themselves: {why}", file=sys.stderr)
    print(*(asked.into / name for name in (ROWS, FACTS, "README.md")), sep="\n")


def _score(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.negative_set import read, scores
    from kvsuite.analysis.tables import benchmark
    from kvsuite.report import markdown, terminal

    families = {}
    for text in asked.family:
        name, equals, family = text.rpartition("=")
        if not (name and equals and family):
            raise UsageError(f"--family {text!r}: write METHOD=FAMILY")
        families[name] = family
    found = scores(read(asked.benchmark), records.told(asked.folder), families, asked.allow_missing)
    if asked.json:
        print(json.dumps(benchmark.as_json(found), indent=1, ensure_ascii=False, allow_nan=False))
    elif asked.markdown:
        print(*map(markdown.table, benchmark.tables(found)), sep="\n\n")
    else:
        terminal.show(benchmark.tables(found))
