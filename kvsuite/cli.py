"""``kvsuite …``: the commands beside pytest."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite import benchmarks, ci, disk, predicting, records, registry, routing, shapes
from kvsuite.arguments import whole_numbers
from kvsuite.errors import UsageError, sentence
from kvsuite.margins import Margins

if TYPE_CHECKING:
    from kvsuite.analysis.table import Table
    from kvsuite.analysis.tables.negatives import Compared


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 after one sentence about bad input, 130 where it was interrupted, or pytest's exit
    code."""
    if sys.stdout is None:  # it was closed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (to the end of this process)
    asked = _parser().parse_args(benchmarks.joined(list(sys.argv[1:] if argv is None else argv)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show ×
    try:
        for file in getattr(asked, "kv_plugin", []):
            registry.load(Path(file))
        code: int | None = asked.run(asked)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:  # the reader has seen enough: head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UsageError, OSError) as error:
        print(f"kvsuite: {sentence(str(error))}", file=sys.stderr)
        return 2
    except MemoryError:
        print("kvsuite: there is not enough memory for this", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvsuite", description="Is a KV-cache compression method worth deploying?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    running = commands.add_parser("run", help="an evaluation: throughput, length, samples, or several of them")
    running.add_argument(
        "marker", metavar="EVALUATION", help='as after pytest\'s -m, e.g. samples or "samples or length"'
    )
    running.add_argument("pytest", nargs=argparse.REMAINDER, metavar="OPTION", help="options of pytest and --kv-…")
    running.set_defaults(run=_run)
    listing = commands.add_parser("methods", help="list the parts of methods: selectors, budgets, codecs, readers")
    _plugin_option(listing)
    listing.add_argument("--json", action="store_true", help="a list of {name, kind, stores, source}")
    listing.add_argument("--markdown", action="store_true", help="what each does, for docs/methods.md")
    listing.add_argument("--survey", action="store_true", help="which of the field run here, for docs/survey.md")
    listing.set_defaults(run=_methods)
    fetching = commands.add_parser("fetch", help="download all that runs and commands need, and convert the model")
    fetching.set_defaults(run=_fetch)
    _report_options(commands.add_parser("report", help="the tables of a run that was left"))
    _compare_options(commands.add_parser("compare", help="what changed from one run or result to another beyond noise"))
    _plan_options(commands.add_parser("plan", help="how many prompts and minutes decide a margin"))
    _negatives_options(commands.add_parser("negatives", help="which samples methods break, from scores you have"))
    _paper_options(commands.add_parser("paper", help="figures and tables of the paper beside its artifact's and ours"))
    _why_options(commands.add_parser("why", help="what the caches had lost of the samples that a run's methods broke"))
    _verbosity_options(commands.add_parser("verbosity", help="whether a run's longer answers to chats are worse ones"))
    _capacity_options(commands.add_parser("capacity", help="how many sequences fit into memory, by a run's caches"))
    _crossover_options(commands.add_parser("crossover", help="where fp8 K/V is faster on a GPU, from public tables"))
    benchmarks.add(commands)
    routing.add(commands)
    predicting.add(commands)
    ci.add(commands)
    return parser


def _plugin_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file of yours with methods or readers",
    )


def _negatives_options(parser: argparse.ArgumentParser) -> None:
    spec = "FORMAT:PATH#WHICH, e.g. artifact:FOLDER/PREFIX, kvpress:predictions.csv, lm-eval:FOLDER, runs/TIME#METHOD"
    parser.add_argument("folder", nargs="?", metavar="RUN", help="a run folder: its own methods, baseline and control")
    parser.add_argument("--baseline", metavar="SPEC", help=f"else scores of the uncompressed model: {spec}")
    parser.add_argument("--candidate", action="append", default=[], metavar="NAME=SPEC", help="and of a method")
    parser.add_argument("--control", metavar="SPEC", help="the uncompressed model once more, with other noise")
    benchmarks.rule_options(parser)
    parser.add_argument("--allow-missing", action="store_true", help="compare the samples that all have")
    _margins_option(parser)
    _plugin_option(parser)
    parser.add_argument("--json", action="store_true", help="print figures for a program")
    parser.set_defaults(run=_negatives)


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN", help="a run folder; after --html several, side by side")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--html", action="store_true", help="one page that needs no network: kvsuite report --html RUN > a.html"
    )
    form.add_argument("--markdown", action="store_true", help="as report.md holds it")
    form.add_argument("--json", action="store_true", help="every cell as numbers, for a program")
    parser.set_defaults(run=_report)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="RUN_A", help="a run folder, or FORMAT:PATH#WHICH")
    parser.add_argument("after", metavar="RUN_B", help="the later one, of the same kind")
    parser.add_argument("--allow-missing", action="store_true", help="compare the samples that both have")
    _margins_option(parser)
    _plugin_option(parser)
    parser.set_defaults(run=_compare)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    what = "a run folder with full and a control; without one, what the presets decide, by published runs"
    parser.add_argument("folder", metavar="RUN", nargs="?", help=what)
    _margins_option(parser)
    parser.set_defaults(run=_plan)


def _paper_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help="fig6, table9, …; else all")
    parser.add_argument(
        "--run", dest="folders", action="append", default=[], type=Path, metavar="RUN", help="a run folder: ours"
    )
    parser.add_argument("--artifact", type=Path, metavar="FOLDER", help="a clone of the artifact: its data, recomputed")
    parser.add_argument("--markdown", action="store_true", help="as docs/paper.md has it")
    parser.set_defaults(run=_paper)


def _why_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="a run folder whose answers were made in process, with scores")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the model that answered, if not the default")
    parser.add_argument("--method", action="append", default=[], help="of the run's; several times for several")
    parser.add_argument("--sample", action="append", default=[], metavar="ID", help="of the run's; else all")
    parser.add_argument("--task", action="append", default=[], metavar="SPEC", help="a hub:… or jsonl:… of the run's")
    _plugin_option(parser)
    parser.set_defaults(run=_why)


def _verbosity_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="a run folder with answers to chats")
    parser.set_defaults(run=_verbosity)


def _capacity_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="a run folder with decoding timed at two lengths or more")
    parser.add_argument("--memory", type=float, default=1.0, metavar="GIB", help="for caches alone (default: 1)")
    parser.add_argument("--length", type=whole_numbers, default=[], metavar="N,…", help="tokens; else the longest")
    parser.set_defaults(run=_capacity)


def _crossover_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", required=True, help="e.g. h100, h200, b200, l40s")
    parser.add_argument("--engine", required=True, help="vllm, trtllm or sglang")
    parser.add_argument("--model", required=True, help=f"a shape: {', '.join(shapes.SHAPES)}")
    parser.add_argument(
        "--kv", default="fp8", metavar="METHOD", help="measured: fp8; modelled: int4, snapkv:budget=0.25 …"
    )
    parser.add_argument("--batch", type=whole_numbers, metavar="N,…", help="these batches, interpolated if need be")
    parser.add_argument(
        "--length", type=whole_numbers, metavar="N,…", help="these lengths (default: the tables', from 256 on)"
    )
    parser.add_argument("--kernel", metavar="NAME", help="where the engine has several for one format")
    parser.add_argument("--extrapolate", action="store_true", help="a stated model where nothing was measured")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="another aiconfigurator's folder systems")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the maps as a picture")
    parser.add_argument("--json", action="store_true", help="every cell as numbers, for a program")
    parser.set_defaults(run=_crossover)


def _margins_option(parser: argparse.ArgumentParser) -> None:
    known = ",".join(f"{name}={getattr(Margins, name):g}" for name in Margins.names())
    parser.add_argument("--margins", default="", help=f"how much worse a method may be (default: {known})")


def _run(asked: argparse.Namespace) -> int:
    """pytest in a process of its own, as an interrupted run has to end in its own way."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "kvsuite.suites", "-m", asked.marker, *asked.pytest]
    with subprocess.Popen(command) as process, _forwarding(process):
        while True:
            try:
                code = process.wait()
                return code if code >= 0 else 128 - code  # as a shell says of a signal
            except KeyboardInterrupt:  # which pytest has got, too
                continue


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals of `timeout`, of a closed window and of a CI that is cancelled reach this process alone: pass them on."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, lambda got, _: process.send_signal(got)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _negatives(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.tables import negatives
    from kvsuite.report import terminal

    rule = benchmarks.rule(asked)
    margins = Margins.parse(asked.margins)
    if asked.folder and (asked.baseline or asked.candidate or asked.control):
        raise UsageError("a run folder has its own baseline, methods and control: leave out the other options")
    if asked.folder:
        compared = negatives.Compared.of(records.told(Path(asked.folder)), asked.allow_missing)
    else:
        compared = _compared(asked)
    found = negatives.negatives(compared, rule, margins)
    if asked.json:
        print(json.dumps(negatives.as_json(found), indent=2, ensure_ascii=False, allow_nan=False))
        print(*found.notes, sep="\n", file=sys.stderr)
    else:
        terminal.show(negatives.tables(found))


def _compared(asked: argparse.Namespace) -> Compared:
    from kvsuite import readers
    from kvsuite.analysis.tables import negatives
    from kvsuite.columns import align

    if not (asked.baseline and asked.candidate):
        raise UsageError("say which scores: a run folder, or --baseline and --candidate")
    specs = ci.named(asked.candidate)
    for name in specs:
        if name in ("eligible", negatives.NOISE) or "&" in name or "|" in name:
            raise UsageError(f"--candidate {name!r}: eligible, by noise, & and | have a meaning in the results")
    arms = [readers.arm(s) for s in (asked.baseline, *specs.values(), *([asked.control] if asked.control else []))]
    (base, *others), left_out = align(arms, asked.allow_missing)
    control = others.pop() if asked.control else None
    methods = dict(zip(specs, others, strict=True))
    return negatives.Compared(base, methods, control, left_out)


def _compare(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.tables import changes
    from kvsuite.report import terminal

    margins = Margins.parse(asked.margins)
    folders = [Path(x) for x in (asked.before, asked.after)]
    if all(f.is_dir() for f in folders):
        one, other = map(records.told, folders)
        tables = changes.runs(one, other, margins)
    else:
        tables = _two_results(asked, margins)
    terminal.show(tables)


def _two_results(asked: argparse.Namespace, margins: Margins) -> list[Table]:
    """Two results that are no whole runs."""
    from kvsuite import readers
    from kvsuite.analysis.tables import changes
    from kvsuite.columns import align, kinds

    (early, alone), (late, bare) = readers.documents(asked.before), readers.documents(asked.after)
    if early and late and alone and bare:
        return changes.arms(f"{asked.after} against {asked.before}", {}, (early, late), margins)
    before, after = readers.read(asked.before), readers.read(asked.after)
    if isinstance(before, readers.Load) and isinstance(after, readers.Load):
        return changes.loads(before, after)
    arms, left_out = align([readers.arm(asked.before), readers.arm(asked.after)], asked.allow_missing)
    title = f"{arms[1].source} against {arms[0].source}"
    return changes.arms(title, kinds(arms), (early, late), margins, left_out)


def _report(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.report import analyse
    from kvsuite.report import as_json, html, markdown, terminal

    if len(asked.folders) > 1 and not asked.html:
        raise UsageError("several runs are shown side by side by --html; kvsuite compare prints what changed")
    if asked.html and sys.stdout.isatty():
        raise UsageError(
            f"--html writes a page to standard output: kvsuite report --html {asked.folders[0]} > report.html"
        )
    reports = [analyse(records.whole(Path(folder))) for folder in asked.folders]
    report = reports[0]
    if asked.html:
        sys.stdout.buffer.write(html.render(reports).encode())
    elif asked.markdown or asked.json:
        print((markdown if asked.markdown else as_json).render(report), end="")
    else:
        terminal.show(report.tables, report.notes)


def _paper(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.tables import paper
    from kvsuite.report import markdown, terminal

    runs = list(map(records.told, asked.folders))
    artifact = paper.Artifact(asked.artifact) if asked.artifact else None
    tables = paper.figures(asked.figures, runs, artifact)
    if asked.markdown:
        shown = [paper.overview(), *(t for t in tables if t.rows)] if not asked.figures else tables
        print(*([] if asked.figures else [paper.INTRO]), *map(markdown.table, shown), sep="\n\n")
    else:
        terminal.show(tables)


def _why(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.tables.causes import causes
    from kvsuite.report import terminal
    from kvsuite.runs.why import Why

    folder = Path(asked.folder)
    why = Why(records.told(folder), asked.model, asked.method, asked.sample, asked.task)
    with disk.claim(folder):
        for at, loss in enumerate(why.losses(), start=1):
            done = f"{at} of {len(why.asked)}: {loss.method}, {loss.sample}"
            print(f"{done}: {loss.error}" if loss.error else done, file=sys.stderr, flush=True)
    terminal.show(causes(records.read(folder)))


def _verbosity(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.tables.verbosity import verbosity
    from kvsuite.report import terminal
    from kvsuite.runs.verbosity import Verbosity

    folder = Path(asked.folder)
    asks = Verbosity(records.told(folder))
    alike = itertools.groupby(asks.similarities(), lambda r: f"{r.task}, {r.sample}")
    with disk.claim(folder):
        for at, (which, _) in enumerate(alike, start=1):
            print(f"{at} of {len(asks.asked)}: {which}", file=sys.stderr, flush=True)
    terminal.show(verbosity(records.read(folder)))


def _plan(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.shipped import shipped
    from kvsuite.analysis.tables import plan, presets
    from kvsuite.presets import PRESETS
    from kvsuite.report import terminal

    if asked.folder is None:
        asks = [presets.Preset.of(name, raw, asked.margins) for name, raw in PRESETS.items()]
        tables = presets.presets(asks, shipped())
    else:
        run, margins = records.told(Path(asked.folder)), Margins.parse(asked.margins)
        tables = [plan.plan(run, margins), *plan.blocks(run, margins)]
    terminal.show(tables)


def _capacity(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.tables import capacity
    from kvsuite.report import terminal

    tables = capacity.asked(records.told(Path(asked.folder)), asked.memory, asked.length)
    terminal.show(tables)


def _crossover(asked: argparse.Namespace) -> None:
    from kvsuite.analysis.crossover import compare
    from kvsuite.analysis.tables import crossover
    from kvsuite.readers import aiconfigurator
    from kvsuite.report import html, terminal

    systems = asked.tables or aiconfigurator.home()
    measured = aiconfigurator.measured(systems, asked.gpu, asked.engine, shapes.shape(asked.model))
    found = compare(measured, asked.model, asked.kv, asked.kernel, asked.extrapolate)
    cells = found.cells(asked.batch, asked.length)
    tables, maps, title = crossover.tables(found, cells), crossover.maps(cells), crossover.title(found)
    try:
        if asked.html:
            disk.write(asked.html, html.board(title, tables, maps))
        if asked.svg:
            disk.write(asked.svg, html.picture(title, maps))
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}") from error
    if asked.json:
        print(json.dumps(crossover.as_json(found, cells), indent=1))
    else:
        terminal.show(tables)


def _methods(asked: argparse.Namespace) -> None:
    from kvsuite.methods import catalogue, names

    if asked.survey:
        from kvsuite.methods import survey

        print(survey.markdown(names()))
        return
    if asked.markdown:
        from kvsuite.methods.described import markdown

        print(markdown(catalogue()))
        return
    rows = [{"name": p.name, "kind": p.kind, "stores": p.stores, "source": p.source} for p in catalogue()]
    if asked.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "name", "kind", "what is stored", "source", title="A method is selector + budget + codec + reader", box=None
    )
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def _fetch(asked: argparse.Namespace) -> None:
    """Every task's texts, the embedder, and both forms of the default model; last what needs more than a download."""
    from kvsuite import models, tasks

    for name in tasks.names():
        for file in [*tasks.task(name).fetch()][:1]:
            print(f"{name}: {file.parent}", flush=True)
    print(f"embeddings: {models.embedder()}", flush=True)
    print(f"model as GGUF: {models.default_gguf()}", flush=True)
    try:
        print(f"model: {models.default_model()}")
    except ImportError as error:
        raise UsageError(f"converting the model needs {error.name}: pip install 'kvsuite[local]'") from error


if __name__ == "__main__":
    sys.exit(main())
