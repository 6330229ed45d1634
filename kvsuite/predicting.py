"""``kvsuite predict …``: predictors learned from runs, and what they are worth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite import records
from kvsuite.arguments import whole_numbers
from kvsuite.errors import UsageError

if TYPE_CHECKING:
    from kvsuite.analysis.table import Table
    from kvsuite.predict.prompts import Embed
    from kvsuite.predict.throughput import Predictor
    from kvsuite.predict.types import Accuracy, Classifier


def add(commands: Any) -> None:
    """Declare these commands among argparse's subparsers."""
    kinds = commands.add_parser("predict", help="what a run did not measure, beside nulls that know less")
    kinds = kinds.add_subparsers(required=True, metavar="WHAT")
    _throughput_options(kinds.add_parser("throughput", help="tokens per second of a method at a batch and length"))
    _kernels_options(
        kinds.add_parser("kernels", help="fp8 over bf16 attention on a GPU that is left out, public tables")
    )
    _length_options(kinds.add_parser("length", help="tokens of the answer to a prompt, and the type of its task"))


def _throughput_options(parser: argparse.ArgumentParser) -> None:
    files = "run folders, pytest-benchmark's .json, or .csv (model,method,bsz,prompt_len,stage,thr)"
    parser.add_argument(
        "--train", nargs="+", default=[], type=Path, metavar="FILE", help=f"what to learn from: {files}"
    )
    parser.add_argument(
        "--test", nargs="+", default=[], type=Path, metavar="FILE", help="score predictions of these cells"
    )
    parser.add_argument("--use", type=Path, metavar="FILE", help="a saved predictor, in place of --train")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep what was learned, as JSON")
    parser.add_argument("--method", help="answer for this method, at --batch and --length")
    parser.add_argument("--model", help="and this model, where there are several")
    parser.add_argument("--batch", type=whole_numbers, default=[1], metavar="N,…")
    parser.add_argument("--length", type=whole_numbers, default=[1024], metavar="N,…")
    parser.add_argument("--extrapolate", action="store_true", help="answer outside what was timed, too")
    parser.add_argument("--json", action="store_true", help="figures for a program")
    parser.set_defaults(run=_throughput)


def _kernels_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", default="vllm", help="vllm, trtllm or sglang")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="another aiconfigurator's folder systems")
    parser.add_argument("--extrapolate", action="store_true", help="also kernels that no other GPU has")
    parser.add_argument("--json", action="store_true", help="figures for a program")
    parser.set_defaults(run=_kernels)


def _length_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="RUN", help="a run folder with answers to chats")
    parser.add_argument("--use", type=Path, metavar="FILE", help="a saved predictor")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep what was learned, as JSON")
    parser.add_argument("--prompt", help="answer for this prompt, with --use")
    parser.add_argument("--tokens", type=int, metavar="N", help="its tokens (default: words × 4/3)")
    parser.add_argument("--json", action="store_true", help="figures for a program")
    parser.set_defaults(run=_length)


def _throughput(asked: argparse.Namespace) -> None:
    from kvsuite.predict import cells, learner, scores, tables
    from kvsuite.predict.throughput import Predictor

    if bool(asked.train) == bool(asked.use):
        raise UsageError("say what to learn from, --train FILE, or --use a saved predictor")
    learner("gaussian_process")  # said once, before anything is read
    known = [c for file in asked.train for c in cells.read(file)]
    predictor = Predictor.load(asked.use) if asked.use else Predictor(known)
    if asked.save:
        predictor.save(asked.save)
    if asked.method:
        answers = _answers(predictor, asked)
        _show([tables.answers(asked.method, answers)], [tables.answer_json(a) for a in answers], asked.json)
        return
    if asked.test:
        test = [c for file in asked.test for c in cells.read(file)]
        found = {"the test files": scores.guesses(predictor.cells, test, asked.extrapolate)}
    else:
        found = {
            f"each {by}": scores.left_out(predictor.cells, by, asked.extrapolate) for by in ("batch", "length", "model")
        }
    rows = [score for what, (guesses, _) in found.items() for score in scores.scores(guesses, what)]
    refused = list(dict.fromkeys(why for _, some in found.values() for why in some))
    if not rows:
        raise UsageError(f"nothing could be predicted: {refused[0] if refused else 'there is nothing to leave out'}")
    _show([tables.throughput(rows, refused)], [tables.score_json(row) for row in rows], asked.json)


def _answers(predictor: Predictor, asked: argparse.Namespace) -> list[Any]:
    models = sorted({(c.setting, c.model) for c in predictor.cells if asked.model in (None, c.model)})
    if len(models) != 1:
        there = ", ".join(sorted({c.model for c in predictor.cells}))
        raise UsageError(f"say which --model of {there}" if not asked.model else f"{asked.model!r} is none of {there}")
    stages = sorted({c.stage for c in predictor.cells if c.method == asked.method or not asked.method})
    if not stages:
        raise UsageError(
            f"{asked.method!r} was not timed; {', '.join(sorted({c.method for c in predictor.cells}))} were"
        )
    places = [(b, n) for b in asked.batch for n in asked.length]
    return [a for s in stages for a in predictor.ask(*models[0], asked.method, s, places, asked.extrapolate)]


def _kernels(asked: argparse.Namespace) -> None:
    from kvsuite.predict import kernels, tables
    from kvsuite.readers import aiconfigurator

    rows, refused = kernels.left_out(asked.tables or aiconfigurator.home(), asked.engine, asked.extrapolate)
    _show([tables.kernels(asked.engine, rows, refused)], [tables.kernel_json(row) for row in rows], asked.json)


def _length(asked: argparse.Namespace) -> None:
    from kvsuite.predict import tables
    from kvsuite.predict.length import Lengths, Predictor
    from kvsuite.predict.length_scores import elsewhere, told
    from kvsuite.predict.prompts import prompts_of
    from kvsuite.runs.verbosity import MiniLM

    predictor = Predictor.load(asked.use) if asked.use else None
    if asked.prompt is not None:
        if predictor is None:
            raise UsageError("--prompt asks a saved predictor: name it with --use")
        tokens = asked.tokens or len(asked.prompt.split()) * 4 // 3
        answers = predictor.ask(asked.prompt, tokens, MiniLM())
        _show([tables.asked(predictor.cap, answers)], answers, asked.json)
        return
    if asked.folder is None:
        raise UsageError("say which run to learn from, or --use a saved predictor with --prompt")
    run = records.told(Path(asked.folder))
    lengths, embed = Lengths.of(run), MiniLM()
    x = prompts_of(lengths.entries, embed)
    if predictor is not None:
        predictor.check(lengths)
        rows, kinds = elsewhere(predictor, lengths, x), None
    else:
        classifier, kinds = _types(run, embed)
        rows = told(lengths, x)
        if asked.save:
            replace(Predictor.learned(lengths, x, lengths.entries), types=classifier).save(asked.save)
    figures = [tables.told_json(row) for row in rows]
    _show(tables.lengths(rows, kinds), {"lengths": figures, "types": kinds and tables.types_json(kinds)}, asked.json)


def _types(run: records.Run, embed: Embed) -> tuple[Classifier | None, Accuracy | None]:
    """The classifier, and what it is worth; None where all prompts are of one type."""
    from kvsuite.predict import types
    from kvsuite.predict.prompts import prompts_of

    known = types.typed(run)
    if len({k.type for k in known}) < 2:
        return None, None
    x = prompts_of(known, embed)
    return types.Classifier.learned(x, [k.type for k in known]), types.held_out(x, known)


def _show(tables: Sequence[Table], figures: Any, as_json: bool) -> None:
    from kvsuite.report import terminal

    if as_json:
        print(json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        terminal.show(tables)
