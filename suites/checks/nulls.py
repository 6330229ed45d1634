"""How often a server beside itself is said to be wrong: ``python -m suites.checks.nulls`` counts 200 pairs and writes
the count into docs/servers.md.

A pair is one server as the baseline, the A/A arm and the variant, prompt by prompt in random roles: chats of
`reports/cpu/noise`, needles and timed legs of vLLM's and of OpenVINO's uncompressed arms (`reports/cpu`). What recorded
legs of one block took is dealt out to arms and halves anew.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace

from kvsuite.analysis import validity
from kvsuite.analysis.tables.verdicts import verdicts
from kvsuite.analysis.validity.outcome import Outcome
from kvsuite.records import Run, Served, read
from suites.checks.planted import AGAIN, BASE, ROOT, M, chats, probes, run

PAIRS, ALLOWED = 200, 16
"""At 5 %, more than 16 of 200 are as unlikely as 1 in 38."""
DOCUMENT = ROOT / "docs" / "servers.md"
MARK = "<!-- what follows is written by: python -m suites.checks.nulls -->"
LACKING = ("sense", "answers", "cap")
"""Checks that may say that there is too little to tell: that is no false alarm."""


@functools.cache
def legs(source: str) -> dict[int, list[list[Served]]]:
    """By block, the timed legs of the uncompressed arms."""
    found: dict[int, dict[int, list[Served]]] = {}
    for r in read(ROOT / "reports" / "cpu" / source).records:
        if isinstance(r, Served) and r.method in (BASE, AGAIN) and r.cell:
            found.setdefault(r.block, {}).setdefault(r.leg, []).append(r)
    return {block: list(some.values()) for block, some in found.items()}


@functools.cache
def needles(source: str) -> list[list[Served]]:
    """By sample, the answers of both uncompressed arms."""
    found: dict[str, list[Served]] = {}
    for r in read(ROOT / "reports" / "cpu" / source).records:
        if isinstance(r, Served) and r.method in (BASE, AGAIN) and r.task == "needle":
            found.setdefault(r.sample, []).append(r)
    return list(found.values())


def pair(seed: int, blocks: int = 6) -> Run:
    """One server beside itself."""
    rng = random.Random(f"null {seed}")
    source = ("vllm", "openvino")[seed % 2]
    records = chats(seed, rng.choice((12, 32, 80)))
    for answers in needles(source):
        records += [replace(rng.choice(answers), method=arm) for arm in (BASE, AGAIN, M)]
    for block in range(blocks):
        known = legs(source)[rng.choice(sorted(legs(source)))]
        for half in (0, 1):
            for order, arm in enumerate((BASE, AGAIN, M) if half == 0 else (M, AGAIN, BASE)):
                number = 6 * block + 3 * half + order
                for r in rng.choice(known):
                    records.append(replace(r, method=arm, block=block, leg=number, cell="closed:4"))
    return run(probes(), records)


def alarms(found: Run) -> list[str]:
    """What is said against a server, or for lack of belief in it, that is nothing but itself."""
    said = [f"{o.kind} {o.check}" for o in validity.outcomes(found) if o.kind and not _lacks(o)]
    _, effects = verdicts(found)
    return said + [f"harmful {e.endpoint}" for arm, e in effects if arm == M and e.verdict == "harmful"]


def _lacks(outcome: Outcome) -> bool:
    return outcome.kind == "COULD NOT TELL" and outcome.check in LACKING


def count(pairs: int) -> list[list[str]]:
    """The alarms of every pair that has any."""
    return [said for seed in range(pairs) if (said := alarms(pair(seed)))]


def main() -> None:
    """Count, and write it down."""
    found = count(PAIRS)
    kinds = sorted({kind for said in found for kind in said})
    by = ", ".join(f"{kind} {sum(kind in said for said in found)}" for kind in kinds)
    line = (
        f"Of {PAIRS} servers beside themselves {len(found)} had a false alarm; {ALLOWED} are allowed{by and f': {by}'}."
    )
    DOCUMENT.write_text(placed(DOCUMENT.read_text(), line))
    print(line)


def placed(text: str, line: str) -> str:
    """The document with this line behind the mark, and nothing else there."""
    return f"{text.partition(MARK)[0].rstrip()}\n\n{MARK}\n\n{line}\n"


if __name__ == "__main__":
    main()
