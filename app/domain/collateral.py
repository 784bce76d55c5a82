"""What backs an account: assets held and assets owed, valued after haircut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.domain.black76 import Floats
from app.domain.computed import computed
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Flags, Underlyings, total
from app.domain.prices import PriceFinder
from app.domain.record import record


@record(frozen=True, slots=True)
class CollateralTerms:
    """One holding (or one debt): units of an asset, of which `lent` are out on loan; its own price if given."""

    asset: str
    amount: float
    price: float | None = None
    lent: float = 0.0


@record(frozen=True, eq=False)
class Collateral:
    """Holdings and debts as columns, each (K,); `amount` is negative for a debt, `value` signed, after haircut.

    Value of a holding: amount x price x (1 - haircut), less lent x price x recall haircut; of a debt: amount x
    price, no haircut.
    """

    assets: tuple[str, ...]
    holdings: int
    """How many of the rows are holdings; the rest, debts, stand behind them."""
    amount: Floats
    lent: Floats
    price: Floats
    haircut: Floats
    value: Floats
    stable: Flags

    @computed
    def collateral_value(self) -> float:
        """Value of all holdings after haircut, USD."""
        return total(self.value[: self.holdings])

    @computed
    def liabilities(self) -> float:
        """Value of all debts, USD, >= 0."""
        return abs(total(self.value[self.holdings :])) if self.holdings < len(self.assets) else 0.0

    def split(self, underlyings: Underlyings) -> CollateralSplit:
        """Return how the value moves with prices: with which underlying, with other coins, or not at all."""
        row, on = underlyings.row, np.zeros(len(underlyings.names))
        other = stable = 0.0
        # a wallet has a handful of assets: less than what an array operation costs
        for asset, value, is_stable in zip(self.assets, self.value.tolist(), self.stable.tolist(), strict=True):
            if asset in row:
                on[row[asset]] += value
            elif is_stable:
                stable += value
            else:
                other += value
        return CollateralSplit(on_underlying=on, other=other, stable=stable)


@record(frozen=True, slots=True)
class CollateralSplit:
    """Collateral value less debts in USD, by what moves it; `on_underlying` (J,)."""

    on_underlying: Floats
    other: float
    stable: float


def value_collateral(
    held: Sequence[CollateralTerms],
    owed: Sequence[CollateralTerms],
    parameters: MarketParameters,
    prices: PriceFinder,
) -> Collateral:
    """Return the holdings and debts at their prices. Raises InvalidError `missing_price`.

    `prices` knows those that stand beside them.
    """
    terms = [*held, *owed]
    assets = [parameters.asset(t.asset) for t in terms]
    amount, lent, price, haircut = np.array(
        (
            [t.amount for t in held] + [-t.amount for t in owed],
            [t.lent for t in terms],
            [prices.asset(t.asset, _pointer(i, len(held))) for i, t in enumerate(terms)],
            [a.haircut for a in assets[: len(held)]] + [0.0] * len(owed),
        ),
        dtype=np.float64,
    )
    return Collateral(
        assets=tuple([t.asset for t in terms]),
        holdings=len(held),
        amount=amount,
        lent=lent,
        price=price,
        haircut=haircut,
        value=price * (amount * (1.0 - haircut) - lent * parameters.models.recall_haircut),
        stable=np.array([a.kind == "stable" for a in assets], dtype=np.bool_),
    )


def _pointer(index: int, held: int) -> str:
    if index < held:
        return f"/collateral/{index}/price"
    return f"/liabilities/{index - held}/price"
