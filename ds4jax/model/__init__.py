"""The trunk and the MTP head as Flax NNX modules that hold weights and nothing else."""
