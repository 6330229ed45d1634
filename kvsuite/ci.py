"""``kvsuite …``: what a team does with runs that are there: gates, badges, a summary, a leaderboard, and its own CI."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsuite import records
from kvsuite.errors import UsageError
from kvsuite.margins import Margins


def add(commands: Any) -> None:
    """Declare these commands among argparse's subparsers."""
    starting = commands.add_parser("init", help="write a project's configuration and its CI into this folder")
    starting.add_argument("--ci", choices=("github", "gitlab", "none"), default="github")
    starting.set_defaults(run=_init)
    holding = commands.add_parser("gate", help="hold a run against limits: exit code 1 where one is missed")
    holding.add_argument("folder", metavar="RUN", help="a run folder")
    holding.add_argument("--gate", action="append", default=[], metavar="GATE", help="as pytest's --kv-gate")
    holding.add_argument("--against", default="", metavar="RUN", help="as --kv-against: an earlier run")
    holding.add_argument("--undecided", default="warns", help="as --kv-undecided: passes, warns or fails")
    holding.add_argument("--acknowledged", default="", metavar="FILE", help="as --kv-acknowledged")
    holding.set_defaults(run=_gate)
    drawing = commands.add_parser("badges", help="what a run decides, as SVG and as JSON for shields.io")
    drawing.add_argument("folder", metavar="RUN", help="a run folder")
    drawing.add_argument("--into", required=True, type=Path, metavar="FOLDER", help="where the files are written")
    drawing.set_defaults(run=_badges)
    saying = commands.add_parser("ci-summary", help="a run in short, as markdown for a CI job or a comment")
    saying.add_argument("folder", metavar="RUN", help="a run folder")
    saying.add_argument("--against", type=Path, metavar="RUN", help="an earlier run: what changed since")
    saying.add_argument("--page", default="", metavar="URL", help="where all of the report can be read")
    saying.set_defaults(run=_summary)
    _leaderboard_options(commands.add_parser("leaderboard", help="methods of many runs and models in one table"))


def _leaderboard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--baseline", metavar="SPEC", help="others' scores of the uncompressed model, as in negatives")
    parser.add_argument("--candidate", action="append", default=[], metavar="NAME=SPEC", help="others' of a method")
    parser.add_argument("--model", default="unknown", help="the model of others' scores")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--html", action="store_true", help="a page: kvsuite leaderboard --html RUNS > a.html")
    form.add_argument("--markdown", action="store_true", help="for a document")
    parser.set_defaults(run=_leaderboard)


def _init(asked: argparse.Namespace) -> None:
    from kvsuite import start

    print(*start.init(Path(), asked.ci), sep="\n")


def _gate(asked: argparse.Namespace) -> int:
    from kvsuite.analysis.gates import Gates
    from kvsuite.analysis.report import analyse
    from kvsuite.report import terminal

    held = Gates.of(asked.gate, asked.undecided, asked.against, asked.acknowledged)
    if not (held.gates or held.against):
        raise UsageError("say what the run is held against: --gate 'speed[int8]>=1.0', --against RUN")
    report = analyse(records.told(Path(asked.folder)), held)
    terminal.show([report.table("gates")])
    return int(report.failed)


def _badges(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.report import analyse
    from kvsuite.report import badge

    print(*badge.write(analyse(records.told(Path(asked.folder))), asked.into), sep="\n")


def _summary(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.report import analyse
    from kvsuite.report import summary

    against = records.told(asked.against) if asked.against else None
    print(summary.render(analyse(records.told(Path(asked.folder))), against, asked.page), end="")


def _leaderboard(asked: argparse.Namespace) -> None:
    from kvsuite import readers
    from kvsuite.analysis.report import analyse
    from kvsuite.analysis.tables.leaderboard import leaderboard, others
    from kvsuite.columns import align
    from kvsuite.report import html, markdown, terminal

    if bool(asked.baseline) != bool(asked.candidate):
        raise UsageError("others' scores need both --baseline and --candidate")
    theirs = []
    if asked.baseline:
        specs = named(asked.candidate)
        arms, _ = align([readers.arm(spec) for spec in (asked.baseline, *specs.values())], False)
        theirs = others(asked.model, arms, list(specs), Margins())
    table = leaderboard([analyse(records.told(Path(folder))) for folder in asked.folders], theirs)
    if asked.html:
        sys.stdout.buffer.write(html.board("Leaderboard", [table]).encode(errors="replace"))
    elif asked.markdown:
        print(markdown.table(table))
    else:
        terminal.show([table])


def named(given: Sequence[str]) -> dict[str, str]:
    """NAME=SPEC by name. Raises UsageError."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            raise UsageError(f"--candidate {text!r}: write NAME=SPEC")
        if name in found:
            raise UsageError(f"--candidate {name} is there twice")
        found[name] = spec
    return found
