"""Checks of what servers say of themselves, and of those that failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from kvsuite.analysis.serving import ServerReport, told
from kvsuite.analysis.validity.outcome import ALL, APART, NOTHING, SPEED, Outcome, by_arm, plain
from kvsuite.records import Run, Served

TESTED = frozenset({"cache eviction", "sparse attention", "kv_cache_dtype", "kv_dtype"})
"""Features by which a cache is compressed: a comparison is about these."""
WEIGHTS = frozenset({"model", "dtype", "quantization", "inference precision"})
"""Features that make it another model, or other numbers of the same: what differs need not be the cache's doing."""
WARM = 0.1
"""A share of tokens: templates and system prompts are found in any prefix cache."""


def failures(run: Run) -> Iterator[Outcome]:
    """Requests that failed, and servers that did."""
    died = {s.method: s.failures for s in told(run)}
    for arm, found in by_arm(r for r in run.records if isinstance(r, Served)).items():
        errors = Counter(r.error for r in found if r.status != "ok")
        said = [why.removeprefix(f"{arm}: ") for why in died.get(arm, ())]
        many = errors.total() > APART * len(found)  # legs without one are few, and those that were easy
        if errors:
            worst = f"{errors.total()} of {len(found)} answers failed ({errors.total() / len(found):.0%})"
            reason = "" if said else f": {errors.most_common(1)[0][0]}"
            said.append(f"{worst}{reason}. Verdicts hold whatever they would have been; legs with one have no speed")
        if said:
            yield Outcome(arm, "failures", "FAILED", "; ".join(said), SPEED if many else NOTHING)
        else:
            yield Outcome(arm, "failures")


def servers(run: Run) -> Iterator[Outcome]:
    """What servers say of themselves."""
    reports = told(run)
    for s in reports:
        yield _restarted(s)
        yield _compression(run, s)
        yield _cold(s, reports)
        yield from _features(s)


def _features(s: ServerReport) -> Iterator[Outcome]:
    """Where a server says otherwise than the baseline's; what one of them does not say is not known to differ."""
    for name, (mine, theirs) in s.apart.items():
        if mine is None or theirs is None:
            says = f"it does not say, the baseline: {theirs}" if mine is None else f"{mine}, the baseline does not say"
            yield Outcome(s.method, "features", "COULD NOT TELL", f"{name}: {says}")
            continue
        more = "; serve one model under one name (--served-model-name)" if name == "model" else ""
        text = f"{name}: {mine} (baseline: {theirs}){more}"
        hides = ALL if name in WEIGHTS else NOTHING
        yield Outcome(s.method, "features", "DIFFERS", text, hides, tested=name in TESTED)


def _restarted(s: ServerReport) -> Outcome:
    times = round(s.counters.get("restarted", 0))
    if not times:
        return Outcome(s.method, "starts")
    text = f"its server ended by itself and was started again, {times} time{'s' * (times > 1)}; read its log"
    return Outcome(s.method, "starts", "RESTARTED", text, ALL)


def _compression(run: Run, s: ServerReport) -> Outcome:
    arm, check, compressed = s.method, "compression", s.facts.get("compressed")
    if arm == run.baseline and compressed:
        stored = s.facts.get("kv_dtype", "unknown")
        text = f"its own cache is compressed, {stored}: nothing can be said against an uncompressed one"
        return Outcome(arm, check, "COMPRESSED", text, ALL)
    if arm == run.baseline and compressed is None and s.facts:
        return Outcome(arm, check, "NOT SHOWN", "nothing says that its cache is uncompressed")
    if not plain(run, arm) and s.facts and not s.proof:
        text = "nothing shows that compression ran; read its log, or give --kv-profile"
        return Outcome(arm, check, "NOT SHOWN", text)
    return Outcome(arm, check)


def _cold(s: ServerReport, all_of_them: Sequence[ServerReport]) -> Outcome:
    """A server that had prompts in its prefix cache is compared with none that had not."""
    shares, perhaps = [x.warm for x in all_of_them], {x.perhaps_warm for x in all_of_them}
    if s.warm > WARM:
        text = (
            f"speed: {s.warm:.0%} of its prompts' tokens were in its prefix cache, and were to be cold; switch it off"
        )
        hides = SPEED if max(shares) - min(shares) > WARM else NOTHING
        return Outcome(s.method, "cold", "COULD NOT TELL", text, hides)
    if s.perhaps_warm:
        text = "time to the first token: nothing kept its prompts out of a prefix cache, if it has one; switch it off"
        return Outcome(s.method, "cold", "COULD NOT TELL", text, SPEED if len(perhaps) > 1 else NOTHING)
    return Outcome(s.method, "cold")
