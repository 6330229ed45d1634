"""code-line: a file of Python's standard library up to a line, which is to be completed."""

from __future__ import annotations

import bisect
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from kvsuite import scorers
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample, Task

BEFORE = "Complete the code given below.\n"
QUESTION = "\nNext line of code:\n"
"""As in LongBench's lcc (github.com/THUDM/LongBench, config/dataset2prompt.json)."""
LONGEST, SHORTEST = 100, 12
"""Characters of a line that is asked for."""
TRIES = 40
"""Lines of a file that are tried."""


class CodeLine(Task):
    """The standard library of the Python that runs; the texts' fingerprint tells versions apart. The line asked for
    stands once more in what is shown of its file. Scores the edit similarity of the answer's first line of code, as
    LongBench does for lcc."""

    name = "code-line"
    type = "code"

    def fetch(self) -> list[Path]:
        return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files, order = self.fetch(), random.Random(f"code-line {seed}")
        order.shuffle(files)
        found: list[Sample] = []
        ids: set[str] = set()
        for file in files * (1 + count):  # a second line of a file only where there are too few
            if len(found) == count:
                break
            length = lengths[len(found) % len(lengths)]
            lines = file.read_text(encoding="utf-8").splitlines()
            for at in order.sample(range(len(lines)), min(TRIES, len(lines))):
                name = f"code-line-l{length}-{file.stem}-{at + 1}"
                if name in ids or not _asked(lines[at]) or lines[at] not in lines[:at]:
                    continue
                shown = _last_lines(lines[:at], length - tokens(BEFORE + QUESTION), tokens)
                if shown and lines[at] in shown:
                    ids.add(name)
                    context = BEFORE + "\n".join(shown)
                    found.append(Sample(name, context, QUESTION, lines[at].strip(), 64, cluster=file.stem))
                    break
        if len(found) == count:
            return found
        raise UsageError(f"Python's standard library does not hold {count} samples of {max(lengths)} tokens")

    def score(self, sample: Sample, answer: str) -> float:
        return scorers.code_similarity(answer, sample.reference)


def _asked(line: str) -> bool:
    text = line.strip()
    return SHORTEST <= len(text) <= LONGEST and not any(mark in text for mark in ("`", "#", "//"))


def _last_lines(lines: Sequence[str], length: int, tokens: Callable[[str], int]) -> list[str] | None:
    """The last lines that fill ``length`` tokens, or None where there are too few."""
    first = max(0, len(lines) - length)  # a line is a token or more
    start = bisect.bisect_left(range(first, len(lines)), True, key=lambda at: tokens("\n".join(lines[at:])) <= length)
    return list(lines[first + start :]) if start else None
