"""The cells of `session.py`: what is measured, in which order, and what is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from statistics import quantiles
from types import SimpleNamespace
from typing import Any

import torch
from session_device import Timed
from session_inputs import (
    CODED,
    LIBRARIES,
    TINY,
    TINY_LIBRARIES,
    Call,
    Dense,
    Evicting,
    Problem,
    Skip,
    Source,
    Walk,
    Wrong,
    built,
    held,
    loaded,
    refuse,
    sdpa,
    stored,
)  # fmt: skip
from torch.nn.attention import SDPBackend
from triton.runtime.errors import OutOfResources

from kvsuite.kernels import triton as kernels
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.triton.store import flush

fused = import_module("kvsuite.kernels.triton.attend")  # its package has a function of that name


def spread(samples: list[float]) -> dict[str, Any]:
    low, middle, high = quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    samples = [float(f"{x:.5g}") for x in samples]
    return {"median": middle, "quartiles": [low, high], "samples": samples}


def over(a: list[float], b: list[float]) -> dict[str, Any]:
    return spread([x / y for x, y in zip(a, b, strict=True)])


CHANGES: list[dict[str, int]] = [
    *({"tile": n} for n in (32, 64, 128)),
    *({"warps": n} for n in (1, 2, 4, 8)),
    *({"stages": n} for n in (1, 2, 3, 4, 5)),
    *({"chunk": n} for n in (256, 512, 1024, 2048)),
    *({"tile": tile, "warps": warps} for tile, warps in ((32, 2), (64, 2), (64, 8), (128, 8), (256, 8))),
]
NAMES = ("Settings", "TUNED", "kind_of", "chunk_tokens")
"""What a sweep needs of the kernel's module."""


@contextmanager
def settings(kv: PagedKV, change: dict[str, int]) -> Iterator[None]:
    """The attention kernel with one setting changed."""
    kind, chunks = fused.kind_of(kv), fused.chunk_tokens
    before = fused.TUNED[kind]
    if change.items() <= vars(before).items():
        raise Skip("this is the setting in use")
    if change.get("chunk", chunks(kv.num_slots.numel())) % change.get("tile", before.tile):
        raise Skip("a program's share is not whole tiles")
    try:
        if "chunk" in change:
            fused.chunk_tokens = lambda *_: change["chunk"]
        else:
            fused.TUNED[kind] = replace(before, **change)
        yield
    finally:
        fused.TUNED[kind], fused.chunk_tokens = before, chunks


def absent(why: str) -> dict[str, Any]:
    raise Skip(why)


@dataclass(frozen=True)
class Cell:
    """One thing to measure: gives what is recorded, or raises."""

    section: str
    name: str
    run: Callable[[], dict[str, Any]]


class Bench(Source):
    """The cells, and what they share: the device, the sizes, and the library that is compared with. ``copied`` is the
    copy bandwidth in GB/s, ``dense`` the fastest library's name, its calls, and the bytes of one."""

    def __init__(self, device: Any, tiny: bool) -> None:
        super().__init__(device, tiny)
        z = self.sizes
        self.copied: float | None = None
        self.shape: tuple[int, int] | None = None
        self.dense: tuple[str, Timed, int] | None = None
        kivi = {f"kivi-{bits}": f"kivi:bits={bits}{z.kivi}" for bits in (4, 2)}
        self.formats = {"full": "full", "int8": "int8", "int4": "int4", "fp8": "fp8", "fp8 per token": "fp8:per=token"}
        self.formats |= kivi
        selectors = [name + z.budget for name in ("h2o", "streaming-llm", "random")]
        self.methods = [*(text for text in self.formats.values() if "per" not in text), *selectors]

    def plan(self) -> list[Cell]:
        """Everything, what matters most first."""
        z, cells = self.sizes, [Cell("copy", "device to device", self.copy)]
        first, long = z.shapes[0], z.shapes[min(1, len(z.shapes) - 1)]
        cells += self.decoding(*first) + self.decoding(*long)
        cells += [Cell("h2o", f"{long[0]} × {long[1]}", partial(self.h2o, *long))]
        cells += [Cell("ragged", name, partial(self.ragged, name, *long)) for name in ("full", "int4", "kivi-4")]
        for shape in z.shapes[2:4]:
            cells += self.decoding(*shape)
        cells += [Cell("step", text, partial(self.step, text)) for text in self.methods]
        cells += [Cell("graph", text, partial(self.graph, text)) for text in self.methods]
        for name in self.formats:
            cells += [Cell("append", f"{name}, {n}", partial(self.append, name, n)) for n in z.batches]
            cells += [Cell("fill", name, partial(self.fill, name))]
        cells += [Cell("prefill mass", str(n), partial(self.prefill_mass, n)) for n in z.prompts]
        for shape in z.shapes[4:]:
            cells += self.decoding(*shape)
        return cells + self.sweeping(*first)

    def sets(self, make: Callable[[], Any]) -> list[Any]:
        """Input sets that together exceed four times the L2 cache, so that nothing is found there; two at least, where
        memory allows."""
        found = [make()]
        wanted = max(2, math.ceil(4 * self.device.l2 / found[0].nbytes))
        while len(found) < wanted:
            try:
                found.append(make())
            except torch.OutOfMemoryError:
                if sum(x.nbytes for x in found) < 4 * self.device.l2:
                    raise
                break
        return found

    def ready(self, problems: list[Any]) -> Timed:
        """Captured, after the first was found right."""
        problems[0].refuse_wrong()
        return self.device.capture(problems * self.repeats(problems))

    def repeats(self, problems: list[Any]) -> int:
        """How often a graph goes through its input sets: for a gigabyte, which is far longer than starting it."""
        if not self.device.l2:
            return 1
        return max(1, min(256 // len(problems), math.ceil(1e9 / sum(x.nbytes for x in problems))))

    def timed(self, calls: list[Call], each: int = 1) -> dict[str, Any]:
        """Of one call, which may do its work ``each`` times."""
        return spread([x / each for x in self.device.samples([self.device.capture(calls)])[0]])

    def rate(self, nbytes: int, us: dict[str, Any]) -> dict[str, Any]:
        speed = nbytes / us["median"] / 1e3
        return {"us": us, "bytes": nbytes, "GB/s": speed, "share": None if self.copied is None else speed / self.copied}

    def beside(self, problems: list[Any], others: list[Any]) -> tuple[dict[str, Any], list[list[float]]]:
        """Ours, the library of this shape if there is one, and others, taking turns; the record, and others' ratios."""
        sides = [self.ready(problems), *others, *([self.dense[1]] if self.dense else [])]
        samples = self.device.samples(sides)
        found = {"sets": len(problems), **self.rate(problems[0].nbytes, spread(samples[0]))}
        if self.dense is not None:
            name, _, nbytes = self.dense
            found |= {"library": name, "library us": spread(samples[-1]), "ratio": over(samples[-1], samples[0])}
            found["allowed"] = nbytes / problems[0].nbytes
        return found, samples

    def copy(self) -> dict[str, Any]:
        source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device.at).random_(0, 256)
        there = torch.empty_like(source)
        found = self.rate(2 * source.nbytes, self.timed([lambda: there.copy_(source)]))
        self.copied = found["GB/s"]
        return found

    def decoding(self, batch: int, tokens: int) -> list[Cell]:
        """The libraries, then every format beside the fastest of them."""
        where = f"{batch} × {tokens}"
        cells = [Cell("libraries", where, partial(self.libraries, batch, tokens))]
        for name in (*self.formats, "full + mass"):
            cells.append(Cell("decode", f"{name}, {where}", partial(self.decode, name, batch, tokens)))
        return cells

    def libraries(self, batch: int, tokens: int) -> dict[str, Any]:
        """All that run here; the fastest stays captured for what comes next."""
        self.shape, self.dense = (batch, tokens), None
        self.device.clean()
        problems = self.sets(partial(Dense, self, batch, tokens))
        found: dict[str, Any] = {"sets": len(problems), "times": {}, "absent": {}}
        best = math.inf
        for name, make in (TINY_LIBRARIES if self.tiny else LIBRARIES).items():
            try:
                calls = [make(problem) for problem in problems]
                problems[0].refuse_wrong(calls[0]())
                captured = self.device.capture(calls * self.repeats(problems))
                us = found["times"][name] = spread(self.device.samples([captured])[0])
            except Exception as error:
                found["absent"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if us["median"] < best:
                best, self.dense = us["median"], (name, captured, problems[0].nbytes)
        if self.dense is None:
            return found
        return found | {"fastest": self.dense[0], **self.rate(problems[0].nbytes, found["times"][self.dense[0]])}

    def beside_library(self, batch: int, tokens: int) -> None:
        """See to it that ``dense`` is of this shape: a session that goes on has it no more."""
        if self.shape != (batch, tokens):
            self.libraries(batch, tokens)

    def decode(self, name: str, batch: int, tokens: int) -> dict[str, Any]:
        self.beside_library(batch, tokens)
        text, mass = self.formats[name.removesuffix(" + mass")], name.endswith("mass")
        make = partial(Problem, self, text, self.lengths(batch, tokens))
        plain = [self.ready(self.sets(make))] if mass else []
        found, samples = self.beside(self.sets(partial(make, mass=mass)), plain)
        return found | ({"over full": over(samples[0], samples[1])} if mass else {})

    def h2o(self, batch: int, tokens: int) -> dict[str, Any]:
        self.beside_library(batch, tokens)
        steps = self.sets(partial(Evicting, self, self.sizes.h2o, batch, tokens))
        return self.beside(steps, [])[0] | {"kept": int(steps[0].cache.kv.num_tokens[0, 0])}

    def ragged(self, name: str, batch: int, tokens: int) -> dict[str, Any]:
        """Time per kept token where every (row, head) keeps between 5 and 100 %, over that of equal lengths."""
        self.shape, self.dense = None, None
        share = torch.rand(batch, self.sizes.kv_heads) * 0.95 + 0.05
        used = (share * tokens).long().numpy()
        mean = round(float(used.mean()))
        make = partial(Problem, self, self.formats[name], ragged=True)
        equal = self.ready(self.sets(partial(make, self.lengths(batch, mean))))
        found, samples = self.beside(self.sets(partial(make, used)), [equal])
        kept = int(used.sum())
        ratio = [x / kept / (y / (mean * used.size)) for x, y in zip(*samples, strict=True)]
        return found | {"per token": spread(ratio), "kept": kept, "equal us": spread(samples[1])}

    def append(self, name: str, batch: int) -> dict[str, Any]:
        """Tokens one after the other, the lengths being put back once per graph; flushing, done again and again."""
        problem = Problem(self, self.formats[name], self.lengths(batch, self.sizes.start), room=self.sizes.repeats)
        kv, rows = problem.kv, problem.rows
        k, v = (self.normal(batch, self.sizes.kv_heads, 1, self.sizes.dim) for _ in range(2))
        kv.advance([*rows], self.sizes.repeats)  # their pages, for all that comes
        add, kv.encodes = partial(kernels.append, kv, k, v, rows), False
        add()
        at = batch - 1, self.sizes.kv_heads - 1
        kv.host.slots[:] = self.sizes.start + 1
        for store, x in ((kv.k, k), (kv.v, v)):
            refuse(stored(kv, store, *at)[-1], x[at][0], CODED[store.spec.bits], "what was appended")

        def several() -> None:
            problem.rewind()
            for _ in range(self.sizes.repeats):
                add()

        found = {"us": self.timed([several], self.sizes.repeats)}
        problem.rewind()
        due = kv.k.spec.residual and not kv.k.spec.rolling
        if due:
            found["flush us"] = self.timed([partial(flush, kv, rows)] * self.sizes.repeats)
        each = found["flush us"]["median"] / kv.k.spec.residual if due else 0.0
        return found | {"mean us": found["us"]["median"] + each}

    def fill(self, name: str) -> dict[str, Any]:
        """Prompts into one row after the other, which hold one as long."""
        z, rows, length = self.sizes, 4, self.sizes.prompts[-1]
        kv = Problem(self, self.formats[name], self.lengths(rows, length)).kv
        prompts = [[self.normal(z.kv_heads, length, z.dim) for _ in range(2)] for _ in range(rows)]
        calls = [partial(kernels.fill, kv, row, *prompts[row]) for row in range(rows)]
        calls[1]()
        for store, x in ((kv.k, prompts[1][0]), (kv.v, prompts[1][1])):
            refuse(stored(kv, store, 1, 1), x[1], CODED[store.spec.bits], "what was filled in")
        written = held(kv, [length] * z.kv_heads)
        return self.rate(sum(x.nbytes for x in prompts[0]) + written, self.timed(calls))

    def prefill_mass(self, length: int) -> dict[str, Any]:
        """A prompt's attention mass beside a library's attention of the same prompt."""
        z = self.sizes
        q, k, v = (self.normal(1, heads, length, z.dim) for heads in (z.heads, z.kv_heads, z.kv_heads))
        call = partial(kernels.column_mass, q[0], k[0], z.dim**-0.5)
        found, last = call(), min(64, length)
        scores = q[0, : z.heads // z.kv_heads, -last:].double() @ k[0, 0].double().T * z.dim**-0.5
        later = torch.ones(last, last, dtype=torch.bool, device=q.device).triu(1)
        scores[..., -last:].masked_fill_(later, -math.inf)
        refuse(found[0, -last:], scores.softmax(-1)[..., -last:].sum(1).mean(0), what="mass of the last keys")
        refuse(found.sum(1), torch.full_like(found[:, 0], length), what="all mass")
        dense = SimpleNamespace(q=q, k=k, v=v)
        backend = SDPBackend.MATH if self.tiny else SDPBackend.FLASH_ATTENTION
        ours, theirs = (self.device.capture([one]) for one in (call, sdpa(backend, dense, causal=True)))
        a, b = self.device.samples([ours, theirs])
        return {"us": spread(a), "library": "SDPA", "library us": spread(b), "over": over(a, b)}

    def step(self, text: str) -> dict[str, Any]:
        """A whole decoding step: launch by launch, as the engine replays it with what the host counts, and the replay
        alone. No residual becomes full on the way."""
        z, (batch, tokens) = self.sizes, self.sizes.shapes[0]
        model = built(z, self.device.at)
        caches = loaded(self, model, text, [tokens] * batch, 64)
        walk = Walk(model, caches, [tokens] * batch)
        eager = [walk.us(self.device) for _ in range(z.steps + 1)][1:]
        walk.record(self.device.step_capture)
        replayed = [walk.us(self.device) for _ in range(z.steps + 2)][2:]
        alone = self.device.samples([Timed(walk.graph.graphs[False][0], [walk])], rounds=z.steps)[0]
        found = {"eager us": spread(eager), "us": spread(replayed), "replay us": spread(alone), "layers": z.layers}
        return found | {"bytes": sum(cache.nbytes for cache in caches)}

    def graph(self, text: str) -> dict[str, Any]:
        """Steps at other lengths, in two of which a residual becomes full: replayed ones are those that were run."""
        model, lengths = built(replace(TINY, kv_heads=1, heads=2), self.device.at), [60, 61]
        text += ",residual=32" if "kivi" in text and "residual" not in text else ""
        runs = []
        for replayed in (False, True):
            walk = Walk(model, loaded(self, model, text, lengths, 16), lengths)
            if replayed:
                walk.record(self.device.step_capture)
            runs.append([walk().clone() for _ in range(6)])
        for n, (a, b) in enumerate(zip(*runs, strict=True)):
            if not torch.equal(a, b):
                raise Wrong(f"step {n} replayed is not the step: logits differ by {float((a - b).abs().max()):.3g}")
        return {"equal": True, "steps": len(runs[0]), "graphs": len(walk.graph.graphs)}

    def sweeping(self, batch: int, tokens: int) -> list[Cell]:
        """Other settings of the attention kernel, one changed at a time, format by format in turns."""
        lacking = ", ".join(name for name in NAMES if not hasattr(fused, name))
        if lacking:
            return [Cell("sweep", "settings", partial(absent, f"kvsuite.kernels.triton.attend has no {lacking}"))]
        names = ("full", "int4", "kivi-4", "kivi-2", "fp8", "int8")
        cells = []
        for change in CHANGES[:: 5 if self.tiny else 1]:
            for name in names[:: 3 if self.tiny else 1]:
                what = ", ".join(f"{key} {value}" for key, value in change.items())
                cells.append(Cell("sweep", f"{name}: {what}", partial(self.sweep, name, change, batch, tokens)))
        return cells

    def sweep(self, name: str, change: dict[str, int], batch: int, tokens: int) -> dict[str, Any]:
        """Times of a setting, and over those of the setting in use."""
        self.shape, self.dense = None, None
        problems = self.sets(partial(Problem, self, self.formats[name], self.lengths(batch, tokens)))
        usual = self.ready(problems)
        try:
            with settings(problems[0].kv, change):
                found, samples = self.beside(problems, [usual])
        except OutOfResources as error:
            raise Skip(str(error)) from error
        return found | {"format": name, "change": change, "over": over(samples[0], samples[1])}
