"""A fleet of accounts as columns, made from a seed, for the screen to be measured on."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

from app.domain.book_columns import BookColumns, HoldingColumns, PositionColumns
from app.domain.parameters import InstrumentParameters, MarketParameters

MARKETS = 275
MODE_SHARES = (0.7, 0.1, 0.2)
"""Of cross, isolated and portfolio margin."""


def market() -> tuple[MarketParameters, dict[str, float]]:
    """Return 275 listed perpetuals, most on an underlying of their own, and a price of each and of each underlying."""
    rng = np.random.default_rng(1)
    base = MarketParameters()
    names = ["BTC", "ETH", "SOL", "BNB", *(f"COIN{k}" for k in range(MARKETS - 25))]
    symbols = [f"{name}-PERP" for name in names] + [f"{name}-27MAR26" for name in names[: MARKETS - len(names)]]
    listed = {s: InstrumentParameters(s, s.partition("-")[0]) for s in symbols}
    prices = dict(zip(names, np.exp(rng.uniform(-2.0, 8.0, len(names))).tolist(), strict=True)) | {"USDC": 1.0}
    prices |= {s: prices[s.partition("-")[0]] * float(rng.uniform(0.999, 1.001)) for s in symbols}
    return replace(base, instruments=MappingProxyType(listed)), prices


def fleet(accounts: int, positions: int, prices: dict[str, float]) -> BookColumns:
    """Return accounts with so many positions each, collateral, and in a tenth of them some isolated positions."""
    rng = np.random.default_rng(2)
    symbols = [name for name in prices if "-" in name]
    mark = np.array([prices[s] for s in symbols])
    # by rank, so that the median market is held by 1,400 of 100,000
    weight = (np.arange(len(symbols)) + 2.0) ** -1.05
    chance = np.log(weight / weight.sum())[None, :]
    draws = [chance + rng.gumbel(size=(part, len(symbols))) for part in _parts(accounts)]
    symbol = np.concatenate([np.argpartition(-d, positions, axis=1)[:, :positions] for d in draws]).ravel()
    account = np.repeat(np.arange(accounts), positions)
    size = rng.choice([-1.0, 1.0], len(symbol)) * rng.uniform(1_000.0, 20_000.0, len(symbol)) / mark[symbol]
    isolated = (rng.random(accounts) < 0.1)[account] & (rng.random(len(symbol)) < 0.1)
    entry = mark[symbol] * rng.uniform(0.95, 1.05, len(symbol))
    return BookColumns(
        agents=[f"agent_{k:08x}" for k in range(accounts)],
        version=np.ones(accounts, dtype=np.int64),
        mode=rng.choice(3, accounts, p=MODE_SHARES).astype(np.int8),
        breach=np.full(accounts, np.nan),
        open_call=np.zeros(accounts, dtype=np.bool_),
        symbols=symbols,
        assets=["USDC", "BTC", "ETH"],
        positions=PositionColumns(
            account=account,
            symbol=symbol.astype(np.intp),
            size=size.round(6),
            entry_price=entry.round(6),
            leverage=rng.choice([np.nan, 2.0, 3.0, 5.0, 10.0], len(symbol)),
            isolated=isolated,
            allocated=np.where(isolated, np.abs(size) * entry * 0.5, 0.0).round(6),
        ),
        holdings=_holdings(accounts, positions, prices, rng),
    )


def _parts(accounts: int, most: int = 10_000) -> list[int]:
    return [min(most, accounts - start) for start in range(0, accounts, most)]


def _holdings(accounts: int, positions: int, prices: dict[str, float], rng: np.random.Generator) -> HoldingColumns:
    """Return USDC for all, BTC for a third, ETH and a debt for a tenth, of each a fifth reserved and a fifth lent."""
    worth = 12_000.0 * positions * rng.uniform(0.4, 2.0, accounts)
    everyone = np.arange(accounts)
    parts = []
    for asset, share, name in ((0, 1.0, "USDC"), (1, 0.33, "BTC"), (2, 0.1, "ETH")):
        who = everyone[rng.random(accounts) < share]
        units = np.zeros((4, len(who)))
        units[0] = worth[who] / prices[name] * (1.0 if asset == 0 else 0.3)
        units[1] = units[0] * 0.1 * (asset == 2)
        units[2] = units[0] * 0.05 * (rng.random(len(who)) < 0.2)
        units[3] = units[0] * 0.3 * (rng.random(len(who)) < 0.2)
        parts.append((who, np.full(len(who), asset), units.round(6)))
    account, asset_row, units = (np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
    return HoldingColumns(account, asset_row, *units)
