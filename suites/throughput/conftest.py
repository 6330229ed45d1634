"""What speed cells share."""

import pytest


@pytest.fixture(scope="session")
def timing():
    """kvsuite.engines.timing, imported with torch when the first cell runs: collecting stays quick."""
    from kvsuite.engines import timing

    return timing
