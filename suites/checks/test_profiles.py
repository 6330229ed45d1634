"""Profiles of servers: which server they fit and what they read. `said` has what servers say."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kvsuite.engines import probe
from kvsuite.engines.profile import NONE, choose, profiles
from kvsuite.errors import UsageError
from suites.checks.said import COUNTED, SERVERS, Said

NAMES = ["llama-cpp", "lmdeploy", "openvino", "sglang", "vllm"]


def read(said: Said) -> dict[str, object]:
    return asyncio.run(probe.facts(choose(said.profile), said.get, said.log))


def counted(said: Said) -> dict[str, float]:
    return asyncio.run(probe.counters(choose(said.profile), said.get))


def test_every_kind_of_server_has_a_profile() -> None:
    assert list(profiles()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_example_starts_this_kind_of_server_and_no_other(name: str) -> None:
    example = profiles()[name].example
    assert "{model}" in example
    assert "{port}" in example
    assert choose("", example).name == name
    assert [p.name for p in profiles().values() if re.search(p.command, example)] == [name]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (
            "python -m llama_cpp.server --model {model} --port {port} --type_k 8 --type_v 8 --flash_attn True",
            "llama-cpp",
        ),
        ("docker run ghcr.io/ggml-org/llama.cpp:server -m {model} --port {port}", "llama-cpp"),
        ("sglang serve --model-path {model} --port {port}", "sglang"),
        ("/opt/lmdeploy/bin/python -m sglang.launch_server --model-path {model} --port {port}", "sglang"),
        ("docker run openvino/model_server:2026.3-gpu --source_model m --rest_port {port}", "openvino"),
        ("vllm serve {model} --port {port}", "vllm"),
        ("python -m sglang_router.launch_router --port {port}", NONE.name),
        ("python serve.py --model /models/llama-3 --port {port}", NONE.name),
    ],
)
def test_a_command_is_known_by_what_it_starts(command: str, name: str) -> None:
    assert choose("", command).name == name


@pytest.mark.parametrize("name", [name for name, said in SERVERS.items() if "/metrics" in said.pages])
def test_a_running_server_is_known_by_its_metrics(name: str) -> None:
    said = SERVERS[name]
    assert choose("", metrics=said.pages["/metrics"]).name == said.profile
    assert counted(said) == COUNTED[said.profile]


@pytest.mark.parametrize("said", SERVERS.values(), ids=SERVERS)
def test_what_a_server_says_is_read(said: Said) -> None:
    facts = read(said)
    assert facts == {**said.facts, "features": said.features}
    assert {k: type(v) for k, v in facts.items() if k in said.facts} == {k: type(v) for k, v in said.facts.items()}
    assert choose(said.profile).compressed(facts) is said.compressed


# vLLM's attention backend "for" something is the one source whose line nobody has seen.
UNSEEN = {"log setting cudagraph_mode=(\\w+)"}


@pytest.mark.parametrize("name", NAMES)
def test_every_source_says_something_on_some_server(name: str) -> None:
    profile = choose(name)
    servers = [s for s in SERVERS.values() if s.profile == name]
    for source in [s for part in (profile.facts, profile.features) for sources in part.values() for s in sources]:
        alone = replace(profile, facts={"it": (source,)}, features={})
        heard = [asyncio.run(probe.facts(alone, s.get, s.log)).get("it") for s in servers]
        assert source in UNSEEN or any(x is not None for x in heard), source


def test_of_a_log_of_two_starts_the_last_counts() -> None:
    old, new = SERVERS["llama-server, q8_0, one cache for four slots"], SERVERS["llama-server, f16, two slots"]
    both = replace(new, log=old.log + new.log)
    assert read(both) == read(new)


def test_a_page_is_asked_for_once() -> None:
    asked = []

    async def get(path: str) -> tuple[int, str]:
        asked.append(path)
        return 500, "{}"

    facts = asyncio.run(probe.facts(choose("sglang"), get, ""))
    assert facts == {"features": {}}
    assert len(asked) == len(set(asked)) > 1


def test_series_of_a_page_in_prometheus_format() -> None:
    page = (
        "# HELP a what a is\n# TYPE a counter\n"
        "a 1\n"
        'b_total{path="C:\\\\m",said="he said \\"a, b={c}\\"",le="+Inf"} 2.5e+06 1395066363000\n'
        'c{} NaN\n\nd{x=""}\t-3\nnovalue\ne 4'
    )
    assert probe.series(page) == [
        ("a", {}, "1"),
        ("b_total", {"path": "C:\\m", "said": 'he said "a, b={c}"', "le": "+Inf"}, "2.5e+06"),
        ("c", {}, "NaN"),
        ("d", {"x": ""}, "-3"),
        ("e", {}, "4"),
    ]


@pytest.mark.parametrize(
    ("status", "text"), [(404, "llamacpp:prompt_tokens_cached_total 5"), (200, "<html>"), (200, "")]
)
def test_without_metrics_nothing_is_counted(status: int, text: str) -> None:
    async def get(path: str) -> tuple[int, str]:
        return status, text

    assert asyncio.run(probe.counters(choose("llama-cpp"), get)) == {}


def test_what_was_counted_in_between() -> None:
    before = {"preemptions": 5.0, "hits": 100.0, "gone": 1.0}
    assert probe.since(before, {"preemptions": 7.0, "hits": 100.0}) == {"preemptions": 2.0, "hits": 0.0}
    assert probe.since(before, {"preemptions": 3.0, "new": 4.0}) == {"preemptions": 3.0, "new": 4.0}, "started anew"
    assert probe.since({}, {"preemptions": 3.0}) == {"preemptions": 3.0}


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("""
        command = 'serve\\.py'
        salt = "cache_salt"
        uncompressed = ["BF16"]
        [facts]
        kv_dtype = 'log stores (\\w+)'
        [features]
        graphs = ["get /state engine.0.graphs"]
        [counters]
        preemptions = "mine_total"
    """)
    mine = choose(str(file))
    said = Said(
        "", "stores bf16", {}, False, {}, {"/state": '{"engine": [{"graphs": true}]}', "/metrics": "mine_total 2"}
    )
    facts = asyncio.run(probe.facts(mine, said.get, said.log))
    assert (mine.name, mine.salt, mine.ready) == ("mine", "cache_salt", "/v1/models")
    assert facts == {"kv_dtype": "bf16", "features": {"graphs": "True"}}
    assert mine.compressed(facts) is False
    assert mine.compressed({"kv_dtype": "fp8"}) is True
    assert mine.compressed({}) is None
    assert mine.compressed({"kv_dtype": "fp8", "compressed": False}) is False
    assert asyncio.run(probe.counters(mine, said.get)) == {"preemptions": 2.0}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("command = ", "cannot be read"),
        ("commands = 'x'", "command"),
        ("command = 'a('", "no regular expression"),
        ("metrics = '['", "no regular expression"),
        ("ready = 5", "a text"),
        ("uncompressed = 'auto'", "a list"),
        ("facts = 'log x'", "a table"),
        ("[counters]\npreemptions = 1", "preemptions is 1, but it has to be a text"),
        ("[facts]\nkv_dtype = 'log ('", "no regular expression"),
        ("[facts]\nkv_dtype = 5", "kv_dtype: 5 is no source"),
        ("[facts]\nkv_dtype = ['metrics x']", "kv_dtype: 'metrics x' is no source"),
        ("[features]\ngraphs = 'get props x'", "graphs: 'get props x' is no source"),
    ],
)
def test_a_mistake_in_a_profile_is_one_sentence_that_names_it(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        choose(str(file))
    assert complaint in str(error.value)
    assert str(file) in str(error.value)


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        choose("/nowhere/mine.toml")
    with pytest.raises(UsageError, match="sglang"):
        choose("sglamg")
