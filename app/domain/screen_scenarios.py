"""What a set of scenarios does to the equity of every account, in one pass over sparse blocks of float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from app.domain.black76 import Floats
from app.domain.portfolio import Rows

ACCOUNTS_AT_ONCE = 4_096
"""A block's results at 64 scenarios fit in a core's cache."""

Singles = NDArray[np.float32]
Spread = Callable[[Callable[[slice], None], Iterable[slice]], Iterable[None]]
"""`map`, or that of an executor: the sparse products run side by side in threads."""


@dataclass(frozen=True, slots=True)
class Exposures:
    """What A accounts have on assets: entries indptr[k] to indptr[k + 1] are account k's; `value` signed, USD."""

    indptr: Rows
    asset: Rows
    value: Floats


def scenario_pnl(parts: Sequence[Exposures], moves: Floats, spread: Spread = map) -> Singles:
    """Return each account's profit and loss (A, S), USD, where assets make the relative moves (K, S).

    Single precision: off by some 1e-7 of what an account has gross.
    """
    shocks = moves.astype(np.float32)
    columns = [(p.indptr, p.asset.astype(np.int32), p.value.astype(np.float32)) for p in parts]
    count = len(parts[0].indptr) - 1
    result = np.empty((count, shocks.shape[1]), dtype=np.float32)

    def fill(block: slice) -> None:
        total = None
        for indptr, asset, value in columns:
            rows = indptr[block.start : block.stop + 1]
            own = slice(rows[0], rows[-1])
            shape = len(rows) - 1, len(shocks)
            product = csr_array((value[own], asset[own], (rows - rows[0]).astype(np.int32)), shape=shape) @ shocks
            total = product if total is None else np.add(total, product, out=total)
        result[block] = total

    starts = range(0, count, ACCOUNTS_AT_ONCE)
    for _ in spread(fill, [slice(start, min(start + ACCOUNTS_AT_ONCE, count)) for start in starts]):
        pass
    return result
