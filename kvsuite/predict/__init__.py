"""Predictors learned from runs: throughput, and the length and type of answers; each beside nulls that know less."""

from __future__ import annotations

from types import ModuleType

from kvsuite.errors import UsageError

NEEDED = "predictors need scikit-learn: pip install 'kvsuite[predict]'"


def learner(module: str) -> ModuleType:
    """A module of scikit-learn, ``gaussian_process`` say. Raises UsageError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise UsageError(NEEDED) from error
