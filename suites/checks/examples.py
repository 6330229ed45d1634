"""How many examples hypothesis tries: the same for checks and for evidence about kernels. ``ci`` always tries the same
ones."""

import os

from hypothesis import HealthCheck, settings

from suites.checks.depth import NIGHTLY

settings.register_profile("dev", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=100, print_blob=True)
settings.load_profile("nightly" if NIGHTLY else "ci" if os.environ.get("CI") else "dev")
