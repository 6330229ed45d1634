"""A graph replays tensors, not Python: steps at other lengths must come out as if they were run."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from kvsuite.cache import adapter, layer
from kvsuite.cache.adapter import KVCache, Member
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.observations import AttentionMass, LastQueries
from kvsuite.cache.prefill import PrefillCache
from kvsuite.engines.graph import StepGraph
from kvsuite.kernels.quantspec import PAGE
from kvsuite.kernels.triton import launch
from kvsuite.methods import parse
from kvsuite.methods.selectors.h2o import H2O
from suites.checks.depth import depth

QUICK = ["int4:rotate=hadamard", "h2o:budget=12 + kivi:bits=4,group=16,residual=16", "streaming-llm:budget=12"]
METHODS = [*QUICK, *depth([], ["full", "jitter", "kivi:bits=2,group=16,residual=16", "h2o:budget=12 + int4"])]


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on any device: every operation and every launch is written down with the very tensors
    and numbers it was given, and replayed on them; results go to the memory they had."""

    def __init__(self):
        super().__init__()
        self.done, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read back while recording"
        if func._schema.is_mutable:
            self.before += [(x, x.clone()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = func(*args, **kwargs)
        self.done.append((func, args, kwargs, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.done:
            if isinstance(func, launch.Launch):
                func.run()
                continue
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)

    @classmethod
    def capture(cls, step):
        """Record without effect, as a CUDA graph does: what was changed on the way is put back."""
        tape = cls()

        class Launches(list):
            def append(self, started):
                tape.done.append((started, (), {}, ()))

        launch._recorders.append(Launches())
        try:
            with tape:
                out = step()
        finally:
            launch._recorders.pop()
        for x, was in reversed(tape.before):
            x.copy_(was)
        return tape.replay, out


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=depth(1, 2), num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    adapter.install(made)
    return made


def prefilled(model, ids, method):
    cache = PrefillCache(adapter.contexts(model), method.observes)
    adapter.forward(model, cache, torch.tensor([ids], device=model.device))
    return cache.prefilled


def caches(model, method, prompts, slots):
    found = [method.cache(where, 4, slots, backend="triton") for where in adapter.contexts(model)]
    assert {cache.backend.NAME for cache in found} == {"triton"}
    for row, ids in enumerate(prompts):
        method.compress(row, prefilled(model, ids, method), found)
    return found


STEPS = depth(9, 12)
PROMPTS = [list(range(5, 15)), list(range(20, 35)), list(range(40, 67))]


def run(model, method, device, replayed, steps=STEPS, slots=64):
    """Logits of every step in which rows come, idle, and go, and the caches after it; by graphs or one by one."""
    layers = caches(model, method, PROMPTS, slots)
    cache = KVCache(Member(layers))
    graph = StepGraph(model, cache, layers, 4, Tape.capture if device.type == "cpu" else None)
    position, found = {row: len(ids) for row, ids in enumerate(PROMPTS)}, []
    for n in range(steps):
        if n == 7:  # an answer ends, a shorter prompt takes its row
            method.compress(2, prefilled(model, PROMPTS[0], method), layers)
            position[2] = len(PROMPTS[0])
        cache.members[0].rows = (0, None if n in (3, 4) else 1, 2, None)
        fed = [[(7 * n + 3 * row) % 97] for row in range(4)]
        at = [[0 if row is None else position[row]] for row in cache.members[0].rows]
        if replayed:
            logits = graph(fed, at)
        else:
            ids, where = torch.tensor(fed, device=device), torch.tensor(at, device=device)
            logits = adapter.forward(model, cache, ids, position_ids=where)
        found.append(logits[[row for row in range(4) if cache.members[0].rows[row] is not None]].clone())
        for row in cache.members[0].rows:
            if row is not None:
                position[row] += 1
    return found, layers, graph


def agree(ours, theirs, rows=range(3)):
    """Everything that is known of some rows, on the device and on the host."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.nbytes == b.nbytes
        assert len(a.kv.allocator) == len(b.kv.allocator)
        for name in ("num_slots", "num_tokens", "num_seen", "free_slot", "page_table", "recent_queries"):
            x, y = getattr(a.kv, name), getattr(b.kv, name)
            assert x is y is None or torch.equal(x, y), name
        for row in rows:
            assert a.kept(row) == b.kept(row) == int(a.kv.num_tokens[row].sum())
            for x, y in zip(a.read(row), b.read(row), strict=True):
                assert torch.equal(x.k, y.k)
                assert torch.equal(x.v, y.v)
                assert torch.equal(x.positions, y.positions)


@pytest.mark.parametrize("text", METHODS)
@torch.inference_mode()
def test_replayed_steps_are_the_steps(model, text, device):
    model.to(device)
    expected, theirs, _ = run(model, parse(text), device, replayed=False)
    found, ours, graph = run(model, parse(text), device, replayed=True)
    assert len(graph.graphs) == (2 if "residual" in text else 1)
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"step {n}"
    agree(ours, theirs)


LONG = {
    # steps, and whether a page is given back on the way
    **depth({}, {"int4": (20, False), "h2o:budget=12 + kivi:bits=4,group=16,residual=16": (24, False)}),
    "streaming-llm:budget=8,sinks=0,positions=absolute + kivi:bits=4,group=16,residual=16": (42, True),
}


@pytest.mark.parametrize("text", LONG)
@torch.inference_mode()
def test_pages_come_and_go_between_replays(model, text, device, monkeypatch):
    monkeypatch.setattr(layer, "RELEASE_EVERY", 8)
    model.to(device)
    steps, gaps = LONG[text]
    expected, theirs, _ = run(model, parse(text), device, replayed=False, steps=steps, slots=3 * PAGE)
    found, ours, _ = run(model, parse(text), device, replayed=True, steps=steps, slots=3 * PAGE)
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * steps
    agree(ours, theirs)
    for cache in ours:
        assert (cache.kv.host.columns[:2] > 1).all() or not gaps
        assert (cache.kv.host.gaps[:2] > 0).all() == gaps


@dataclass(frozen=True)
class Odd(H2O):
    """Evicts what the newest queries' ring says, and by a number of each sequence's own: what a graph could freeze."""

    every: int = 1

    @property
    def observes(self):
        return (AttentionMass(), LastQueries(8))

    @property
    def eviction(self):
        return OddEviction(self, self.every)


@dataclass(frozen=True)
class OddEviction:
    selector: Odd
    every: int
    rerotated_sinks: int = 0
    observes: tuple = (AttentionMass(), LastQueries(8))

    def parameters(self, length):
        return length % 7, length

    def score(self, state):
        first, length = state.parameters
        return ((state.positions * 5 + first * state.num_seen) % (length + 3)).float() + state.accumulated_attention


@pytest.mark.parametrize("every", [1, 5])
@torch.inference_mode()
def test_numbers_of_a_sequence_and_its_queries_are_not_frozen(model, every, device):
    """Every step, and with rows compacted between replays."""
    model.to(device)
    method = replace(parse("h2o:budget=12"), selector=Odd(budget=12, every=every))
    expected, theirs, _ = run(model, method, device, replayed=False)
    found, ours, _ = run(model, method, device, replayed=True)
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)
    agree(ours, theirs)


@torch.inference_mode()
def test_a_length_that_is_a_number_is_seen(model, device, monkeypatch):
    """The break this test is for: the cache is asked for its length on the host, and a graph keeps the answer."""
    model.to(device)
    expected, _, _ = run(model, parse("full"), device, replayed=False, steps=5)
    appended = LayerCache.append

    def frozen(self, *given):
        appended(self, *given)
        self.kv.num_slots[0] = int(self.kv.host.slots[0, 0])

    monkeypatch.setattr(LayerCache, "append", frozen)
    found, _, _ = run(model, parse("full"), device, replayed=True, steps=5)
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True, False, False, False, False]
