"""The baseline's likelihoods of what every arm answered: as servers return them, and as a sign of garbage."""

import asyncio
import math
import random

import numpy as np
import pytest

from kvsuite.analysis.likelihood import surprise, unlikely
from kvsuite.analysis.serving import checks
from kvsuite.analysis.tables import servers
from kvsuite.engines.openai import Client
from kvsuite.engines.request import Ask, Reply
from kvsuite.errors import UsageError
from kvsuite.plugin import scoring
from kvsuite.records import Scored
from suites.checks import nulls, signs
from suites.checks.planted import AGAIN, BASE, M, chats, needles, probes, run, said
from suites.checks.scripted import Server, answer

HELLO = ({"role": "user", "content": "hello there"},)
FIELD = {"return_token_ids": True}


def asked(behaviour, *, extra=FIELD, **more):
    """A reply of such a server, and what it makes of the reply's tokens."""

    async def go(url):
        async with Client(url) as client:
            reply = await client.ask(Ask("a", HELLO, 20, extra=extra))
            return reply, await client.likelihoods("prompt_logprobs", [1, 2], reply.ids or [1])

    with Server(behaviour=behaviour, **more) as server:
        return asyncio.run(go(server.url))


def test_token_ids_come_with_an_answer_where_they_are_asked_for():
    reply, logs = asked("normal")
    assert (len(reply.prompt_ids), len(reply.ids), reply.text) == (2, 20, "".join(answer(HELLO, 20)))
    assert logs[1:] == [math.log(1 / 2)] * 19
    assert asked("normal", extra={})[0].ids == []


def test_what_is_no_answer_is_unlikely():
    _, logs = asked("garbage")
    assert max(logs) == math.log(1e-6)


def test_a_server_that_does_not_say_it_is_one_sentence():
    with pytest.raises(UsageError, match=r"/v1/completions has no likelihoods \(HTTP 404: Not Found\)"):
        asked("normal", scores=False)


class Baseline:
    """Says it of answers whose tokens are all 1; counts."""

    def __init__(self):
        self.asked = []

    async def likelihoods(self, prompt, reply):
        self.asked.append((prompt, reply))
        if set(reply) != {1}:
            raise UsageError("no")
        return [-0.123456] * len(reply)


def scored(baseline, *replies):
    found, heard = [], scoring.Scoring()
    for arm, reply in replies:
        heard.hear(arm, "chat", reply)
    asyncio.run(heard.score(baseline, found.append))
    return found


def test_all_arms_of_a_sample_come_before_the_next(monkeypatch):
    short, long = ({"prompt_ids": [7] * n, "ids": [1] * 4} for n in (2, 9))
    replies = [(arm, Reply(name, **own)) for arm in (BASE, M) for name, own in (("long", long), ("short", short))]
    baseline = Baseline()
    found = scored(baseline, *replies, (M, Reply("alone", ids=[1])), (BASE, Reply("failed", ids=[1], error="x")))
    assert [(r.method, r.sample) for r in found] == [(arm, name) for name in ("short", "long") for arm in (BASE, M)]
    assert [len(prompt) for prompt, _ in baseline.asked] == [2, 9], "the baseline's prompt for all, each answer once"
    assert {tuple(r.logs) for r in found} == {(-0.1235,) * 4}
    other = Baseline()
    scored(other, *replies, (AGAIN, Reply("short", ids=[1] * 3)))
    assert [len(ids) for _, ids in other.asked] == [4, 3, 4], "another answer to one prompt is read, too"
    monkeypatch.setattr(scoring, "BUDGET", -1.0)
    assert scored(Baseline(), *replies) == []


def test_a_baseline_that_fails_once_is_asked_no_more():
    bad = {"prompt_ids": [7], "ids": [2]}
    baseline = Baseline()
    [failed] = scored(baseline, *((arm, Reply(name, **bad)) for arm in (BASE, M) for name in "ab"))
    assert (failed.status, failed.error, len(baseline.asked)) == ("failed", "no", 1)


def test_parts_of_an_answer():
    logs = {("chat", "a"): [-1.0] * 16 + [-9.0] * 16 + [-2.0] * 16, ("chat", "b"): [-1.0] * 20 + [-3.0] * 20}
    logs |= {("chat", "c"): [-5.0] * 31, ("chat", "d"): [-5.0] * 8, ("chat", "f"): [-5.0] * 7}
    found = surprise(logs, [*logs, ("chat", "e")])
    assert found[:3].tolist()[0] == [1, 9, 2]
    np.testing.assert_array_equal(found[1], [1, np.nan, 3])
    assert found[2:4].tolist() == [[5, 5, 5]] * 2
    assert np.isnan(found[4:]).all()
    own, other = unlikely(np.array([[1.0, 1, 1]] * 8), np.array([[1.0, 3.9, 4.1]] * 8))
    assert not own.any()
    assert other.all(0).tolist() == [False, False, True]
    assert not np.any(unlikely(found[4:], found[:2]))


def comparison(n=32, share=1.0, end=False, seed=0, arms=(BASE, AGAIN, M), floor=0.0):
    """Chats that read well, a share of which the baseline finds unlikely, or their ends."""
    rng = random.Random(seed)
    hit = {f"c{at}" for at in rng.sample(range(n), round(share * n))}
    noisy = {f"c{at}" for at in rng.sample(range(n), round(floor * n))}
    found = []
    for r in chats(n=n, seed=seed):
        bad = r.sample in (hit if r.method == M else noisy)
        logs = [rng.gauss(-9 if bad and (not end or k > 32) else -1.6, 0.5) for k in range(48)]
        found += [Scored(r.method, task=r.task, sample=r.sample, logs=logs)] if r.method in arms else []
        found.append(r)
    return run(probes(), found)


def sign(found):
    return next((s for s in checks(found)[M].signs if s.name == "likelihood"), None)


def test_what_the_baseline_finds_unlikely_is_broken():
    found = comparison()
    assert (sign(found).count, sign(found).floor, sign(found).failed) == (32, 0, True)
    assert any(line.startswith("BROKEN m: its answers are no answers: likelihood 32 of 32") for line in said(found))
    assert "likelihood 32 of 32 (start 0, middle 0, end 32)" in said(comparison(end=True))[0]
    assert sign(comparison(80, 0.25)).failed


def test_what_it_finds_likely_or_does_not_know_is_not():
    assert not checks(comparison(share=0.0))[M].broken
    assert not checks(comparison(share=0.25, floor=0.25, n=80))[M].broken, "the A/A arm shows it as often"
    for arms in ((), (BASE, AGAIN), (AGAIN, M)):
        found = comparison(arms=arms)
        assert sign(found) is None or sign(found).n == 0
        assert not checks(found)[M].broken


def test_a_report_says_how_much_was_read():
    found, known = comparison(), "said how likely the answers are (the sign likelihood)"
    read = [r for r in found.records if not (isinstance(r, Scored) and r.sample > "c3")]
    for more, end in (([], "."), ([Scored(M, "failed", "HTTP 400: no")], ": HTTP 400: no.")):
        [table] = servers.served(run(read, more))
        notes = [note.text for note in table.notes if "likelihood" in note.text]
        assert notes == [f"The baseline's server {known} to 24 of the 32 prompts of tasks{end}"]
    [table] = servers.served(run([r for r in read if not isinstance(r, Scored)]))
    assert not [note for note in table.notes if "likelihood" in note.text]


def test_short_answers_are_told_by_it():
    """Fewer than 100 characters tell no language; 8 tokens are enough here."""
    texts = chats(n=40, cap=20)
    assert checks(run(probes(), texts))[M].told < 40
    logs = [Scored(r.method, task=r.task, sample=r.sample, logs=[-1.5] * 8) for r in texts]
    assert checks(run(probes(), texts, logs))[M].told == 40


def test_garbage_in_short_answers_is_found_by_it():
    """As turboquant on vLLM's CPU build gave it: needles in 15 tokens, and noise up to the cap of 24."""
    texts = needles(n=32)
    nats = {BASE: [-0.2] * 15, AGAIN: [-0.2] * 15, M: [-7.3] * 24}
    found = run(probes(), texts, [Scored(r.method, task=r.task, sample=r.sample, logs=nats[r.method]) for r in texts])
    assert (sign(found).n, sign(found).count, sign(found).failed) == (32, 32, True)


def test_what_two_commands_write_into_one_document_stays():
    text = f"Before.\n\n{signs.MARK}\n{signs.END}\n\nBetween.\n\n{nulls.MARK}\n\nOld.\n"
    both = f"Before.\n\n{signs.MARK}\n\n| t |\n\n{signs.END}\n\nBetween.\n\n{nulls.MARK}\n\nNew.\n"
    assert nulls.placed(signs.placed(text, "| t |"), "New.") == both
    assert signs.placed(nulls.placed(text, "New."), "| t |") == both
    assert nulls.placed(signs.placed(both, "| t |"), "New.") == both
    for wrong in (
        text.replace(signs.END, ""),
        text.replace(signs.MARK, ""),
        f"{nulls.MARK}\n{signs.MARK}\n{signs.END}",
    ):
        with pytest.raises(ValueError, match="above what"):
            signs.placed(wrong, "| t |")
    signs.placed(signs.DOCUMENT.read_text(), "| t |")
