"""From text to methods: canonical names, and a sentence that helps for whatever is wrong."""

import dataclasses
import typing

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvsuite.errors import UsageError
from kvsuite.methods import BudgetSelector, Method, catalogue, component, names, parse, parse_all
from kvsuite.methods.base import share
from kvsuite.methods.named import NAMED
from suites.checks.table import KVZAP, METHODS, layer


@pytest.mark.parametrize("text", METHODS)
def test_a_rows_canonical_name_names_the_same_method(text):
    method = parse(text)
    assert parse(method.name) == method
    assert parse(method.name).name == method.name
    assert " " not in method.name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("full", "full"),
        ("kivi", "kivi:bits=4"),
        (" kivi : bits = 2 , group=32 ", "kivi:bits=2"),
        ("kivi:residual=64,bits=4", "kivi:bits=4,residual=64"),
        ("jitter:seed=0", "jitter"),
        ("jitter:seed=3", "jitter:seed=3"),
        ("int8:", "int8"),
        ("h2o+full", "h2o"),
        ("h2o + uniform", "h2o"),
        ("int8 + random:budget=20", "random:budget=20+int8"),
        ("streaming-llm:positions=absolute,budget=64", "streaming-llm:budget=64,positions=absolute"),
        ("streaming-llm:budget=64.0", "streaming-llm:budget=64"),
        ("random:budget=0.50", "random:budget=0.5"),
        ("h2o:heavy=64,recent=448+kivi:bits=4", "h2o:heavy=64,recent=448+kivi:bits=4"),
        ("int8:skip_last=2,rotate=hadamard", "int8:rotate=hadamard,skip_last=2"),
        ("kivi:layer_bits=4422", "kivi:layer_bits=4422"),
        ("turboquant", "turboquant:bits=k4v4"),
        ("paper:kivi", "kivi:bits=4"),
        ("paper:streaming-llm + int8", "streaming-llm:budget=512,sinks=64+int8"),
        ("vllm:turboquant_3bit_nc", "turboquant:bits=k3v3,skip_first=2,skip_last=2"),
    ],
)
def test_canonical_names(text, name):
    assert parse(text).name == name


KINDS = [
    ("codec",), ("selector",), ("selector", "codec"), ("selector", "budget", "codec"), ("reader",),
    ("selector", "budget", "codec", "reader"),
]  # fmt: skip


@st.composite
def written(draw):
    """A method with any parameters that its parts accept, as text."""
    pieces = []
    for kind in draw(st.sampled_from(KINDS)):
        part = draw(st.sampled_from([part for part in catalogue() if part.kind == kind]))
        hints, given = typing.get_type_hints(part), {}
        for name in draw(st.sets(st.sampled_from([field.name for field in dataclasses.fields(part)] or [""]))) - {""}:
            if typing.get_origin(hints[name]) is typing.Literal:
                given[name] = draw(st.sampled_from(typing.get_args(hints[name])))
            elif name == "layer_bits":
                given[name] = draw(st.sampled_from(["4", "42", "2442"]))
            elif name == "outliers":
                given[name] = 0.25
            elif name == "residual":
                given[name] = 32 * draw(st.integers(1, 5))
            else:
                given[name] = draw(st.integers(2, 60) | st.sampled_from([0.25, 0.5] if name == "budget" else [2]))
        if "budget" in given:  # what contradicts a budget
            given = {name: value for name, value in given.items() if name not in ("heavy", "recent", "sinks")}
        if given.get("bits") == "k8v4":  # has nothing to turn
            given = {"bits": "k8v4"}
        if given.get("per") == "token":  # has no scale for all
            given = {"per": "token"}
        if issubclass(part, BudgetSelector) or part.name == "redundant":
            given["budget"] = 129  # above all that may be protected
        if part.name == "pyramid":
            given["window"] = 128  # covers what any selector protects
        if part.name == "kvzap":
            given["weights"] = KVZAP
        if part.name == "think":
            given["prune"] = 0.25
        if part.name == "dms":
            given = {}
        if "mix" in given:
            given["mix"] = 0.5
        if "kernel" in given:
            given["kernel"] = 2 * given["kernel"] + 1
        if "alpha" in given:
            given["alpha"] = 0.5
        assume(not (getattr(part, "ragged", False) and pieces[0].startswith("tova")))  # its heads have nothing to share
        assume(part.name != "headwise")  # leaves no budget to the selector
        pieces.append(part.name + ":" * bool(given) + ",".join(f"{name}={value}" for name, value in given.items()))
    return draw(st.sampled_from(["+", " + "])).join(draw(st.permutations(pieces)))


@given(text=written())
def test_names_round_trip(text):
    method = parse(text)
    assert isinstance(method, Method)
    assert parse(method.name) == method
    assert parse(method.name).name == method.name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kivy", r"unknown method 'kivy': did you mean 'kivi'\? known are .*full.*kivi"),
        ("streaming", r"did you mean 'streaming-llm'\?"),
        ("h2o+int9", r"did you mean 'int8'\?"),
        ("", "names no method"),
        ("h2o+", "names no method"),
        ("+int8", "names no method"),
        (":budget=3", "names no method"),
        (
            "kivi:bit=4",
            r"unknown parameter of kivi 'bit': did you mean 'bits'\? known are bits, group, layer_bits",
        ),
        ("mxfp4:bits=4", "unknown parameter of mxfp4 .bits.: known are rotate, skip_first, skip_last"),
        ("kivi+int8", "two codecs, kivi and int8"),
        ("h2o+random", "two selectors, h2o and random"),
        ("h2o+uniform+uniform", "two budgets"),
        ("uniform", "no selector"),
        ("uniform+kivi", "no selector"),
        ("kivi:bits=3", r"bits is one of 4, 2, not '3'"),
        ("kivi:bits=four", r"bits is one of 4, 2"),
        ("kivi:bits", "bits=VALUE"),
        ("kivi:bits=4,bits=2", "bits=VALUE once"),
        ("kivi:residual=many", r"residual must be a whole number, not 'many'"),
        ("kivi:residual=64.5", r"residual must be a whole number"),
        ("kivi:residual=48", "residual=48 must be a multiple of group=32"),
        ("kivi:residual=0", "must be a multiple"),
        ("kivi:bits=2,layer_bits=4422", "layer_bits has the bits of each layer; leave bits out"),
        ("kivi:layer_bits=43", "layer_bits=43 must be a digit a layer, 4 or 2"),
        ("int8:skip_first=-1", "skip_first and skip_last must not be negative"),
        ("fp8:skip_last=-1", "skip_first and skip_last must not be negative"),
        ("paper:kiwi", "unknown method .paper:kiwi.: did you mean .paper:kivi.. known are artifact:gear"),
        ("artifact:", "unknown method .artifact:."),
        ("paper:h2o + paper:streaming-llm", "two selectors, h2o and streaming-llm"),
        ("kivi:residual=-32", "must be a multiple"),
        ("jitter:seed=", "seed must be a whole number"),
        ("h2o:heavy=nan", "heavy must be a number, not 'nan'"),
        ("h2o:heavy=inf", "heavy must be a number"),
        ("random:budget=1e999", "budget must be a number"),
        ("fp8:k_scale=0", "fp8: k_scale=0 must be above 0"),
        ("nvfp4:v_scale=-1", "nvfp4: v_scale=-1 must be above 0"),
        ("random:budget=0", "budget=0 must be at least 1 tokens or a fraction"),
        ("random:budget=-5", "budget=-5 must be"),
        ("random:budget=2.5", "budget=2.5 must be"),
        ("h2o:budget=1", "at least 2 tokens"),
        ("h2o:recent=0", "recent=0 must be"),
        ("h2o:budget=64,heavy=32", "either budget or heavy and recent"),
        ("streaming-llm:budget=4", "budget=4 must be above its 4 sinks"),
        ("streaming-llm:budget=8,sinks=8", "budget=8 must be above its 8 sinks"),
        ("streaming-llm:sinks=-1", "must not be negative"),
        ("streaming-llm:budget=0", "budget=0 must be"),
        ("streaming-llm:positions=relative", "positions is one of cache, absolute, not 'relative'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text, sentence):
    with pytest.raises(UsageError, match=sentence) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["full,int8"], ["full", "int8"]),
        (["kivi:bits=2,group=16,int8"], ["kivi:bits=2,group=16", "int8"]),
        (["h2o:heavy=64,recent=448+kivi:bits=4,residual=64, full"],
         ["h2o:heavy=64,recent=448+kivi:bits=4,residual=64", "full"]),
        (["kivi", "kivi:bits=4", "kivi:bits=2,kivi"], ["kivi:bits=4", "kivi:bits=2"]),
        (["streaming-llm:budget=64 , positions = absolute,jitter:seed=1"],
         ["streaming-llm:budget=64,positions=absolute", "jitter:seed=1"]),
        ([], []),
    ],
)  # fmt: skip
def test_a_comma_starts_a_method_unless_a_parameter_follows(texts, expected):
    assert [method.name for method in parse_all(texts)] == expected


@pytest.mark.parametrize("text", ["full,", ",full", "full,,int8", "full,kivy"])
def test_an_empty_or_wrong_method_of_several_is_refused(text):
    with pytest.raises(UsageError):
        parse_all([text])


@pytest.mark.parametrize("name", NAMED)
def test_what_a_name_stands_for_is_a_method(name):
    assert parse(name) == parse(NAMED[name])
    assert parse_all([f"{name},full"])[0] == parse(name)


def test_the_catalogue_is_found_by_file_name():
    for part in catalogue():
        assert component(part.name) is part
        assert part.stores
        assert part.source
        assert part.kind in ("selector", "budget", "codec", "reader")
    assert [part.name for part in catalogue()] == list(names())


@given(length=st.integers(1, 5000), value=st.integers(1, 100) | st.floats(0.01, 0.99))
def test_a_share_is_tokens_or_a_fraction_of_the_context(length, value):
    tokens = share(value, length, least=3)
    assert isinstance(tokens, int)
    assert tokens == value if value >= 1 else abs(tokens - max(3, value * length)) <= 0.5


def test_a_budget_that_keeps_everything_is_refused_before_anything_starts():
    for text in METHODS:
        method = parse(text)
        if method.budget.decides or (method.selector is None and method.reader):
            continue
        if method.selector is None:
            method.check_context(1)
            continue
        budget = method.selector.tokens(200)
        method.check_context(budget + 1 if budget == method.selector.tokens(budget + 1) else 200)
        with pytest.raises(UsageError, match=f"{budget} tokens keeps everything of a context of {budget}"):
            method.check_context(budget)
    with pytest.raises(UsageError, match="quest: budget=64 reads everything of a context of 64"):
        parse("quest:budget=64").check_context(64)
    parse("quest:budget=64").check_context(65)
    assert parse("h2o:budget=16").capacity(100, 5) == 21
    assert parse("h2o:budget=16").capacity(10, 5) == 15
    assert parse("full").capacity(100, 5) == 105


@pytest.mark.parametrize("text", ["kivi:bits=4", "kivi:bits=2,group=16"])
def test_a_head_dimension_that_no_group_divides_is_refused(text):
    odd = dataclasses.replace(layer(), head_dim=40)
    with pytest.raises(UsageError, match="does not divide the head dimension 40"):
        parse(text).cache(odd, 1, 32)
    parse("kivi:group=8").cache(odd, 1, 32)


def stored_by(text, layers):
    """What stores each layer of a model, spelled."""
    return [parse(text).codec.at(layer, layers).spelled() for layer in range(layers)]


def test_first_and_last_layers_are_left_full():
    assert stored_by("int8:skip_first=1,skip_last=2", 5) == [
        "full",
        *["int8:skip_first=1,skip_last=2"] * 2,
        "full",
        "full",
    ]
    assert stored_by("int8", 2) == ["int8", "int8"]
    with pytest.raises(UsageError, match="int8:skip_first=2,skip_last=2: leaves none of 4 layers to int8"):
        stored_by("int8:skip_first=2,skip_last=2", 4)


def test_a_layers_cache_is_that_of_its_own_codec():
    where = dataclasses.replace(layer(), layers=3)
    for text in ("int8:skip_first=1,skip_last=1", "h2o:budget=16 + int8:skip_first=1,skip_last=1"):
        caches = [parse(text).cache(dataclasses.replace(where, index=index), 1, 32) for index in range(3)]
        assert [cache.kv.k.spec.bits for cache in caches] == [16, 8, 16]
    caches = [parse("kivi:layer_bits=424").cache(dataclasses.replace(where, index=index), 1, 32) for index in range(3)]
    assert [cache.kv.v.spec.bits for cache in caches] == [4, 2, 4]


def test_kivis_bits_are_of_as_many_layers_as_there_are():
    assert stored_by("kivi:layer_bits=4224,skip_last=1", 4) == [
        "kivi:bits=4,skip_last=1",
        *["kivi:bits=2,skip_last=1"] * 2,
        "full",
    ]
    with pytest.raises(UsageError, match="kivi: layer_bits has 3 digits, but there are 4 layers"):
        stored_by("kivi:layer_bits=422", 4)
