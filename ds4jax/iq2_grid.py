"""The rows of magnitudes that IQ2_XXS draws from.

This is not in `quant`, so that the processes that encode do without JAX.
"""

from __future__ import annotations

import numpy as np
from gguf import quants
from jaxtyping import Float32

quants.IQ2_XXS.init_grid()
assert quants.IQ2_XXS.grid is not None

IQ2_GRID: Float32[np.ndarray, "256 8"] = quants.IQ2_XXS.grid.reshape(256, 8)
"""256 rows of eight magnitudes: 8, 25 or 43."""
