"""A machine for programs in PTX, as far as ours go: what a GPU would do, one by one.

Programs run beside each other, warps take turns at random, and copies arrive at random,
so a program that does not wait where it has to goes wrong.  All branches are of whole
warps.  What nobody wrote cannot be read: a register is missing, memory is full of ones.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Sequence

import numpy as np
from ptx_instructions import LANES
from ptx_text import ALL, SHARED, Place, Registers, Text, lanes

TURN = 400
"""Instructions that a warp runs at most before another's turn, and on to the next act:
before that no other could tell."""
PACES = 0.3, 0.005
"""Chances of a copy to arrive at a turn: soon, or when many have gone on."""

HASTES = 1.0, 0.02
"""How often programs, and warps of a program, have turns: some are far behind."""
LOOKS = "acquire", "try_wait", "branch"
"""What a warp does again and again while it waits for an event."""

NONE = np.zeros(LANES, bool)
WORDS = np.arange(4)[:, None]
"""Of a load or store, as far as it has them."""


class Event:
    """What warps wait for: something that changes.

    Attributes:
      changes: how many there were.
      asleep: programs and their warps that do nothing before the next.
    """

    def __init__(self):
        self.changes, self.asleep = 0, []

    def happen(self):
        """Change, and wake who waits for that."""
        self.changes += 1
        for program, warp in self.asleep:
            program.ready.append(warp)
        self.asleep = []


class Barrier(Event):
    """An mbarrier: a phase ends when `count` have arrived and all bytes have."""

    def __init__(self, count: int):
        super().__init__()
        self.count = self.missing = count
        self.bytes = 0

    def change(self, arrived: int, expected: int):
        """Note arrivals, and bytes to come or, below zero, come."""
        self.missing -= arrived
        self.bytes += expected
        assert self.missing >= 0 and self.bytes >= 0
        if self.missing == self.bytes == 0:
            self.missing = self.count
            self.happen()


class Machine:
    """A program's text, and what it works on.

    Attributes:
      operands: arrays, which a run changes.
      counted: changes of numbers in memory, by address.
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
        self.text = Text(text, len(operands))
        self.counted = collections.defaultdict(Event)

    def run(self, programs: int, seed: int = 0):
        """Run so many programs until all have ended."""
        chance = random.Random(seed)
        live = [Program(self, number, chance) for number in range(programs)]
        while live:
            able = [program for program in live if program.ready or program.copies]
            assert able, "all wait for each other"
            (program,) = chance.choices(able, [program.haste for program in able])
            program.take_turn()
            if not program.live:
                live.remove(program)


class Program:
    """A program while it runs.

    Attributes:
      live: how many warps have not ended.
      ready: which of them do not wait.
      copies: that have not arrived.
      seen: where a warp looked for an event in vain, and what had come until then.
    """

    def __init__(self, machine: Machine, number: int, chance: random.Random):
        self.machine, self.chance = machine, chance
        self.shared = np.full(machine.shared, 255, np.uint8)
        self.barriers, self.copies, self.pace = {}, [], PACES[0]
        names = "%tid.y", "%ntid.x", "%ctaid.x"
        sizes = np.array([0, LANES * machine.warps, number], np.uint32)
        known = dict(zip(names, np.repeat(sizes[:, None], LANES, 1), strict=True))
        known |= machine.text.constants
        self.files: list[Registers] = [
            known | {"%tid.x": np.arange(LANES, dtype=np.uint32) + LANES * warp}
            for warp in range(machine.warps)
        ]
        self.haste, *self.hastes = chance.choices(HASTES, k=1 + machine.warps)
        self.at, self.seen = [0] * machine.warps, {}
        self.live, self.ready = machine.warps, list(range(machine.warps))
        self.present, self.held = collections.Counter(), collections.defaultdict(list)

    def take_turn(self):
        """Let a copy arrive, or none, and a warp run."""
        if self.copies and (not self.ready or self.chance.random() < self.pace):
            self.land(*self.copies.pop(self.chance.randrange(len(self.copies))))
            self.pace = self.chance.choice(PACES)
        if not self.ready:
            return
        hastes = [self.hastes[warp] for warp in self.ready]
        (warp,) = self.chance.choices(self.ready, hastes)
        file, left, ends = self.files[warp], self.chance.randrange(1, TURN), False
        while left > 0 and not ends:
            stretch, act = self.machine.text.stretch(self.at[warp])
            for compute in stretch:
                compute(file)
            self.at[warp] += len(stretch) + 1
            left -= len(stretch) + 1
            if act.name not in LOOKS:
                self.seen.pop(warp, None)
            on = lanes(file, act.guard)
            ends = getattr(self, act.name)(warp, on, *act.operands)

    def land(self, source: int, to: int, size: int, barrier: int):
        """Let a copy arrive."""
        memory, start = self.locate(source)
        own = self.shared[to - SHARED : to - SHARED + size]
        own[:] = memory[start : start + size]
        self.barriers[barrier].change(0, -size)

    def locate(self, address: int) -> tuple[np.ndarray, int]:
        """Return the memory that an address is of, and the place in it."""
        operand, place = divmod(address, 1 << 32)
        if operand:
            return self.machine.memory[operand - 1], place
        return self.shared, place - SHARED

    def end(self, warp: int, on: np.ndarray) -> bool:
        """End a warp."""
        self.ready.remove(warp)
        self.live -= 1
        return True

    def branch(self, warp: int, on: np.ndarray, label: str):
        """Go on elsewhere, or not."""
        taken = np.count_nonzero(on)
        assert taken in (0, LANES), "lanes of a warp part"
        if taken:
            self.at[warp] = self.machine.text.labels[label]

    def come(self, warp: int, on: np.ndarray, number: str, threads: str):
        """Come to where so many threads meet, and go on."""
        self.present[number] += LANES
        if self.present[number] == int(threads):
            self.present[number] = 0
            self.ready += self.held.pop(number, [])

    def meet(self, warp: int, on: np.ndarray, number: str, threads: str) -> bool:
        """Come to where so many threads meet, and wait for them."""
        self.ready.remove(warp)
        self.held[number].append(warp)
        self.come(warp, on, number, threads)
        return True

    def look(self, warp: int, event: Event) -> bool:
        """Note that a warp looked for an event; where it does again in vain it sleeps.

        Not at once, or nobody would notice who looks only once.
        """
        seen = self.at[warp], event, event.changes
        if self.seen.get(warp) == seen:
            self.ready.remove(warp)
            event.asleep.append((self, warp))
        self.seen[warp] = seen
        return True

    def addresses(self, warp: int, place: Place) -> np.ndarray:
        """Return what a place is in each lane."""
        return self.files[warp][place.base].astype(np.uint64) + place.offset

    def number(self, warp: int, on: np.ndarray, operand: str | Place) -> int:
        """Return what an operand is in the only lane that runs."""
        (lane,) = np.flatnonzero(on)
        if isinstance(operand, Place):
            return int(self.addresses(warp, operand)[lane])
        return int(self.files[warp][operand][lane])

    def words(self, addresses: np.ndarray, kind: type[np.generic], count: int):
        """Return a memory as words of a kind, and where in it `count` of each lane are.

        The places are of [count, lanes].
        """
        memory, start = self.locate(int(addresses[0]))
        places = (addresses - addresses[0]).view(np.int64) + start
        size = np.dtype(kind).itemsize
        assert not np.bitwise_or.reduce(places) % (size * count), "not aligned"
        places = places // size
        return memory.view(kind), places + WORDS[:count] if count > 1 else places[None]

    def load(self, warp: int, on: np.ndarray, *operands):
        """Load words that follow each other, in some lanes if there is a guard."""
        *registers, place = operands
        if not np.count_nonzero(on):
            return
        file, kind = self.files[warp], self.machine.text.types[registers[0]]
        addresses = self.addresses(warp, place)
        addresses = addresses if on is ALL else addresses[on]
        memory, places = self.words(addresses, kind, len(registers))
        for register, found in zip(registers, memory[places], strict=True):
            if len(found) < LANES:
                found, loaded = file[register].copy(), found
                found[on] = loaded
            file[register] = found

    def store(self, warp: int, on: np.ndarray, place: Place, *registers: str):
        """Store words that follow each other, in some lanes if there is a guard."""
        if not np.count_nonzero(on):
            return
        file, kind = self.files[warp], self.machine.text.types[registers[0]]
        addresses = self.addresses(warp, place)[on]
        memory, places = self.words(addresses, kind, len(registers))
        for register, own in zip(registers, places, strict=True):
            memory[own] = file[register][on]

    def acquire(self, warp: int, on: np.ndarray, to: str, place: Place) -> bool:
        """Load what others count, and let them run before the next time."""
        self.load(warp, on, to, place)
        event = self.machine.counted[int(self.addresses(warp, place)[0])]
        return self.look(warp, event)

    def count(self, warp: int, on: np.ndarray, place: Place, last: str):
        """Add one to a number in memory for each lane; after a given one comes zero."""
        lasts = self.files[warp][last][on]
        for address, last in zip(self.addresses(warp, place)[on], lasts, strict=True):
            memory, start = self.locate(int(address))
            found = memory.view(np.uint32)[start // 4 :]
            found[0] = 0 if found[0] >= last else found[0] + 1
            self.machine.counted[int(address)].happen()

    def try_wait(self, warp: int, on: np.ndarray, to: str, place: Place, phase: str):
        """Look if a barrier's phase has ended."""
        barrier = self.barriers[int(self.addresses(warp, place)[0])]
        done = barrier.changes % 2 != self.files[warp][phase][0]
        self.files[warp][to] = ALL if done else NONE
        return not done and self.look(warp, barrier)

    def copy(self, warp: int, on: np.ndarray, *operands):
        """Have something copied."""
        if np.count_nonzero(on):
            to, source, size, barrier = (self.number(warp, on, o) for o in operands)
            assert not (to % 16 or source % 16 or size % 16)
            self.copies.append((source, to, size, barrier))

    def create(self, warp: int, on: np.ndarray, place: Place, count: str):
        """Make a barrier."""
        if np.count_nonzero(on):
            barrier = Barrier(self.number(warp, on, count))
            self.barriers[self.number(warp, on, place)] = barrier

    def arrive(self, warp: int, on: np.ndarray, _: str, place: Place, *size: str):
        """Arrive at a barrier, maybe with bytes to come."""
        if np.count_nonzero(on):
            expected = sum(self.number(warp, on, operand) for operand in size)
            self.barriers[self.number(warp, on, place)].change(1, expected)
