"""The operations on a compressed cache: `paged` is what they act on, each backend a folder with the same functions."""

BACKENDS = ("triton", "cpu", "reference")
"""Folders here."""
AUTO = {"cuda": ("triton", "reference"), "cpu": ("cpu", "reference")}
"""By device: those that ``auto`` tries, the fastest first; it takes the first that supports a layer."""
