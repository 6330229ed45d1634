"""This checkout's pytest set-up: what is asked of checks and of evidence about kernels alone."""

import os
from pathlib import Path

import pytest

from kvsuite import environment, plugin

if not environment.cuda_driver():  # kernels run in Triton's interpreter, which must be known before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

CHECKS, KERNELS = (Path(__file__).parent / name for name in ("suites/checks", "kernels"))

STRICT = pytest.mark.filterwarnings(
    "error",
    # transformers and torch warn of their own insides; nothing here can change it
    "ignore::DeprecationWarning:torch.*",
    "ignore::FutureWarning:transformers.*",
)
"""What a check is run with. An evaluation is not: a deprecation in a library is no finding about a method."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning fails a check."""
    for item in items:
        if {CHECKS, KERNELS} & set(item.path.parents):
            item.add_marker(STRICT, append=False)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the kernels where ``-m`` chooses evaluations: their imports take seconds."""
    return True if collection_path.parent == KERNELS and plugin.ruled_out(config, "kernels") else None
