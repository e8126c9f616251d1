"""What the gate costs where drafts pay, and what it saves where they do not.

ds4's pairing of the head stands for drafts that are seldom accepted.  The rounds are
many and the texts long, because the question is one of 2 %: each time that drafts are
tried in vain costs what a few passes do, and a machine's own speed changes by more from
one run to the next.  The turns are short for that, but long enough that what a call
costs is little of one.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "modes": ("continuous",),
            "depths": (0, 1),
            "verifiers": ("exact",),
            "pairings": ("trained", "ds4"),
            "fills": (True,),
            "gates": (False, True),
            # What a cycle costs on a CPU, where no row is nearly free, in plain ones,
            # less one; with ds4's pairing a draft takes a pass more of the head.
            "gate_least": (0.6, 0.75),
            "cross": True,
            "texts": ("copy", "technical", "prose"),
            "seeds": (0,),
            "temperature": 0.0,
            "tokens": 1024,
            "turn": 64,
            "rounds": 10,
            "repeats": 2,
        }
    )
