"""Settings shared by all tests."""

import os

from hypothesis import settings

settings.register_profile("moesim", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("moesim")
