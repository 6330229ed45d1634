"""How deep the checks go: some minutes, or with ``KVSUITE_NIGHTLY=1`` (``tox -e nightly``) all cases and draws."""

import os

import pytest

NIGHTLY = os.environ.get("KVSUITE_NIGHTLY") == "1"

only_nightly = pytest.mark.skipif(not NIGHTLY, reason="takes too long: tox -e nightly")


MANY = ("budgets", "budgets-tasks")
"""Published runs of 90 methods: what is looked at in every run takes as long in these as in all others, so it waits for
the night."""


def by_night(runs):
    """Folders of published runs, or files in them: by day without those of many methods."""
    return [run for run in runs if NIGHTLY or not {run.name, run.parent.name} & {*MANY}]


def depth(quick, nightly):
    """One of two: cases of a test, examples of a property, draws of a simulation."""
    return nightly if NIGHTLY else quick
