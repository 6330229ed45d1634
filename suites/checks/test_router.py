"""The router: a server is a queue with known waits, stretches of steps are steps, policies do what they say."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvsuite.cli import main
from kvsuite.errors import UsageError
from kvsuite.predict import laws
from kvsuite.predict.cells import Cell
from kvsuite.predict.cells import read as cells_of
from kvsuite.predict.fleet import Request, Server, simulator
from kvsuite.predict.laws import Law, fitted
from kvsuite.predict.router import (
    POLICIES,
    Chats,
    Outcome,
    Policy,
    Setup,
    Stated,
    expected,
    outcomes,
    over_seeds,
    simulate,
)
from kvsuite.records import read
from kvsuite.workloads import Arrivals
from suites.checks.depth import depth

PLAIN = Law("full", (0.0, 2e-4, 0.0), (0.02, 1e-4, 1e-6))
SMALL = Law("kivi", (0.0, 2e-4, 0.0), (0.02, 1e-4, 3e-7), share=0.3)
SMOKE = Path(__file__).parents[2] / "reports" / "cpu" / "smoke"
NAMES = [policy.name for policy in POLICIES]


def asks(*shapes):
    """Requests of (arrival, prompt, answer)."""
    return [Request(at, prompt, {"full": n, "kivi": n}, {"full": n, "kivi": n}) for at, prompt, n in shapes]


def served(law, requests, batch=8, memory=math.inf):
    """One server on its own."""
    env = simulator().Environment()
    server = Server(env, law, batch, memory)

    def arrive():
        for r in requests:
            yield env.timeout(r.at - env.now)
            server.submit(r)

    env.process(arrive())
    env.run()
    return server


def stepwise(law, requests, batch, memory):
    """The same, one step at a time: when each first and last token comes, and the most memory that was held."""
    time, waiting, running, most = 0.0, [], [], 0.0
    coming, first, done = list(enumerate(requests)), {}, {}

    def held(further):
        return sum(law.held(requests[i].prompt + made + further) for i, made in running)

    while coming or waiting or running:
        if not waiting and not running:
            time = max(time, coming[0][1].at)
        while True:
            while coming and coming[0][1].at <= time:
                waiting.append((coming.pop(0)[0], 0))
            if not waiting or len(running) >= batch:
                break
            at, made = waiting[0]
            if running and held(0) + law.held(requests[at].prompt + made + 1) > memory:
                break
            waiting.pop(0)
            time += law.prefill_seconds(requests[at].prompt + made)
            first.setdefault(at, time)
            if made + 1 >= requests[at].lengths[law.method]:
                done[at] = time
            else:
                running.append((at, made + 1))
        if not running:
            continue
        while len(running) > 1 and held(1) > memory:
            waiting.insert(0, running.pop())
        most = max(most, held(1))
        time += law.step_seconds(len(running), sum(requests[i].prompt + made for i, made in running))
        running = [(i, made + 1) for i, made in running]
        for i, made in list(running):
            if made >= requests[i].lengths[law.method]:
                running.remove((i, made))
                done[i] = time
    return first, done, most


LAWS = (PLAIN, SMALL, replace(PLAIN, budget=20.0), replace(PLAIN, step=(0.02, 0.0, 0.0)))
WORLDS = depth(150, 2000)


def busy(rng, span=1.0):
    """Up to 25 requests that come while others run."""
    n = int(rng.integers(1, 26))
    shapes = zip(np.sort(rng.random(n)) * span, rng.integers(1, 61, n), rng.integers(1, 41, n), strict=True)
    return asks(*((float(at), int(prompt), int(answer)) for at, prompt, answer in shapes))


def test_stretches_of_steps_are_steps():
    preempted = 0
    for seed in range(WORLDS):
        rng = np.random.default_rng([11, seed])
        requests, law = busy(rng), LAWS[seed % len(LAWS)]
        batch, memory = int(rng.integers(1, 12)), float(rng.choice([101, 120.5, 150, math.inf]))
        server = served(law, requests, batch, memory)
        first, done, most = stepwise(law, requests, batch, memory)
        assert most <= memory
        assert server.load == 0
        assert [r.first for r in requests] == pytest.approx([first[at] for at in range(len(requests))], abs=1e-6)
        assert [r.done for r in requests] == pytest.approx([done[at] for at in range(len(requests))], abs=1e-6)
        preempted += server.preempted
    assert preempted > WORLDS / 2


def test_memory_makes_the_youngest_wait():
    requests = asks((0, 50, 40), (0.001, 40, 40), (0.002, 30, 5))
    server = served(PLAIN, requests, memory=120)
    assert server.preempted == 1
    assert [r.made for r in requests] == [40, 40, 5]
    assert requests[0].done < requests[2].first < requests[1].done
    roomy = asks((0, 50, 40), (0.001, 40, 40), (0.002, 30, 5))
    assert served(PLAIN, roomy).preempted == 0
    assert roomy[2].first < roomy[0].done


def test_what_never_fits_is_refused():
    with pytest.raises(UsageError, match="140 tokens does not fit a server's memory of 139"):
        served(PLAIN, asks((0, 100, 40)), memory=139)
    assert served(SMALL, asks((0, 100, 40)), memory=43).load == 0


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_one_server_of_batch_1_is_m_d_1(busy):
    """Pollaczek and Khinchine: the mean wait at a constant service S is ρ·S / (2·(1 - ρ))."""
    law = Law("full", (0.0, 0.002, 0.0), (0.03, 0.0, 0.0))
    service = 100 * 0.002 + 20 * 0.03
    setup = Setup((law, law), Fixed(), Arrivals("poisson", rate=busy / service), requests=depth(2000, 20_000), batch=1)
    setup = replace(setup, plain=1, compressed=0)
    waits = []
    for seed in range(depth(16, 20)):
        done = simulate(setup, Policy("one", "plain", lambda r, servers, rng: servers[0]), seed)[500:]
        assert all(r.done - r.at >= service - 1e-6 for r in done)
        waits.append(np.mean([r.done - r.at - service for r in done]))
    found = over_seeds(np.array(waits))
    true = busy * service / (2 * (1 - busy))
    assert abs(found.mean - true) < 3.5 * found.se
    assert found.se < 0.1 * true


class Fixed:
    """All prompts of 100 tokens, all answers of 21."""

    def draw(self, n, methods, rng):
        return np.full(n, 100.0), {m: np.full(n, 21.0) for m in methods}


def test_latency_is_prefill_and_a_quotient():
    env = simulator().Environment()
    server = Server(env, PLAIN, 8)
    short, long = asks((0, 100, 10), (0, 100, 300))
    assert expected(short, server, 10) == pytest.approx(0.02 + 10 * PLAIN.step_seconds(1, 100))
    assert expected(long, server, 300) > expected(short, server, 10)
    quick = Server(env, replace(PLAIN, step=(0.01, 5e-5, 5e-7)), 8)
    assert expected(long, quick, 300) < expected(long, server, 300)


def test_the_oracle_knows_when_it_is_done():
    """Where nobody comes after it, but for the rest of the step or prefill under way."""
    for seed in range(WORLDS // 3):
        span = (0.2, 1.0)[seed % 2]  # with a queue, and with sequences that have begun
        *before, last = [*busy(np.random.default_rng([12, seed]), span), *asks((span + 0.01, 30, 25))]
        env = simulator().Environment()
        server = Server(env, Law("full", (0.0, 1e-3, 0.0), (0.002, 2e-3, 2e-5)), 100)
        told = []

        def arrive(server=server, requests=(*before, last), told=told, env=env):
            for r in requests:
                yield env.timeout(r.at - env.now)
                if r is requests[-1]:
                    told.append(server.forecast(r))
                server.submit(r)

        env.process(arrive())
        env.run()
        assert last.done - last.at == pytest.approx(told[0], abs=0.12), "a step of 26 takes 0.1 s"


def test_policies():
    env = simulator().Environment()
    plain, *small = servers = [Server(env, PLAIN, 8), *(Server(env, SMALL, 8) for _ in range(3))]
    rng, one = np.random.default_rng(0), asks((0, 50, 20))[0]
    chosen = {p.name: {p.server(one, servers, "full", rng) for _ in range(40)} for p in POLICIES}
    assert chosen["mixed, at random"] == chosen["mixed, least loaded"] == set(servers)
    assert chosen["by throughput"] <= set(small)
    assert chosen["by length"] == set(servers), "as long on all"
    careful = next(p for p in POLICIES if p.careful)
    assert careful.server(replace(one, fragile=True), servers, "full", rng) is plain
    one.told = {"full": 20.0, "kivi": 60.0}
    by = {p.name: p for p in POLICIES}
    assert by["by length"].server(one, servers, "full", rng) is plain
    assert by["by both"].server(one, servers, "full", rng) is plain
    assert by["by both, blind"].server(one, servers, "full", rng) in small
    assert by["oracle"].server(one, servers, "full", rng) in small, "what is told does not matter"
    for _ in range(6):
        plain.submit(asks((0, 500, 500))[0])
    assert by["mixed, least loaded"].server(one, servers, "full", rng) in small


@pytest.fixture(scope="module")
def small():
    """A busy fleet, all policies, the same 150 requests for each."""
    setup = Setup((PLAIN, SMALL), Stated(), Arrivals("poisson", rate=20), requests=150, fragile=0.3)
    return setup, {o.policy.name: o for o in outcomes(setup, 4)}


def test_every_policy_answers_the_same_requests(small):
    setup, found = small
    assert list(found) == NAMES
    plain = simulate(setup, POLICIES[0], 1)
    oracle = simulate(setup, POLICIES[-1], 1)
    assert [(r.at, r.prompt, r.lengths) for r in plain] == [(r.at, r.prompt, r.lengths) for r in oracle]
    assert {r.method for r in plain} == {"full"}
    assert all(r.at < r.first <= r.done for r in plain)
    assert all(r.made == r.lengths[r.method] for r in oracle)


def test_figures(small):
    _, found = small
    assert found["plain, least loaded"].figures["exposed"].mean == 0
    assert found["compressed, least loaded"].figures["exposed"].mean == 1
    assert found["by both, fragile plain"].figures["exposed"].mean == 0
    assert 0.5 < found["mixed, at random"].figures["exposed"].mean < 0.95
    for outcome in found.values():
        f = outcome.figures
        assert f["mean"].low < f["mean"].mean < f["mean"].high
        assert f["p50"].mean < f["p95"].mean <= f["p99"].mean
        assert 0 <= f["slo"].mean <= 1
    base = found["plain, least loaded"]
    assert base.ratio(base).mean == 1
    assert found["oracle"].ratio(found["mixed, at random"]).high < 1
    assert found["compressed, least loaded"].ratio(base).high < 1


def test_an_objective_is_met_or_missed(small):
    setup, _ = small
    policy = [POLICIES[0]]
    for ttft, itl, met in ((1e3, 1e3, 1), (1e-9, 1e3, 0), (1e3, 1e-9, 0)):
        found = outcomes(replace(setup, ttft=ttft, itl=itl, requests=20), 2, policy)[0].figures["slo"].mean
        assert found == pytest.approx(met, abs=0.15), "an answer of one token has no time between tokens"


def test_choosing_the_shorter_answer_is_all_that_routing_gains_here():
    """Two methods that are as fast and as long: only who is expected to say less differs, and blind nothing does."""
    same = replace(PLAIN, method="kivi")
    setup = Setup((PLAIN, same), Stated(), Arrivals("poisson", rate=12), requests=200)
    found = {o.policy.name: o for o in outcomes(setup, 4)}
    base = found["mixed, least loaded"]
    assert found["by both"].ratio(base).high < 0.95
    assert found["by both"].figures["tokens"].mean < 0.9 * base.figures["tokens"].mean
    blind = found["by both, blind"].ratio(base)
    assert blind.low < 1.02
    assert blind.mean > 0.97


def test_more_noise_makes_predicted_lengths_worth_less(small):
    setup, found = small
    blind = outcomes(replace(setup, error=3.0), 4, [p for p in POLICIES if p.name == "by both"])[0]
    assert blind.ratio(found["by both"]).mean > 1.02


def cells(law, widths=(1, 4, 16), lengths=(256, 1024, 4000), plain=True):
    each = list(itertools.product(widths, lengths))
    steps = [Cell("", "m", law.method, "decoding", b, n, law.step_seconds(b, b * n), plain) for b, n in each]
    return steps + [Cell("", "m", law.method, "prefill", 1, n, law.prefill_seconds(n), plain) for n in lengths]


def test_a_law_is_found_again():
    true = Law("full", (0.01, 2e-4, 3e-9), (0.02, 1e-4, 1e-6))
    found = fitted([*cells(true), *cells(SMALL, plain=False)])
    assert list(found) == ["full", "kivi"]
    assert found["full"].prefill == pytest.approx(true.prefill)
    assert found["full"].step == pytest.approx(true.step)
    assert found["full"].off < 1e-9
    alone = fitted(cells(true, widths=(8,), lengths=(512, 2048)))["full"]
    assert alone.step_seconds(8, 8 * 1024) == pytest.approx(true.step_seconds(8, 8 * 1024))
    assert alone.step[1] == 0, "one width says nothing of what a sequence costs"


def test_laws_that_cannot_be_had():
    with pytest.raises(UsageError, match="several models, n among them"):
        fitted([*cells(PLAIN), replace(cells(PLAIN)[0], model="n")])
    with pytest.raises(UsageError, match="uncompressed cache was not timed"):
        fitted(cells(SMALL, plain=False))
    with pytest.raises(UsageError, match="unknown method that was timed 'kiwi': did you mean 'kivi'"):
        laws.law({"kivi": SMALL}, "kiwi")


def test_stated_lengths():
    prompts, lengths = Stated(factor=2.0).draw(4000, ["full", "kivi"], np.random.default_rng(0))
    for column in (prompts, *lengths.values()):
        assert column.min() >= 1
        assert column.max() <= 1024
        assert (column == np.rint(column)).all()
    assert np.median(lengths["full"]) == pytest.approx(210, rel=0.1)
    assert np.median(lengths["kivi"] / lengths["full"]) == pytest.approx(2, rel=0.1)


@pytest.fixture
def told(capsys):
    def go(*words):
        code = main(["route", "simulate", *words])
        return code, *capsys.readouterr()

    return go


def test_command(told, tmp_path):
    few = ["--requests", "30", "--seeds", "2"]
    code, out, _ = told(*few, "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found["policies"]) == NAMES
    assert set(found["parts"]) >= {"mixing the fleet", "routing by both", "what the oracle has left"}
    code, out, _ = told(*few, "--arrivals", "bursts:5@1", "--servers", "2+2")
    assert code == 0
    assert "2 + 2 servers · bursts:5@1 · 30 requests" in out
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(json.dumps({"at": at, "messages": [{"role": "user", "content": "x"}]}) + "\n" for at in (2, 0, 1))
    )
    code, out, _ = told("--seeds", "2", "--arrivals", "trace", "--workload", str(trace))
    assert code == 0
    assert "a trace · 3 requests" in out


def test_command_reads_times(told, tmp_path):
    file = tmp_path / "times.csv"
    rows = [
        f"m,{name},{c.batch},{c.length},{c.stage},{c.rate}"
        for name, law in (("None-16", PLAIN), ("X-4", SMALL))
        for c in cells(law)
    ]
    file.write_text("\n".join(["model,method,bsz,prompt_len,stage,thr", *rows]))
    code, out, _ = told(str(file), "--requests", "20", "--seeds", "2", "--json", "--share", "0.3")
    assert code == 0
    assert json.loads(out)["methods"] == ["None-16", "X-4"]
    code, _, said = told(str(file), "--method", "None-16")
    assert code == 2
    assert "is the uncompressed cache" in said


def test_command_reads_a_run(told):
    """Every request is one of its chats, with that method's own answer."""
    run = read(SMOKE)
    code, out, _ = told(str(SMOKE), "--method", "kivi:bits=4", "--requests", "40", "--seeds", "2", "--json")
    assert code == 0
    assert json.loads(out)["methods"] == ["full", "kivi:bits=4"]
    texts = Chats.of(run, ["full", "kivi:bits=4"])
    known = {}
    for a in run.records:
        if a.kind == "answer" and a.evaluation == "length" and not a.repeat:
            known.setdefault(a.sample, {})[a.method] = (a.prompt_tokens, a.length)
    pairs = {(*x["full"], x["kivi:bits=4"][1]) for x in known.values()}
    prompts, lengths = texts.draw(200, ["full", "kivi:bits=4"], np.random.default_rng(0))
    assert set(zip(prompts, lengths["full"], lengths["kivi:bits=4"], strict=True)) == pairs
    law = fitted(cells_of(SMOKE), run)["kivi:bits=4"]
    assert law.share == pytest.approx(0.42, abs=0.02), "bytes at 1,024 tokens over full's"
    with pytest.raises(UsageError, match="holds no chats that full and fp9 answered"):
        Chats.of(run, ["full", "fp9"])
    code, _, said = told("--lengths", str(SMOKE))
    assert code == 2
    assert "no chats that fp16 and kivi-4 answered" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arrivals", "closed:8"], "do not wait for answers"),
        (["--arrivals", "trace"], "go together"),
        (["--servers", "4"], "how many are plain and how many compressed"),
        (["--servers", "0+4"], "how many are plain"),
        (["--seeds", "0"], "--seeds must be over 0"),
        (["--fragile", "2"], "a share from 0 to 1"),
        (["--method", "nothing"], "unknown method that was timed"),
        (["--memory", "100"], "does not fit a server's memory"),
    ],
)
def test_mistakes(told, words, said):
    code, out, err = told(*words)
    assert (code, out) == (2, "")
    assert said in err


def test_simpy_is_missed_in_a_sentence(told, monkeypatch):
    monkeypatch.setitem(sys.modules, "simpy", None)
    code, _, said = told()
    assert code == 2
    assert "pip install 'kvsuite[predict]'" in said


def test_seeds_give_an_interval():
    found = over_seeds(np.array([1.0, 2.0, 3.0, math.nan]))
    assert (found.mean, found.df) == (2, 2)
    assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3), rel=1e-4)
    assert over_seeds(np.array([1.0])).high == math.inf
    one = Outcome(POLICIES[0], {}, np.array([2.0, 8.0]))
    other = Outcome(POLICIES[1], {}, np.array([1.0, 4.0]))
    assert one.ratio(other).mean == pytest.approx(2)
