"""What the instructions of `ptx_machine`'s programs compute, of all lanes at once."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

LANES = 32
LANE = np.arange(LANES)
PAIRS, NIBBLES = 8 * LANE[:, None], np.arange(0, 16, 4, dtype=np.uint32)


def signed(x):
    return x.view(np.int32)


def real(x):
    return x.view(np.float32)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def of_bytes(words, dtype):
    return words.view(dtype).astype(np.int32).reshape(LANES, 4)


def whole(low, high=None):
    """Return a word, maybe of two halves."""
    return low if high is None else low.astype(np.uint32) | high.astype(np.uint32) << 16


def permute(a, b, selector):
    """Return `prmt`: bytes of two words by nibbles, or the sign of one eight times."""
    both = np.empty((LANES, 2), np.uint32)
    both[:, 0], both[:, 1] = a, b
    nibbles = selector[:, None] >> NIBBLES
    found = both.view(np.uint8).take(PAIRS + (nibbles & 7))
    if np.bitwise_or.reduce(selector) & 0x8888:
        signs = nibbles & 8 > 0
        found[signs] = np.where(found[signs] & 128, 255, 0)
    return found.view(np.uint32)[:, 0]


def logic(a, b, c, table):
    """Return `lop3`: bits by a table of what three bits give."""
    found = np.zeros_like(a)
    with_a, with_b, with_c = ((~x, x) for x in (a, b, c))
    for case in range(8):
        if int(table[0]) >> case & 1:
            found |= with_a[case >> 2] & with_b[case >> 1 & 1] & with_c[case & 1]
    return found


def extract(x, start, length):
    found = (x >> start & (1 << length) - 1).astype(np.int64)
    return (found - (found >> length - 1 << length)).astype(np.int32).view(np.uint32)


def narrow(x):
    return real(x).astype(ml_dtypes.bfloat16).view(np.uint16)


def dot(a, b, c, kind: type[np.integer] = np.int8):
    return np.vecdot(of_bytes(a, kind), of_bytes(b, np.int8)).view(np.uint32) + c


def fused(a, b, c):
    return bits(real(a).astype(np.float64) * real(b) + real(c))


def multiply_tiles(a, b, c):
    """Return `mma` of 16 x 16 and 16 x 8 numbers in bfloat16, added to c, in registers.

    Of each a lane has two that are side by side; four lanes have eight of a row, or of
    a column of the second.
    """
    place, own = np.divmod(np.arange(LANES), 4)
    pair, half = 2 * own[:, None] + np.arange(2), np.arange(2)[:, None, None]
    halves = lambda words: np.stack([words << 16, words & 0xFFFF0000], -1)  # noqa: E731
    first, second = np.zeros((16, 16)), np.zeros((16, 8))
    for i, words in enumerate(a):
        first[place[:, None] + i % 2 * 8, pair + i // 2 * 8] = real(halves(words))
    for i, words in enumerate(b):
        second[pair + 8 * i, place[:, None]] = real(halves(words))
    rows = place[:, None] + 8 * half
    product: np.ndarray = (first @ second).astype(np.float32)
    found = product[rows, pair].transpose(0, 2, 1).reshape(4, LANES)
    return [bits(real(x) + y) for x, y in zip(c, found, strict=True)]


def multiply_bytes(a, b, c, kind: type[np.integer]):
    """Return `mma` of 16 x 32 bytes, of a kind, and 32 x 8 with signs, added to c.

    Of each a lane has four that are side by side; four lanes have 16 of a row, or of a
    column of the second.
    """
    split = lambda words, kind: np.stack(words).view(kind).astype(np.float64)  # noqa: E731
    first = split(a, kind).reshape(2, 2, 8, 4, 4).transpose(1, 2, 0, 3, 4)
    second = split(b, np.int8).reshape(2, 8, 4, 4).transpose(0, 2, 3, 1)
    product = first.reshape(16, 32) @ second.reshape(32, 8)
    found = product.reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, LANES)
    return list(np.stack(c) + found.astype(np.int64).astype(np.uint32))


MULTIPLY = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": multiply_tiles,
    "m16n8k32.row.col.s32.s8.s8.s32": functools.partial(multiply_bytes, kind=np.int8),
    "m16n8k32.row.col.s32.u8.s8.s32": functools.partial(multiply_bytes, kind=np.uint8),
}
"""What `mma` computes of registers that are a tile, another, and what is added."""

COMPUTE = {
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b,
    "mul.lo.s32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mad.wide.u32": lambda a, b, c: a.astype(np.uint64) * b + c,
    "div.u32": lambda a, b: a // b,
    "rem.u32": lambda a, b: a % b,
    "min.u32": np.minimum,
    "max.u32": np.maximum,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shr.s32": lambda a, b: (signed(a) >> signed(b)).view(np.uint32),
    "bfe.s32": extract,
    "lop3.b32": logic,
    "prmt.b32": permute,
    "dp4a.s32.s32": dot,
    "dp4a.u32.s32": functools.partial(dot, kind=np.uint8),
    "mov.u32": lambda a: a,
    "mov.b32": whole,
    "mov.b64": lambda a: a,
    "mov.f32": lambda a: a,
    "neg.f32": lambda a: bits(-real(a)),
    "abs.f32": lambda a: bits(np.abs(real(a))),
    "sqrt.rn.f32": lambda a: bits(np.sqrt(real(a))),
    "cvt.u32.u64": lambda a: a.astype(np.uint32),
    "cvt.f32.f16": lambda a: bits(a.view(np.float16)),
    "cvt.rn.f32.s32": lambda a: bits(signed(a)),
    "cvt.rn.bf16.f32": narrow,
    "cvt.rn.bf16x2.f32": lambda a, b: narrow(a).astype(np.uint32) << 16 | narrow(b),
    "cvt.rmi.s32.f32": lambda a: np.floor(real(a)).astype(np.int32).view(np.uint32),
    "add.rn.f32": lambda a, b: bits(real(a) + real(b)),
    "mul.rn.f32": lambda a, b: bits(real(a) * real(b)),
    "div.rn.f32": lambda a, b: bits(real(a) / real(b)),
    "min.f32": lambda a, b: bits(np.minimum(real(a), real(b))),
    "max.f32": lambda a, b: bits(np.maximum(real(a), real(b))),
    "fma.rn.f32": fused,
    "ex2.approx.f32": lambda a: bits(np.exp2(real(a))),
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "selp.f32": lambda a, b, p: np.where(p, a, b),
    "setp.eq.u32": lambda a, b: a == b,
    "setp.ne.u32": lambda a, b: a != b,
    "setp.lt.u32": lambda a, b: a < b,
    "setp.ge.u32": lambda a, b: a >= b,
    "setp.lt.and.u32": lambda a, b, p: (a < b) & p,
    "setp.lt.or.u32": lambda a, b, p: (a < b) | p,
    "setp.ge.and.u32": lambda a, b, p: (a >= b) & p,
    "setp.eq.and.u32": lambda a, b, p: (a == b) & p,
    "setp.eq.or.u32": lambda a, b, p: (a == b) | p,
    "shfl.sync.bfly.b32": lambda a, bit, *_: a[LANE ^ bit],
    "shfl.sync.idx.b32": lambda a, lane, *_: a[lane],
    "shfl.sync.down.b32": lambda a, by, *_: a[(LANE + by) % LANES],
    "redux.sync.max.u32": lambda a, _: np.full_like(a, a.max()),
    "redux.sync.min.u32": lambda a, _: np.full_like(a, a.min()),
}  # fmt: skip
"""From an instruction to what it writes, given what it reads of each lane."""
