"""Triton kernels, one module per stem; installed as `finefuse.kernels` and imported on first GPU use."""
