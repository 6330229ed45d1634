"""The operations on a compressed cache: `paged` is what they act on, each backend a folder with the same functions."""

BACKENDS = ("triton", "reference")
"""Folders here, fastest first; ``auto`` takes the first that supports a layer."""
