"""Whether what servers seemed to do can be believed: every check of every arm ends here, in one of three states."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from kvsuite.analysis import length
from kvsuite.analysis.calls import called
from kvsuite.analysis.garbled import SHARE, Check, State, orderless
from kvsuite.analysis.pressure import pressed
from kvsuite.analysis.serving import ServerReport, checks, sense, timed, told
from kvsuite.analysis.stats import mean_interval
from kvsuite.analysis.table import State as Lost
from kvsuite.margins import Margins
from kvsuite.readers.run import answers, arms
from kvsuite.records import Run, Served

Kind = Literal["BROKEN", "DIFFERS", "COMPRESSED", "FAILED", "RESTARTED", "NOT SHOWN", "COULD NOT TELL"]
"""Of headlines, the gravest first."""
FATAL: tuple[Kind, ...] = ("BROKEN", "FAILED", "DIFFERS")
"""Kinds that end a run with an error, unless its user wants otherwise."""
TESTED = frozenset({"cache eviction", "sparse attention", "kv_cache_dtype", "kv_dtype"})
"""Features by which a cache is compressed: a comparison is about these."""
WEIGHTS = frozenset({"model", "dtype", "quantization", "inference precision"})
"""Features that make it another model, or other numbers of the same: what differs need not be the cache's doing."""
OPEN: tuple[Kind, ...] = ("NOT SHOWN", "COULD NOT TELL")
"""Kinds of checks that did not decide."""
ANSWERS = frozenset({"quality", "broken", "length", "truncation"})
SPEED = frozenset({"speed"})
ALL = ANSWERS | SPEED
NOTHING: frozenset[str] = frozenset()
APART = 0.05
"""Of requests, the share that may differ before something does."""
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
WARM = 0.1
"""A share of tokens: templates and system prompts are found in any prefix cache."""
EDGE = 0.05
"""How far above what guessing scores a baseline must be known to score."""


@dataclass(frozen=True)
class Outcome:
    """What one check says of one arm."""

    arm: str
    check: str
    kind: Kind | None = None
    """None: it passed."""
    text: str = ""
    """What was seen, what follows, and what to do."""
    hides: frozenset[str] = NOTHING
    """Endpoints that this leaves nothing good to say of: no *within margin*, no rank. Those of the baseline are every
    variant's."""
    lost: Lost = "ok"
    """Why the arm has no figures at all, where it has none."""
    tested: bool = False
    """Whether it is what the comparison is about."""

    @property
    def state(self) -> State:
        """How the check ended."""
        return "passed" if self.kind is None else "could not tell" if self.kind in OPEN else "failed"

    @property
    def fatal(self) -> bool:
        """Whether it ends a run with an error, unless the user wants otherwise."""
        return self.kind in FATAL and not self.tested


@lru_cache(maxsize=2)
def outcomes(run: Run) -> tuple[Outcome, ...]:
    """All that is checked of a comparison of servers, the baseline first; of any other run, what the baseline
    scores."""
    served = any(isinstance(r, Served) for r in run.records) or told(run)
    found = [outcome for check in (_scores, *(CHECKS if served else ())) for outcome in check(run)]
    return tuple(sorted(found, key=lambda o: (o.arm != run.baseline, _rank(o))))


def _rank(outcome: Outcome) -> int:
    kinds = get_args(Kind)
    return len(kinds) if outcome.kind is None else kinds.index(outcome.kind)


def left_out(run: Run) -> dict[str, Lost]:
    """Arms that have no figures, and why: their answers are none, or to other prompts."""
    return {o.arm: o.lost for o in outcomes(run) if o.lost != "ok" and not _plain(run, o.arm)}


def withheld(run: Run) -> dict[str, frozenset[str]]:
    """By variant, the endpoints that nothing good may be said of."""
    every = NOTHING.union(*(o.hides for o in outcomes(run) if o.arm == run.baseline))
    found = {arm: every for arm in run.facts.get("methods", ()) if every and not _plain(run, arm)}
    for o in outcomes(run):
        if not _plain(run, o.arm):
            found[o.arm] = found.get(o.arm, every) | o.hides
    return found


def unranked(run: Run) -> set[str]:
    """Variants whose speed is beside no other's."""
    return {*left_out(run), *(arm for arm, hidden in withheld(run).items() if "speed" in hidden)}


def _plain(run: Run, arm: str) -> bool:
    """Whether it is the baseline, once more or not."""
    return arm == run.baseline or run.is_control(arm)


def _scores(run: Run) -> Iterator[Outcome]:
    """Whether the baseline scores more than guessing does. A task in which it does not is in the mean score all the
    same, since leaving out what the baseline got wrong by chance would make every method look worse."""
    above, guessed = _scored(run)
    if guessed:
        more = "In the mean over all tasks that hides what others lose" if above else "Nothing can be lost there"
        text = (
            f"quality: it scores {'; '.join(guessed)}, not shown to be above guessing. {more}: give tasks that "
            "the model can do"
        )
        hides = NOTHING if above else frozenset({"quality", "broken"})
        yield Outcome(run.baseline, "scores", "COULD NOT TELL", text, hides)


def _baseline(run: Run) -> Iterator[Outcome]:
    """Whether the baseline is one: its answers make sense, and end by themselves."""
    above, _ = _scored(run)
    bad, told = sense(run)
    state = orderless(bad, told)
    if above and state == "could not tell":
        state = "passed"
    if state == "failed":
        text = f"{bad} of its {told} answers make no sense by themselves: nothing can be concluded; look at its log"
        yield Outcome(run.baseline, "sense", "BROKEN", text, ALL)
    elif state == "could not tell":
        needed = next(n for n in range(told, 1000) if orderless(0, n) == "passed")
        text = f"whether its answers make sense: {told} are long enough to tell, it takes {needed}, or a task scored"
        yield Outcome(run.baseline, "sense", "COULD NOT TELL", text, ALL)
    else:
        yield Outcome(run.baseline, "sense")
    chats = arms(run, "length").get((run.baseline, 0))
    if chats is not None and length.capped(chats, Margins.of(run.facts).length):
        ended = round(float((chats.capped == 1).sum()))
        text = f"length: {ended} of {len(chats)} answers end at their cap, where longer ones would; raise --kv-cap"
        yield Outcome(run.baseline, "cap", "COULD NOT TELL", text)


@lru_cache(maxsize=2)
def _scored(run: Run) -> tuple[list[str], list[str]]:
    """Tasks in which the baseline is known to be above chance, and those in which it is not, in words."""
    scores: dict[str, list[tuple[float, float]]] = {}
    for a in answers(run, "samples"):
        if a.method == run.baseline and a.status == "ok" and a.score is not None:
            scores.setdefault(a.task, []).append((a.score, a.chance))
    above, guessed = [], []
    for task, found in scores.items():
        mean, chance = (statistics.fmean(x) for x in zip(*found, strict=True))
        low = mean_interval([score for score, _ in found]).low
        if low < chance + EDGE:
            guessed.append(f"{mean:.2f} on {len(found)} samples of {task} (guessing: {chance:.2f})")
        else:
            above.append(task)
    return above, guessed


def _garbled(run: Run) -> Iterator[Outcome]:
    for arm, check in checks(run).items():
        if check.state == "failed":
            yield Outcome(arm, "answers", "BROKEN", broken_text(check), ALL, "broken")
        elif check.state == "could not tell":
            yield Outcome(arm, "answers", "COULD NOT TELL", _untold(check), ALL)
        else:
            yield Outcome(arm, "answers")


SHOWN = 160
"""Characters of an example."""


def broken_text(check: Check) -> str:
    """In which ways its answers are none, with an example."""
    signs = [s for s in check.signs if s.failed]
    failed = ", ".join(f"{s.name} {s.count} of {s.n}{_where(s.where)}{_floor(s.floor)}" for s in signs)
    said = f"its answers are no answers: {failed or 'none of them is'}"
    if check.example is not None:
        both = _cut(check.example.baseline), _cut(check.example.variant)
        said += f". {' '.join(check.example.sample)}: the baseline said {both[0]}, it said {both[1]}"
    return f"{said}. It is in no ranking"


def _where(where: tuple[int, int, int] | None) -> str:
    names = zip(("start", "middle", "end"), where or (), strict=False)
    return f" ({', '.join(f'{name} {count}' for name, count in names)})" if where else ""


def _floor(floor: int | None) -> str:
    return "" if floor is None else f", A/A {floor}"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + " …")


def _untold(check: Check) -> str:
    share = f"whether its answers are answers: garbage in {SHARE:.0%} of them"
    if math.isinf(check.needed):
        return f"{share} could not be told from what noise does here, however many prompts there were"
    return (
        f"{share} would show in {check.needed:,.0f} prompts with long, scored or equal answers, there are "
        f"{check.told:,}; raise --kv-samples or --kv-cap, or time it, too"
    )


def _prompts(run: Run) -> Iterator[Outcome]:
    """Whether every arm read the same prompts: a template, a system message or a half can be lost on the way."""
    read: dict[str, dict[tuple[object, ...], int]] = {}
    for r in _served(run):
        if r.evaluation != "goodput":
            read.setdefault(r.method, {})[r.task, r.cell, r.block, r.sample] = r.prompt_tokens
    base = {key: n for key, n in read.get(run.baseline, {}).items() if n}
    for arm, mine in ((arm, mine) for arm, mine in read.items() if arm != run.baseline):
        known = {key: n for key, n in mine.items() if n}
        shared = known.keys() & base.keys()
        apart = [key for key in shared if known[key] != base[key]]
        if not shared:
            who = "neither" if not (known or base) else "not both"
            text = f"whether it reads the prompts that the baseline reads: {who} of them say how many tokens these have"
            hides = NOTHING if not (known or base) else ALL
            yield Outcome(arm, "prompts", "COULD NOT TELL", text, hides)
        elif len(apart) > APART * len(shared):
            means = [statistics.fmean(x[key] for key in apart) for x in (known, base)]
            yield Outcome(
                arm, "prompts", "DIFFERS",
                f"not the same prompt: it read {means[0]:,.0f} tokens where the baseline read {means[1]:,.0f}, in "
                f"{len(apart)} of {len(shared)} requests. Serve the same model with the same chat template, and look "
                "for a gateway that changes messages. It is in no ranking",
                ALL, "differs",
            )  # fmt: skip
        else:
            yield Outcome(arm, "prompts")


def _tokens(run: Run) -> Iterator[Outcome]:
    """Whether tokens are counted alike: by the server, by the model's tokenizer, by the size of the text."""
    served = {arm: [r for r in found if r.count] for arm, found in _by_arm(_served(run)).items()}
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


def _times(run: Run) -> Iterator[Outcome]:
    """Whether the times of an arm tell one story."""
    found = _by_arm(r for r in timed(run) if r.status == "ok" and r.count > 1 and r.e2e > QUICK)
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


def _repeats(run: Run) -> Iterator[Outcome]:
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


def _failures(run: Run) -> Iterator[Outcome]:
    """Requests that failed, and servers that did."""
    died = {s.method: s.failures for s in told(run)}
    for arm, found in _by_arm(r for r in run.records if isinstance(r, Served)).items():
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


def _servers(run: Run) -> Iterator[Outcome]:
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
    if not _plain(run, arm) and s.facts and not s.proof:
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


NOISE = 0.01
"""How often noise alone may look like damage, in answers under pressure and in tool calls."""
FEW = 8
"""How many prompts the baseline must answer by valid tool calls: that all of these are lost can just be told."""


def _pressure(run: Run) -> Iterator[Outcome]:
    """Whether pools were full, and what that did to answers."""
    arms = pressed(run)
    base = next((p for p in arms if p.arm == run.baseline), None)
    for p in arms:
        if p.preempted is None:
            text = "pressure: whether its pool was full: it does not count preemptions"
            yield Outcome(p.arm, "pressure", "COULD NOT TELL", text)
        elif not p.preempted:
            more = f"; raise --kv-requests to {math.ceil(4 * p.room / p.size):,}" if p.room else ""
            load = f"{p.asked} requests at once of {p.size:,.0f} tokens"
            text = f"pressure: nothing was preempted by {load}{more}, or give it a smaller pool"
            yield Outcome(p.arm, "pressure", "COULD NOT TELL", text)
        elif base and p.adjusted <= NOISE:
            text = (
                f"with a full pool {p.changed} of {p.n} answers are others than without, of the baseline's "
                f"{base.changed} of {base.n}: what is preempted, or asked beside so many, is answered otherwise"
            )
            yield Outcome(p.arm, "pressure", "DIFFERS", text, ANSWERS)
        else:
            yield Outcome(p.arm, "pressure")


def _calls(run: Run) -> Iterator[Outcome]:
    """Whether tool calls are calls."""
    arms = called(run)
    base = next((c for c in arms if c.arm == run.baseline), None)
    if base is None:
        return
    if base.valid < FEW:
        text = (
            f"tool calls: its own are valid for {base.valid} of {base.n} prompts; serve a model that calls tools "
            "(vLLM: --enable-auto-tool-choice --tool-call-parser), raise --kv-cap or --kv-requests"
        )
        yield Outcome(base.arm, "calls", "COULD NOT TELL", text)
        return
    for c in arms:
        if c.adjusted <= NOISE:
            text = (
                f"its tool calls are valid for {c.valid} of {c.n} prompts, the baseline's for {base.valid} of {base.n}"
            )
            yield Outcome(c.arm, "calls", "BROKEN", text, ALL)
        else:
            yield Outcome(c.arm, "calls")


def _served(run: Run) -> Iterable[Served]:
    return (r for r in run.records if isinstance(r, Served) and r.status == "ok")


def _by_arm(found: Iterable[Served]) -> Mapping[str, list[Served]]:
    grouped: dict[str, list[Served]] = {}
    for r in found:
        grouped.setdefault(r.method, []).append(r)
    return grouped


CHECKS: tuple[Callable[[Run], Iterator[Outcome]], ...] = (
    _baseline, _garbled, _prompts, _tokens, _times, _repeats, _pressure, _calls, _failures, _servers,
)  # fmt: skip
