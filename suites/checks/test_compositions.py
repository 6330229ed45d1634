"""Methods at random, of all parts in docs/methods.md and those from outside: what holds for every method holds for any
selector, budget, codec and reader together, with any options, on layers of any heads, groups of queries, head
dimensions and dtypes, at lengths around the edges of pages and groups, and with numbers of every kind."""

import atexit
import dataclasses
import json
import shutil
import tempfile
import typing
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import event, example, given, reject, settings
from hypothesis import strategies as st

from kvsuite.cache.checker import AttentionChecker
from kvsuite.errors import UsageError
from kvsuite.kernels.context import LayerContext
from kvsuite.methods import catalogue, parse
from suites.checks.depth import depth
from suites.checks.table import layer, observed, same, sizes
from suites.checks.test_decided import weights

PARTS = {
    kind: [part for part in catalogue() if part.kind == kind] for kind in ("selector", "budget", "codec", "reader")
}
OPTIONS = {"layer_bits": ["42"], "skip_first": [1], "skip_last": [1], "threshold": [-8, -4, -0.5, 0.01, 1]}
"""Those of options that fit LAYERS layers."""
NUMBERS = {
    int: [0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 128],
    float: [0.02, 0.1, 0.2, 0.5, 0.9, 1, 2, 4, 8, 20, 33, 48, 64, 100],
}
OFTEN = ("budget", "heavy", "recent", "threshold", "weights", "shares")
"""Options that are given more often than not."""
KINDS = ["spread", "zero", "constant", "constant channels", "outlier", "outlier channel", "long token", "tiny"]
LAYERS, STEPS = 2, 3
WIDE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(WIDE, WIDE), (WIDE, BRAIN), (BRAIN, BRAIN), (HALF, HALF)]
"""What computes, and what is stored."""


@lru_cache
def files(kv_heads, dim):
    """Options that are files, for layers of this shape."""
    folder = Path(tempfile.mkdtemp(prefix="kvsuite-"))
    atexit.register(shutil.rmtree, folder)
    shares = [[(1, 0.5, 0.1)[(at + head) % 3] for head in range(kv_heads)] for at in range(LAYERS)]
    (folder / "shares.json").write_text(json.dumps(shares))
    return {"weights": weights(folder, LAYERS, dim, kv_heads)[0], "shares": folder / "shares.json"}


@st.composite
def parts(draw, kind, known):
    """A part of a kind, with options that it allows; ``known`` files."""
    part = draw(st.sampled_from(PARTS[kind]))
    hints, given = typing.get_type_hints(part), {}
    for field in dataclasses.fields(part) if part.__module__.startswith("kvsuite.") else ():  # else nobody checks them
        if draw(st.integers(0, 3)) < (4 if field.name in known else 3 if field.name in OFTEN else 1):
            own = typing.get_args(hints[field.name]) or (hints[field.name],)
            numbers = next((NUMBERS[type_] for type_ in (float, int) if type_ in own), own)
            given[field.name] = draw(st.sampled_from(OPTIONS.get(field.name, numbers)))
    given |= {name: known[name] for name in given if name in known}
    for written in (given, {name: value for name, value in given.items() if name in known}):
        text = part.name + ":" * bool(written) + ",".join(f"{name}={value}" for name, value in written.items())
        with suppress(UsageError):
            parse(f"random+{text}" if kind == "budget" else text)
            return text
    return reject()


class Made(NamedTuple):
    """A method on layers, a prompt's length, and of which kind the numbers of K and V are."""

    text: str
    where: list[LayerContext]
    length: int
    kinds: list[str]
    seed: int

    def numbers(self):
        """Of each layer q (heads, n, D), k and v (kv_heads, n, D), of the prompt and STEPS tokens more."""
        noise, found = torch.Generator().manual_seed(self.seed), []
        for own in self.where:
            heads, size = (own.heads, own.kv_heads, own.kv_heads), (self.length + STEPS, own.head_dim)
            q, k, v = (torch.randn(h, *size, generator=noise) for h in heads)
            for x, kind in zip((k, v), self.kinds, strict=True):
                become(x, kind, self.length, own.head_dim // 3)
            q *= min(1.0, 1 / float(k.abs().max() + 1e-9))  # so that one key does not take all attention
            found.append([x.to(own.dtype) for x in (q, k, v)])
        return found


@st.composite
def compositions(draw):
    """A method's parts, and all else."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dim = draw(st.sampled_from([32, 64, 96, 128, 256]))
    known, kinds = files(kv_heads, dim), ["selector"] * draw(st.sampled_from([0, 1, 1, 1]))
    kinds += ["budget"] * (bool(kinds) and draw(st.booleans()))
    kinds += ["codec"] * draw(st.sampled_from([0, 1, 1, 1])) + ["reader"] * draw(st.sampled_from([0, 0, 0, 1]))
    text = "+".join([draw(parts(kind, known)) for kind in kinds]) or "full"
    dtype, kv_dtype = draw(st.sampled_from(DTYPES))
    where = [layer(dtype, at, kv_dtype, (kv_heads * group, kv_heads, dim)) for at in range(LAYERS)]
    if draw(st.integers(0, 7)) == 7:
        where = [replace(own, rope=None) for own in where]
    length = draw(st.sampled_from([1, 7, 31, 32, 33, 63, 64, 65, 95, 127, 128, 129, 160]))
    return Made(text, where, length, [draw(st.sampled_from(KINDS)) for _ in "KV"], draw(st.integers(0, 2**32)))


def become(x, kind, length, at):
    """Numbers of a kind, in place: x (heads, n, D)."""
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


def compressed(method, where, prompts, new):
    """Caches of all layers with a row for each prompt, its layers prefilled. What was never written has all bits set:
    NaN, or a code that a codec may not have."""
    length = max(seen[0].k.shape[1] for seen in prompts)
    caches = [method.cache(own, len(prompts), *sizes(method, own, length, new), backend="reference") for own in where]
    for cache in caches:
        for pool in (*cache.kv.k.pools, *cache.kv.v.pools, cache.kv.k.residual, cache.kv.v.residual):
            pool.view(torch.uint8).fill_(255)
    for row, seen in enumerate(prompts):
        method.compress(row, seen, caches)
    return caches


def step(cache, q, k, v, rows):
    """A step of a batch, and how far its last row's attention is from float64's over what is held or read."""
    hidden = k.amax(1) if cache.wants_hidden else None
    cache.append(k, v, rows, hidden)
    checker = AttentionChecker(rows[-1])
    checker.before(cache)
    for held in cache.read(rows[-1]):
        assert held.positions[-1] == cache.seen(rows[-1]) - 1, "the newest token is attended to"
    out = cache.attend(q, q.shape[-1] ** -0.5, rows)
    checker.after(cache, rows, q, out, q.shape[-1] ** -0.5, None, None, None)
    return out, checker.worst


def prompt(method, where, given, n):
    """The first n tokens of each layer, and what the method asks to see."""
    return [observed(own, method.observes, *(x[:, :n] for x in layer)) for own, layer in zip(where, given, strict=True)]


@settings(max_examples=depth(120, 2500))
@given(made=compositions())
@example(Made("expected-attention+dms:threshold=-8", [layer(index=at) for at in range(LAYERS)], 3, ["spread"] * 2, 0))
@example(Made("compactor:budget=20", [layer(index=at) for at in range(LAYERS)], 64, ["outlier", "spread"], 0))
def test_what_holds_for_every_method_holds_for_a_composition(made):
    text, where, length, kinds, _ = made
    given, refused = made.numbers(), ""
    try:
        method = parse(text)
        method.check_model(where)
        method.check_layers(where)
        method.check_context(4096)
        for own in where:
            method.cache(own, 1, 32, backend="reference")
        seen = prompt(method, where, given, length)
    except UsageError as error:
        refused = str(error)
    event("refused" if refused else "made")
    if refused:
        assert any(part.partition(":")[0] in refused for part in text.split("+")), refused
        assert "\n" not in refused
        return
    mate = prompt(method, where, [[-x.flip(1) for x in own] for own in given], max(1, length // 2))
    caches, batch = compressed(method, where, [seen], STEPS), compressed(method, where, [mate, seen], STEPS)
    as_many_stay_as_the_budget_says(method, seen, caches)
    prompts = compressed(method, where, [seen], STEPS)
    for at, (cache, other) in enumerate(zip(caches, batch, strict=True)):
        held = cache.kv.allocated, other.kv.allocated
        for i in range(length, length + STEPS):
            q, k, v = (x[None, :, i : i + 1] for x in given[at])
            out, worst = step(cache, q, k, v, (0,))
            assert worst <= 1, "attention is that over what is held"
            both, _ = step(other, *(torch.cat([-x, x]) for x in (q, k, v)), (0, 1))
            assert torch.equal(both[1], out[0]), "a row does not depend on its mates"
        assert same(cache, other, 0, 1)
        assert cache.kept(0) == other.kept(1)
        assert cache.row_nbytes(0) == other.row_nbytes(1) == cache.nbytes
        assert held == (cache.kv.allocated, other.kv.allocated) == tuple(c.nbytes + c.slack for c in (cache, other))
        assert cache.slack >= 0
        assert cache.read_nbytes(0) <= cache.row_nbytes(0)
        if not cache.stepwise:
            prompts[at].append(*(x[None, :, length:] for x in given[at][1:]))
            assert same(cache, prompts[at]), "one by one is as all at once"
        for own in cache.read():
            assert own.k.isfinite().all()
            assert own.v.isfinite().all()
    if (
        kinds == ["spread", "spread"] and "=/" not in text
    ):  # else tokens or heads are equal, or a file tells heads apart
        which_head_is_which_does_not_matter(method, where, given, length)


def which_head_is_which_does_not_matter(method, where, given, length):
    """A prompt with its heads in reverse, and where nothing is selected one head in a model without others."""
    turned = prompt(method, where, [[x.flip(0) for x in own] for own in given], length)
    both = [compressed(method, where, [seen], 0) for seen in (prompt(method, where, given, length), turned)]
    for cache, other in zip(*both, strict=True):
        for a, b in zip(cache.read(), reversed(other.read()), strict=True):
            assert all(torch.equal(x, y) for x, y in ((a.k, b.k), (a.v, b.v), (a.positions, b.positions)))
    if method.selector is None and method.reader is None:
        group = where[0].heads // where[0].kv_heads
        alone = [replace(own, heads=group, kv_heads=1) for own in where]
        first = [[q[:group], k[:1], v[:1]] for q, k, v in given]
        singles = compressed(method, alone, [prompt(method, alone, first, length)], 0)
        for cache, single in zip(both[0], singles, strict=True):
            (own,) = single.read()
            assert torch.equal(own.k, cache.read()[0].k)
            assert torch.equal(own.v, cache.read()[0].v)


def as_many_stay_as_the_budget_says(method, seen, caches):
    """Of a prompt: counts, and what the selector protects."""
    (heads, length, _), layers = seen[0].k.shape, len(seen)
    kept = [[len(own.positions) for own in cache.read()] for cache in caches]
    assert all(cache.kept(0) == sum(own) for cache, own in zip(caches, kept, strict=True))
    tokens, budget = method.tokens(length), method.budget
    whole = [budget.whole(at, layers) for at in range(layers)]
    most, mean = budget.most(tokens, length)
    for own, everything in zip(kept, whole, strict=True):
        assert max(own) <= most
        assert everything <= (own == [length] * heads)
        assert budget.decides or everything or sum(own) <= heads * mean
    if method.selector is None:
        assert kept == [[length] * heads] * layers
        return
    if not budget.decides and budget.name in ("uniform", "layers"):
        assert all(everything or own == [tokens] * heads for own, everything in zip(kept, whole, strict=True))
    elif not budget.decides:
        rounded = budget.name == "ada" and budget.rule == "authors"  # each head's count, from a floor
        assert sum(map(sum, kept)) > heads * layers * (tokens - 2 if rounded else tokens) - 1
    for at, cache in enumerate(caches):
        if tokens < length or (budget.decides and length > method.selector.protects[0]):
            scores = method.selector.score(seen[at], tokens)
            assert not scores.isnan().any()
            for own, protected in zip(cache.read(), scores.isposinf(), strict=True):
                few = len(own.positions) < int(protected.sum())
                assert few or set(protected.nonzero()[:, 0].tolist()) <= set(own.positions.tolist())
