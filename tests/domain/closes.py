"""The real daily closes of four assets, which a checkout may lack."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from app.domain.panel import Panel

CLOSES = Path(__file__).resolve().parents[2] / "../shared/data/crypto_daily_closes.csv"
needs_closes = pytest.mark.skipif(not CLOSES.exists(), reason=f"no closes at {CLOSES}")


def panel() -> Panel:
    with CLOSES.open() as lines:
        header, *rows = csv.reader(lines)
    closes = np.array([[float(x) for x in row[1:]] for row in rows])
    return Panel.from_closes(header[1:], np.array([row[0] for row in rows], dtype="datetime64[D]"), closes)
