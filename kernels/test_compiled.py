"""Kernels as a GPU would run them, compiled without one: what they load, how widely, and that nothing spills.

``python kernels/test_compiled.py`` prints what the checks look at as JSON, with ``--table`` it rewrites README.md.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it is to find the suites

import kvsuite
from kvsuite.kernels import triton as kernels
from kvsuite.kernels.context import AttentionParams, LayerContext, Needs
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.quantspec import PAGE
from kvsuite.kernels.triton.compiled import UNKNOWN, Compiled, Loop, compile_for, kinds
from kvsuite.kernels.triton.launch import launch, recording
from kvsuite.kernels.triton.store import flush
from kvsuite.methods.codecs.fp8 import Fp8
from kvsuite.methods.codecs.full import Full
from kvsuite.methods.codecs.int4 import Int4
from kvsuite.methods.codecs.int8 import Int8
from kvsuite.methods.codecs.kivi import Kivi
from kvsuite.methods.codecs.nvfp4 import NvFp4
from kvsuite.methods.codecs.q8_0 import Q80
from kvsuite.methods.codecs.turboquant import TurboQuant
from suites.checks.depth import depth

README = Path(__file__).with_name("README.md")
MARKS = "<!-- kernels/test_compiled.py --table -->\n", "<!-- end -->\n"
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a block may have, by compute capability."""

# Llama 3.1 8B, bfloat16; few rows and pages: what is compiled depends on neither
HEADS, KV_HEADS, DIM, ROWS, PAGES = 32, 8, 128, 3, 5


@dataclass(frozen=True)
class Case:
    """``call`` starts kernels on CPU tensors. ``reads``: argument -> bytes per load and thread, 0 for no loads; a
    ``…codes_ptr`` that is named nowhere is to be read 16 bytes wide. ``writes``: likewise. ``tensor``: the kernels that
    must use tensor cores."""

    call: Callable[[], object]
    reads: Mapping[str, int] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)
    tensor: tuple[str, ...] = ()


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def cache(codec, evicts=False):
    """An empty cache; one that ``evicts`` has positions and accumulates attention."""
    layer = LayerContext(0, HEADS, KV_HEADS, DIM, torch.bfloat16, torch.bfloat16, torch.device("cpu"))
    needs = Needs(positions=evicts, evicts=evicts, accumulated_attention=evicts)
    return PagedKV.empty(layer, codec.specs(layer), ROWS, PAGES * PAGE, needs, arena=False)


def attending(codec, evicts=False, queries=1, **expected):
    def call():
        q, params = zeros(ROWS, HEADS, queries, DIM), AttentionParams(DIM**-0.5)
        return kernels.attend(cache(codec, evicts), q, range(ROWS), params)

    return Case(call, tensor=("_attend",), **expected)


def appending(codec, evicts=False, **writes):
    def call():
        new = zeros(ROWS, KV_HEADS, 1, DIM)
        kernels.append(cache(codec, evicts), new, new, range(ROWS))

    return Case(call, writes=writes)


def filling(codec, evicts=False, codes=16):
    def call():
        prompt, keep = zeros(KV_HEADS, 77, DIM), [torch.arange(40 - head) for head in range(KV_HEADS)]
        kept = (keep, zeros(KV_HEADS, 77, dtype=torch.float32)) if evicts else ()
        kernels.fill(cache(codec, evicts), 0, prompt, prompt, *kept)

    return Case(call, reads={"k_ptr": 16, "v_ptr": 16}, writes={"k_codes_ptr": codes, "v_codes_ptr": codes})


def flushing(codec):
    def call():
        flush(cache(codec), range(ROWS))

    return Case(call, reads={"x_residual_ptr": 16}, writes={"x_codes_ptr": 16})


def scoring(**asked):
    def call():
        kernels.column_mass(zeros(HEADS, 200, DIM), zeros(KV_HEADS, 200, DIM), DIM**-0.5, **asked)

    return Case(call, reads={"q_ptr": 16, "k_ptr": 16}, tensor=("_log_sum_exp", "_column_mass"))


CASES = {
    "attend full": attending(Full()),
    "attend full, h2o": attending(Full(), evicts=True),
    "attend full, 4 queries": attending(Full(), queries=4),
    "attend int8": attending(Int8()),
    "attend int4": attending(Int4()),
    "attend int4, h2o": attending(Int4(), evicts=True),
    "attend int4:rotate=hadamard": attending(Int4(rotate="hadamard")),
    "attend turboquant:bits=k4v4": attending(TurboQuant()),
    "attend q8_0": attending(Q80()),
    "attend nvfp4": attending(NvFp4()),
    "attend fp8": attending(Fp8()),
    "attend fp8:per=token": attending(Fp8(per="token")),
    "attend kivi:bits=4": attending(Kivi(bits=4), reads={"k_residual_ptr": 16, "v_residual_ptr": 16}),
    "attend kivi:bits=2": attending(Kivi(bits=2)),
    # one warp writes one token: a thread has a 32nd of its bytes
    "append full": appending(Full(), k_codes_ptr=8, v_codes_ptr=8),
    "append int8": appending(Int8(), k_codes_ptr=4, v_codes_ptr=4),
    "append int4": appending(Int4(), k_codes_ptr=2, v_codes_ptr=2),
    "append int4, h2o": appending(Int4(), evicts=True, k_codes_ptr=2, v_codes_ptr=2),
    "append int4:rotate=hadamard": appending(Int4(rotate="hadamard"), k_codes_ptr=2, v_codes_ptr=2),
    "append turboquant:bits=k4v4": appending(TurboQuant(), k_codes_ptr=2, v_codes_ptr=2),
    "append q8_0": appending(Q80(), k_codes_ptr=4, v_codes_ptr=4),
    "append q8_0:rotate=hadamard": appending(Q80(rotate="hadamard"), k_codes_ptr=4, v_codes_ptr=4),
    "append nvfp4": appending(NvFp4(), k_codes_ptr=2, v_codes_ptr=2),
    "append nvfp4:rotate=hadamard": appending(NvFp4(rotate="hadamard"), k_codes_ptr=2, v_codes_ptr=2),
    "append fp8": appending(Fp8(), k_codes_ptr=4, v_codes_ptr=4),
    "append fp8:per=token": appending(Fp8(per="token"), k_codes_ptr=4, v_codes_ptr=4),
    "append kivi:bits=4": appending(Kivi(bits=4), k_codes_ptr=0, k_residual_ptr=8, v_codes_ptr=2, v_residual_ptr=8),
    "flush kivi:bits=4": flushing(Kivi(bits=4)),
    "flush kivi:bits=2": flushing(Kivi(bits=2)),
    "fill full": filling(Full()),
    "fill int8": filling(Int8()),
    "fill int4": filling(Int4()),
    "fill int4, h2o": filling(Int4(), evicts=True),
    "fill int4:rotate=hadamard": filling(Int4(rotate="hadamard")),
    "fill turboquant:bits=k4v4": filling(TurboQuant()),
    "fill q8_0": filling(Q80()),
    "fill q8_0:rotate=hadamard": filling(Q80(rotate="hadamard")),
    "fill nvfp4": filling(NvFp4()),
    "fill nvfp4:scale=4over6": filling(NvFp4(scale="4over6")),
    "fill nvfp4:rotate=hadamard": filling(NvFp4(rotate="hadamard")),
    "fill fp8": filling(Fp8()),
    "fill fp8:per=token": filling(Fp8(per="token")),
    "fill kivi:bits=4": filling(Kivi(bits=4)),
    "fill kivi:bits=2": filling(Kivi(bits=2), codes=8),
    "mass": scoring(),
    "mass, window": scoring(window=64),
}
QUICK = [  # every kernel, every layout
    "attend full, h2o",
    "attend fp8:per=token",
    "attend kivi:bits=2",
    "append int4, h2o",
    "append kivi:bits=4",
    "flush kivi:bits=2",
    "fill int8",
    "fill kivi:bits=4",
    "mass, window",
]
CHECKED = depth(QUICK, [*CASES])
FOR = depth([90], [*SHARED])
"""What cases and toys are compiled for."""


@triton.jit
def _toy(q_ptr, codes_ptr, table_ptr, out_ptr, pages, D: tl.constexpr, UNPACK: tl.constexpr):
    row = tl.program_id(0)
    m, token, byte = tl.arange(0, 16), tl.arange(0, 32), tl.arange(0, D // 2)
    q_ptr += row * 16 * D + m[:, None] * D + byte[None, :]
    low, high = tl.load(q_ptr), tl.load(q_ptr + D // 2)
    scores = tl.zeros((16, 32), tl.float32)
    for i in range(pages):
        page = tl.load(table_ptr + row * pages + i).to(tl.int64)
        codes = tl.load(codes_ptr + page * (16 * D) + token[:, None] * (D // 2) + byte[None, :])
        if not UNPACK:
            codes = tl.full((32, D // 2), 0x53, tl.uint8)
        scores = tl.dot(low, tl.trans((codes & 15).to(tl.bfloat16)), scores)
        scores = tl.dot(high, tl.trans((codes >> 4).to(tl.bfloat16)), scores)
    tl.store(out_ptr + row * 512 + m[:, None] * 32 + token[None, :], scores)


def toy(unpack=True, shift=0, **options):
    arguments = {
        "q_ptr": zeros(ROWS, 16, DIM),
        "codes_ptr": zeros(ROWS * PAGES * PAGE * DIM // 2 + shift, dtype=torch.uint8)[shift:],
        "table_ptr": zeros(ROWS, PAGES, dtype=torch.int32),
        "out_ptr": zeros(ROWS, 16, PAGE, dtype=torch.float32),
        "pages": PAGES,
    }
    launch(_toy, (ROWS,), arguments, {"D": DIM, "UNPACK": unpack, **options})


TOYS = {
    "toy": (Case(toy, reads={"q_ptr": 16, "table_ptr": 4}, writes={"out_ptr": 16}, tensor=("_toy",)), None),
    "stub": (Case(partial(toy, unpack=False)), "no kernel reads codes_ptr"),
    "spilling": (Case(partial(toy, maxnreg=32)), "_toy spills"),
    "unaligned": (Case(partial(toy, shift=1)), "a kernel reads codes_ptr [1] bytes at a time instead of 16"),
    "unaligned by half": (Case(partial(toy, shift=8)), "a kernel reads codes_ptr [1] bytes at a time instead of 16"),
    "without the tensor kernel": (Case(toy, tensor=("_toy", "_other")), "_other is not started"),
    "reading what it should not": (
        Case(toy, reads={"q_ptr": 0}),
        "a kernel reads q_ptr [16] bytes at a time instead of 0",
    ),
    "that should write codes": (Case(toy, writes={"codes_ptr": 16}), "no kernel writes codes_ptr"),
}
"""Cases and what is wrong with them."""


def compile_all(names):
    """Case -> compute capability -> its kernels as JSON has them, or why there are none. Toys are among the cases."""
    cases, built = {name: CASES[name] for name in names} | {name: case for name, (case, _) in TOYS.items()}, {}
    wanted = dict.fromkeys(cases, [*SHARED] if names is CASES else FOR)
    for call, capabilities in {case.call: wanted[name] for name, case in cases.items()}.items():
        for capability in capabilities:
            try:
                with recording() as launches:
                    call()
                built[call, capability] = [asdict(compile_for(started, capability)) for started in launches]
            except Exception:
                built[call, capability] = traceback.format_exc()
    return {name: {to: built[case.call, to] for to in wanted[name]} for name, case in cases.items()}


def restore(text):
    """What `compile_all` found, from JSON."""
    found = json.loads(text, object_hook=lambda x: {int(k) if k.isdigit() else k: v for k, v in x.items()})
    for by_capability in found.values():
        for capability, built in by_capability.items():
            if not isinstance(built, str):
                loops = [tuple(Loop(**loop) for loop in kernel.pop("loops")) for kernel in built]
                by_capability[capability] = [Compiled(**k, loops=own) for k, own in zip(built, loops, strict=True)]
    return found


def expected(case, built):
    """Argument -> bytes per access: what the case says, and 16 for codes that it does not mention."""
    codes = {name for kernel in built for name in kernel.reads if name.endswith("codes_ptr")} - {*case.writes}
    return {"reads": dict.fromkeys(codes, 16) | case.reads, "writes": case.writes}


def faults(case, built):
    """What is wrong with a case's kernels for one GPU, in words."""
    found = [f"{name} is not started" for name in case.tensor if name not in {kernel.name for kernel in built}]
    for kernel in built:
        if kernel.stack or kernel.local or kernel.spills:
            found.append(f"{kernel.name} spills: {kernel.spills} accesses to {kernel.stack + kernel.local} bytes")
        if kernel.shared > SHARED[kernel.capability]:
            found.append(f"{kernel.name} wants {kernel.shared} bytes of shared memory")
        if UNKNOWN in kernel.reads or UNKNOWN in kernel.writes:
            found.append(f"{kernel.name} accesses what could not be traced to an argument")
        if kernel.name in case.tensor and not kinds(kernel.instructions)["tensor"]:
            found.append(f"{kernel.name} does not use tensor cores")
    for verb, widths in expected(case, built).items():
        for argument, width in widths.items():
            seen = {w for kernel in built for w in getattr(kernel, verb).get(argument, {})}
            if not seen and width:
                found.append(f"no kernel {verb} {argument}")
            elif seen - {width}:
                found.append(f"a kernel {verb} {argument} {sorted(seen)} bytes at a time instead of {width}")
    return found


def table(compiled):
    """The table in README.md."""
    titles = ("case", "kernel", "registers", "shared KiB", "reads", "writes", "loops", "tensor", "slow")
    lines = [f"Triton {triton.__version__}, {' / '.join(f'sm_{c}' for c in SHARED)} where they differ.", ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, case in CASES.items():
        for built in zip(*(compiled[name][capability] for capability in SHARED), strict=True):
            cells = zip(*(row(case, kernel) for kernel in built), strict=True)
            lines.append(f"| {name} | {' | '.join(' / '.join(dict.fromkeys(cell)) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def row(case, kernel):
    """A kernel's cells for one GPU."""
    accesses = [
        ", ".join(
            f"{argument.removesuffix('_ptr')} {'+'.join(map(str, sorted(widths)))}"
            for argument in sorted(wanted)
            if (widths := getattr(kernel, verb).get(argument))
        )
        for verb, wanted in expected(case, [kernel]).items()
    ]
    loops = [kinds(loop.instructions) for loop in kernel.loops]
    counts = [[loop.total() for loop in loops], *([loop[kind] for loop in loops] for kind in ("tensor", "slow"))]
    shared = f"{kernel.shared / 1024:.0f}"
    texts = [*accesses, *(", ".join(map(str, numbers)) for numbers in counts)]
    return [f"`{kernel.name}`", str(kernel.registers), shared, *(text or "–" for text in texts)]


def key():
    """Of all that decides what comes out: the cases, the sources, and the compiler."""
    rooms = [Path(kvsuite.__file__).with_name(name) for name in ("kernels", "methods")]
    sources = [Path(__file__), *sorted(source for room in rooms for source in room.rglob("*.py"))]
    what = [f"{CHECKED} {sys.version} {torch.__version__} {triton.__version__}".encode()]
    return hashlib.sha256(b"".join([*what, *(source.read_bytes() for source in sources)])).hexdigest()[:16]


@pytest.fixture(scope="session")
def compiled(request):
    """All kernels, compiled where nothing is interpreted: by the first worker for all, and kept for the next run."""
    folder = request.config.cache.mkdir("compiled")
    kept = folder / f"{key()}.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            for old in folder.glob("*.json"):
                old.unlink()
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            command = [sys.executable, __file__, *CHECKED]
            ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            kept.with_suffix(".new").write_text(ran.stdout)
            kept.with_suffix(".new").replace(kept)
        return restore(kept.read_text())


@pytest.mark.parametrize("capability", FOR)
@pytest.mark.parametrize("name", CHECKED)
def test_a_kernel_loads_widely_and_does_not_spill(name, capability, compiled):
    built = compiled[name][capability]
    assert not isinstance(built, str), built
    assert faults(CASES[name], built) == []


@pytest.mark.parametrize("capability", FOR)
@pytest.mark.parametrize("name", TOYS)
def test_a_kernel_that_does_not_is_found(name, capability, compiled):
    case, fault = TOYS[name]
    found = faults(case, compiled[name][capability])
    assert (len(found) == 1 and fault in found[0]) if fault else not found


def test_every_load_is_traced_to_an_argument(compiled):
    toy = compiled["toy"][90][0]
    assert sum(toy.loads.values()) == sum(count for widths in toy.reads.values() for count in widths.values()) > 4


def test_the_loop_over_pages_is_found(compiled):
    (loop,) = compiled["toy"][90][0].loops
    assert loop.instructions["HMMA"] == 2 * (DIM // 2 // 16) * (PAGE // 8) // 4  # m16n8k16, 4 warps
    assert loop.reads["codes_ptr"] == {16: 1}
    assert not loop.reads["q_ptr"]


def test_the_table_names_the_kernels_there_are(compiled):
    rows = re.findall(r"^\| (.+?) \| `(\w+)` \|", README.read_text(), re.M)
    assert [*dict.fromkeys(name for name, _ in rows)] == [*CASES]
    there = [(name, kernel.name) for name in CASES if name in CHECKED for kernel in compiled[name][90]]
    assert [row for row in rows if row[0] in CHECKED] == there


def main(arguments):
    """Compile the cases that are named, or all."""
    whole = arguments == ["--table"]
    with redirect_stdout(sys.stderr):  # Triton prints a program that it cannot assemble
        found = json.dumps(compile_all(CASES if whole else arguments or CASES), indent=1)
    if whole:
        before, _, rest = README.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        README.write_text(before + MARKS[0] + table(restore(found)) + MARKS[1] + after)
    else:
        print(found)


if __name__ == "__main__":
    main(sys.argv[1:])
