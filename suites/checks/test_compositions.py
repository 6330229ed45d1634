"""Codecs on layers of any shape: what METHODS.md asks of every method, for random compositions of heads, groups of
queries, head dimensions, dtypes, lengths around the edges of pages and groups, and numbers of every kind."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.checker import error
from kvsuite.kernels.context import LayerContext
from kvsuite.methods import parse
from suites.checks.depth import depth
from suites.checks.table import FITTED, plain, same

TEXTS = [
    "full", "jitter", "fp8", "fp8:per=token", "int8", "int4", "int8:rotate=hadamard", "int4:rotate=hadamard", "nvfp4",
    "mxfp4", "q8_0", "q4_0", "kivi:bits=4", "kivi:bits=2,group=16,residual=32", "kivi:bits=4,residual=32,order=after",
    "turboquant:bits=k4v4", "turboquant:bits=k3v3,seed=2", "turboquant:bits=k8v4", "turboquant:bits=k4v2",
    "kvarn:bits=k4v2", "kvarn:bits=k4v4", "gear:bits=4,group=32,residual=32",
    "gear-l:bits=2,rank=0.1,group=32,order=after", "think:recent=8",
]  # fmt: skip
LEARNING = {"gear", "gear-l", "think"}
"""Those of them that are fitted to each prompt."""
KINDS = ["spread", "zero", "constant", "constant channels", "outlier", "outlier channel", "long token", "tiny"]


@st.composite
def compositions(draw):
    """A codec's text, a layer, and q (heads, n, D), k and v (kv_heads, n, D) of a prompt and three tokens more."""
    text, kv_heads, group = draw(st.sampled_from(TEXTS)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dim = draw(st.sampled_from([32, 64, 96, 128, 256]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    length = draw(st.sampled_from([1, 7, 31, 32, 33, 63, 64, 65, 95, 127, 128, 129, 160]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q, k, v = (torch.randn(h, length + 3, dim, generator=noise) for h in (kv_heads * group, kv_heads, kv_heads))
    for x in (k, v):
        kind, at = draw(st.sampled_from(KINDS)), draw(st.integers(0, dim - 1))
        if kind == "zero":
            x *= 0
        elif kind == "constant":
            x[:] = x[:, :1, :1]
        elif kind == "constant channels":
            x[:] = x[:, :1]
        elif kind == "outlier":
            x[:, length // 2, at] = 1e4
        elif kind == "outlier channel":
            x[..., at] *= 1e4 / 8
        elif kind == "long token":
            x[:, length // 3] *= 100
        elif kind == "tiny":
            x *= 1e-6
    q *= min(1.0, 1 / float(k.abs().max() + 1e-9))  # so that one key does not take all attention
    where = LayerContext(0, kv_heads * group, kv_heads, dim, dtype, dtype, torch.device("cpu"))
    return text, where, *(x.to(dtype) for x in (q, k, v))


def loaded(text, where, k, v, rows=1, backend="reference"):
    """A cache whose last row holds a prompt, with room for three tokens more."""
    cache = parse(text).cache(where, rows, k.shape[1] + 3, backend=backend)
    cache.load(rows - 1, plain(k, v))
    return cache


@settings(max_examples=depth(150, 3000))
@given(made=compositions())
def test_a_codec_on_a_layer_of_any_shape(made):
    text, where, q, k, v = made
    length, scale = k.shape[1] - 3, where.head_dim**-0.5
    prompt = k[:, :length], v[:, :length]
    cache, other = loaded(text, where, *prompt), loaded(text, where, *prompt, rows=2)
    other.load(0, plain(k[:, :5], v[:, :5]))
    once = loaded(text, where, k, v)
    for i in range(length, length + 3):
        step = [x[None, :, i : i + 1] for x in (q, k, v)]
        for each, row in ((cache, 0), (other, 1)):
            each.append(step[1], step[2], (row,))
            out = each.attend(step[0], scale, (row,))
    assert same(cache, other, 0, 1), "a row does not depend on its mates"
    assert text.partition(":")[0] in LEARNING or same(cache, once), "one by one is as all at once"
    assert cache.row_nbytes(0) == other.row_nbytes(1) == once.row_nbytes(0)
    group = where.heads // where.kv_heads
    for head, held in enumerate(cache.read()):
        assert held.k.isfinite().all()
        assert held.v.isfinite().all()
        own = slice(head * group, (head + 1) * group)
        assert error(q[own, -1], out[0, own, 0], held, scale) <= 1
        # a head by itself, in a model that has no other
        alone = LayerContext(0, group, 1, where.head_dim, where.dtype, where.kv_dtype, where.device)
        single = loaded(text, alone, *(x[head : head + 1] for x in prompt))
        for i in range(length, length + 3):
            single.append(*(x[None, head : head + 1, i : i + 1] for x in (k, v)))
        assert torch.equal(single.read()[0].k, held.k)
        assert torch.equal(single.read()[0].v, held.v)


def test_all_that_learn_of_a_prompt_are_known_here():
    assert {text.partition(":")[0] for text in FITTED} == {*LEARNING, "codebook"}
