"""How deep the checks go: some minutes, or with ``KVSUITE_NIGHTLY=1`` (``tox -e nightly``) all cases and draws."""

import os

import pytest

NIGHTLY = os.environ.get("KVSUITE_NIGHTLY") == "1"

only_nightly = pytest.mark.skipif(not NIGHTLY, reason="takes too long: tox -e nightly")


def depth(quick, nightly):
    """One of two: cases of a test, examples of a property, draws of a simulation."""
    return nightly if NIGHTLY else quick
