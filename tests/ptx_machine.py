"""A machine for programs in PTX, as far as ours go: what a GPU would do, one by one.

Programs run beside each other, warps take turns at random, and copies arrive at random,
so a program that does not wait where it has to goes wrong.  All branches are of whole
warps.  What nobody wrote cannot be read: a register is missing, memory is full of ones.
"""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Sequence

import numpy as np
from ptx_instructions import COMPUTE, LANES, multiply_tiles

SHARED = 1024
"""Where shared memory begins; operand i begins at (i + 1) << 32."""
TURN = 400
"""Instructions that a warp runs at most before another's turn."""
PACES = 0.3, 0.005
"""Chances of a copy to arrive at a turn: soon, or when many have gone on."""
PATIENCE = 100_000
"""Waits after each other, all in vain, before the machine gives up."""

TYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
ALL = np.ones(LANES, bool)

ORDERS = ("fence.", "bar.warp.sync")
"""Instructions that only order others, which run one by one here."""


class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all bytes have."""

    def __init__(self, count: int):
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def change(self, arrived: int, expected: int):
        """Note arrivals, and bytes to come or, below zero, come."""
        self.missing -= arrived
        self.bytes += expected
        assert self.missing >= 0 and self.bytes >= 0
        if self.missing == self.bytes == 0:
            self.phase, self.missing = self.phase ^ 1, self.count


class Machine:
    """A program's text, and what it works on.

    Attributes:
      operands: arrays, which a run changes.
    """

    def __init__(
        self, text: str, operands: Sequence[np.ndarray], shared: int, warps: int
    ):
        """Read a program.

        Args:
          text: with `$i` for the address of operand i, then of shared memory.
          operands: arrays.
          shared: bytes of shared memory.
          warps: of a program.
        """
        self.operands, self.shared, self.warps = operands, shared, warps
        self.memory = [a.reshape(-1).view(np.uint8) for a in operands]
        self.vain = 0
        self.code, self.labels, self.types = [], {}, {}
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
                name, *rest = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", words)
                rest = [self.constant(operand) for operand in rest]
                self.code.append((guard[1:], name, COMPUTE.get(name), rest))

    def constant(self, operand: str) -> str | np.ndarray:
        """Return what an operand is in each lane, if that is known before a run."""
        if operand[0] == "$":
            number = int(operand[1:])
            is_shared = number == len(self.operands)
            at = SHARED if is_shared else number + 1 << 32
            return np.full(LANES, at, np.uint64)
        if not operand[0].isdigit():
            return operand
        base = 16 if operand.startswith("0f") else 0
        return np.full(LANES, int(operand[2:] if base else operand, base), np.uint32)

    def run(self, programs: int, seed: int = 0):
        """Run so many programs until all have ended."""
        chance = random.Random(seed)
        live = [Program(self, number, chance) for number in range(programs)]
        while live:
            program = chance.choice(live)
            if not program.take_turn():
                live.remove(program)

    def note(self, done: bool):
        """Note what a wait found, or that something came about that others wait for."""
        self.vain = 0 if done else self.vain + 1
        assert self.vain < PATIENCE, "all wait for each other"


class Program:
    """A program while it runs."""

    def __init__(self, machine: Machine, number: int, chance: random.Random):
        self.machine, self.number, self.chance = machine, number, chance
        self.shared = np.full(machine.shared, 255, np.uint8)
        self.barriers, self.copies, self.pace = {}, [], PACES[0]
        names = "%tid.y", "%ntid.x", "%ctaid.x"
        sizes = np.array([0, LANES * machine.warps, number], np.uint32)
        known = dict(zip(names, np.repeat(sizes[:, None], LANES, 1), strict=True))
        self.files = [
            known | {"%tid.x": np.arange(LANES, dtype=np.uint32) + LANES * warp}
            for warp in range(machine.warps)
        ]
        self.at = [0] * machine.warps
        self.live, self.waiting = set(range(machine.warps)), {}
        self.at_barrier = collections.Counter()

    def take_turn(self) -> bool:
        """Let a copy arrive, or none, and a warp run; say whether any has not ended."""
        if self.copies and self.chance.random() < self.pace:
            self.arrive(*self.copies.pop(self.chance.randrange(len(self.copies))))
            self.pace = self.chance.choice(PACES)
        able = sorted(self.live - self.waiting.keys())
        assert able, "all wait for each other"
        warp = self.chance.choice(able)
        for _ in range(self.chance.randrange(1, TURN)):
            if self.at[warp] == len(self.machine.code):
                self.live.discard(warp)
            if warp not in self.live or not self.step(warp):
                break
        return bool(self.live)

    def arrive(self, source, to, size, barrier):
        """Let a copy arrive."""
        memory, start = self.locate(source)
        own = self.shared[to - SHARED : to - SHARED + size]
        own[:] = memory[start : start + size]
        self.barriers[barrier].change(0, -size)

    def locate(self, address: int) -> tuple[np.ndarray, int]:
        """Return the memory that an address is of, and the place in it."""
        operand, place = divmod(int(address), 1 << 32)
        if operand:
            return self.machine.memory[operand - 1], place
        return self.shared, place - SHARED

    def step(self, warp: int) -> bool:
        """Run a warp's next instruction; say whether it may go on at once."""
        guard, name, compute, operands = self.machine.code[self.at[warp]]
        file, on = self.files[warp], ALL
        self.at[warp] += 1
        if guard:
            on = ~file[guard[1:]] if guard[0] == "!" else file[guard]
        if compute:
            to, *read = operands
            self.write(warp, to, compute(*(self.value(warp, o) for o in read)), on)
            return True
        if name == "bra":
            assert on.all() or not on.any(), "lanes of a warp part"
            if on.all():
                self.at[warp] = self.machine.labels[operands[0]]
        elif name in ("bar.sync", "bar.arrive"):
            number, threads = (int(operand[0]) for operand in operands)
            return self.meet(warp, number, threads, name == "bar.sync")
        elif name.startswith(("ld.", "st.")):
            self.move(warp, name, operands, on)
            if name.startswith("ld.acquire."):
                # Whoever looks at this again and again lets others run between.
                self.machine.note(False)
                return False
        elif name.startswith("mma."):
            to, *read = (o[1:-1].split(", ") for o in operands)
            given = [[self.value(warp, o) for o in own] for own in read]
            found = multiply_tiles(*given)
            for register, value in zip(to, found, strict=True):
                self.write(warp, register, value, on)
        elif name.startswith("red."):
            self.count(warp, operands, on)
        elif name.startswith(("mbarrier.", "cp.async")):
            return self.synchronize(warp, name, operands, on)
        else:
            assert name.startswith(ORDERS), name
        return True

    def value(self, warp: int, operand: str | np.ndarray) -> np.ndarray:
        """Return what an operand is in each lane."""
        if not isinstance(operand, str):
            return operand
        if operand[0] != "{":
            return self.files[warp][operand]
        low, high = operand[1:-1].split(", ")  # two halves of a word
        low, high = (self.value(warp, self.machine.constant(o)) for o in (low, high))
        return low.astype(np.uint32) | high.astype(np.uint32) << 16

    def write(self, warp: int, to: str, value: np.ndarray, on: np.ndarray):
        """Write a register, or two, in some lanes, which then have to be there."""
        if to[0] == "{":
            for half, own in enumerate(to[1:-1].split(", ")):
                self.write(warp, own, value >> 16 * half, on)
            return
        file, value = self.files[warp], np.asarray(value, self.machine.types[to])
        whole = on is ALL or on.all()
        file[to] = value if whole else np.where(on, value, file[to])

    def address(self, warp: int, operand: str) -> np.ndarray:
        """Return the addresses that `[register+offset]` is."""
        base, _, offset = operand[1:-1].partition("+")
        return self.files[warp][base].astype(np.uint64) + np.uint64(offset or 0)

    def move(self, warp, name, operands, on):
        """Load or store."""
        loads = name.startswith("ld.")
        registers, place = operands if loads else operands[::-1]
        registers = registers.strip("{}").split(", ")
        size = self.machine.types[registers[0]]().itemsize
        if not on.any():
            return
        addresses = self.address(warp, place)[on]
        memory, start = self.locate(addresses[0])
        places = start + (addresses - addresses[0]).astype(np.int64)
        assert not (places % (size * len(registers))).any(), "not aligned"
        view = memory.view(f"u{size}")
        for number, register in enumerate(registers):
            index = places // size + number
            if loads:
                found = np.zeros(LANES, view.dtype)
                found[on] = view[index]
                self.write(warp, register, found, on)
            else:
                view[index] = self.value(warp, register)[on]

    def meet(self, warp: int, number: int, threads: int, waits: bool) -> bool:
        """Come to where so many threads meet; say whether to go on at once."""
        self.at_barrier[number] += LANES
        if self.at_barrier[number] == threads:
            self.at_barrier[number] = 0
            self.waiting = {w: n for w, n in self.waiting.items() if n != number}
        elif waits:
            self.waiting[warp] = number
        return not waits

    def count(self, warp, operands, on):
        """Add one to a number in memory for each lane; after a given one comes zero."""
        place, value = operands
        for address, last in zip(
            self.address(warp, place)[on], self.value(warp, value)[on], strict=True
        ):
            memory, start = self.locate(address)
            found = memory.view(np.uint32)[start // 4 :]
            found[0] = 0 if found[0] >= last else found[0] + 1
        self.machine.note(True)

    def synchronize(self, warp, name, operands, on) -> bool:
        """Use a barrier, or have something copied."""
        if name.startswith("mbarrier.try_wait"):
            to, place, phase = operands
            barrier = self.barriers[int(self.address(warp, place)[0])]
            done = barrier.phase != self.value(warp, phase)[0]
            self.write(warp, to, np.full(LANES, done), on)
            self.machine.note(done)
            return bool(done)
        if not on.any():
            return True
        (lane,) = np.flatnonzero(on)
        number = lambda operand: int(self.value(warp, operand)[lane])  # noqa: E731
        at = lambda operand: int(self.address(warp, operand)[lane])  # noqa: E731
        if name.startswith("cp.async"):
            to, source, size, barrier = operands
            assert not (at(to) % 16 or at(source) % 16 or number(size) % 16)
            self.copies.append((at(source), at(to), number(size), at(barrier)))
        elif name.startswith("mbarrier.init"):
            self.barriers[at(operands[0])] = Barrier(number(operands[1]))
        elif "expect_tx" in name:
            self.barriers[at(operands[1])].change(1, number(operands[2]))
        else:
            self.barriers[at(operands[1])].change(1, 0)
        return True
