"""``kvsuite compare`` and ``kvsuite plan`` as a user meets them: what changed, what decides, what is refused."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvsuite.analysis import stats
from kvsuite.analysis.report import analyse
from kvsuite.analysis.speed import blocks_needed
from kvsuite.cli import main
from kvsuite.records import Answer, RunFolder, Timing, encode, read
from kvsuite.report import terminal
from suites.checks.drawn import words
from suites.checks.test_decision import forced, references

FACTS = {
    "model": {"name": "tiny", "fingerprint": "1"}, "texts": {"chat": "2"}, "settings": {"cap": 200, "temperature": 0},
    "environment": {"cpu": "one", "cores": 2, "threads": 2},
}  # fmt: skip
LENGTHS = np.random.default_rng(0).integers(20, 150, 60)
NOISY = np.clip(LENGTHS + np.random.default_rng(1).integers(-9, 10, 60), 1, 200)
RIGHT = (np.random.default_rng(2).random(60) < 0.8).astype(float)
SHARED = {"finish": "stop", "cap": 200, "prefill_seconds": 0.5, "decode_share": 1.0}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def told(capsys):
    """The code of a command, and what it printed, its lines joined."""

    def go(*words):
        code = main(list(map(str, words)))
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), err

    return go


def chats(method, lengths=LENGTHS, repeat=0, **more):
    said = [f"{length} words of {repeat}" for length in lengths]
    kind = {"evaluation": "length", "task": "chat", "type": "chat", "repeat": repeat}
    return [
        Answer(method, sample=f"q{i}", tokens=[1] * int(n), text=said[i], **SHARED | kind | more)
        for i, n in enumerate(lengths)
    ]


def needles(method, scores=RIGHT):
    return [
        Answer(method, task="needle", type="synthetic", sample=f"n{i}", score=x, tokens=[1], text=f"{x}", **SHARED)
        for i, x in enumerate(scores)
    ]


def timing(method, *seconds):
    rounds = {"seconds": list(seconds), "baseline_seconds": [0.2] * len(seconds)}
    return Timing(method, cache="kvsuite.cache.x", checked=0.5, width=8, length=512, tokens=8, **rounds)


def left(name, *records, facts=FACTS):
    run = RunFolder(Path(name))
    run.describe(facts)
    for record in records:
        run.append(record)
    return name


def one_line(found):
    code, out, err = found
    assert (code, out, err.count("\n"), err[:9]) == (2, "", 1, "kvsuite: "), err
    return err


def test_the_same_answers_changed_nothing(told):
    left("a", *chats("full"), *chats("m", NOISY), *needles("full"), timing("m", 0.1, 0.11, 0.1))
    code, out, err = told("compare", "a", "a")
    assert (code, err) == (0, "")
    assert "Nothing is worse that can be told. The same answers in both: full, m." in out
    assert "- worse" not in out


def test_a_change_is_found_and_named(told):
    slow, fast = timing("m", 0.15, 0.16, 0.15, 0.16), timing("m", 0.1, 0.11, 0.1, 0.11)
    worse = [*chats("m", np.round(LENGTHS * 1.25)), *needles("m", RIGHT * (np.arange(60) > 20)), slow]
    left("a", *chats("full"), *needles("full"), *chats("m"), *needles("m"), fast)
    left("b", *chats("full"), *needles("full"), *worse)
    _, out, _ = told("compare", "a", "b")
    assert "b against a" in out
    assert "Worse (p < 5 % after Holm): m: quality; m: length." in out
    assert "The same answers in both: full." in out
    assert f"m length {np.round(LENGTHS * 1.25).sum() / LENGTHS.sum():.2f} ×" in out
    assert [word in out for word in ("m quality -", "speed 0.68 ×", "worse")] == [True] * 3
    _, out, _ = told("compare", "b", "a")
    assert "Worse (p < 5 % after Holm): m: length." in out, "shorter answers are no gain, better ones no harm"
    assert "m quality +31.7 pt" in out


def test_what_both_answered_is_resampled_once(told, monkeypatch):
    calls, bootstrap = [], stats.bootstrap
    monkeypatch.setattr(stats, "bootstrap", lambda *given: calls.append(given) or bootstrap(*given))
    left("a", *chats("full"), *chats("m"), *needles("m"))
    left("b", *chats("full"), *chats("m", NOISY), *needles("m", RIGHT[::-1]))
    assert told("compare", "a", "b")[0] == 0
    assert len(calls) == 1, "chats of m: its tasks are counted, and full's answers are the same"


def test_the_geometric_length_stands_beside_the_verdicts():
    settings = {"settings": FACTS["settings"] | {"compress": "prompt", "batch": [8], "length": [512]}}
    environment = {"environment": FACTS["environment"] | {"gpu": None, "dtype": "float32"}}
    left("a", *chats("full"), *chats("m", NOISY), facts=FACTS | settings | environment | {"methods": ["full", "m"]})
    report = analyse(read(Path("a")))
    cell = report.cell("beside", "m", "log length")
    assert cell.low < cell.value < cell.high
    assert cell.value == pytest.approx(math.exp(np.log(NOISY / LENGTHS).mean()))
    assert cell.p is not None


def test_noise_is_no_change(told):
    left("a", *chats("full"), *chats("m"))
    left("b", *chats("full"), *chats("m", NOISY))
    _, out, _ = told("compare", "a", "b", "--margins", "length=0.2")
    assert "Nothing is worse that can be told." in out
    assert "not worse" in out
    assert "undecided" in told("compare", "a", "b", "--margins", "length=0.001")[1]


def test_seconds_of_full_are_compared_on_one_machine_only(told):
    before, after = (timing("full", *x) for x in ([0.1, 0.11, 0.1], [0.3, 0.31, 0.3]))
    left("a", before, timing("m", 0.1, 0.1))
    left("b", after, timing("m", 0.1, 0.1))
    assert "full, decode 8 · 512 speed" in told("compare", "a", "b")[1], "shown, but no verdict"


KNOWN = {"gpu": "a GPU", "cpu": "one", "cores": 2, "threads": 2}


@pytest.mark.parametrize(
    ("device", "first", "second", "why"),
    [
        ("cuda", {}, {}, ""),
        ("cpu", {}, {"gpu": None}, ""),
        ("cpu", {}, {"cpu": "another"}, "of different hardware"),
        ("cpu", {"cpu": ""}, {"cpu": ""}, "on what hardware a and b ran is not known"),
        ("cpu", {}, {"threads": None}, "on what hardware b ran is not known"),
        ("cuda", {}, {"gpu": "another GPU"}, "of different hardware"),
        ("cuda", {"gpu": None}, {"gpu": None}, "on what hardware a and b ran is not known"),
        ("cpu", {}, {"kv_dtype": "float32"}, "number formats"),
    ],
)
def test_seconds_on_unknown_hardware_are_compared_with_none(told, device, first, second, why):
    for name, environment, seconds in (("a", first, [0.1, 0.11, 0.1]), ("b", second, [0.3, 0.31, 0.3])):
        settings = {"settings": FACTS["settings"] | {"device": device}, "environment": KNOWN | environment}
        left(name, timing("full", *seconds), timing("m", 0.1, 0.1), facts=FACTS | settings)
    _, out, _ = told("compare", "a", "b")
    assert "m, decode" in out
    assert ("full, decode" in out) == (not why)
    assert ("The speed of full itself is not compared: " in out) == bool(why)
    assert why in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"name": "big", "fingerprint": "1"}}, "different models (name: 'tiny' and 'big')"),
        ({"texts": {"chat": "9"}}, "different texts (chat: '2' and '9')"),
        ({"settings": {"cap": 100, "temperature": 0}}, "different settings (cap: 200 and 100)"),
    ],
)
def test_runs_of_different_things_are_refused(told, change, said):
    left("a", *chats("full"))
    left("b", *chats("full"), facts=FACTS | change)
    assert f"a and b are of {said} and cannot be compared" in one_line(told("compare", "a", "b"))


def test_what_cannot_be_compared_is_said(told):
    left("a", *chats("full"))
    left("b", *chats("other"))
    left("capped", *chats("full", NOISY, cap=100))
    Path("s").mkdir()
    Path("s/base_trec_eval.json").write_text(json.dumps([{"id": 0, "score": 1}]))
    assert "say which method, a#METHOD; there are full" in one_line(told("compare", "a", "artifact:s/base"))
    assert "a#full has no dataset trec" in one_line(told("compare", "artifact:s/base", "a#full"))
    assert "'s' is not a run folder" in one_line(told("compare", "a", "s"))
    assert "have no method in common" in one_line(told("compare", "a", "b"))
    assert "unknown method in a 'x'" in one_line(told("compare", "a#x", "a#full"))
    assert "sample q0 of chat had different caps, 200 tokens and 100" in one_line(told("compare", "capped", "a"))
    assert "gone" in one_line(told("compare", "gone", "a"))


def test_two_results_are_compared_like_runs(told):
    left("a", *chats("full"), *chats("m", np.round(LENGTHS * 1.25)))
    code, out, _ = told("compare", "a#full", "a#m")
    assert (code, "Worse (p < 5 % after Holm): answers: length." in out) == (0, True)
    left("b", *chats("full")[:-2])
    said = one_line(told("compare", "a#full", "b#full"))
    assert "b/records.jsonl#full has no sample q58 of chat, which a/records.jsonl#full has (and 1 more)" in said
    assert "left out of chat: 2 of 60" in told("compare", "a#full", "b#full", "--allow-missing")[1]


def test_arms_of_a_run_with_tasks_and_chats_are_compared_task_by_task(told):
    worse = [*chats("m", np.round(LENGTHS * 1.25)), *needles("m", RIGHT * (np.arange(60) > 20))]
    left("a", *chats("full"), *needles("full"), *worse)
    code, out, err = told("compare", "a#full", "a#m")
    assert (code, err) == (0, "")
    assert "a#m against a#full" in out
    assert "Worse (p < 5 % after Holm): chat: length; needle: quality." in out
    left("b", *chats("full"), *needles("full")[:-2])
    assert "no sample n58 of needle" in one_line(told("compare", "a#m", "b#full"))
    assert "left out of needle: 2 of 60 samples" in told("compare", "a#m", "b#full", "--allow-missing")[1]
    left("c", *(replace(a, score=None) for a in needles("full")), *chats("full"))
    said = one_line(told("compare", "a#m", "c#full"))
    assert "c#full (needle)" in said
    assert "neither scores nor lengths" in said


def test_forced_documents_of_two_runs_are_compared(told):
    early, late = forced("m", 0.02, 0.001), forced("m", 0.12, 0.08)
    left("a", *forced("full"), *early, *forced("still", 0.02))
    left("b", *forced("full"), *late, *forced("still", 0.02))
    code, out, err = told("compare", "a", "b")
    assert (code, err) == (0, "")
    assert "Worse (p < 5 % after Holm): m: kl; m: perplexity." in out
    assert "still kl" not in out, "nothing changed"
    before, after = (np.mean([r.kl for r in records]) for records in (early, late))
    loss = np.mean([np.array(x.logs) - y.logs for x, y in zip(early, late, strict=True)])
    assert f"m kl {after - before:+.4f} nats" in out
    row = out.split("KL before")[1].split(" m ")[1].split()
    assert [float(x) for x in row[:3]] == pytest.approx([before, after, after - before], abs=1e-5)
    assert float(row[6]) == pytest.approx(math.exp(loss), abs=1e-3)
    assert "Nothing is worse" in told("compare", "b", "a")[1]
    left("c", *forced("full"), *forced("m", 0.12, 0.08, n=9))
    _, out, _ = told("compare", "a", "c")
    assert out.split(" m kl ")[1].split(" - ")[1].startswith("partial 9/16")


def test_forced_documents_of_two_methods_are_compared_in_one_family_with_their_answers(told, monkeypatch):
    drawn, write = [], terminal.write
    monkeypatch.setattr(terminal, "write", lambda tables, *rest: (drawn.append(tables), write(tables, *rest)))
    longer = [*chats("full"), *chats("m", LENGTHS * np.random.default_rng(4).uniform(0.7, 1.6, 60))]
    left("chats", *longer)
    left("both", *forced("full"), *forced("m", 0.025), *longer)
    for run in ("chats", "both"):
        assert told("compare", f"{run}#full", f"{run}#m")[0] == 0
    (alone,), (together, shown) = drawn
    assert {row.key for row in together.rows} == {("answers", "length"), *(("forced documents", x) for x in PAIRED)}
    one, other = (table.cell(("answers", "length"), "effect").p for table in (alone, together))
    assert 0.0001 < one < 0.6
    assert other == pytest.approx(one * 3 / 2), "four tests, of which one has a smaller p, beside two"
    assert shown.cell("forced documents", "before").value == 0


def test_forced_documents_alone_are_compared(told):
    left("documents", *forced("full"), *forced("m", 0.09, 0.08))
    code, out, err = told("compare", "documents#full", "documents#m")
    assert (code, err) == (0, "")
    assert "documents#m against documents#full" in out
    assert "Worse (p < 5 % after Holm): forced documents: kl; forced documents: perplexity." in out
    left("chats", *chats("full"))
    assert "documents#m holds forced documents alone, no answers" in one_line(
        told("compare", "chats#full", "documents#m")
    )
    assert "there are full, m" in one_line(told("compare", "documents", "documents#m"))
    left("early", *references("full"), *references("m"))
    left("late", *references("full"), *references("m", 0.3))
    for pair in (("early", "late"), ("early#m", "late#m")):
        assert "reference." in told("compare", *pair)[1].partition("Worse (p < 5 % after Holm): ")[2].partition("\n")[0]
    left("others", *(replace(r, sample=f"x{r.sample}") for r in forced("m", 0.09)))
    assert "no document in common" in one_line(told("compare", "documents#full", "others#m"))


PAIRED = ("kl", "perplexity")


def test_a_torn_line_is_told_and_costs_itself(told):
    left("a", *chats("full"))
    left("b", *chats("full"))
    with Path("b/records.jsonl").open("a") as file:
        file.write(encode(chats("full")[0])[:70])
    for later in ("", "\n" + encode(chats("m")[0]) + "\n"):
        with Path("b/records.jsonl").open("a") as file:
            file.write(later)
        code, out, err = told("compare", "a", "b")
        assert code == 0
        assert err == "b: 1 record line was cut off while being written, or damaged, and left out\n"
        said = "partial: in b 1 record line was cut off while being written, or damaged, and left out."
        assert said in " ".join(out.split())
        assert told("plan", "b")[0] == 2, "there is no control"


@pytest.mark.parametrize("how", ["a line separator in an answer", "torn inside a letter", "a number alone"])
def test_a_line_is_what_ends_with_a_newline(told, how):
    text = {"a line separator in an answer": "one\u2028two\x85three"}.get(how, "one")
    left("a", *(replace(a, text=text) for a in chats("full")))
    with Path("a/records.jsonl").open("ab") as file:
        file.write({"torn inside a letter": b'{"text": "\xe2\x82', "a number alone": b"5"}.get(how, b""))
    torn = how != "a line separator in an answer"
    assert len(read(Path("a")).records) == 60
    assert read(Path("a")).torn == torn
    assert ("was cut off" in " ".join(told("compare", "a", "a")[1].split())) == torn


@pytest.mark.parametrize("lost", ["failed", "missing", "all failed"])
def test_answers_that_are_gone_are_told(told, lost):
    gone = [replace(a, status="failed", error="out of memory", tokens=[]) for a in chats("m")]
    now = {"failed": chats("m")[:9] + gone[9:], "missing": chats("m")[:9], "all failed": gone}[lost]
    left("a", *chats("full"), *chats("m"))
    left("b", *chats("full"), *now)
    code, out, err = told("compare", "a", "b")
    assert code == 2 or any(word in out + err for word in ("51", "60", "failed", "left out")), out


def test_what_was_interrupted_is_neither_worse_nor_not_worse(told):
    known = FACTS | {"methods": ["full", "m"], "expected": {"samples": {"chat": 60}}}
    short = np.round(LENGTHS * 2)[:40]
    left("a", *chats("full"), *chats("m"), facts=known | {"finished": "now"})
    left("b", *chats("full"), *chats("m", short), facts=known)
    _, out, _ = told("compare", "a", "b")
    assert "partial: b was interrupted." in out
    assert "partial: a was" not in out
    row = out.split("m length ")[1].split("Nothing is worse")[0]
    assert ("partial 40/60" in row, "worse" in row) == (True, False)


# plan


def test_a_plan_from_answers_that_are_not_all_there_says_so(told):
    known = FACTS | {"methods": ["full", "jitter"], "expected": {"samples": {"chat": 60}}}
    left("a", *chats("full"), *chats("jitter", NOISY[:40]), facts=known)
    left("b", *chats("full"), *chats("jitter", NOISY), facts=known)
    assert "partial: jitter, length: only 40 of 60 samples are there." in told("plan", "a")[1]
    assert "partial" not in told("plan", "b")[1]


def test_a_plan_from_two_seeds_is_the_formulas(told):
    left("a", *chats("full"), *chats("full", NOISY, repeat=1), *chats("m"))
    code, out, _ = told("plan", "a", "--margins", "length=0.005")
    apart = NOISY / NOISY.sum() - LENGTHS / LENGTHS.sum()
    spread = math.sqrt(60 / 59 * (apart**2).sum()) * math.sqrt(60)
    power = statistics.NormalDist().inv_cdf(0.95) + statistics.NormalDist().inv_cdf(0.9)  # TOST
    wanted = (power * spread / math.log1p(0.005)) ** 2
    _, row = out.split("full, other seed length ")
    margin, shown, prompts, time = row.split()[:4]
    assert (code, margin) == (0, "0.5")
    assert float(shown) == pytest.approx(100 * spread, rel=0.05)
    assert int(prompts.replace(",", "")) == pytest.approx(wanted, rel=0.1)
    hours, minutes, seconds = map(int, time.split(":"))
    assert 3600 * hours + 60 * minutes + seconds == 3 * int(prompts.replace(",", "")), "1.5 s an answer, two arms"
    for again, each in ((0.25, 2.75), (0.5, 3)):  # it answered in the same pass, or with a prefill of its own
        shared = [replace(a, shared_seconds=again if a.repeat else 0.25) for a in read(Path("a")).records]
        took = told("plan", left(f"b{again}", *shared), "--margins", "length=0.005")[1].split(" seed length ")[1]
        hours, minutes, seconds = map(int, took.split()[3].split(":"))
        wanted = each * int(prompts.replace(",", ""))
        assert 3600 * hours + 60 * minutes + seconds == pytest.approx(wanted, abs=1)
    wider = told("plan", "a", "--margins", "length=0.01")[1].split(" seed length ")[1].split()[2]
    assert int(prompts.replace(",", "")) / int(wider.replace(",", "")) == pytest.approx(3.3, abs=0.7), (
        "less than 4, since few lengths change much"
    )


def test_a_run_is_the_pilot_of_its_blocks(told):
    seconds = 0.1, 0.11, 0.1, 0.12
    left("a", *chats("full"), *chats("jitter", NOISY), timing("m", *seconds))
    needed = blocks_needed([math.log(0.2 / s) for s in seconds], 0.1)
    _, out, _ = told("plan", "a", "--margins", "speed=0.1")
    assert f"m 8 · 512 4 {100 * statistics.stdev(map(math.log, seconds)):.1f} {needed:,}" in out
    assert "decode step" not in told("plan", left("b", *chats("full"), *chats("jitter", NOISY)))[1]


def test_one_control_plans_what_it_can_and_two_plan_broken(told):
    off = RIGHT.copy()
    off[:24:2] = 1 - off[:24:2]
    one = [*chats("full"), *needles("full"), *chats("jitter", NOISY), *needles("jitter", off)]
    _, out, _ = told("plan", left("one", *one))
    assert ["jitter quality 5.0 " in out, "jitter length 15.0 " in out, "jitter broken " in out] == [1, 1, 0]
    hours, minutes, seconds = map(int, out.split("jitter length ")[1].split()[3].split(":"))
    prompts = int(out.split("jitter length ")[1].split()[2].replace(",", ""))
    left("shared", *(replace(a, shared_seconds=0.25) for a in one))
    less = told("plan", "shared")[1].split("jitter length ")[1].split()[3].split(":")
    saved = 3600 * (hours - int(less[0])) + 60 * (minutes - int(less[1])) + seconds - int(less[2])
    assert saved == pytest.approx(prompts / 4, abs=1), "one pass, one prefill"
    two = [*chats("jitter:seed=1", NOISY[::-1]), *needles("jitter:seed=1", np.roll(RIGHT, 1))]
    assert "jitter:seed=1 broken 5.0 " in told("plan", left("two", *one, *two))[1]


def test_without_noise_there_is_no_plan(told):
    left("alone", *chats("full"), *chats("m", NOISY))
    assert "alone has no control to plan from: run full and jitter" in one_line(told("plan", "alone"))
    left("same", *chats("full"), *chats("jitter"), *needles("full"), *needles("jitter"))
    code, out, _ = told("plan", "same")
    assert code == 0
    assert "jitter changed no quality: no floor measured. jitter changed no length: no floor measured." in out
    assert "is not a run folder" in one_line(told("plan", "gone"))
    assert "the margin for length must be" in one_line(told("plan", "same", "--margins", "length=-1"))


@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize("command", ["compare", "plan"])
def test_every_cell_can_be_read(told, monkeypatch, command, columns):
    drawn, write = [], terminal.write
    monkeypatch.setattr(terminal, "write", lambda tables, *rest: (drawn.extend(tables), write(tables, *rest)))
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ("full", "jitter", "jitter:seed=1", "h2o:budget=2048")
    for run in "ab":
        mixed = [np.random.default_rng([i, ord(run)]).permutation(RIGHT) for i in range(4)]
        mixed[3] *= run == "a"
        left(run, *(a for name, x in zip(names, mixed, strict=True) for a in needles(name, x)))
    _, out, _ = told(command, *(["a", "b"] if command == "compare" else ["a"]))
    assert set(words(drawn)) - set(out.split()) == set()
