"""The row contract of the products by every quantised weight, bit for bit.

A decode pass of w tokens is of `DECODE_ROWS` rows, w of them its own (see
`model_rows_test.py` for whole passes): a row has the bits that it has alone, whatever w
is, at which of the w places it stands and what the other rows are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_matmul_test import EXPERTS, IN, TYPES, weight

from ds4jax.model.cache import DECODE_ROWS
from ds4jax.pallas.matmul import (
    every_expert_matmul,
    expert_matmul,
    grouped_matmul,
    quant_matmul,
)

pytestmark = pytest.mark.optimised
OUT = 24
WIDTHS = (1, 2, 3, 4)


@functools.partial(jax.jit, static_argnums=(2, 3))
def product(x, w, op: str, dtype: str):
    """Return an op's result for rows `[N, 2, IN]`, rows leading."""
    if op == "expert":
        # Each row brings its experts with it, by the signs of its first channels.
        ids = jnp.where(x[..., 0] > 0, 1, 4)
        return expert_matmul(x, w, ids, dtype)
    if op == "every":
        return every_expert_matmul(x[:, 0], w, dtype).transpose(1, 0, 2)
    return {"quant": quant_matmul, "grouped": grouped_matmul}[op](x, w, dtype)


def check_rows(run):
    """Compare every row at every place of a pass of every width with the row alone.

    Args:
      run: from rows `[DECODE_ROWS, 2, IN]` to their results, rows leading.
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal((DECODE_ROWS, 2, IN), np.float32)
    alone = [run(np.broadcast_to(row, x.shape))[0] for row in x[: max(WIDTHS)]]
    for width in WIDTHS:
        for first in range(max(WIDTHS)):
            own = [(first + i) % max(WIDTHS) for i in range(width)]
            others = 100 * rng.standard_normal((DECODE_ROWS - width, 2, IN), np.float32)
            found = run(np.concatenate([x[own], others]))
            for place, row in enumerate(own):
                np.testing.assert_array_equal(
                    found[place], alone[row], err_msg=f"{width} rows, place {place}"
                )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["quant", "grouped", "expert", "every"])
@pytest.mark.parametrize("name", TYPES)
def test_a_row_has_its_bits_at_every_width_and_place(name, op, dtype):
    """Activations have the operands' type; the same program dequantises."""
    w = weight(name, *((EXPERTS, OUT) if op in ("expert", "every") else (OUT,)))
    check_rows(lambda x: np.asarray(product(jnp.asarray(x, dtype), w, op, dtype)))


def test_a_product_that_looks_at_other_rows_is_found():
    """Rounding all rows of a pass by one common scale, as an int8 kernel might."""
    w = weight("Q8_0", OUT)

    def run(x):
        scale = np.abs(x).max() / 127
        return np.asarray(product(np.round(x / scale) * scale, w, "quant", "float32"))

    with pytest.raises(AssertionError, match="1 rows, place 0"):
        check_rows(run)
