"""Whether tests try many cases instead of a few representative ones: `make test-long` sets MOE_DIST_LONG."""

import os

import pytest

LONG = "MOE_DIST_LONG" in os.environ
REPEATED = pytest.mark.skipif(not LONG, reason="repeats what other cases of this test show: make test-long runs it")
THREADS = int(
    os.environ.get("MOE_DIST_TEST_THREADS", "1")
)  # threads per rank; for tensors this small a second thread only waits
