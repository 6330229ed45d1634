"""code-line: a file of Python's standard library up to a line, which is to be completed."""

from __future__ import annotations

import bisect
import itertools
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from kvsuite import scorers
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample, Task

BEFORE = "Complete the code given below.\n"
QUESTION = '\n\nWhich line of code comes after "{line}"? Answer with that line only.'
EXAMPLES = (
    (
        "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):",
        "return area(width, height) * depth",
    ),
    ("total = 0\nfor price in prices:", "total += price"),
)
"""Code and its next line, as turns before the prompt: a small model of chats else talks about the code."""
LONGEST, SHORTEST = 100, 12
"""Characters of a line that is asked for."""
TRIES = 40
"""Lines of a file that are tried."""


class CodeLine(Task):
    """The standard library of the Python that runs; the texts' fingerprint tells versions apart. The line asked for
    and the one before it stand once more in what is shown of the file: what was said must be held to know what comes.
    Scores the edit similarity of the answer's first line of code, as
    LongBench does for lcc, of lines without their indentation."""

    name = "code-line"
    type = "code"

    def fetch(self) -> list[Path]:
        return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files, order = self.fetch(), random.Random(f"code-line {seed}")
        order.shuffle(files)
        before = tuple(
            turn
            for code, line in EXAMPLES
            for turn in (("user", BEFORE + code + _question(code.split("\n"))), ("assistant", line))
        )
        around = tokens("".join(text for _, text in before) + BEFORE)
        found: list[Sample] = []
        ids: set[str] = set()
        for file in files * (1 + count):  # a second line of a file only where there are too few
            if len(found) == count:
                break
            length = lengths[len(found) % len(lengths)]
            lines = file.read_text(encoding="utf-8").splitlines()
            for at in order.sample(range(len(lines)), min(TRIES, len(lines))):
                name = f"code-line-l{length}-{file.stem}-{at + 1}"
                if name in ids or not _asked(lines[at]) or not _repeated(lines[: at + 1]):
                    continue
                shown = _last_lines(lines[:at], length - around - tokens(_question(lines[:at])), tokens)
                if shown and _repeated([*shown, lines[at]]):
                    ids.add(name)
                    context = BEFORE + "\n".join(shown)
                    found.append(Sample(name, context, _question(shown), lines[at].strip(), 64, file.stem, before))
                    break
        if len(found) == count:
            return found
        raise UsageError(f"Python's standard library does not hold {count} samples of {max(lengths)} tokens")

    def score(self, sample: Sample, answer: str) -> float:
        return scorers.code_similarity("\n".join(line.strip() for line in answer.splitlines()), sample.reference)


def _question(shown: Sequence[str]) -> str:
    return QUESTION.format(line=shown[-1].strip())


def _asked(line: str) -> bool:
    text = line.strip()
    return SHORTEST <= len(text) <= LONGEST and not any(mark in text for mark in ("`", "#", "//"))


def _repeated(lines: Sequence[str]) -> bool:
    """Whether the last two lines stand somewhere before, neither empty."""
    one, two = lines[-2:] if len(lines) > 1 else ("", "")
    return bool(one.strip() and two.strip()) and (one, two) in itertools.pairwise(lines[:-2])


def _last_lines(lines: Sequence[str], length: int, tokens: Callable[[str], int]) -> list[str] | None:
    """The last lines that fill ``length`` tokens, or None where there are too few."""
    first = max(0, len(lines) - length)  # a line is a token or more
    start = bisect.bisect_left(range(first, len(lines)), True, key=lambda at: tokens("\n".join(lines[at:])) <= length)
    return list(lines[first + start :]) if start else None
