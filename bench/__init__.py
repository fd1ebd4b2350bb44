"""Benchmarks: python -m bench."""

import time

# Before torch is imported, which a budget has to pay for too.
STARTED = time.monotonic()
