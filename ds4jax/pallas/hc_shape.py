"""What `hc_program` is made for, and how memory is shared out.

It is the beginning of a launch that reads what a hyper connection makes of the streams.
"""

from __future__ import annotations

from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas.fixed_point import GROUP, LIMBS
from ds4jax.pallas.ptx_fixed_point import APART, Counter

WARPS = 8
"""Of a program, that take part: its first ones."""

STREAMS = 4

MAPS = STREAMS * (2 + STREAMS)

PAIRS = (
    *((i, i) for i in range(STREAMS)),
    *((i, j) for i in range(STREAMS) for j in range(i + 1, STREAMS)),
)
"""Of streams whose products are summed: all means of squares follow from them."""

MAPS_EACH = MAPS // WARPS
"""That a warp sums."""

SUMS_EACH = MAPS_EACH + pl.cdiv(len(PAIRS), WARPS)
"""Maps, and then pairs: every WARPS-th."""

SUMS = WARPS * SUMS_EACH
"""Of a row, those of a warp after each other."""

MOST_ROWS = WARPS
"""Each has a warp."""

_MOST_TERMS = 16
"""Groups whose sums a warp has in registers at once."""


class Shape(NamedTuple):
    """What a program is made for.

    Attributes:
      rows: to compute.
      copied_rows: whose results are copies of the last one's.
      width: D, values of a stream.
      parts: of the update, one or two, whose sum is to be merged into the streams.
      fn: type of the weight of the maps.
      dtype: of operands in fixed point.
      programs: that run side by side.
      iterations: of Sinkhorn.
      hc_eps: that is added to shares, and in Sinkhorn.
      rms_eps: of the norms.
    """

    rows: int
    copied_rows: int
    width: int
    parts: int
    fn: str
    dtype: str
    programs: int
    iterations: int
    hc_eps: float
    rms_eps: float

    @property
    def groups(self) -> int:
        """Return into how many groups of channels a row is cut."""
        return self.width // GROUP

    @property
    def own(self) -> int:
        """Return how many of them a program has at most."""
        return pl.cdiv(self.groups, self.programs)

    @property
    def terms(self) -> int:
        """Return of how many groups a warp adds the sums up."""
        return self.groups // WARPS

    @property
    def limbs(self) -> int:
        """Return how many limbs the input has in fixed point."""
        return LIMBS[self.dtype]

    @property
    def summed(self) -> Counter:
        """Return what counts groups of all rows whose sums are there."""
        # Who has no group waits only if it is the last, which has the weights to write.
        return Counter(self.groups, min(self.programs, self.groups + 1))

    @property
    def written(self) -> Counter:
        """Return what counts groups of the input, of each row, that are there."""
        return Counter(self.groups * self.rows, self.programs)

    @property
    def counters(self) -> int:
        """Return how many counters there are room for: those two."""
        return 2 * APART

    @property
    def at_written(self) -> int:
        """Return how many bytes after the first counter the second is."""
        return 4 * APART

    @property
    def read_operands(self) -> tuple[str, ...]:
        """Return names of what is read."""
        update = *(f"hc_part{i}" for i in range(self.parts)), "hc_post", "hc_mix"
        weights = "hc_fn", "hc_base", "hc_scale", "hc_norm"
        return "hc_streams", *update, *weights

    @property
    def written_operands(self) -> tuple[str, ...]:
        """Return names of what is written."""
        return "streams", "hc_sums", "x", "x_words", "x_scale", "post", "mix"

    @property
    def merged_row(self) -> int:
        """Return the bytes of a group of a row's streams."""
        return 4 * GROUP * STREAMS

    @property
    def merged(self) -> int:
        """Return the bytes of a group's streams, of all rows."""
        return self.rows * self.merged_row

    @property
    def sums(self) -> int:
        """Return where warps' sums of a row begin, in the memory for this."""
        return self.own * self.merged

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory."""
        return self.sums + self.rows * WARPS * SUMS * 4


def serves(streams: int, width: int, rows: int, fn: str) -> bool:
    """Say whether programs can be made for such sizes."""
    terms, rest = divmod(width, GROUP * WARPS)
    fits = streams == STREAMS and rows <= MOST_ROWS and terms <= _MOST_TERMS
    return fits and fn in ("float16", "float32") and not rest
