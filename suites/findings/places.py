"""Which of several hidden numbers survive, by their place in the prompt: ``python suites/findings/places.py RUN``.

For every method of a run on the default model that asked ``multi-needle``, of the samples that ask for all four
numbers: how many answers name the first, the second, the third and the last one, with Wilson's 95 % interval.
docs/findings.md has the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table
from statsmodels.stats.proportion import proportion_confint

from kvsuite import models, tasks
from kvsuite.records import Answer, read

TASK = "multi-needle"


def places(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Method → of each place, first to last: answers that name its number, and how many were asked."""
    run = read(folder)
    settings, count = run.facts["settings"], run.facts["expected"]["samples"][TASK]
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.default_model(), local_files_only=True)
    samples = tasks.task(TASK).samples(
        count,
        settings["length"],
        settings["seed"],
        lambda text: len(tokenizer(text, add_special_tokens=False).input_ids),
    )
    wanted = {sample.id: sample.reference.split() for sample in samples}
    found: dict[str, list[list[bool]]] = {}
    for answer in run.records:
        if (
            isinstance(answer, Answer)
            and answer.task == TASK
            and answer.status == "ok"
            and len(wanted[answer.sample]) > 1
        ):
            found.setdefault(answer.method, []).append([number in answer.text for number in wanted[answer.sample]])
    return {method: [(sum(place), len(place)) for place in zip(*rows, strict=True)] for method, rows in found.items()}


def main() -> None:
    """Print the table."""
    table = Table("method", "first", "second", "third", "last")
    for method, counts in places(Path(sys.argv[1])).items():
        ends = [proportion_confint(k, n, method="wilson") for k, n in counts]
        table.add_row(
            method, *(f"{k}/{n} ({100 * a:.0f}–{100 * b:.0f} %)" for (k, n), (a, b) in zip(counts, ends, strict=True))
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
