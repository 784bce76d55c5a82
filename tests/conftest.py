from __future__ import annotations

import os

pytest_plugins = ["tests.postgres", "tests.database"]


def pytest_xdist_auto_num_workers() -> int:
    """Run two workers a core: much of what the flows take is waiting for processes and deadlines."""
    return 2 * (os.cpu_count() or 1)
