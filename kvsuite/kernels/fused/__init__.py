"""Triton kernels, each of the signature of its PyTorch reference in `kvsuite.kernels`."""
