"""The text of a program in PTX, read for `ptx_machine`."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ptx_instructions import COMPUTE, LANES, MULTIPLY

SHARED = 1024
"""Where shared memory begins; operand i begins at (i + 1) << 32."""

TYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
ALL = np.ones(LANES, bool)

ACTS = {
    "bra": "branch",
    "bar.sync": "meet",
    "bar.arrive": "come",
    "ld.acquire.": "acquire",
    "ld.": "load",
    "st.": "store",
    "red.": "count",
    "mbarrier.try_wait": "try_wait",
    "mbarrier.init": "create",
    "mbarrier.arrive": "arrive",
    "cp.async": "copy",
    "fence.": None,
    "bar.warp.sync": None,
}
"""From what an instruction begins with to the name of what a `Program` does, if
anything: where instructions run one by one, some have nothing to order."""

MMA_ALIGNED = "mma.sync.aligned."
MMA = 0, 4, 8, 10, 14
"""Where the operands of `mma` begin, and end."""

Registers = dict[str, np.ndarray]
"""Of a warp, and constants by what they are written as."""
Compute = Callable[[Registers], None]


class Place(NamedTuple):
    """What `[base+offset]` is."""

    base: str
    offset: np.uint64


class Act(NamedTuple):
    """An instruction that may be of other warps' concern, by its name in `ACTS`."""

    name: str
    guard: str
    operands: list[str | Place]


class Text:
    """A program's text.

    Attributes:
      labels: where they are in what is to be done.
      types: of registers.
      constants: of each lane, by what they are written as.
    """

    def __init__(self, text: str, operands: int):
        """Read a text with `$i` for the address of operand i, then of shared memory."""
        self.operands = operands
        self.code: list[Compute | Act] = []
        self.labels, self.types, self.constants, self.stretches = {}, {}, {}, {}
        for part in re.findall(r"\w+:\n|[^;\n]+;", text.strip()[1:-1]):
            words = part.strip(" \n;:")
            if part.endswith(":\n"):
                assert words not in self.labels, words
                self.labels[words] = len(self.code)
            elif words.startswith(".reg"):
                _, kind, names = words.split(maxsplit=2)
                for name in names.split(", "):
                    name, _, count = name.rstrip(">").partition("<")
                    own = [f"{name}{i}" for i in range(int(count))] if count else [name]
                    assert self.types.keys().isdisjoint(own), own
                    self.types |= dict.fromkeys(own, TYPES[kind[1:].replace("f", "b")])
            else:
                guard, words = words.split(" ", 1) if words[0] == "@" else ("", words)
                name, *rest = re.findall(r"\[[^\]]*\]|[^\s,{}]+", words)
                rest = [self.operand(operand) for operand in rest]
                self.read(guard[1:], name, rest, halves="{" in words.split(",")[0])
        self.code.append(Act("end", "", []))

    def operand(self, text: str) -> str | Place:
        """Return a place in memory, or a register's name or a constant's, noting it."""
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return Place(base, np.uint64(offset or 0))
        if text[0] == "$":
            number = int(text[1:])
            is_shared = number == self.operands
            at = SHARED if is_shared else number + 1 << 32
            self.constants[text] = np.full(LANES, at, np.uint64)
        elif text[0].isdigit():
            base = 16 if text.startswith("0f") else 0
            number = int(text[2:] if base else text, base)
            self.constants[text] = np.full(LANES, number, np.uint32)
        return text

    def read(self, guard: str, name: str, operands: list, halves: bool):
        """Read an instruction, which may write two halves of a word."""
        if name in COMPUTE and halves:
            low, high, word = operands
            self.read(guard, name, [low, word], halves=False)
            operands = [high, word, self.operand("16")]
            self.read(guard, "shr.u32", operands, halves=False)
        elif name in COMPUTE:
            to, *read = operands
            self.code.append(computing(COMPUTE[name], to, self.types[to], read, guard))
        elif name.startswith(MMA_ALIGNED):
            multiply = MULTIPLY[name.removeprefix(MMA_ALIGNED)]
            self.code.append(multiplying(multiply, operands))
        else:
            act = next(act for prefix, act in ACTS.items() if name.startswith(prefix))
            if act:
                self.code.append(Act(act, guard, operands))

    def stretch(self, at: int) -> tuple[Sequence[Compute], Act]:
        """Return what is computed from a place on, and the act that follows."""
        if at not in self.stretches:
            end = at
            while not isinstance(self.code[end], Act):
                end += 1
            self.stretches[at] = self.code[at:end], self.code[end]
        return self.stretches[at]


def computing(
    compute: Callable, to: str, kind: type[np.generic], read: list[str], guard: str
) -> Compute:
    """Return what writes a register, in some lanes if there is a guard."""
    first, several = read[0], operator.itemgetter(*read)

    def of_one(file: Registers):
        file[to] = np.asarray(compute(file[first]), kind)

    def of_several(file: Registers):
        file[to] = np.asarray(compute(*several(file)), kind)

    def in_some(file: Registers):
        on = lanes(file, guard)
        value = np.asarray(compute(*(file[name] for name in read)), kind)
        file[to] = value if on.all() else np.where(on, value, file[to])

    if guard:
        return in_some
    return of_several if len(read) > 1 else of_one


def multiplying(multiply: Callable, registers: list[str]) -> Compute:
    """Return what multiplies tiles: four registers of sums, four, two, and four."""
    to, *read = (registers[start:end] for start, end in itertools.pairwise(MMA))

    def of_tiles(file: Registers):
        found = multiply(*([file[name] for name in own] for own in read))
        file.update(zip(to, found, strict=True))

    return of_tiles


def lanes(file: Registers, guard: str) -> np.ndarray:
    """Return in which lanes an instruction runs."""
    if not guard:
        return ALL
    return ~file[guard[1:]] if guard[0] == "!" else file[guard]
