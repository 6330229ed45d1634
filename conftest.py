"""This checkout's pytest set-up: the plugin, hypothesis profiles, one thread and no hub for the checks."""

import os

from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ("kvsuite.plugin", "pytester")

settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
