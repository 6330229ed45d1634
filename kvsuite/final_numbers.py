"""The number that an answer comes to, right or not: the rules of GSM8K and AIME as lm-evaluation-harness has them.

github.com/EleutherAI/lm-evaluation-harness (4e7e0d47f33b). Written anew; oddities that change a score are kept.
"""

from __future__ import annotations

import re

NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LATEX = {"\n": "", r"\!": "", r"\\": "\\", r"\left": "", r"\right": "", r"^{\circ}": "", r"^\circ": "", r"\$": ""}
"""What AIME's rule takes out of an answer or replaces in it, in this order."""
STOPS = ("</s>", "<|im_end|>", "<|eot_id|>")
"""Where lm-evaluation-harness ends an answer; a decoded text has them where they are no special tokens."""


def last_number(answer: str, reference: str) -> float:
    """1 if the last number of an answer, up to the next "Q:", is that behind the reference's ``####`` (lm-evaluation-
    harness: gsm8k-cot-zeroshot.yaml, flexible-extract and exact_match)."""
    found = NUMBER.findall(_until(answer, "Q:"))
    said = next(group for group in found[-1] if group).strip() if found else "[invalid]"
    return float(_gsm8k(said) == _gsm8k(reference))


def whole_number(answer: str, reference: str) -> float:
    r"""1 if an answer is the reference, a whole number: what is in its last ``\boxed``, else between its first and last
    ``$``, else all of it, without LaTeX's spacing, signs and units (lm-evaluation-harness: lm_eval/tasks/aime/utils.py,
    of whose normalization the steps are left out that no whole number can come of)."""
    answer = _until(answer, "Question:")
    first, last = answer.find("$"), answer.rfind("$")
    said = answer[first + 1 : last] if first != last else answer
    boxed = _last_box(answer)
    return float(_bare(said if boxed is None else boxed) == _bare(reference))


def _until(answer: str, stop: str) -> str:
    for text in (stop, *STOPS):
        answer = answer.partition(text)[0]
    return answer


def _gsm8k(text: str) -> str:
    text = re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", text))
    return re.sub(r"\.$", "", text).lower()


def _last_box(answer: str) -> str | None:
    r"""What is in the last ``\boxed``; None without one, or where it is not closed."""
    if r"\boxed " in answer:
        return answer.rpartition(r"\boxed ")[2].partition("$")[0]
    start, depth = answer.rfind(r"\boxed"), 0
    for at in range(start, len(answer)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(answer[at], 0)
        if answer[at] == "}" and depth == 0:
            box = answer[start : at + 1]
            return box[len(r"\boxed{") : -1] if box.startswith(r"\boxed{") else None
    return None


def _bare(text: str) -> str:
    """A number as AIME's rule compares it; as it is where the rule fails on it."""
    bare = text
    for mark, instead in LATEX.items():
        bare = bare.replace(mark, instead)
    if bare.count(r"\text{ ") > 1:
        return text
    bare = bare.partition(r"\text{ ")[0].replace(r"\%", "").replace(r"\%", "")
    bare = re.sub(r"(^|[ {])\.", r"\g<1>0.", bare)  # .5 is 0.5
    left, equals, right = bare.partition("=")
    return (right if equals and len(left) <= 2 and "=" not in right else bare).replace(" ", "")
