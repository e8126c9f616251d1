"""Matrix products over ggml weights: one op, and the kernels that serve it."""
