"""Books and histories for the tests of VaR: portfolios of the builders, drawn returns, drawn covariances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st

from app.domain.black76 import Floats
from app.domain.panel import History
from app.domain.portfolio import Portfolio
from app.domain.var.historical import HistoricalRisk, HistoricalTerms, historical
from tests.domain.book import PRICES, Book, Row, greeks, linear, option

NAMES = ("BTC", "ETH", "SOL")
CURVED = (
    linear("BTC-PERP", "long", 0.5),
    greeks("ETH", 20_000.0, -0.6, gamma=2.5, vega=300.0),
    option("BTC", "put", "short", 1.0, strike=57_000.0, days=20, iv=0.6),
    option("ETH", "call", "long", 9.0, strike=3_200.0, days=45, iv=0.75, rate=0.05),
)

DRAWN = settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


def portfolio(*rows: Row) -> Portfolio:
    return Book(rows=rows).quote(models=()).portfolio


def exposed(exposures: Mapping[str, float]) -> Portfolio:
    """Return perpetuals of so many USD, signed, in the order of the assets' names."""
    return portfolio(
        *(
            linear(f"{name}-PERP", "long" if usd >= 0.0 else "short", abs(usd) / PRICES[name])
            for name, usd in sorted(exposures.items())
        )
    )


def history(returns: Any, *assets: str) -> History:
    values = np.asarray(returns, dtype=np.float64).reshape(len(returns), len(assets))
    dates = np.datetime64("2025-01-01") + np.arange(len(values))
    return History(assets, dates.astype("datetime64[D]"), values)


def drawn_history(seed: int, days: int = 250, *assets: str) -> History:
    """Return returns with fat tails that move together."""
    rng = np.random.default_rng(seed)
    names = assets or NAMES
    common, own = rng.standard_t(4, (days, 1)), rng.standard_t(4, (days, len(names)))
    return history(np.clip(0.02 * common + 0.015 * own, -0.9, 3.0), *names)


def drawn_covariance(seed: int, size: int) -> Floats:
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((size, size + 2)) + 0.8
    return factors @ factors.T * (0.6 / (size + 2))


def of_losses(losses: Any, **terms: Any) -> HistoricalRisk:
    """Return the historical figures of a book of 10,000 USD that loses so many USD, oldest first."""
    book = exposed({"BTC": 10_000.0})
    return historical(book, history(-np.asarray(losses, dtype=np.float64) / 10_000.0, "BTC"), HistoricalTerms(**terms))


usd = st.floats(-50_000.0, 50_000.0).map(lambda x: round(x, 2))
exposures = st.fixed_dictionaries(dict.fromkeys(NAMES, usd))
seeds = st.integers(0, 10_000)
confidences = st.floats(0.501, 0.9999)
