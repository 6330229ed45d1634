"""Whether an answer keeps a rule, as IFEval checks it; pure functions.

IFEval: Zhou et al. 2023, github.com/google-research/google-research, instruction_following_eval/instructions.py.
Written anew. The one difference: an answer in one case need not be English, which the authors ask the library
langdetect.
"""

from __future__ import annotations

import json
import re
from typing import Any

FENCES = ("```json", "```Json", "```JSON", "```")


def followed(rule: str, value: Any, answer: str) -> bool:
    """Whether an answer keeps a rule of `RULES`, with its number, word or phrase. An empty answer keeps none."""
    return bool(answer.strip()) and bool(RULES[rule](answer, value))


def parsed(answer: str) -> Any:
    """The JSON value that an answer is, fences of code aside (JsonFormat); None where it is none, or ``null``."""
    text = answer.strip()
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        return json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return None


def _titled(answer: str) -> bool:
    """``<<[^\\n]+>>`` with something inside, in time that does not grow with the square of an answer."""
    spans = ((line, line.find("<<"), line.rfind(">>")) for line in answer.split("\n"))
    return any(line[at:end].lstrip("<").rstrip(">").strip() for line, at, end in spans if 0 <= at <= end - 3)


def _bullets(answer: str) -> int:
    """Lines that begin with a dash, or with one star. The authors' ``\\s*`` takes blank lines before them, too, which
    does not change their number."""
    marks = (r"^[^\S\n]*\*[^\*].*$", r"^[^\S\n]*-.*$")
    return sum(len(re.findall(mark, answer, re.MULTILINE)) for mark in marks)


RULES: dict[str, Any] = {
    "change_case:english_capital": lambda answer, _: answer.isupper(),
    "change_case:english_lowercase": lambda answer, _: answer.islower(),
    "detectable_format:number_bullet_lists": lambda answer, count: _bullets(answer) == count,
    "detectable_format:title": lambda answer, _: _titled(answer),
    "keywords:existence": lambda answer, word: re.search(word, answer, re.IGNORECASE),
    "punctuation:no_comma": lambda answer, _: "," not in answer,
    "startend:end_checker": lambda answer, end: answer.strip().strip('"').lower().endswith(end.strip().lower()),
}
"""IFEval's name of a rule → its check of an answer."""
