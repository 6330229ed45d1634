"""Packed weights: the same products but for rounding, row by row, or none at all."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from transformers import DynamicCache

from kvsuite.cache.adapter import forward
from kvsuite.engines import packing
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.methods import parse_all

DTYPES = torch.bfloat16, torch.float32


def packed(dtype, out=96, bias=True, width=64):
    """A linear layer whose weights are packed; skipped where PyTorch cannot do that."""
    layer = torch.nn.Linear(width, out, bias).to(dtype)
    made = packing.pack(torch.nn.Sequential(layer))
    if "cannot" in made:
        pytest.skip(made)
    assert made == "weights packed"
    return layer


def is_packed(model):
    return {"forward" in vars(module) for module in model.modules() if type(module) is torch.nn.Linear}


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 300),
    out=st.integers(1, 200),
    bias=st.booleans(),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_products_differ_by_rounding_alone(dtype, rows, out, bias, threads, seed):
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    layer = packed(dtype, out, bias)
    x, weight = torch.randn(rows, 64).to(dtype), layer.weight.detach().double()
    added = layer.bias.detach().double() if bias else torch.zeros(out, dtype=torch.float64)
    with torch.inference_mode():
        exact, terms = linear(x.double(), weight, added), linear(x.double().abs(), weight.abs(), added.abs())
        sums, results = (
            64 * torch.finfo(torch.float32).eps * terms,
            torch.finfo(dtype).eps * (exact.abs() + added.abs()),
        )
        assert ((layer(x).double() - exact).abs() <= sums + results).all()
        assert torch.equal(layer(x[None]), layer(x)[None])


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([1, 2, 4, 8, 16, 64]),
    out=st.sampled_from([32, 192, 576, 1000]),
    threads=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_its_mates_nor_on_its_place(dtype, rows, out, threads, data):
    torch.set_num_threads(threads)
    torch.manual_seed(rows)
    layer, row = packed(dtype, out, width=576), torch.randn(1, 576).to(dtype)
    found = []
    for _ in range(2):
        x, at = torch.randn(rows, 1, 576).to(dtype), data.draw(st.integers(0, rows - 1))
        x[at] = row
        with torch.inference_mode():
            found.append(layer(x)[at])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_gives_what_transformers_own_cache_gives(tiny_llama, dtype):
    packed(dtype)
    model = copy.deepcopy(tiny_llama).to(dtype)
    assert packing.pack(model) == "weights packed"
    assert is_packed(model) == {True}
    ids, theirs, cache, fed = list(range(3, 60)), [], DynamicCache(), torch.arange(3, 60)[None]
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        for _ in range(8):
            theirs.append(int(forward(model, cache, fed).argmax()))
            fed = torch.tensor([theirs[-1:]])
    engine = TransformersEngine(model, None)
    engine.stop = frozenset()
    engine.encode = lambda request, compress: (ids, [])
    (ours,) = engine.generate([Request("a", "", "", 8)], parse_all(["full"]), width=1)
    assert ours.tokens == theirs


def test_what_takes_too_much_memory_is_left_alone(tiny_llama, monkeypatch):
    model = copy.deepcopy(tiny_llama)
    weights = sum(m.weight.nbytes for m in model.modules() if type(m) is torch.nn.Linear)
    monkeypatch.setattr(packing, "memory", lambda: weights / 2**30 * 3.9)
    assert packing.pack(model) == "weights not packed: 0.0 GiB more are above 25% of the memory"
    assert is_packed(model) == {False}


def cannot(*args):
    raise AttributeError("no such operator")


@pytest.mark.parametrize(
    ("name", "broken", "reason"),
    [
        ("_packed", cannot, "this PyTorch cannot do it here"),
        ("_multiply", cannot, "this PyTorch cannot do it here"),
        ("_multiply", lambda weight, bias, x: torch.zeros(len(x), bias.shape[0]), "products would differ"),
    ],
)
def test_what_cannot_be_packed_is_left_alone(monkeypatch, name, broken, reason):
    monkeypatch.setattr(packing, name, broken)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
    assert packing.pack(model) == f"weights not packed: {reason}"
    assert is_packed(model) == {False}
