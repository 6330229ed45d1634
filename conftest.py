"""This checkout's pytest set-up: the plugin, hypothesis profiles, one thread and no hub for the checks."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvsuite import environment

os.environ["HF_HUB_OFFLINE"] = "1"
if not environment.cuda_driver():  # kernels run in Triton's interpreter, which must be known before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ("kvsuite.plugin", "pytester")

SUITES, KERNELS = (Path(__file__).parent / name for name in ("suites", "kernels"))
EVALUATIONS = ("throughput", "length", "samples", "tools")

settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


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
        if not any(item.get_closest_marker(name) for name in EVALUATIONS):
            item.add_marker(STRICT, append=False)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folders that a ``-m`` made of evaluations' names rules out: their imports take seconds. A folder of
    ``suites/`` is named like the marker of all its tests; ``checks`` and ``kernels/`` have none of these."""
    if collection_path.parent != KERNELS and (collection_path.parent != SUITES or not collection_path.is_dir()):
        return None
    words = re.findall(r"\w+|\S", config.option.markexpr)
    if not words or not set(words) <= {*EVALUATIONS, "and", "or", "not", "(", ")"}:
        return None
    chosen = eval(" ".join(words), {}, {name: name == collection_path.name for name in EVALUATIONS})
    return None if chosen else True
