"""Records survive: every line, whatever happened after it."""

import dataclasses
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite import disk, records
from kvsuite.environment import describe, fingerprint
from kvsuite.errors import UsageError
from kvsuite.records import Agreement, Answer, Predicted, RunFolder, Timing, decode, encode, read, refusal

finite = st.floats(0, records.MOST)
some = st.floats(1e-12, records.MOST)
whole = st.integers(0, 10**18)


@given(
    st.builds(Answer, method=st.text(), tokens=st.lists(whole), text=st.text(), score=finite | st.none())
    | st.lists(some).flatmap(
        lambda seconds: st.builds(
            Timing,
            method=st.text(),
            tokens=st.just(8),
            seconds=st.just(seconds),
            baseline_seconds=st.just(seconds),
            checked=finite | st.none(),
        )
    )
    | st.builds(Agreement, method=st.text(), other=st.text(), n=whole)
)
def test_a_line_is_a_record_again(record):
    line = encode(record)
    assert "\n" not in line
    assert decode(line) == record


def test_a_figure_that_is_not_finite_is_a_failure_and_is_kept(tmp_path):
    run = RunFolder(tmp_path)
    run.describe({})
    run.append(Timing("m", seconds=[0.1, math.nan], baseline_seconds=[0.1, 0.2], checked=math.inf, length=512))
    [found] = read(tmp_path).records
    assert (found.status, found.error) == ("failed", "a figure is not finite")
    assert (found.method, found.length, found.seconds, found.checked) == ("m", 512, [], None)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("seconds", [0.1, 0.0], "[0.1, 0.0]"),
        ("nbytes", -1, "-1"),
        ("checked", 1e300, "1e+300"),
        ("width", 0, "0"),
        ("bandwidth", -0.5, "-0.5"),
        ("scale", 0.0, "0.0"),
    ],
)
def test_a_figure_that_none_can_be_is_a_failure_where_it_is_written_and_refused_where_it_is_read(
    tmp_path, field, value, said
):
    RunFolder(tmp_path).describe({})
    RunFolder(tmp_path).append(Timing("m", length=512, **{field: value}))
    [found] = read(tmp_path).records
    assert (found.status, found.error) == ("failed", f"{field} cannot be {said}")
    assert dataclasses.replace(found, status="ok", error="") == Timing("m", length=512)
    (tmp_path / "records.jsonl").write_text("\n" + encode(Timing("m", **{field: value})) + "\n")
    with pytest.raises(UsageError, match=rf"records.jsonl line 2: {field} cannot be {re.escape(said)}$"):
        read(tmp_path)


def test_what_can_be_below_zero_is_bounded_too():
    assert decode(encode(Predicted("m", value=-2.5))).value == -2.5
    with pytest.raises(UsageError, match=r"^value cannot be -1e\+300$"):
        decode(encode(Predicted("m", value=-1e300)))


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"baseline_seconds": [0.1]}, "baseline_seconds are of 1 rounds, seconds of 2"),
        ({"rest_seconds": [0.1]}, "rest_seconds are of 1 rounds, seconds of 2"),
        ({"tokens": 0}, "tokens are 0, of rounds that took time"),
    ],
)
def test_rounds_that_do_not_belong_together_are_a_failure_and_refused(tmp_path, figures, said):
    timing = Timing("m", **{"tokens": 8, "seconds": [0.1, 0.2], "baseline_seconds": [0.1, 0.2], **figures})
    RunFolder(tmp_path).describe({})
    RunFolder(tmp_path).append(timing)
    [found] = read(tmp_path).records
    assert (found.status, found.error) == ("failed", said)
    with pytest.raises(UsageError, match=f"^{said}$"):
        decode(encode(timing))


def test_a_line_is_there_at_once(tmp_path):
    run = RunFolder(tmp_path)
    run.describe({})
    for at in range(3):
        run.append(Answer("m", sample=f"s{at}"))
        assert len(read(tmp_path).records) == at + 1


def test_a_torn_last_line_is_skipped_and_told(tmp_path):
    run = RunFolder(tmp_path)
    run.describe({})
    run.append(Answer("m"))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(encode(Answer("n"))[:40])
    found = read(tmp_path)
    assert ([r.method for r in found.records], found.torn) == (["m"], 1)


def test_an_answer_that_is_longer_than_what_is_read_is_a_failure(tmp_path, monkeypatch):
    """A server may send 16 Mi characters, each of which JSON may spell in six."""
    monkeypatch.setattr(disk, "LONGEST", 50_000)
    run = RunFolder(tmp_path)
    run.describe({})
    run.append(Answer("m", sample="1", text="short", score=1.0))
    run.append(Answer("m", sample="2", text="\x01" * 20_000, tokens=[7] * 10, score=1.0))
    first, second = read(tmp_path).records
    assert (first.text, first.status) == ("short", "ok")
    assert (second.sample, second.status, second.text, second.tokens) == ("2", "failed", "", [7] * 10)
    assert re.fullmatch(r"its record has 12\d,\d{3} bytes, and 50,000 are read", second.error)


@pytest.mark.parametrize("name", ["records.jsonl", "records-gw0.jsonl", "report.md.tmp"])
def test_no_link_in_a_run_folder_leads_out_of_it(tmp_path, name):
    """Who publishes a run may have put one there."""
    run, victim = RunFolder(tmp_path / "run"), tmp_path / "victim"
    run.describe({})
    victim.write_text("private\n")
    (run.folder / name).symlink_to(victim)
    if name == "report.md.tmp":
        disk.write(run.folder / "report.md", "report")
        assert (run.folder / "report.md").read_text() == "report"
    else:
        with pytest.raises(UsageError, match=r"is a link, and no worker's file|cannot be written: "):
            run.append(Answer("m")) if name == "records.jsonl" else run.join()
    assert victim.read_text() == "private\n"


@pytest.mark.parametrize("name", ["run.json", "records.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for_and_no_run_without_records(tmp_path, name, make):
    RunFolder(tmp_path).describe({})
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(UsageError, match="is no file"):
        read(tmp_path)


def test_what_run_json_does_not_say_is_a_sentence(tmp_path):
    RunFolder(tmp_path).describe({"settings": {"cap": 3}, "servers": {}})
    run = read(tmp_path)
    assert run.facts["settings"]["cap"] == 3
    assert run.facts.get("model") is None
    with pytest.raises(UsageError, match=r"run.json' has no settings.temperature$"):
        _ = run.sampled
    with pytest.raises(UsageError, match=r"run.json' has no model$"):
        _ = run.facts["model"]


@pytest.mark.parametrize("joined", [False, True])
def test_a_torn_line_costs_that_line_alone_when_workers_are_joined_and_when_a_run_goes_on(tmp_path, joined):
    RunFolder(tmp_path).describe({})
    for worker in ("gw0", "gw1"):
        RunFolder(tmp_path, worker).append(Answer(worker, sample="1"))
        with (tmp_path / f"records-{worker}.jsonl").open("a") as file:
            file.write(encode(Answer("torn"))[:-1])
        RunFolder(tmp_path, worker).append(Answer(worker, sample="2"))
    if joined:
        RunFolder(tmp_path).join()
        RunFolder(tmp_path).append(Answer("later"))
    found = read(tmp_path)
    assert [(r.method, r.sample) for r in found.records if r.method != "later"] == [
        (worker, sample) for worker in ("gw0", "gw1") for sample in "12"
    ]
    assert found.torn == 2


def test_a_failed_job_that_was_done_again_is_what_it_was_then(tmp_path):
    run = RunFolder(tmp_path)
    run.describe({})
    for sample, *states in (("1", "failed", "ok"), ("2", "failed", "failed"), ("3", "ok", "failed")):
        for error, status in enumerate(states):
            run.append(Answer("m", status=status, error=str(error), sample=sample))
    found = read(tmp_path).records
    assert [(r.sample, r.status, r.error) for r in found] == [
        ("1", "ok", "1"),
        ("2", "failed", "1"),
        ("3", "ok", "0"),
        ("3", "failed", "1"),
    ]


def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path):
    RunFolder(tmp_path).describe({})
    (tmp_path / "records.jsonl").write_text("{}\n" + encode(Answer("m")) + "\n")
    with pytest.raises(UsageError, match=r"records.jsonl line 1: this record is of another schema than 1"):
        read(tmp_path)


def test_workers_files_are_read_and_joined(tmp_path):
    RunFolder(tmp_path).describe({})
    for worker in ("gw0", "gw1"):
        RunFolder(tmp_path, worker).append(Answer(worker))
    assert [r.method for r in read(tmp_path).records] == ["gw0", "gw1"]
    RunFolder(tmp_path).join()
    assert [p.name for p in tmp_path.glob("records*")] == ["records.jsonl"]
    assert [r.method for r in read(tmp_path).records] == ["gw0", "gw1"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="which file is synced is read from /proc")
def test_power_may_fail_at_any_moment(tmp_path, monkeypatch):
    """At every step that removes or renames a file, what was on disk by then: of a file that was not synced nothing is,
    what is removed is gone. No record is lost that was there when the workers ended, and a run that is finished has all
    of its records."""
    kept, moments = {}, []
    fsync, unlink, move = os.fsync, Path.unlink, Path.replace

    def synced(at):
        file = Path(f"/proc/self/fd/{at}").readlink()
        if file.is_file():
            kept[file.name] = file.read_bytes()
        fsync(at)

    def removed(file, missing_ok=False):
        unlink(file, missing_ok)
        kept.pop(file.name, None)
        moments.append(dict(kept))

    def renamed(file, other):
        kept[other.name] = kept.pop(file.name)
        moments.append(dict(kept))
        return move(file, other)

    for worker in ("gw0", "gw1"):
        RunFolder(tmp_path, worker).append(Answer("full", sample=worker, tokens=[1], cap=1))
    run = RunFolder(tmp_path)
    run.describe({"methods": []})
    lines = {file.read_bytes() for file in tmp_path.glob("records-*")}
    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(Path, "unlink", removed)
    monkeypatch.setattr(Path, "replace", renamed)
    run.amend({"finished": "now"})
    run.join()
    assert len(moments) == 3, "run.json and two workers' files"
    for there in moments:
        text = b"".join(content for name, content in there.items() if name.startswith("records"))
        assert all(line in text for line in lines), there.keys()


def test_no_run_folder_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="is not a run folder"):
        read(tmp_path)


FACTS = {"model": {"name": "a", "fingerprint": "1"}, "texts": {"needle": "2"}, "settings": {"cap": 128}}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", {"name": "a", "fingerprint": "9"}, "different models (fingerprint: '1' and '9')"),
        ("texts", {"chat": "2"}, "different texts (chat: None and '2', needle: '2' and None)"),
        ("settings", {"cap": 64}, "different settings (cap: 128 and 64)"),
    ],
)
def test_runs_of_different_things_refuse_to_be_compared(tmp_path, key, value, said):
    for name, facts in (("a", FACTS), ("b", FACTS | {key: value}), ("c", FACTS)):
        RunFolder(tmp_path / name).describe(facts)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert said in refusal(a, b)
    assert refusal(a, c) == ""


def test_a_fingerprint_tells_files_apart(tmp_path):
    (tmp_path / "w").write_bytes(bytes(3 << 20))
    one = fingerprint([tmp_path / "w"])
    assert fingerprint([tmp_path / "w"]) == one
    for change in (b"x" + bytes((3 << 20) - 1), bytes((3 << 20) - 1) + b"x", bytes((3 << 20) + 1)):
        (tmp_path / "w").write_bytes(change)
        assert fingerprint([tmp_path / "w"]) != one


def test_the_environment_is_json_with_versions():
    found = describe()
    assert found["packages"]["torch"]
    assert found["cores"] >= 1
    Agreement("m", other=str(dataclasses.asdict(Timing("m"))))
