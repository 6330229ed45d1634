"""A graph replays tensors, not Python: steps at other lengths must come out as if they were run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache, Member
from kvsuite.cache.fused import FusedCache
from kvsuite.engines.graph import StepGraph
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.kernels.fused import launch
from kvsuite.methods import parse

METHODS = [
    "full",
    "jitter",
    "kivi:bits=2,group=16,residual=16",
    "h2o:budget=12 + int4",
    "h2o:budget=12 + kivi:bits=4,group=16,residual=16",
    "streaming-llm:budget=12",
]


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
def engine():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    return TransformersEngine(LlamaForCausalLM(config).to(torch.bfloat16), None)


def caches(engine, method, prompts, capacity=64):
    found = []
    for layer in adapter.contexts(engine.model):  # where the model is now
        evictor = method.selector.evictor(capacity) if method.selector else None
        sides = method.codec.sides(layer)
        found.append(FusedCache(layer, sides, 4, capacity, evictor, method.selector is not None))
    for row, ids in enumerate(prompts):
        context = engine.prefill(Request("x", "", "", 1), ids, [], method.needs).context
        method.compress(row, context, found)
    return found


PROMPTS = [list(range(5, 15)), list(range(20, 35)), list(range(40, 67))]


def run(engine, text, device, replayed, steps=12):
    """Logits of every step in which rows come, idle, and go, and the caches after it; by graphs or one by one."""
    method = parse(text)
    layers = caches(engine, method, PROMPTS)
    cache = KVCache(Member(layers))
    graph = StepGraph(engine.model, cache, layers, 4, Tape.capture if device.type == "cpu" else None)
    position, found = {row: len(ids) for row, ids in enumerate(PROMPTS)}, []
    for n in range(steps):
        if n == 7:  # an answer ends, a shorter prompt takes its row
            for layer, seen in zip(
                layers, engine.prefill(Request("y", "", "", 1), PROMPTS[0], [], method.needs).context, strict=True
            ):
                method.compress(2, [seen], [layer])
            position[2] = len(PROMPTS[0])
        cache.members[0].rows = (0, None if n in (3, 4) else 1, 2, None)
        fed = [[(7 * n + 3 * row) % 97] for row in range(4)]
        at = [[0 if row is None else position[row]] for row in cache.members[0].rows]
        if replayed:
            logits = graph(fed, at)
        else:
            ids, where = torch.tensor(fed, device=device), torch.tensor(at, device=device)
            logits = adapter.forward(engine.model, cache, ids, position_ids=where)
        found.append(logits[[row for row in range(4) if cache.members[0].rows[row] is not None]].clone())
        for row in cache.members[0].rows:
            if row is not None:
                position[row] += 1
    return found, layers, graph


@pytest.mark.parametrize("text", METHODS)
@torch.inference_mode()
def test_replayed_steps_are_the_steps(engine, text, device):
    engine.model.to(device)
    expected, theirs, _ = run(engine, text, device, replayed=False)
    found, ours, graph = run(engine, text, device, replayed=True)
    assert len(graph.graphs) == (2 if "residual" in text else 1)
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"step {n}"
    for a, b in zip(ours, theirs, strict=True):
        assert a.nbytes == b.nbytes
        assert torch.equal(a._counters, b._counters)
        for row in range(3):
            assert a.kept(row) == b.kept(row) == int(a.paged.live[row].sum())
            for x, y in zip(a.materialise(row), b.materialise(row), strict=True):
                assert torch.equal(x.k, y.k)
                assert torch.equal(x.v, y.v)
                assert torch.equal(x.positions, y.positions)


@torch.inference_mode()
def test_a_length_that_is_a_number_is_seen(engine, device, monkeypatch):
    """The break this test is for: the cache is asked for its length on the host, and a graph keeps the answer."""
    engine.model.to(device)
    expected, _, _ = run(engine, "full", device, replayed=False, steps=5)
    appended = FusedCache.append

    def frozen(self, k, v, rows=(0,)):
        appended(self, k, v, rows)
        self.paged.used[0] = self._slots[0][0]

    monkeypatch.setattr(FusedCache, "append", frozen)
    found, _, _ = run(engine, "full", device, replayed=True, steps=5)
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True, False, False, False, False]
