"""A look at whether everything works, on few tokens; its times mean nothing."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "modes": ("continuous",),
            "depths": (0, 1),
            "verifiers": ("exact",),
            "pairings": ("trained",),
            "fills": (True,),
            "gates": (False, True),
            "cross": False,
            "texts": ("copy", "prose"),
            "seeds": (0,),
            "temperature": 0.0,
            "tokens": 24,
            "rounds": 2,
            "repeats": 2,
        }
    )
