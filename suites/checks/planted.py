"""Comparisons of servers made of recorded answers, into which a fault can be planted, and what their report believes.

Answers are those of SmolLM2-135M at temperature 1 to MT-Bench's prompts, each asked four times (`reports/cpu/noise`):
the baseline, the A/A arm and a variant that does nothing are three of these, in random roles prompt by prompt. Times
are drawn.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path

from kvsuite.analysis.cost import throughput
from kvsuite.analysis.tables import servers
from kvsuite.analysis.tables.verdicts import verdicts as verdict_tables
from kvsuite.records import Probe, Run, Served, read
from suites.checks.test_garbled import elsewhere

ROOT = Path(__file__).parents[2]
BASE, AGAIN, M = "baseline", "baseline again", "m"
UNCOMPRESSED = {"compressed": False, "kv_dtype": "auto", "kv_tokens": 100, "kv_bytes": 1000}
COMPRESSED = {"compressed": True, "kv_dtype": "fp8", "kv_tokens": 200, "kv_bytes": 1000}
CAP = 1024
MARGINS = {"quality": 0.05, "broken": 0.05, "length": 0.15, "truncation": 0.03, "speed": 0.05}


@functools.cache
def recorded():
    """By chat, its four answers: text, tokens, how they ended."""
    found = {}
    for r in read(ROOT / "reports" / "cpu" / "noise").records:
        if r.evaluation == "length":  # as if those that ended at their cap of 256 had ended there by themselves
            found.setdefault(r.sample, []).append((r.text, len(r.tokens), "stop"))
    return [answers for _, answers in sorted(found.items())]


def asked(seed, n):
    """``n`` prompts with the answers of all arms to them; the same prompts come again where there are too few."""
    rng, known = random.Random(seed), recorded()
    places = [rng.sample(range(len(known)), len(known)) for _ in range(-(-n // len(known)))]
    return [rng.sample(known[at], 3) for some in places for at in some][:n]


def cut(answer, cap):
    """As it would have been with a smaller cap."""
    text, tokens, _ = answer
    return answer if tokens <= cap else (text[: len(text) * cap // tokens], cap, "length")


def served(arm, at, answer, pace=0.02, **more):
    text, tokens, finish = answer
    gaps = [pace] * max(tokens - 1, 0)
    known = {"sample": f"c{at}", "cluster": f"c{at}", "text": text, "count": tokens, "finish": finish, "cap": CAP}
    known |= {"counted": "usage", "prompt_tokens": 40 + at % 7, "ttft": 0.2, "e2e": 0.2 + sum(gaps), "gaps": gaps}
    return Served(arm, **known | more)


def chats(seed="chats", n=32, cap=CAP, greedy=False):
    """All arms' answers to chats; ``greedy``: those of the A/A arm and of the variant are the baseline's."""
    found = []
    for at, three in enumerate(asked(seed, n)):
        for arm, answer in zip((BASE, AGAIN, M), [three[0]] * 3 if greedy else three, strict=True):
            known = {"evaluation": "length", "task": "chat", "type": "chat", "cap": cap}
            found.append(served(arm, at, cut(answer, cap), **known))
    return found


def needles(n=32, right=1.0):
    """Scored answers of a few characters."""
    known = {"task": "needle", "type": "synthetic", "cap": 16}
    return [
        served(arm, at, (f"{10_000 + 17 * at}", 5, "stop"), score=float(at < right * n), **known)
        for arm in (BASE, AGAIN, M)
        for at in range(n)
    ]


def loads(seed="loads", blocks=4, requests=6, sd=0.02):
    """Timed answers, in blocks A B B A; what a leg is faster or slower by is drawn."""
    rng, found, answers = random.Random(seed), [], asked(seed, blocks * requests)
    for block in range(blocks):
        for half in (0, 1):
            for order, arm in enumerate((BASE, AGAIN, M) if half == 0 else (M, AGAIN, BASE)):
                pace = 0.02 * rng.lognormvariate(0, sd)
                known = {
                    "evaluation": "throughput",
                    "cell": "closed:8",
                    "block": block,
                    "leg": 6 * block + 3 * half + order,
                }
                for at in range(requests):
                    place = block * requests + at
                    answer = answers[place][(BASE, AGAIN, M).index(arm)]
                    found.append(served(arm, 1000 + place, cut(answer, 96), pace, start=100.0 * known["leg"], **known))
    return found


def probes(**facts):
    known = {BASE: UNCOMPRESSED, AGAIN: UNCOMPRESSED, M: COMPRESSED} | facts
    return [Probe(arm, facts={"features": {"model": "m"}} | own, counters={}) for arm, own in known.items()]


def run(*records, **settings):
    """A run that has these records and came to its end."""
    facts = {
        "started": "2026-11-29", "command": [], "preset": "smoke", "model": {"name": "m", "fingerprint": ""},
        "texts": {}, "methods": [BASE, AGAIN, M], "baseline": BASE, "controls": [AGAIN], "servers": {},
        "cells": ["closed:8"], "margins": MARGINS, "finished": "now",
        "environment": {"packages": {}, "git": None, "gpu": None, "kvsuite": "0"},
        "settings": {"temperature": 1.0, "batch": [8], "length": [512], "prefix": "cold", "end": "natural"} | settings,
    }  # fmt: skip
    return Run(Path("planted"), facts, [r for some in records for r in some])


def change(records, make, arms=(M,), share=1.0, seed=0, where=lambda r: True):
    """``records`` with ``make(record, rng)`` instead of those of some arms, in a share of their prompts."""
    rng = random.Random(seed)
    prompts = sorted({r.sample for r in records if isinstance(r, Served) and where(r)})
    hit = set(rng.sample(prompts, round(share * len(prompts))))
    chosen = lambda r: isinstance(r, Served) and r.method in arms and r.sample in hit and where(r)  # noqa: E731
    return [make(r, rng) if chosen(r) else r for r in records]


def said(found):
    """The headlines."""
    return [note.text for table in servers.headlines(found) for note in table.notes]


judged = functools.lru_cache(maxsize=4)(verdict_tables)


def effects(found):
    """By arm and endpoint, the verdicts' cells."""
    tables, _ = judged(found)
    return {row.key: row.cells["effect"] for t in tables if t.key == "verdicts" for row in t.rows}


def verdicts(found, arm=M):
    """By endpoint."""
    return {end: cell.verdict or cell.state for (name, end), cell in effects(found).items() if name == arm}


def believed(found, arm=M):
    """What a report says in favour of an arm: endpoints within their margins, and its rank in speed."""
    good = [endpoint for endpoint, verdict in verdicts(found, arm).items() if verdict == "within margin"]
    rows = [row for table in servers.speed(found) for row in table.rows if row.key[-1] == arm]
    ranked = any(cell.value is not None for row in rows for name, cell in row.cells.items() if name.endswith("ratio"))
    return good + ["rank"] * ranked + ["cost"] * (arm in throughput(found).rates)


@functools.cache
def vocabulary():
    """Words of a large vocabulary, the rare ones as often as the others."""
    return sorted({w for w in map(str.lower, elsewhere().words) if w.isalpha() and len(w) > 2})


def noise(rng, size):
    """Random tokens of about so many characters: words and ends of words, now and then without a space."""
    text = ""
    while len(text) < size:
        word = rng.choice(vocabulary())
        text += f" {word}" if rng.random() < 0.6 else word[rng.randrange(3) :]
    return text[:size]


def noisy(start=0.0, end=1.0):
    """Makes an answer random between two parts of it."""

    def make(r, rng):
        size = len(r.text)
        low, high = round(start * size), round(end * size)
        return replace(r, text=r.text[:low] + noise(rng, high - low) + r.text[high:])

    return make


def shortened(part):
    """Makes an answer end after a part of it."""

    def make(r, rng):
        tokens = max(round(part * r.count), 1)
        gaps = r.gaps[: tokens - 1]
        return replace(
            r, text=r.text[: round(part * len(r.text))], count=tokens, finish="stop", gaps=gaps, e2e=r.ttft + sum(gaps)
        )

    return make


def paced(times):
    """Makes an answer's tokens come so many times as fast."""

    def make(r, rng):
        gaps = [gap / times for gap in r.gaps]
        return replace(r, gaps=gaps, e2e=r.ttft + sum(gaps))

    return make
