"""Reading a page: where slots are, and how what is written there becomes numbers.

Packed codes are loaded as words of four bytes and become float16, which holds them exactly, by a few lines of PTX.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvsuite.kernels import fp4, lloyd


@triton.jit
def _where(table_ptr, slot):
    """Slots' places in the pools."""
    return tl.load(table_ptr + slot // 32).to(tl.int64) * 32 + slot % 32


def _assembler(bits: int, part: int, signed: bool = False) -> tl.constexpr:
    """PTX for the four bytes of a word: one part of each as float16, by placing the code into the mantissa of 1024; a
    ``signed`` one is 128 more there."""
    mask = ((1 << bits) - 1) * 0x01010101
    return tl.constexpr(
        "{ .reg .b32 t, a, b, o;"
        + (f"shr.b32 t, $4, {bits * part};" if part else "mov.b32 t, $4;")
        + (f"and.b32 t, t, {mask:#x};" if bits < 8 else "")
        + ("xor.b32 t, t, 0x80808080; mov.b32 o, 0x64806480;" if signed else "mov.b32 o, 0x64006400;")
        + "prmt.b32 a, t, 0x64646464, 0x4140;"
        "prmt.b32 b, t, 0x64646464, 0x4342;"
        "sub.f16x2 a, a, o;"
        "sub.f16x2 b, b, o;"
        "mov.b32 {$0, $1}, a;"
        "mov.b32 {$2, $3}, b; }"
    )


def _table(numbers: Sequence[float], mirrored: bool, part: int) -> tl.constexpr:
    """PTX for the four bytes of a word: 4 bits of each as float16, by the table of the 8 positive ``numbers``. The
    highest bit is the sign; where ``mirrored`` 8 … 15 are the positive numbers, and 7 … 0 their negatives."""
    bits = torch.tensor(numbers).half().view(torch.int16).tolist()
    high, low = ([f"{int.from_bytes(bytes(x >> at & 255 for x in bits[i : i + 4]), 'little'):#x}" for i in (0, 4)]
                 for at in (8, 0))  # fmt: skip
    return tl.constexpr(
        "{ .reg .b32 t, i, s, a, b, h, l;"
        + (f"shr.b32 t, $4, {4 * part};" if part else "mov.b32 t, $4;")
        + "and.b32 i, t, 0x07070707;"
        "and.b32 s, t, 0x08080808;"
        + ("xor.b32 s, s, 0x08080808; shr.b32 t, s, 3; sub.u32 t, s, t; xor.b32 i, i, t;" if mirrored else "")
        + "shl.b32 s, s, 4;"
        "shr.b32 t, i, 4;"  # the four numbers' places, each a nibble of the selector
        "or.b32 t, i, t;"
        "prmt.b32 t, t, 0, 0x4420;"
        f"mov.b32 a, {high[0]}; mov.b32 b, {high[1]};"
        "prmt.b32 h, a, b, t;"
        "or.b32 h, h, s;"
        + (
            f"mov.b32 a, {low[0]}; mov.b32 b, {low[1]}; prmt.b32 l, a, b, t;"
            if any(x & 255 for x in bits)
            else "mov.b32 l, 0;"
        )
        + "prmt.b32 a, l, h, 0x5140;"
        "prmt.b32 b, l, h, 0x7362;"
        "mov.b32 {$0, $1}, a;"
        "mov.b32 {$2, $3}, b; }"
    )


LEVELS = tl.constexpr(lloyd.levels(4))
_POSITIVE = tl.constexpr(LEVELS.value[8:])
_ASM_LEVELS_0, _ASM_LEVELS_1 = (_table(_POSITIVE.value, True, part) for part in range(2))
E2M1 = tl.constexpr(fp4.E2M1)
_ASM_E2M1_0, _ASM_E2M1_1 = (_table(fp4.E2M1[:8], False, part) for part in range(2))
_ASM_8, _ASM_SIGNED = _assembler(8, 0), _assembler(8, 0, signed=True)
_ASM_4_0, _ASM_4_1 = _assembler(4, 0), _assembler(4, 1)
_ASM_2_0, _ASM_2_1, _ASM_2_2, _ASM_2_3 = (_assembler(2, part) for part in range(4))
_ASM_E4M3 = tl.constexpr(  # by the GPU itself, from sm_89
    "{ .reg .b16 l, h; .reg .b32 a, b;"
    "mov.b32 {l, h}, $4;"
    "cvt.rn.f16x2.e4m3x2 a, l;"
    "cvt.rn.f16x2.e4m3x2 b, h;"
    "mov.b32 {$0, $1}, a;"
    "mov.b32 {$2, $3}, b; }"
)


def _move(byte_pair: str, to: str) -> str:
    """Two e4m3 bytes to float16: their bits moved, times 256 for the difference in exponent bias; times 146 in between
    only NaN's 480 becomes infinite, and that times 0 is NaN."""
    return (
        f"prmt.b32 {to}, $4, 0, {byte_pair};"
        f"and.b32 s, {to}, 0x80008000;"
        f"and.b32 {to}, {to}, 0x7f007f00;"
        f"shr.b32 {to}, {to}, 1;"
        f"or.b32 {to}, {to}, s;"
        f"mul.f16x2 {to}, {to}, x;"
        f"mul.f16x2 s, {to}, y;"
        f"fma.rn.f16x2 {to}, s, z, {to};"
    )


_ASM_E4M3_OLD = tl.constexpr(
    "{ .reg .b32 a, b, s, x, y, z;"
    "mov.b32 x, 0x5c005c00; mov.b32 y, 0x58905890; mov.b32 z, 0;"
    + _move("0x1404", "a")
    + _move("0x3424", "b")
    + "mov.b32 {$0, $1}, a;"
    "mov.b32 {$2, $3}, b; }"
)


@triton.jit
def _bytes(words, ASM: tl.constexpr):
    """Words (T, W / 4) to float16 (T, W): what the assembler makes of each byte, in order."""
    a, b, c, d = tl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,r", [words], (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1
    )
    return _in_order(a, b, c, d)


@triton.jit
def _split(words):
    """The bytes of words (T, W / 4), in order: (T, W)."""
    return _in_order(words & 255, (words >> 8) & 255, (words >> 16) & 255, (words >> 24) & 255)


@triton.jit
def _in_order(a, b, c, d):
    """What became of the four bytes of each word, in the order of the bytes: four times (T, W / 4) to (T, W)."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4 * a.shape[1]))


@triton.jit
def _looked_up(codes, TABLE: tl.constexpr):
    """The numbers of codes, float32 of their shape."""
    x = tl.zeros(codes.shape, tl.float32)
    for i in tl.static_range(16):
        x = tl.where(codes == i, TABLE[i], x)
    return x


@triton.jit
def _part(words, LAYOUT: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, WIDEN: tl.constexpr):
    """One part of packed codes, words (T, W / 4), as float16 (T, W): the codes themselves, or the levels they are
    for."""
    if WIDEN:  # the interpreter has no assembler
        x = (_split(words) >> (BITS * PART)) & ((1 << BITS) - 1)
        if LAYOUT == "levels":
            x = _looked_up(x, LEVELS)
        elif LAYOUT == "e2m1":
            x = _looked_up(x, E2M1)
        elif LAYOUT == "symmetric":
            x = (x ^ 128) - 128
        x = x.to(tl.float16)
    elif LAYOUT == "levels":
        x = _bytes(words, _ASM_LEVELS_0 if PART == 0 else _ASM_LEVELS_1)
    elif LAYOUT == "e2m1":
        x = _bytes(words, _ASM_E2M1_0 if PART == 0 else _ASM_E2M1_1)
    elif BITS == 8:
        x = _bytes(words, _ASM_SIGNED if LAYOUT == "symmetric" else _ASM_8)
    elif BITS == 4:
        x = _bytes(words, _ASM_4_0 if PART == 0 else _ASM_4_1)
    elif PART < 2:
        x = _bytes(words, _ASM_2_0 if PART == 0 else _ASM_2_1)
    else:
        x = _bytes(words, _ASM_2_2 if PART == 2 else _ASM_2_3)
    return x


@triton.jit
def _two(a, b):
    """(T, W) and (T, W) to (T, 2 W), one behind the other: in registers, with nothing exchanged."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _all(codes, LAYOUT: tl.constexpr, BITS: tl.constexpr, WIDEN: tl.constexpr):
    """Packed codes (T, W) as float16 (T, W * 8 / BITS): what `_part` makes of the parts, one behind the other."""
    x = _part(codes, LAYOUT, BITS, 0, WIDEN)
    if BITS < 8:
        x = _two(x, _part(codes, LAYOUT, BITS, 1, WIDEN))
    if BITS == 2:
        x = _two(x, _two(_part(codes, LAYOUT, 2, 2, WIDEN), _part(codes, LAYOUT, 2, 3, WIDEN)))
    return x


@triton.jit
def _of_e4m3(codes):
    """e4m3 bytes as float16 of their shape, exactly."""
    codes = codes.to(tl.int32)
    x = (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), x * 256.0).to(tl.float16)


@triton.jit
def _e4m3(words, WIDEN: tl.constexpr, NATIVE: tl.constexpr):
    """e4m3 bytes, words (T, W / 4), as float16 (T, W), exactly."""
    if WIDEN:
        x = _of_e4m3(_split(words))
    elif NATIVE:
        x = _bytes(words, _ASM_E4M3)
    else:
        x = _bytes(words, _ASM_E4M3_OLD)
    return x


@triton.jit
def _channels(D: tl.constexpr, BITS: tl.constexpr, DP: tl.constexpr):
    """The channel of each column of a tile and whether there is one: parts are padded one by one."""
    PARTS: tl.constexpr = 8 // BITS if BITS < 8 else 1
    W: tl.constexpr = D // PARTS
    WP: tl.constexpr = DP // PARTS
    column = tl.arange(0, DP)
    return (column // WP) * W + column % WP, (column % WP) < W


@triton.jit
def _load(ptr, mask, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(ptr, mask=mask, other=0)
    else:
        x = tl.load(ptr)
    return x


@triton.jit
def _codes(
    codes_ptr, at, inside, D: tl.constexpr, LAYOUT: tl.constexpr, BITS: tl.constexpr, DP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """What the pools hold of tokens ``at`` (T,), as it lies there: plain numbers (T, DP) or words of four codes."""
    EACH: tl.constexpr = 1 if LAYOUT == "plain" else 32 // BITS  # channels in an element
    W: tl.constexpr = D // EACH
    WP: tl.constexpr = DP // EACH
    column = tl.arange(0, WP)
    PADDED: tl.constexpr = W != WP
    real = inside[:, None] & (column < W)[None, :]
    return _load(codes_ptr + ((at * W)[:, None] + column[None, :]), real, MASKED or PADDED)


@triton.jit
def _times(
    codes, scale_ptr, zero_ptr, where, real, shape, AXIS: tl.constexpr, LAYOUT: tl.constexpr, MASKED: tl.constexpr
):
    """codes (T, W) times the scales at ``where`` plus the zeros there, if the layout has any, rounded once; with AXIS
    inserted they broadcast to ``shape``, a finer view of (T, W)."""
    scale = _load(scale_ptr + where, real, MASKED)
    if LAYOUT == "e2m1":
        scale = _of_e4m3(scale)
    scale = tl.broadcast_to(tl.expand_dims(scale, AXIS), shape)
    x = tl.reshape(codes, shape)
    if LAYOUT == "token" or LAYOUT == "channel":
        x = tl.fma(x, scale, tl.broadcast_to(tl.expand_dims(_load(zero_ptr + where, real, MASKED), AXIS), shape))
    else:
        x = x * scale
    return tl.reshape(x, codes.shape)


@triton.jit
def _scaled(
    codes, scale_ptr, zero_ptr, at, inside, D: tl.constexpr, LAYOUT: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One part of tokens' codes, float16 (T, W), times their groups' scales plus their zeros, rounded once."""
    T: tl.constexpr = codes.shape[0]
    W: tl.constexpr = codes.shape[1]
    if W <= GROUP or GROUP == D:
        where = at * (D // GROUP) + (PART * W // GROUP if GROUP < D else 0)
        x = _times(codes, scale_ptr, zero_ptr, where, inside, (T, W), 1, LAYOUT, MASKED)
    else:
        N: tl.constexpr = W // GROUP
        where = (at * (D // GROUP))[:, None] + (tl.arange(0, N) + PART * N)[None, :]
        x = _times(codes, scale_ptr, zero_ptr, where, inside[:, None], (T, N, GROUP), 2, LAYOUT, MASKED)
    return x


@triton.jit
def _numbers(
    codes_ptr, scale_ptr, zero_ptr, at, unit, inside, unit_inside,
    D: tl.constexpr, LAYOUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr,
    MASKED: tl.constexpr, WIDEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Tokens ``at`` (T,) of the pools, in the units ``unit`` (T / GROUP,) where they are encoded together, as numbers
    (T, DP): what is encoded as float16, rounded once; fp8 with a fixed scale without it."""
    PADDED: tl.constexpr = D != DP
    x = _codes(codes_ptr, at, inside, D, LAYOUT, BITS, DP, MASKED)
    if LAYOUT == "fp8":
        x = _e4m3(x, WIDEN, NATIVE)
        if GROUP > 0:
            x = (x * _load(scale_ptr + at, inside, MASKED)[:, None]).to(tl.float16)
    elif LAYOUT == "channel":
        codes = _all(x, LAYOUT, BITS, WIDEN)
        channel, real = _channels(D, BITS, DP)
        T: tl.constexpr = codes.shape[0]
        where = (unit * D)[:, None] + channel[None, :]
        both = unit_inside[:, None] & real[None, :]
        x = _times(codes, scale_ptr, zero_ptr, where, both, (T // GROUP, GROUP, DP), 1, LAYOUT, MASKED or PADDED)
    elif LAYOUT != "plain" and PADDED and GROUP < D:
        codes = _all(x, LAYOUT, BITS, WIDEN)
        channel, real = _channels(D, BITS, DP)
        where = (at * (D // GROUP))[:, None] + (channel // GROUP)[None, :]
        both = inside[:, None] & real[None, :]
        x = _times(codes, scale_ptr, zero_ptr, where, both, (codes.shape[0], DP, 1), 2, LAYOUT, True)
    elif LAYOUT != "plain":
        words = x
        x = _part(words, LAYOUT, BITS, 0, WIDEN)
        x = _scaled(x, scale_ptr, zero_ptr, at, inside, D, LAYOUT, GROUP, 0, MASKED)
        if BITS < 8:
            b = _part(words, LAYOUT, BITS, 1, WIDEN)
            x = _two(x, _scaled(b, scale_ptr, zero_ptr, at, inside, D, LAYOUT, GROUP, 1, MASKED))
        if BITS == 2:
            c, d = _part(words, LAYOUT, BITS, 2, WIDEN), _part(words, LAYOUT, BITS, 3, WIDEN)
            c = _scaled(c, scale_ptr, zero_ptr, at, inside, D, LAYOUT, GROUP, 2, MASKED)
            x = _two(x, _two(c, _scaled(d, scale_ptr, zero_ptr, at, inside, D, LAYOUT, GROUP, 3, MASKED)))
    return x


@triton.jit
def _recent(x, residual_ptr, slot, wanted, R: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, DP: tl.constexpr):
    """x (T, DP) in the model's dtype, with the tokens that are ``wanted`` from the residual put in their places."""
    channel, real = _channels(D, BITS, DP)
    at = residual_ptr + (slot % R)[:, None] * D + channel[None, :]
    found = tl.load(at, mask=wanted[:, None] & real[None, :], other=0)
    return tl.where(wanted[:, None], found, x.to(found.dtype))
