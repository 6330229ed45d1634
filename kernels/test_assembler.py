"""The PTX in the attention kernel, run by a small PTX machine: the interpreter has none, and CI has no GPU."""

import re

import numpy as np
import pytest
import torch

from kvsuite.kernels import lloyd
from kvsuite.kernels.fp4 import from_e2m1
from kvsuite.kernels.quantize import unpack
from kvsuite.kernels.triton import pages

U32 = np.uint64(0xFFFFFFFF)


def halves(x):
    """32-bit words as two float16 each, low half first."""
    return x.astype(np.uint32).view(np.float16).reshape(-1, 2)


def word(x):
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint32).reshape(-1).astype(np.uint64)


def prmt(a, b, selector):
    """PTX's byte permutation: result byte i is byte ``selector >> 4 i`` of b:a."""
    both, out = a | (b << np.uint64(32)), np.zeros_like(a)
    for i in range(4):
        at = (selector >> np.uint64(4 * i)) & np.uint64(0xF)
        assert (at < 8).all(), "replicating the sign is not used"
        out |= ((both >> (np.uint64(8) * at)) & np.uint64(0xFF)) << np.uint64(8 * i)
    return out


def e4m3(pair):
    both = np.stack([pair & np.uint64(0xFF), (pair >> np.uint64(8)) & np.uint64(0xFF)], -1).astype(np.uint8)
    return word(torch.from_numpy(both).view(torch.float8_e4m3fn).half().numpy())


def fused_multiply_add(a, b, c):
    a, b, c = (halves(x).astype(np.float64) for x in (a, b, c))
    return word(a * b + c)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "sub.u32": lambda a, b: a - b,
    "prmt.b32": prmt,
    "sub.f16x2": lambda a, b: word(halves(a) - halves(b)),
    "mul.f16x2": lambda a, b: word(halves(a) * halves(b)),
    "fma.rn.f16x2": fused_multiply_add,
    "cvt.rn.f16x2.e4m3x2": e4m3,
}


def run(program, given):
    """The four float16 results of a program whose fourth operand is ``given``, uint64 (n,) of 32-bit words."""
    registers = {"$4": given}
    declared = {name.strip() for names in re.findall(r"\.reg \.b\d+ ([^;]*);", program) for name in names.split(",")}

    def value(text):
        text = text.strip()
        return registers[text] if text in registers else np.full_like(given, int(text, 0))

    for line in (line.strip() for line in program.strip("{} ").split(";")):
        if not line or line.startswith(".reg"):
            continue
        name, operands = line.split(" ", 1)
        if name == "mov.b32" and "{" in operands:
            pair = re.findall(r"\{([^}]*)\}", operands)[0].split(",")
            source = operands.split("}")[-1].strip(", ") if operands.startswith("{") else None
            x = value(source)
            registers[pair[0].strip()], registers[pair[1].strip()] = x & np.uint64(0xFFFF), x >> np.uint64(16)
            continue
        to, *rest = (x.strip() for x in operands.split(","))
        assert to in declared | {"$0", "$1", "$2", "$3"}, f"{to} is not declared"
        x = [value(text) for text in rest]
        with np.errstate(over="ignore", invalid="ignore"):
            registers[to] = OPERATIONS[name](*x) & U32
    bits = np.stack([registers[f"${i}"] for i in range(4)], -1).astype(np.uint16)
    return torch.from_numpy(bits.view(np.float16))


def words(x):
    """uint8 (n, 4) -> uint64 (n,)"""
    return np.ascontiguousarray(x.numpy()).view(np.uint32).reshape(-1).astype(np.uint64)


BYTES = torch.cat([torch.arange(256, dtype=torch.uint8)[:, None] + torch.arange(0, 256, 67, dtype=torch.uint8)[None]])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_become_numbers_exactly(bits):
    for part in range(8 // bits):
        name = f"_ASM_{bits}_{part}" if bits < 8 else "_ASM_8"
        wanted = unpack(BYTES, bits)[:, 4 * part : 4 * part + 4]
        assert torch.equal(run(getattr(pages, name).value, words(BYTES)), wanted.half())


def test_signed_codes_become_numbers_exactly():
    assert torch.equal(run(pages._ASM_SIGNED.value, words(BYTES)), BYTES.view(torch.int8).half())


@pytest.mark.parametrize(("name", "numbers"), [("LEVELS", lambda x: lloyd.numbers(x, 4)), ("E2M1", from_e2m1)])
def test_codes_become_what_they_are_for(name, numbers):
    for part in range(2):
        wanted = numbers(unpack(BYTES, 4)[:, 4 * part : 4 * part + 4]).half()
        found = run(getattr(pages, f"_ASM_{name}_{part}").value, words(BYTES))
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("name", ["_ASM_E4M3", "_ASM_E4M3_OLD"])
def test_e4m3_becomes_numbers_exactly_and_nan_stays(name):
    wanted = BYTES.view(torch.float8_e4m3fn).half()
    assert wanted.isnan().any()
    found = run(getattr(pages, name).value, words(BYTES))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(0), wanted.nan_to_num(0))


def test_a_wrong_selector_is_seen():
    broken = pages._ASM_8.value.replace("0x4342", "0x4341")
    assert broken != pages._ASM_8.value
    assert not torch.equal(run(broken, words(BYTES)), BYTES.half())
