"""Whether tests try many cases where a few stand for them otherwise: `make test-long` sets MOE_DIST_LONG."""

import os

import pytest

LONG = "MOE_DIST_LONG" in os.environ
REPEATED = pytest.mark.skipif(not LONG, reason="repeats what other cases of this test show: make test-long runs it")
THREADS = int(os.environ.get("MOE_DIST_TEST_THREADS", "1"))  # of a rank: of tensors this small a second one only waits
