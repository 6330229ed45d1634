"""Faults planted into comparisons of servers: each is found, or the report says what it could not tell and what would
tell it; none is believed, and what has no fault is."""

import asyncio
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from kvsuite.analysis import validity
from kvsuite.analysis.garbled import orderless
from kvsuite.analysis.report import analyse
from kvsuite.analysis.serving import served_rows
from kvsuite.analysis.validity.outcome import Kind
from kvsuite.engines.openai import Client
from kvsuite.engines.request import Ask
from kvsuite.engines.server import Server as Started
from kvsuite.engines.server import Spec
from kvsuite.plugin.visits import _served
from suites.checks import nulls
from suites.checks.depth import depth
from suites.checks.planted import (
    AGAIN,
    BASE,
    COMPRESSED,
    UNCOMPRESSED,
    M,
    believed,
    change,
    chats,
    loads,
    needles,
    noise,
    noisy,
    paced,
    probes,
    run,
    said,
    shortened,
    verdicts,
)  # fmt: skip
from suites.checks.scripted import Server
from suites.checks.test_garbled import GERMAN

EVERY = (BASE, AGAIN, M)


def broken(what, n=32, share=1.0, **more):
    return run(probes(), change(chats(n=n, **more), what, share=share, seed=n))


def empty(r, rng):
    return replace(r, text="", count=1, finish="stop")


def salad(r, rng):
    words = r.text.split()
    return replace(r, text=" ".join(rng.sample(words, len(words))))


def stuttering(r, rng):
    """Every chunk is delivered twice; usage counts it once."""
    return replace(r, text="".join(2 * r.text[at : at + 5] for at in range(0, len(r.text), 5)))


def twice(r, rng):
    """The whole stream is delivered twice; usage counts it once."""
    return replace(r, text=r.text + r.text)


def swapped(records):
    """Two streams at a time have changed places."""
    mine = [r for r in records if r.method == M]
    other = {id(a): b for pair in zip(mine[::2], mine[1::2], strict=True) for a, b in (pair, pair[::-1])}
    return [
        replace(r, **{k: getattr(other[id(r)], k) for k in ("text", "count", "finish")}) if id(r) in other else r
        for r in records
    ]


def german(r, rng):
    return replace(r, text=" ".join(GERMAN.write(rng, len(r.text) // 6 + 1)))


def constant(r, rng):
    return replace(
        r, text="I would be glad to help you with that, and will do my best to answer the question that you asked me."
    )


def endless(r, rng):
    """Stop tokens are dropped: it goes on, to its cap."""
    text = r.text + noise(rng, max(0, len(r.text) * (r.cap - r.count) // max(r.count, 1)))
    return replace(r, text=text, count=r.cap, finish="length")


FOUND = {
    "random tokens, 8 chats": (lambda: broken(noisy(), 8, cap=64), "language 8 of 8"),
    "random tokens, 12 chats": (lambda: broken(noisy(), 12, cap=64), "language 1"),
    "random from its half on": (lambda: broken(noisy(0.5)), "end 1"),
    "random in its first third": (lambda: broken(noisy(0, 0.34)), "start "),
    "random in its middle": (lambda: broken(noisy(0.33, 0.67)), "middle "),
    "a fifth random, 80 chats": (lambda: broken(noisy(), 80, 0.2), "language "),
    "a fifth empty, 80 chats": (lambda: broken(empty, 80, 0.2), "empty 16 of"),
    "a fifth random, greedy, 80 chats": (lambda: broken(noisy(), 80, 0.2, greedy=True), "language "),
    "words in no order": (lambda: broken(salad, 48), "order "),
    "chunks delivered twice": (lambda: broken(stuttering), "repetition "),
    "streams swapped": (lambda: run(probes(), swapped(chats(n=32))), "agreement "),
    "another language": (lambda: broken(german), "language "),
    "always the same sentence": (lambda: broken(constant), "agreement "),
    "stop tokens dropped": (lambda: broken(endless), "language "),
}


@pytest.mark.parametrize("fault", FOUND)
def test_garbage_is_found(fault):
    make, sign = FOUND[fault]
    found = make()
    [line] = [line for line in said(found) if line.startswith("BROKEN")]
    assert line.startswith("BROKEN m: its answers are no answers: ")
    assert sign in line
    assert verdicts(found) == {"all": "broken"}
    assert believed(found) == []
    assert any(o.kind == "BROKEN" and o.arm == M for o in validity.outcomes(found))


UNTOLD = {
    "random tokens, 4 chats": lambda: broken(noisy(), 4, cap=64),
    "a fifth random, 32 chats": lambda: broken(noisy(), 32, 0.2),
    "a quarter random, greedy, 16 chats": lambda: broken(noisy(), 16, 0.25, greedy=True),
    "words in no order, 8 chats": lambda: broken(salad, 8),
    "streams swapped, 8 chats": lambda: run(probes(), swapped(chats(n=8))),
    "short answers": lambda: broken(lambda r, rng: replace(r, text=noise(rng, 40), count=12), 40, cap=12),
}


@pytest.mark.parametrize("fault", UNTOLD)
def test_what_is_too_little_to_tell_says_how_much_would(fault):
    found = UNTOLD[fault]()
    lines = [line for line in said(found) if line.startswith("COULD NOT TELL") and "m: whether its answers" in line]
    broke = [line for line in said(found) if line.startswith("BROKEN m")]
    assert lines or broke
    if lines:
        needed = int(lines[0].split(" would show in ")[1].split()[0].replace(",", ""))
        assert 8 <= needed <= 300
        assert "raise --kv-samples or --kv-cap" in lines[0]
    assert believed(found) == []
    assert "within margin" not in verdicts(found).values()


def test_so_many_more_do_tell():
    """What the headline asks for is enough."""
    few = broken(noisy(), 32, 0.2)
    [line] = [line for line in said(few) if "m: whether its answers" in line]
    needed = int(line.split(" would show in ")[1].split()[0])
    assert sum(broken_by(needed, seed) for seed in range(3)) >= 2


def broken_by(n, seed):
    found = run(probes(), change(chats(seed, n), noisy(), share=0.25, seed=seed))
    return any(line.startswith("BROKEN m") for line in said(found))


def test_what_has_no_fault_is_believed():
    """Else everything could be said to be found. With needles, chats and loads nothing stands above the verdicts."""
    found = run(probes(), needles(64), chats(n=80), loads())
    assert said(found) == []
    assert analyse(found).alarms == []
    assert "rank" in believed(found)
    assert verdicts(found)["quality"] == "within margin"
    assert {o.state for o in validity.outcomes(found)} == {"passed"}
    same = run(probes(), chats(n=12, greedy=True), needles(16), loads(), temperature=0.0)
    assert not [line for line in said(same) if line.startswith(("BROKEN", "DIFFERS"))]


LENGTHS = {
    "a fifth cut to a third": (shortened(1 / 3), 0.2),
    "all cut to a third": (shortened(1 / 3), 1.0),
    "half of max_tokens": (shortened(1 / 2), 1.0),
    "cut before a character of several bytes": (lambda r, rng: shortened(rng.uniform(0.1, 0.6))(r, rng), 1.0),
    "twice as long": (lambda r, rng: replace(r, text=2 * r.text, count=min(2 * r.count, r.cap)), 1.0),
}


@pytest.mark.parametrize("fault", LENGTHS)
def test_answers_of_another_length_are_never_within_margin(fault):
    make, share = LENGTHS[fault]
    found = run(
        probes(), needles(64), change(chats(n=80, cap=128), make, share=share, where=lambda r: r.task == "chat")
    )
    seen = {
        endpoint: verdict
        for endpoint, verdict in verdicts(found).items()
        if endpoint in ("length", "truncation", "all")
    }
    assert seen
    assert "within margin" not in seen.values() or "harmful" in seen.values()
    if share == 1 and fault != "twice as long":
        assert "harmful" in seen.values()


def test_a_baseline_at_its_cap_hides_longer_answers():
    found = run(probes(), chats(n=8, cap=16))
    assert verdicts(found)["length"] in ("capped", "cannot tell")
    assert [line for line in said(found) if "length: 8 of 8 answers end at their cap" in line]
    assert believed(found) == []


# the baseline on trial


def test_a_baseline_of_noise_is_said_first():
    """Whatever a variant is like beside it."""
    found = run(probes(), needles(16, right=0), change(chats(n=32), noisy(), EVERY), change(loads(), noisy(), EVERY))
    first, *others = said(found)
    assert first.startswith("BROKEN baseline: ")
    assert "make no sense by themselves: nothing can be concluded" in first
    assert any(
        line.startswith("COULD NOT TELL baseline: quality: it scores 0.00 on 16 samples of needle") for line in others
    )
    assert believed(found) == []


def test_a_baseline_that_guesses_tells_nothing_of_quality():
    found = run(probes(), needles(64, right=0), chats(n=40), loads())
    assert said(found)[0].startswith("COULD NOT TELL baseline: quality: it scores 0.00 on 64 samples of needle")
    assert "quality" not in believed(found)
    assert "rank" in believed(found)


def test_a_baseline_that_compresses_clears_no_variant():
    found = run(probes(baseline=COMPRESSED), needles(64), loads())
    assert said(found)[0].startswith("COMPRESSED baseline: its own cache is compressed, fp8")
    assert believed(found) == []


def test_how_many_answers_show_that_they_make_sense():
    assert orderless(0, 0) == orderless(1, 4) == "could not tell"
    assert orderless(0, 24) == orderless(8, 24) == "passed"
    assert orderless(20, 24) == "failed"


# tokens, times, prompts


def stall(r, rng):
    gaps = [*r.gaps[:-1], 40.0] if r.gaps else []
    return replace(r, gaps=gaps, e2e=r.ttft + sum(gaps))


def burst(r, rng):
    """All chunks come one after the other, once the answer is there."""
    ttft = r.e2e - 1e-4
    return replace(r, ttft=ttft, gaps=[1e-4 / len(r.gaps)] * len(r.gaps) if r.gaps else [])


def replayed(r, rng):
    """Whole answers were kept: the second leg of a block gets them at once."""
    second = r.leg % 6 >= 3
    return paced(200)(r, rng) if second else r


def half_more(r, rng):
    return replace(r, count=3 * r.count // 2)


TIMES = {
    "in one piece": (lambda r, rng: replace(r, ttft=r.e2e, gaps=[]), "COULD NOT TELL", "came in one piece"),
    "in a burst": (burst, "COULD NOT TELL", "follow its first token"),
    "eight times as fast": (paced(8), "COULD NOT TELL", "which no smaller cache explains"),
    "whole answers kept": (replayed, "DIFFERS", "times as fast when it is asked once more"),
    "usage says half as much again": (
        lambda r, rng: replace(r, count=3 * r.count // 2),
        "COULD NOT TELL",
        "counts 1.4",
    ),
    "usage says half": (
        lambda r, rng: replace(r, count=max(r.count // 2, 2)),
        "COULD NOT TELL",
        "times as many tokens",
    ),
    "no usage": (lambda r, rng: replace(r, counted="chunks"), "COULD NOT TELL", "counted by chunks"),
    "the stream delivered twice": (twice, "COULD NOT TELL", "times as many tokens"),
}


@pytest.mark.parametrize("stalled", ["one leg of two", "some answers of milliseconds"])
def test_a_stall_is_no_cache_of_whole_answers(stalled):
    """As on a machine that has other work, which makes 400 times as slow what is asked first."""
    if stalled == "one leg of two":
        found = change(loads(blocks=2), paced(1 / 400), where=lambda r: r.leg < 3)
    else:
        quick = change(loads(), paced(400))
        found = change(quick, paced(1 / 400), where=lambda r: r.leg % 6 < 3 and r.sample[-1] in "147")
    assert "keeps whole answers" not in " ".join(said(run(probes(), needles(64), found)))


@pytest.mark.parametrize("fault", TIMES)
def test_instruments_that_disagree_are_told(fault):
    make, kind, text = TIMES[fault]
    sane = [*probes(), *needles(64), *loads()]
    found = run(change(sane, make, where=lambda r: bool(r.cell)))
    lines = [line for line in said(found) if line.startswith(f"{kind} m: ")]
    assert any(text in line for line in lines), said(found)
    assert "rank" not in believed(found)
    assert "speed" not in believed(found)


def test_a_few_streams_that_stall_are_told():
    found = run(probes(), needles(64), change(loads(), stall, share=0.2))
    assert any("some answers stall" in line for line in said(found))
    assert "rank" not in believed(found)


@pytest.mark.parametrize("lost", ["system prompt", "first half"])
def test_not_the_same_prompt_has_no_figures(lost):
    def make(r, rng):
        return replace(r, prompt_tokens=r.prompt_tokens - 12 if lost == "system prompt" else r.prompt_tokens // 2)

    found = run(change([*probes(), *needles(64), *loads()], make))
    [line] = [line for line in said(found) if line.startswith("DIFFERS")]
    assert line.startswith("DIFFERS m: not the same prompt: it read ")
    assert (verdicts(found), believed(found)) == ({"all": "differs"}, [])


def test_prompts_that_one_side_does_not_count_are_not_known_to_be_the_same():
    found = run(change([*probes(), *needles(64), *loads()], lambda r, rng: replace(r, prompt_tokens=0)))
    assert any("m: whether it reads the prompts that the baseline reads" in line for line in said(found))
    assert believed(found) == []


def test_another_model_is_told_and_clears_nothing():
    facts = {M: COMPRESSED | {"features": {"model": "other"}}}
    found = run(probes(**facts), needles(64), loads())
    assert any(line.startswith("DIFFERS m: model: other (baseline: m)") for line in said(found))
    assert believed(found) == []


FEATURES = {
    "cache eviction": ("true", "false", False, True),
    "sparse attention": ("true", "false", False, True),
    "kv_cache_dtype": ("fp8_e4m3", "auto", False, True),
    "prefix caching": ("False", "True", True, True),
    "tokenizer": ("other", "m", True, True),
    "dtype": ("float16", "bfloat16", True, False),
    "quantization": ("fp8", "None", True, False),
    "inference precision": ("f32", "bf16", True, False),
}
"""What the variant and the baseline say, whether it ends a run with an error, and whether figures are believed: other
weights are another model."""


@pytest.mark.parametrize("name", FEATURES)
def test_what_is_tested_differs_and_is_no_error(name):
    """Anything else that differs ends a run with an error (`--kv-strict`)."""
    mine, theirs, fatal, ranked = FEATURES[name]
    plain = UNCOMPRESSED | {"features": {"model": "m", name: theirs}}
    own = COMPRESSED | {"features": {"model": "m", name: mine}}
    report = analyse(run(probes(**{BASE: plain, AGAIN: plain, M: own}), needles(64), chats(n=80), loads()))
    line = f"DIFFERS m: {name}: {mine} (baseline: {theirs})"
    assert [(note.text, note.severity) for note in report.table("headlines").notes] == [
        (f"{line}.", "error" if fatal else "warning")
    ]
    assert report.alarms == [line] * fatal
    assert ("rank" in believed(report.run)) is ranked
    assert bool(believed(report.run)) is ranked


@pytest.mark.parametrize(("mine", "theirs"), [("True", None), (None, "True")])
def test_what_one_server_does_not_say_is_not_known_to_differ(mine, theirs):
    """A server at a URL has no log to be read."""
    told = {arm: {"features": {"model": "m"} | ({"x": x} if x else {})} for arm, x in ((BASE, theirs), (M, mine))}
    report = analyse(run(probes(baseline=UNCOMPRESSED | told[BASE], m=COMPRESSED | told[M]), needles(64), chats(n=80)))
    assert [note.text for note in report.table("headlines").notes] == [
        "COULD NOT TELL m: x: True, the baseline does not say."
        if mine
        else "COULD NOT TELL m: x: it does not say, the baseline: True."
    ]
    assert report.alarms == []


# what failed


def test_failures_are_told_with_their_share():
    def make(r, rng):
        return replace(r, status="failed", error="HTTP 500: out of memory", text="", count=0, score=None)

    found = run(change([*probes(), *needles(32), *chats(n=80), *loads()], make, share=0.2))
    [line] = [line for line in said(found) if line.startswith("FAILED")]
    assert "answers failed (1" in line
    assert "HTTP 500: out of memory" in line
    assert believed(found) == []


def test_a_server_that_was_started_again_is_told():
    again = [replace(p, counters={"restarted": 1.0}) if p.method == M else p for p in probes()]
    found = run(again, needles(64), loads())
    assert any(
        line.startswith("RESTARTED m: its server ended by itself and was started again, 1 time") for line in said(found)
    )
    assert believed(found) == []


def test_headlines_are_ranked_and_each_is_said_once():
    faults = [*probes(baseline=COMPRESSED, m=UNCOMPRESSED), *change(chats(n=32), noisy())]
    lines = said(run(faults, change(loads(), lambda r, rng: replace(r, status="failed", error="x"), (AGAIN,), 0.3)))
    kinds = [next(kind for kind in get_args(Kind) if line.startswith(kind)) for line in lines]
    assert kinds[0] == "COMPRESSED", "the baseline's first"
    ranks = [get_args(Kind).index(kind) for kind in kinds[1:]]
    assert ranks == sorted(ranks)
    assert len(set(lines)) == len(lines)


# over the wire


def answers(behaviour, arm, prompts, count=None):
    """What one server answers, asked as two legs ask it. It writes a token each 20 ms: at 2 ms a whole answer took a
    tenth of a second, in which this process cannot always send and read a kept one eight times."""

    async def go(url):
        found = []
        async with Client(url, count=count) as client:
            for leg in range(2):
                asks = [
                    Ask(f"s{at}", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": p}), 48)
                    for at, p in enumerate(prompts)
                ]
                replies = await asyncio.gather(*map(client.ask, asks))
                known = {"evaluation": "throughput", "cell": "c", "block": 0, "leg": leg}
                found += [_served(reply, ask, method=arm, **known) for reply, ask in zip(replies, asks, strict=True)]
        return found

    with Server(behaviour=behaviour, itl=0.02, prefix_caching=False) as server:
        return asyncio.run(go(server.url))


PROMPTS = [f"tell me about number {at} of a long list" for at in range(16)]


@pytest.fixture(scope="module")
def sane():
    return [r for arm in (BASE, AGAIN) for r in answers("normal", arm, PROMPTS)]


def words(text):
    return len(text.split())


WIRE = {
    "normal": ("", ""),
    "one-piece": ("COULD NOT TELL m: speed: ", "came in one piece"),
    "overstated": ("COULD NOT TELL m: speed and length: ", "1.50 times as many tokens"),
    "replayed": ("DIFFERS m: it writes the same answer ", "something keeps whole answers"),
    "halved": ("DIFFERS m: not the same prompt: ", "it read "),
    "flaky": ("FAILED m: ", "HTTP 500: out of memory"),
    "garbage": ("BROKEN m: ", "language "),
}


@pytest.mark.parametrize("behaviour", WIRE)
def test_a_server_that_does_this_is_told(sane, behaviour):
    found = run(probes(), sane, answers(behaviour, M, PROMPTS))
    start, text = WIRE[behaviour]
    told = [line for line in said(found) if line.split(":")[0].endswith(" m")]
    assert bool(told) == bool(start), told
    assert any(line.startswith(start) and text in line for line in told) or not start, told
    assert bool(believed(found)) == (not start)


def test_a_tokenizer_decides_what_usage_overstates(sane):
    found = run(probes(), sane, answers("overstated", M, PROMPTS, count=words))
    assert any(
        line.startswith("DIFFERS m: its server counts 2,304 tokens where the model's tokenizer counts 1,536")
        for line in said(found)
    )
    row = next(row for row in served_rows(found) if row.method == M)
    assert row.tokens == 48


def test_a_server_that_hangs_costs_its_timeout(tmp_path):
    """It waited a minute, whatever --kv-timeout said."""

    async def go():
        async def silent(reader, writer):
            try:
                await asyncio.sleep(30)
            finally:
                writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(Exception, match=r"no server answers at .* no answer within 0.2 s"):
            await Started("m", Spec.parse(url), tmp_path / "log", Path, timeout=0.2).start()
        server.close()
        return time.monotonic() - begin

    assert asyncio.run(go()) < 10


def test_a_port_in_an_assignment_is_filled_in(tmp_path):
    """It was passed on as it stood."""
    command = f"PORT={{port}} sh -c 'exec {shlex.quote(sys.executable)} -m suites.checks.scripted --port $PORT'"

    async def go():
        server = Started("m", Spec.parse(command), tmp_path / "log", Path, startup=60)
        await server.start()
        try:
            assert (server.up, server.ended) == (True, False)
            reply = await server.ask(Ask("a", ({"role": "user", "content": "hi"},)))
            assert server._process is not None
            await asyncio.to_thread(server._process.stop)
            assert server.ended, "nobody asked it to end"
        finally:
            await server.stop()
        assert not server.ended
        return reply

    assert asyncio.run(go()).error == ""


def test_a_server_beside_itself_raises_no_alarm():
    """At 5 % a pair, 2 of 4 are as unlikely as 1 in 71; all 200 at night."""
    pairs = depth(4, nulls.PAIRS)
    assert len(nulls.count(pairs)) <= depth(1, nulls.ALLOWED)
