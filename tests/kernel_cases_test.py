"""The kernels' benchmark can be traced, which without a GPU nobody else would notice.

A part of the model that a case calls may have got another name or other arguments.
"""

import functools
import importlib

import jax
import numpy as np
import pytest

PARTS = "kernel_products", "kernel_blocks", "kernel_parts", "kernel_prefill"
CASES = [case for name in PARTS for case in importlib.import_module(name).CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}: {case.what}")
def test_a_case_has_a_kernel_and_what_it_replaces(case):
    """Seen red with an expert block whose sum got another name, and uncounted bytes."""
    shapes = jax.eval_shape(case.draw)
    jax.eval_shape(case.xla, *shapes)
    operands = jax.tree.map(lambda a: np.broadcast_to(a.dtype.type(0), a.shape), shapes)
    for width in case.widths:
        jax.eval_shape(functools.partial(case.run, width), *shapes)
        assert case.nbytes(width, *operands) > 0
