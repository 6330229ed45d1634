"""What each sign of garbage is worth: ``python -m suites.checks.signs`` plants faults into recorded answers
(`planted`), lets the model that gave them say how likely every token is, and writes into docs/servers.md how often each
sign finds the fault, and how often it is seen where there is none. Some 6 minutes of one core. ``… signs 12`` does it
with answers of at most 12 tokens, and prints alone.

The answers are those of SmolLM2-135M at temperature 1 to MT-Bench's prompts, of at most 96 tokens. The model reads
them as a baseline's server would: prompt and answer at once, uncompressed.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from kvsuite.analysis.serving import checks
from kvsuite.records import Record, Run, Scored, Served
from suites.checks import nulls
from suites.checks.planted import AGAIN, BASE, ROOT, M, cut, noisy, probes, recorded, run, served
from suites.checks.test_planted import german, salad

CAP = 96
"""Tokens of an answer."""
KNOWN, PROMPTS, DRAWS, NULLS = 48, 32, 20, 200
"""Prompts whose answers are read, those of a draw, draws of a fault and of none."""
SIGNS = ("empty", "repetition", "language", "likelihood", "cap hits", "order", "agreement")
DOCUMENT = ROOT / "docs" / "servers.md"
MARK, END = "<!-- written by: python -m suites.checks.signs -->", "<!-- until here -->"
Change = Callable[[Served, random.Random], Served]


def sprinkled(share: float) -> Change:
    """Makes a share of an answer's words another's."""

    def make(r: Served, rng: random.Random) -> Served:
        others = [word for answers in recorded() for word in answers[0][0].split()]
        words = [rng.choice(others) if rng.random() < share else word for word in r.text.split()]
        return replace(r, text=" ".join(words))

    return make


FAULTS: dict[str, Change] = {
    "random tokens": noisy(),
    "random tokens in the last third": noisy(2 / 3),
    "words in no order": salad,
    "every fifth word from elsewhere": sprinkled(0.2),
    "another language": german,
}
"""What is done to answers."""
SHARES = (1.0, 0.2)
"""And to how many."""


@functools.cache
def model() -> tuple[Any, Any]:
    """Tokenizer and model."""
    from transformers import AutoTokenizer

    from kvsuite import models
    from kvsuite.engines.pretrained import load_model

    folder = models.default_model()
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), load_model(folder).eval()


@functools.cache
def prompts() -> list[list[int]]:
    """The prompts of `recorded`, in its order, as token ids."""
    from kvsuite import tasks

    samples = sorted(tasks.task("chat").samples(80, [0], 0, len), key=lambda s: s.id)
    said = [[{"role": "user", "content": s.context + s.question}] for s in samples]
    return [list(model()[0].apply_chat_template(one, add_generation_prompt=True)["input_ids"]) for one in said]


def likelihoods(at: int, text: str) -> list[float]:
    """How likely the model finds every token of an answer to a prompt, nats."""
    import torch

    tokenizer, reader = model()
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = reader(torch.tensor([[*prompts()[at], *answer]])).logits[0, -len(answer) - 1 : -1]
        logs = logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    return [round(x, 4) for x in logs.tolist()]


Known = dict[str, list[tuple[Served, list[float]]]]
"""By fault, every prompt's answer and how likely its tokens are; ``sane 0`` to ``sane 3`` have none."""


def known(cap: int) -> Known:
    """Everything that draws are made of; ``cap``: tokens of an answer."""
    found: Known = {}
    for k in range(4):
        answers = [served(M, at, cut(answers[k], cap), cap=cap) for at, answers in enumerate(recorded()[:KNOWN])]
        found[f"sane {k}"] = [(r, likelihoods(at, r.text)) for at, r in enumerate(answers)]
    for fault, make in FAULTS.items():
        rng = random.Random(fault)
        answers = [make(r, rng) for r, _ in found["sane 3"]]
        found[fault] = [(r, likelihoods(at, r.text)) for at, r in enumerate(answers)]
    return found


def drawn(there: Known, fault: str, share: float, seed: int) -> Run:
    """A comparison of some prompts; ``fault`` is empty where there is none."""
    rng, records = random.Random(f"signs {fault} {seed}"), list[Record](probes())
    places = rng.sample(range(len(there["sane 0"])), PROMPTS)
    hit = set(rng.sample(places, round(share * PROMPTS)) if fault else [])
    for at in places:
        roles = rng.sample(range(4), 3) if not fault else [*rng.sample(range(3), 2), 3]
        for arm, k in zip((BASE, AGAIN, M), roles, strict=True):
            r, logs = there[fault if arm == M and at in hit else f"sane {k}"][at]
            more = {"method": arm, "evaluation": "length", "task": "chat", "type": "chat"}
            records += [replace(r, **more), Scored(arm, task="chat", sample=r.sample, logs=logs)]
    return run(records)


def shown(runs: Iterable[Run]) -> Counter[str]:
    """In how many runs the variant is broken by each sign, and at all."""
    found: Counter[str] = Counter()
    for one in runs:
        check = checks(one)[M]
        found.update([*(s.name for s in check.signs if s.failed), *["any"] * check.broken])
    return found


def main(cap: int = 0) -> None:
    """Count, and write it down, unless it is with another ``cap``."""
    there, columns = known(cap or CAP), (*SIGNS, "any")
    rows = [("planted, % of draws found", *columns), ("---", *["---:"] * len(columns))]
    for fault, share in itertools.product(FAULTS, SHARES):
        found = shown(drawn(there, fault, share, seed) for seed in range(DRAWS))
        about = f"{fault}, {'every answer' if share == 1 else 'a fifth of them'}"
        rows.append((about, *(f"{100 * found[name] / DRAWS:.0f}" for name in columns)))
    found = shown(drawn(there, "", 0, seed) for seed in range(NULLS))
    rows.append((f"nothing ({NULLS} draws)", *(f"{100 * found[name] / NULLS:.1f}" for name in columns)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if not cap:
        DOCUMENT.write_text(placed(DOCUMENT.read_text(), table))
    print(table)


def placed(text: str, table: str) -> str:
    """The document with this table between its two marks. Raises ValueError where they are not there, in this order:
    `nulls` rewrites all that stands behind its own."""
    before, mark, after = text.partition(MARK)
    _, end, rest = after.partition(END)
    if not (mark and end) or nulls.MARK in before:
        raise ValueError(f"the document has no {MARK} with its {END} above what python -m suites.checks.nulls writes")
    return f"{before}{MARK}\n\n{table}\n\n{END}{rest}"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
