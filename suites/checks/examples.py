"""How many examples hypothesis tries: the same for checks and for evidence about kernels."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
