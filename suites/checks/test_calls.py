"""Tool calls and full pools: what counts, and what that says of an arm beside the baseline and the A/A arm."""

import json
import re
from dataclasses import replace

import jinja2
import pytest

from kvsuite.analysis.calls import called
from kvsuite.analysis.pressure import pressed
from kvsuite.analysis.validity import outcomes
from kvsuite.calls import ASKED, NAME, TOOL, valid
from suites.checks.planted import AGAIN, BASE, ROOT, M, loads, probes, run, said

GOOD = {"summary": "It speaks.", "topics": ["war"], "year": 1812}


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        (NAME + json.dumps(GOOD), True),
        (NAME + json.dumps(GOOD) + NAME + json.dumps(GOOD | {"topics": []}), True),
        (f"{NAME} {json.dumps(GOOD)} ", True),
        ("", False),
        (NAME, False),
        (json.dumps(GOOD), False),
        ("other" + json.dumps(GOOD), False),
        (NAME + json.dumps(GOOD)[:-1], False),
        (NAME + json.dumps(GOOD) + "}", False),
        (NAME + json.dumps(GOOD) + NAME, False),
        (NAME + json.dumps([GOOD]), False),
        (NAME + json.dumps({"summary": "It speaks.", "topics": ["war"]}), False),
        (NAME + json.dumps(GOOD | {"year": "1812"}), False),
        (NAME + json.dumps(GOOD | {"year": True}), False),
        (NAME + "[" * 100_000, False),
    ],
)
def test_what_is_a_call(calls, expected):
    assert valid(calls) is expected


def test_the_template_shows_calls_of_our_tool():
    """docs/examples/tools.jinja, rendered as transformers and vLLM do."""
    text = (ROOT / "docs" / "examples" / "tools.jinja").read_text()
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    said = [{"role": "user", "content": "a" * 500 + ASKED}]
    shown = template.render(messages=said, tools=[TOOL], add_generation_prompt=True)
    calls = [json.loads(call) for call in re.findall(r"<tool_call>\n(.*)\n</tool_call><\|im_end\|>\n", shown)]
    assert len(calls) == 3
    assert all(valid(call["name"] + json.dumps(call["arguments"])) for call in calls)
    assert shown.count(ASKED) == 4
    assert "a" * 250 in shown
    assert "a" * 300 not in shown
    assert shown.endswith(f"{ASKED}<|im_end|>\n<|im_start|>assistant\n")
    plain = template.render(messages=said, add_generation_prompt=False)
    assert plain == f"<|im_start|>user\n{said[0]['content']}<|im_end|>\n"


def tools(bad, arm=M, share=lambda r: True):
    """Every answer is a call; those of an arm that are ``bad`` are cut off."""
    good = NAME + json.dumps(GOOD)
    records = [replace(r, calls=good, finish="tool_calls") for r in loads()]
    broken = [replace(r, calls=good[:20]) if r.method == arm and share(r) and bad else r for r in records]
    return run(probes(), broken, workload="tools")


def of(found, check, arm=M):
    [outcome] = [o for o in outcomes(found) if (o.check, o.arm) == (check, arm)]
    return outcome.kind


def test_calls_that_are_none_are_broken():
    assert {c.arm: (c.n, c.called, c.valid) for c in called(tools(True))} == {
        BASE: (24, 24, 24),
        AGAIN: (24, 24, 24),
        M: (24, 24, 0),
    }
    assert of(tools(True), "calls") == "BROKEN"
    assert of(tools(False), "calls") is None
    few = tools(True, share=lambda r: r.sample in ("c1000", "c1001"))
    assert (called(few)[2].valid, of(few, "calls")) == (22, None), "two may be noise"
    assert any(line.startswith("BROKEN m: its tool calls are valid for 0 of 24 prompts") for line in said(tools(True)))


def test_a_baseline_whose_calls_are_none_or_cut_tells_nothing():
    assert of(tools(True, arm=BASE), "calls", BASE) == "COULD NOT TELL"
    few = [f"c{at}" for at in range(1000, 1007)]
    for more, kind in ((), "COULD NOT TELL"), (("c1007",), None):
        made = {*few, *more}
        found = tools(True, arm=BASE, share=lambda r, made=made: r.sample not in made)
        assert of(found, "calls", BASE) == kind


def test_an_arm_that_calls_for_other_prompts_as_often_loses_nothing():
    """As vLLM's fp8 did: of the prompts that the baseline answers by calls it lost 7, of the others it won 4. Those
    were left out once, as the baseline's cap had ended its answers, and it was BROKEN."""
    good = NAME + json.dumps(GOOD)

    def calls(r):
        at, kind = int(r.sample[1:]) % 4, r.method
        return good if at in ((0, 1) if kind != M else (1, 2)) else good[:20]

    records = [replace(r, calls=calls(r), finish="tool_calls" if calls(r) == good else "length") for r in loads()]
    found = run(probes(), records, workload="tools")
    assert {c.arm: (c.n, c.valid) for c in called(found)} == {BASE: (24, 12), AGAIN: (24, 12), M: (24, 12)}
    assert of(found, "calls") is None
    assert called(found)[2].adjusted > 0.5


def pressure(changes, count="preemptions, closed:24 512 tokens pressure", preempted=5.0):
    """Every leg's answers once more, all at once; those whose arm and sample ``changes`` are others then."""
    records = [replace(r, cell="closed:4 512 tokens pressure") for r in loads()]
    many = [
        replace(r, cell="closed:24 512 tokens pressure", text=f"{r.text}!" if changes(r) else r.text) for r in records
    ]
    told = [replace(p, counters={count: preempted}) for p in probes()]
    return run(told, records, many, workload="pressure")


def test_answers_that_a_full_pool_changes_differ():
    found = pressure(lambda r: r.method == M)
    assert {p.arm: (p.asked, p.preempted, p.n, p.changed) for p in pressed(found)} == {
        BASE: (24, 5, 24, 0),
        AGAIN: (24, 5, 24, 0),
        M: (24, 5, 24, 24),
    }
    assert of(found, "pressure") == "DIFFERS"
    assert any(
        line.startswith("DIFFERS m: with a full pool 24 of 24 answers are others than without") for line in said(found)
    )
    assert any("what is preempted, or asked beside so many, is answered otherwise" in line for line in said(found))
    second = pressure(lambda r: r.method == M and r.leg % 6 >= 3)
    assert of(second, "pressure") == "DIFFERS", "in the second legs alone"


def test_what_a_full_pool_changes_of_the_baseline_as_well_is_noise():
    assert of(pressure(lambda r: True), "pressure") is None
    assert of(pressure(lambda r: r.method == M and r.sample in ("c1000", "c1001")), "pressure") is None


def test_a_pool_that_was_not_full_or_does_not_say_tells_nothing():
    for found, text in (
        (pressure(lambda r: False, preempted=0.0), "nothing was preempted by 24 requests at once"),
        (pressure(lambda r: False, count="x"), "whether its pool was full: it does not count preemptions"),
        (pressure(lambda r: False, count="preemptions, closed:4 512 tokens pressure"), "does not count preemptions"),
    ):
        assert of(found, "pressure") == "COULD NOT TELL"
        assert any(text in line for line in said(found) if line.startswith("COULD NOT TELL"))
    assert pressed(run(probes(), loads())) == called(run(probes(), loads())) == ()
