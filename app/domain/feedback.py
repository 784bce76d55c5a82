"""Collateral feedback: what a shock leaves of collateral that has to be sold, and the loop that such sales set off.

The loop: a shock, the call that it brings, the sale that the call forces, the impact of the sale on prices, which is
the next shock. Impact follows the square root of what is sold over a day's volume (Tóth et al. 2011, "Anomalous price
impact and the critical nature of liquidity in financial markets").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from app.domain.black76 import PRICE_FACTOR_MIN, Floats
from app.domain.collateral import Collateral
from app.domain.curves import Figures
from app.domain.margin.shocked import net_exposures, requirements
from app.domain.portfolio import Portfolio, sums
from app.domain.revalue import pnl_by_underlying
from app.domain.scenarios import ScenarioGrid, floored
from app.domain.stress import StressAccount, is_breached
from app.errors import FieldError, InvalidError, pointer_to

ROUNDS_MAX = 100
_NOTHING = 1e-9
"""Of a book: what is left after a sale of all but rounding."""

Outcome = Literal["stable", "insolvent", "sold_out", "rounds_max"]


@dataclass(frozen=True, slots=True)
class CollateralStep:
    """Collateral value before and after one shock, USD, and the drop as an amount and as a share."""

    before: float
    after: float

    @property
    def drop(self) -> float:
        """What the shock and the slippage take, USD."""
        return self.before - self.after

    @property
    def drop_share(self) -> float:
        """The drop as a share of the value before, 0 where there is none."""
        return self.drop / self.before if self.before > 0.0 else 0.0


def collateral_step(collateral: Collateral, moves: Floats, slippage: float) -> CollateralStep:
    """Return Σ held x price x (1 + move) x (1 - haircut - slippage) beside the value now, moves (K,) by holding.

    Debts are no part of it. A stablecoin is what others are sold for: it has no slippage.
    """
    held = collateral.amount > 0.0
    value = np.where(held, forced_value(collateral, slippage) * (1.0 + floored(moves)), 0.0)
    return CollateralStep(before=collateral.collateral_value, after=float(value.sum()))


def forced_value(collateral: Collateral, slippage: float) -> Floats:
    """Return the value of each holding (K,), USD, haircut and slippage taken off, and of each debt without either."""
    sold = (collateral.amount > 0.0) & ~collateral.stable
    worth = collateral.amount * collateral.price
    rate = np.maximum(1.0 - collateral.haircut - slippage, 0.0)
    after_haircut = collateral.value - worth * (1.0 - collateral.haircut)
    return np.where(sold, after_haircut + worth * rate, collateral.value)


@dataclass(frozen=True, slots=True)
class FeedbackTerms:
    """Of the loop: each asset's average daily volume, USD; the impact of selling one such; slippage, a fraction."""

    adv: Mapping[str, float]
    impact: float
    slippage: float


@dataclass(frozen=True, slots=True)
class Round:
    """One round, USD: the account at `moves` since the start (J,), and the sale that followed, if there was a call.

    `sold` (J,) is signed: negative where shorts are bought back. `impact` (J,) is the relative move that it makes.
    """

    moves: Floats
    collateral_value: float
    equity: float
    required_initial: float
    required_maintenance: float
    utilization: float | None
    call: bool
    fraction: float
    sold: Floats
    impact: Floats


@dataclass(frozen=True, slots=True)
class Feedback:
    """The rounds, and how they end: no call any more, no equity, nothing left to sell, or too many rounds."""

    names: tuple[str, ...]
    rounds: tuple[Round, ...]
    outcome: Outcome
    terms: FeedbackTerms = field(repr=False)


def feedback(account: StressAccount, grid: ScenarioGrid, terms: FeedbackTerms) -> Feedback:
    """Return the rounds that a shock sets off, `grid` being that of the one shock.

    While the account is in breach it sells the same fraction of every pooled position and of every coin that it holds,
    the smallest that would bring utilization to the level at which liquidation stops, at the round's prices; coins are
    sold at the slippage, and held they count less by it, as `collateral_step` has it. What is sold of an asset moves
    its price by impact·√(sold/ADV) against the seller. The isolated positions are left alone.

    Raises InvalidError `missing_adv` for an asset that may be sold and has no average daily volume.
    """
    loop = _Loop(account, grid, terms, _volumes(account, terms), _Coins.of(account, terms.slippage))
    rounds: list[Round] = []
    state = _State(grid.moves[:, 0], left=1.0, cash=0.0)
    for _ in range(ROUNDS_MAX):
        found, following = loop.round(state)
        rounds.append(found)
        if found.equity <= 0.0 and found.call:
            return Feedback(account.names, tuple(rounds), "insolvent", terms)
        if not found.call:
            return Feedback(account.names, tuple(rounds), "stable", terms)
        if state.left <= _NOTHING:
            return Feedback(account.names, tuple(rounds), "sold_out", terms)
        state = following
    return Feedback(account.names, tuple(rounds), "rounds_max", terms)


def _volumes(account: StressAccount, terms: FeedbackTerms) -> Floats:
    """Return the daily volumes (J,), USD, NaN where nothing of an asset can be sold."""
    book, held = account.pool.portfolio, account.collateral
    sellable = {account.names[j] for j in book.underlying[book.notional > 0.0].tolist()}
    sellable |= {a for a, amount in zip(held.assets, held.amount.tolist(), strict=True) if amount > 0.0}
    stable = {name for name, flag in zip(account.names, account.table.stable.tolist(), strict=True) if flag}
    absent = sorted(name for name in sellable - stable if not terms.adv.get(name, 0.0) > 0.0)
    if absent:
        detail = f"no average daily volume for {', '.join(absent)}: what would be sold has no impact without one"
        errors = tuple(FieldError(f"/adv{pointer_to(name)}", "missing_adv", detail) for name in absent)
        raise InvalidError(detail, "missing_adv", errors)
    return np.array([terms.adv.get(name, np.nan) for name in account.names])


@dataclass(frozen=True, slots=True)
class _State:
    """Where the loop stands: moves since the start (J,), the fraction not yet sold, USD that the sales brought."""

    moves: Floats
    left: float
    cash: float


@dataclass(frozen=True, slots=True)
class _Coins:
    """What backs the pool by lane, USD at the start (J,): coins that can be sold, what they count for, all the rest.

    What is lent out can't be sold; it counts less by the slippage all the same.
    """

    worth: Floats
    counted: Floats
    rest: Floats

    @classmethod
    def of(cls, account: StressAccount, slippage: float) -> _Coins:
        held = account.collateral
        lanes, count = account.lanes_of(held.assets), len(account.names)
        for_sale = (held.amount > 0.0) & ~held.stable
        worth = np.where(for_sale, (held.amount - held.lent) * held.price, 0.0)
        counted = worth * np.maximum(1.0 - held.haircut - slippage, 0.0)
        rest = forced_value(held, slippage) - counted
        return cls(*(sums(lanes, values, count) for values in (worth, counted, rest)))


@dataclass(frozen=True, slots=True)
class _Standing:
    """The pool at a state of the loop, USD: what its positions are worth, its margin, and (J,) what could be sold."""

    positions: float
    initial: float
    maintenance: float
    exposure: Floats
    coins: Floats


@dataclass(frozen=True, eq=False)
class _Loop:
    account: StressAccount
    shock: ScenarioGrid
    terms: FeedbackTerms
    volumes: Floats
    coins: _Coins

    def round(self, state: _State) -> tuple[Round, _State]:
        """Return the account at a state, and the state after the sale that it forces."""
        pool, policy = self.account.pool, self.account.parameters.policy
        at = self._standing(state)
        factor = 1.0 + state.moves
        counted = state.left * float((self.coins.counted * factor).sum())
        collateral = state.cash + counted + float((self.coins.rest * factor).sum())
        equity = collateral + pool.backing.stable + at.positions
        reserved = pool.reserved + float(self.account.reserved @ state.moves)
        required, maintenance = at.initial + reserved, at.maintenance + reserved
        figures = Figures(*(np.array([value]) for value in (equity, required, maintenance)))
        call = bool(is_breached(figures, policy.breach_utilization)[0])
        proceeds = float(at.coins.sum()) * (1.0 - self.terms.slippage)
        fraction = _fraction(equity, required, at.initial, proceeds - counted, policy.stop_utilization) if call else 0.0
        sold = fraction * (at.exposure + at.coins)
        impact = self._impact(sold)
        found = Round(
            moves=state.moves,
            collateral_value=collateral,
            equity=equity,
            required_initial=required,
            required_maintenance=maintenance,
            utilization=required / equity if equity > 0.0 else None,
            call=call,
            fraction=fraction,
            sold=sold,
            impact=impact,
        )
        following = _State(
            moves=floored(factor * (1.0 + impact) - 1.0),
            left=state.left * (1.0 - fraction),
            cash=state.cash + fraction * (at.positions + proceeds),
        )
        return found, following

    def _standing(self, state: _State) -> _Standing:
        pool = self.account.pool
        book = scaled(pool.portfolio, state.left)
        shock = replace(self.shock, moves=state.moves[:, None])
        pnl, each_option = pnl_by_underlying(book, shock)
        initial, maintenance = requirements(book, shock, each_option, pool.mode, pool.terms)
        return _Standing(
            positions=float(book.unrealized_pnl.sum() + pnl.sum()) + book.options_value,
            initial=float(initial[0]),
            maintenance=float(maintenance[0]),
            exposure=net_exposures(book, shock, pool.terms)[:, 0],
            coins=state.left * self.coins.worth * (1.0 + state.moves),
        )

    def _impact(self, sold: Floats) -> Floats:
        """Return -sign(sold)·impact·√(|sold|/volume) (J,); stablecoins have none."""
        size = np.divide(np.abs(sold), self.volumes, out=np.zeros_like(sold), where=~np.isnan(self.volumes))
        size[self.account.table.stable] = 0.0
        return np.maximum(-np.sign(sold) * self.terms.impact * np.sqrt(size), PRICE_FACTOR_MIN - 1.0)


def _fraction(equity: float, required: float, initial: float, gain: float, stop: float) -> float:
    """Return the fraction to sell for utilization `stop`: margin falls in proportion, coins sold count more by `gain`.

    Concentration add-ons fall faster than in proportion, so that it may be a little more than needed.
    """
    relief = initial + stop * gain
    return min(1.0, (required - stop * equity) / relief) if relief > 0.0 else 1.0


def scaled(book: Portfolio, factor: float) -> Portfolio:
    """Return the same fraction of every position."""
    options = book.options
    return replace(
        book,
        notional=book.notional * factor,
        vega=book.vega * factor,
        unrealized_pnl=book.unrealized_pnl * factor,
        options=replace(options, quantity=options.quantity * factor, value=options.value * factor),
    )
