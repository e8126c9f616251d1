"""Depths 0 to 4 of both speculative modes, and what each other switch does to one.

A quarter of an hour on a CPU of two cores.  `ds4jax/experiments/arms.py` says what each
field means.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "modes": ("continuous", "chained"),
            "depths": (0, 1, 2, 3, 4),
            "verifiers": ("exact", "batched"),
            "pairings": ("trained", "ds4"),
            "fills": (True, False),
            "gates": (False, True),
            "cross": False,
            "texts": ("copy", "technical", "prose"),
            "seeds": (0,),
            "temperature": 0.0,
            "tokens": 128,
            "turn": 32,
            "rounds": 5,
            "repeats": 10,
        }
    )
