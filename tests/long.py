"""Whether tests try many cases where a few stand for them otherwise: `make test-long` sets MOE_DIST_LONG."""

import os

LONG = "MOE_DIST_LONG" in os.environ
