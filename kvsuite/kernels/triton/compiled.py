"""What a kernel becomes on a GPU that is not there: registers, shared memory, machine instructions, who loads what.

Needs triton's compiler and the two tools it ships, no GPU; not in a process where ``TRITON_INTERPRET`` is set."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, create_function_from_signature

from kvsuite.kernels.triton.launch import Launch

UNKNOWN = "?"
"""In place of an argument's name: an access whose address could not be traced to one."""

Widths = Mapping[int, int]
"""Bytes that one instruction moves per thread -> instructions of that width."""

Node = TypeVar("Node", bound=Hashable)

LOADS = ("LDG", "LDGSTS")
WRITES = ("STG", "RED", "REDG", "ATOM", "ATOMG")
LOCAL = ("LDL", "STL")
TENSOR = ("HMMA", "IMMA", "QMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "BGMMA")

_KINDS = {
    "tensor": TENSOR,
    "global": (*LOADS, *WRITES, "UBLKCP", "UTMALDG", "UTMASTG"),
    "shared": ("LDS", "LDSM", "STS", "STSM", "ATOMS"),
    "local": LOCAL,
    "slow": ("I2F", "F2F", "F2I", "FRND", "MUFU"),
    "pack": ("I2FP", "F2FP", "F2IP"),
    "control": ("BAR", "BRA", "BSSY", "BSYNC", "CALL", "EXIT", "NOP", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "WARPGROUP"),
}
_SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Loop:
    """What one turn of a loop may execute, branches not taken included, as often unrolled as ptxas chose."""

    instructions: Mapping[str, int]
    reads: Mapping[str, Widths]


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU. Counts are of SASS instructions as they stand in the program, not as they are executed.

    ``capability``: 80 for sm_80. ``registers``: per thread. ``stack`` and ``local``: bytes per thread. ``spills``:
    loads and stores of local memory. ``shared``: bytes per block. ``instructions``: mnemonic up to its first dot ->
    count. ``loads``: global loads by width. ``reads`` and ``writes`` (stores and atomics): the same for every argument
    that is a pointer, empty for one that is not used; `UNKNOWN` stands for accesses that could not be traced. Bulk
    copies (TMA) are in ``instructions`` alone.
    ``loops``: the innermost loops with tensor instructions, or if there are none with global loads, as they come.
    """

    name: str
    capability: int
    registers: int
    stack: int
    local: int
    spills: int
    shared: int
    instructions: Mapping[str, int]
    loads: Widths
    reads: Mapping[str, Widths]
    writes: Mapping[str, Widths]
    loops: tuple[Loop, ...]


def kinds(instructions: Mapping[str, int]) -> Counter[str]:
    """Sum counts by what the instructions do: tensor; global, shared and local memory; slow (conversions and special
    functions, at most 16 a cycle on an SM); pack (conversions that are not slow); control; float; and integer for the
    rest (moves, addresses and predicates too)."""
    found: Counter[str] = Counter()
    for mnemonic, count in instructions.items():
        kind = next((kind for kind, names in _KINDS.items() if mnemonic in names), None)
        found[kind or ("float" if mnemonic[0] in "FH" else "integer")] += count
    return found


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile a recorded launch as Triton's JIT would for its arguments, and look at what came out."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("an interpreted kernel cannot be compiled: TRITON_INTERPRET was set when it was imported")
    target = GPUTarget("cuda", capability, 32)
    backend = triton.compiler.make_backend(target)
    constants = dict(launch.constants)
    if "NATIVE" in constants:  # whether the GPU converts e4m3 itself: asked of a device there, here of the target
        constants["NATIVE"] = capability >= 89
    given = {**launch.arguments, **constants, "num_warps": launch.warps, "num_stages": launch.stages}
    bound, special, options = create_function_from_signature(kernel.signature, kernel.params, backend)(**given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, special, options)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder  # nothing stale is trusted
        built = triton.compile(source, target=target, options=options.__dict__)
        cubin = Path(folder, "cubin")
        cubin.write_bytes(built.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        program = _parse(_output(triton.knobs.nvidia.nvdisasm.path, "-c", "-gp", str(cubin)))
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    pointers = {i: name for i, name in enumerate(names) if signature[name].startswith("*")}
    traced = _addresses(built.asm["ptx"], pointers)
    instructions = _count(line.mnemonic for line in program)
    return Compiled(
        name=kernel.__name__,
        capability=capability,
        registers=int(used["REG"]),
        stack=int(used["STACK"]),
        local=int(used["LOCAL"]),
        spills=sum(instructions.get(name, 0) for name in LOCAL),
        shared=built.metadata.shared,
        instructions=instructions,
        loads=_count(_width(line) for line in program if line.mnemonic in LOADS),
        reads=_accesses(program, LOADS, traced, pointers.values()),
        writes=_accesses(program, WRITES, traced, pointers.values()),
        loops=tuple(
            Loop(_count(line.mnemonic for line in body), _accesses(body, LOADS, traced, pointers.values()))
            for body in _loops(program)
        ),
    )


def _count(things: Iterable[Node]) -> dict[Node, int]:
    return dict(Counter(things))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


class _Line(NamedTuple):
    """A SASS instruction, the line of PTX it was made from, the labels that stand before it."""

    mnemonic: str
    modifiers: tuple[str, ...]
    operands: str
    conditional: bool
    ptx: int
    labels: tuple[str, ...]


def _parse(sass: str) -> list[_Line]:
    program: list[_Line] = []
    labels: list[str] = []
    ptx = 0
    for text in sass.splitlines():
        if found := re.search(r'"\.nv_debug_ptx_txt", line (\d+)', text):
            ptx = int(found[1])
        elif found := re.match(r"(\.L_\w+):", text):
            labels.append(found[1])
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@\S+ )?\s*([A-Z][\w.]*)\s*([^;]*);", text):
            mnemonic, *modifiers = found[2].split(".")
            program.append(_Line(mnemonic, tuple(modifiers), found[3].strip(), bool(found[1]), ptx, tuple(labels)))
            labels.clear()
    return program


def _width(line: _Line) -> int:
    return next((_SIZES[word] for word in line.modifiers if word in _SIZES), 4)


def _addresses(ptx: str, pointers: Mapping[int, str]) -> dict[int, set[str]]:
    """For every line of PTX that accesses global memory: the pointer arguments its address is made from."""
    sources: dict[str, set[str]] = {}
    roots: dict[str, str] = {}
    asked: dict[int, set[str]] = {}
    for number, text in enumerate(ptx.splitlines(), 1):
        for statement in text.partition("//")[0].split(";"):
            found = re.match(r"[\s{]*(?:@\S+\s+)?([a-z]\w*(?:[.:]+\w+)+)\s+(.*)", statement)
            if not found:
                continue
            operation, operands = found.groups()
            if operation.startswith("ld.param"):
                index = re.search(r"_param_(\d+)", operands)
                if index and int(index[1]) in pointers:
                    roots[operands.partition(",")[0]] = pointers[int(index[1])]
            elif ".global" in operation and "[" in operands:
                # of a copy's two addresses the global one is the last
                asked.setdefault(number, set()).update(re.findall(r"%\w+", re.findall(r"\[([^]]*)]", operands)[-1]))
            elif not operation.startswith(("ld.", "st.")):
                target, _, rest = operands.partition("}," if operands.startswith("{") else ",")
                for register in re.findall(r"%\w+", target):
                    sources.setdefault(register, set()).update(re.findall(r"%\w+", rest))
    return {number: {roots[name] for name in _reach(of, sources) if name in roots} for number, of in asked.items()}


def _reach(start: Iterable[Node], edges: Mapping[Node, Iterable[Node]]) -> set[Node]:
    found: set[Node] = set()
    ahead = list(start)
    while ahead:
        if (node := ahead.pop()) not in found:
            found.add(node)
            ahead.extend(edges.get(node, ()))
    return found


def _accesses(
    program: Sequence[_Line], mnemonics: Collection[str], traced: Mapping[int, set[str]], arguments: Iterable[str]
) -> dict[str, dict[int, int]]:
    found: dict[str, list[int]] = {name: [] for name in arguments}
    for line in program:
        if line.mnemonic in mnemonics:
            for name in traced.get(line.ptx) or (UNKNOWN,):
                found.setdefault(name, []).append(_width(line))
    return {name: _count(widths) for name, widths in found.items()}


def _loops(program: Sequence[_Line]) -> list[list[_Line]]:
    at = {label: i for i, line in enumerate(program) for label in line.labels}
    before: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for i, line in enumerate(program):
        jump = re.fullmatch(r"(.*)`\((\.L_\w+)\)", line.operands) if line.mnemonic == "BRA" else None
        if jump:
            before.setdefault(at[jump[2]], []).append(i)
            if at[jump[2]] <= i:
                ends.setdefault(at[jump[2]], []).append(i)
        if line.conditional or (line.mnemonic not in ("EXIT", "RET") and not (jump and not jump[1])):
            before.setdefault(i + 1, []).append(i)
    loops = {}
    for head, latches in sorted(ends.items()):
        body = {head, *_reach(latches, {**before, head: []})}
        if 0 not in body:  # else this is no loop: a way leads in past its head
            loops[head] = body
    for wanted in (TENSOR, LOADS):
        having = {head: body for head, body in loops.items() if any(program[i].mnemonic in wanted for i in body)}
        inner = [body for head, body in having.items() if not any(other in body for other in having if other != head)]
        if inner:
            return [[program[i] for i in sorted(body)] for body in inner]
    return []
