"""Benchmarks: every figure is a ratio of rivals in one run."""

import os

# as the service does when it starts: BLAS threads of its own, which spin between calls, slow whoever has a core
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
