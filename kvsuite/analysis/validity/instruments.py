"""Checks of what measures: tokens are counted alike, and times tell one story."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from kvsuite.analysis.serving import timed, told
from kvsuite.analysis.validity.outcome import APART, SPEED, Outcome, answered, by_arm
from kvsuite.records import Run, Served

TALKATIVE = 1.2
"""How many times as many tokens a server may count for a text of the same size as the baseline's does."""
IMPOSSIBLE = 4.0
"""As many times as fast per token no smaller cache makes a server that was not short of memory."""
AGAIN = 8.0
"""As many times as fast per token no server repeats an answer that it computes."""
QUICK = 0.05
"""Seconds of an answer whose times tell of the network and the client more than of the server."""
STALLED = 1.5
"""How much slower all answers together may be, beside the median one."""
BURST = 10.0
"""By how many times less of an answer's time may follow its first token than of the baseline's."""


def tokens(run: Run) -> Iterator[Outcome]:
    """Whether tokens are counted alike: by the server, by the model's tokenizer, by the size of the text."""
    served = {arm: [r for r in found if r.count] for arm, found in by_arm(answered(run)).items()}
    base = served.get(run.baseline, [])
    both = SPEED | {"length", "truncation"}
    for arm, found in served.items():
        counted, reference = _counted(found), _counted(base)
        overruled = [r for r in found if r.usage_tokens is not None]
        times = _talkative(found, base)
        if len(overruled) > APART * len(found):
            said, read = sum(r.usage_tokens or 0 for r in overruled), sum(r.count for r in overruled)
            text = (
                f"its server counts {said:,} tokens where the model's tokenizer counts {read:,}, in {len(overruled)} "
                f"of {len(found)} answers. The tokenizer's count is used; look for a gateway that counts otherwise"
            )
            yield Outcome(arm, "tokens", "DIFFERS", text)
        elif counted != reference and reference:
            text = (
                f"speed and length: its tokens are counted by {counted}, the baseline's by {reference}; name the model "
                "(--kv-model), so that its tokenizer counts"
            )
            yield Outcome(arm, "tokens", "COULD NOT TELL", text, both)
        elif times > TALKATIVE or times < 1 / TALKATIVE:
            text = (
                f"speed and length: for a text of the same size it counts {times:.2f} times as many tokens as the "
                "baseline's server; name the model (--kv-model), so that its tokenizer decides"
            )
            yield Outcome(arm, "tokens", "COULD NOT TELL", text, both)
        else:
            yield Outcome(arm, "tokens")


def _counted(found: Iterable[Served]) -> str:
    """Who counted tokens, in words: the server's usage and a tokenizer count the same."""
    return " and ".join(sorted({"chunks" if r.counted == "chunks" else "usage" for r in found}))


def _talkative(mine: Iterable[Served], base: Iterable[Served]) -> float:
    """How many times as many tokens an arm has as the baseline for a text of the same size, in the task or load where
    that is most; 1 where the texts are too short to tell."""
    times = [1.0]
    sizes, reference = _sizes(mine), _sizes(base)
    for where in sizes.keys() & reference.keys():
        (size, count), (text, tokens) = sizes[where], reference[where]
        if min(size, text) >= 500:
            times.append(count / size / (tokens / text))
    return max(times, key=lambda x: abs(math.log(x)))


def _sizes(found: Iterable[Served]) -> dict[str, tuple[int, int]]:
    """By task or load, characters and tokens."""
    sums: dict[str, tuple[int, int]] = {}
    for r in found:
        size, count = sums.get(r.task or r.cell, (0, 0))
        sums[r.task or r.cell] = size + len(r.text) + len(r.reasoning) + len(r.calls), count + r.count
    return sums


def times(run: Run) -> Iterator[Outcome]:
    """Whether the times of an arm tell one story."""
    found = by_arm(r for r in timed(run) if r.status == "ok" and r.count > 1 and r.e2e > QUICK)
    base = [r for r in found.get(run.baseline, ()) if r.tpot]
    rushed = sum(s.counters.get("preemptions", 0) for s in told(run) if s.method == run.baseline) > 0
    for arm, mine in found.items():
        paced = [r for r in mine if r.tpot]
        lumps = len(mine) - len(paced)
        why = ""
        if lumps > APART * len(mine):
            why = f"{lumps} of {len(mine)} answers came in one piece: no time to a first token, none per token"
        elif paced and base:
            why = _story(paced, base, rushed and arm != run.baseline)
        if why:
            text = f"speed: {why}; ask the server itself, without a proxy that buffers, caches or stalls"
            yield Outcome(arm, "times", "COULD NOT TELL", text, SPEED)
        else:
            yield Outcome(arm, "times")


def _story(mine: Sequence[Served], base: Sequence[Served], rushed: bool) -> str:
    """What cannot be true of an arm's times beside the baseline's; empty where all can."""
    after = [statistics.median((r.e2e - r.ttft) / r.e2e for r in found if r.e2e > 0) for found in (mine, base)]
    if BURST * after[0] < after[1]:
        return f"{after[0]:.1%} of an answer's time follow its first token, of the baseline's {after[1]:.0%}"
    middle = [statistics.median(r.tpot or 0 for r in found) for found in (mine, base)]
    if IMPOSSIBLE * middle[0] < middle[1] and not rushed:
        return f"it writes {middle[1] / middle[0]:.1f} times as fast as the baseline, which no smaller cache explains"
    pooled = [sum(r.e2e - r.ttft for r in found) / sum(r.count - 1 for r in found) for found in (mine, base)]
    slower = pooled[0] / pooled[1] / (middle[0] / middle[1])
    if slower > STALLED:
        return f"some answers stall: all together take {slower:.1f} times as long as the median one says"
    return ""


def repeats(run: Run) -> Iterator[Outcome]:
    """Whether a prompt that is asked again in the same block is computed again: of a cached answer all tokens are
    there at once. One block may be slow at first by chance, and a choice of what was slow at first is quicker later."""
    legs: dict[str, dict[tuple[int, str, str], list[Served]]] = {}
    for r in sorted(timed(run), key=lambda r: r.leg):
        if r.status == "ok" and r.count > 1:
            legs.setdefault(r.method, {}).setdefault((r.block, r.cell, r.sample), []).append(r)
    for arm, asked in legs.items():
        firsts: list[float] = []
        ratios: dict[int, list[float]] = {}
        for (block, *_), pair in asked.items():
            if len(pair) == 2 and pair[0].output_key == pair[1].output_key:
                firsts.append(pair[0].e2e - pair[0].ttft)
                ratios.setdefault(block, []).append(_after(pair[0]) / max(_after(pair[1]), 1e-9))
        times = min(map(statistics.median, ratios.values()), default=0.0)
        if len(firsts) >= 4 and statistics.median(firsts) > QUICK and times > AGAIN:
            text = (
                f"it writes the same answer {min(times, 1e3):.0f} times as fast when it is asked once more: something "
                "keeps whole answers. Ask the server itself"
            )
            yield Outcome(arm, "repeats", "DIFFERS", text, SPEED)
        else:
            yield Outcome(arm, "repeats")


def _after(r: Served) -> float:
    """Seconds per token after the first, 0 where all came at once."""
    return (r.e2e - r.ttft) / (r.count - 1)
