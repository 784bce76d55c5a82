"""A second account of what agents have, in plain fractions: nothing of app."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

GATE = Fraction(8, 10)
CAP = Fraction(35, 10)
HAIRCUTS = {"USDC": Fraction(0), "BTC": Fraction(10, 100), "ETH": Fraction(12, 100)}
CLOSE_CALL = Fraction(1, 10**8)
"""Relative: nearer to a limit than this, floats may decide either way."""


@dataclass(frozen=True)
class Market:
    underlying: str
    contract: Fraction
    rate: Fraction


MARKETS = {
    "BTC-PERP": Market("BTC", Fraction(1), Fraction(3, 10)),
    "BTC-MINI": Market("BTC", Fraction(1, 100), Fraction(4, 10)),
    "ETH-PERP": Market("ETH", Fraction(1), Fraction(3, 10)),
}


@dataclass
class Lot:
    """An open position: `size` below zero for a short, `own` its own collateral where isolated."""

    symbol: str
    size: Fraction
    entry: Fraction
    leverage: Fraction | None
    isolated: bool
    own: Fraction = Fraction(0)
    realized: Fraction = Fraction(0)

    @property
    def market(self) -> Market:
        return MARKETS[self.symbol]

    @property
    def rate(self) -> Fraction:
        return self.market.rate if self.leverage is None else max(self.market.rate, 1 / self.leverage)

    def exposure(self, price: Fraction) -> Fraction:
        return self.size * self.market.contract * price

    def gain(self, price: Fraction) -> Fraction:
        return self.size * self.market.contract * (price - self.entry)


@dataclass
class Hold:
    asset: str
    left: Fraction
    paid: Fraction = Fraction(0)


class Refused(Exception):  # noqa: N818  not an error: an answer
    """What may not be done, under the code of the refusal; a ? before it where it is too close to tell."""


@dataclass
class Shadow:
    """One agent. What it may not do raises Refused; `house` counts what the other sides have received."""

    prices: dict[str, Fraction]
    netting: bool
    free: dict[str, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    owed: dict[str, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    lots: dict[str, Lot] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    house: dict[tuple[str, str], Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    cash: dict[str, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    realized: dict[str, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    closes: int = 0
    lenient: bool = False
    seen: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Shadow:
        return deepcopy(self, {id(self.prices): self.prices})

    # --- money

    def receive(self, asset: str, amount: Fraction) -> None:
        back = min(self.owed[asset], amount)
        if back:
            self.seen["owed is paid first"] += 1
        self.owed[asset] -= back
        self.free[asset] += amount - back

    def pay(self, asset: str, amount: Fraction) -> None:
        here = min(self.free[asset], amount)
        if here < amount:
            self.seen["a loss is owed"] += 1
        self.free[asset] -= here
        self.owed[asset] += amount - here

    def deposit(self, asset: str, amount: Fraction) -> None:
        self.receive(asset, amount)
        self.house[asset, "external"] -= amount

    def withdraw(self, asset: str, amount: Fraction) -> None:
        before = self.copy()
        if amount > self.free[asset]:
            raise Refused("insufficient_funds")
        self.free[asset] -= amount
        self.house[asset, "external"] += amount
        self.check_raise(before)

    def reserve(self, asset: str, amount: Fraction) -> None:
        """Check a reservation; its id is known when it is made: `holds` is then filled in."""
        before = self.copy()
        if amount > self.free[asset]:
            raise Refused("insufficient_funds")
        self.free[asset] -= amount
        self.holds["new"] = Hold(asset, amount)
        self.check_raise(before)

    def end(self, hold_id: str, amount: Fraction, *, paid: bool) -> None:
        hold = self.holds[hold_id]
        if amount > hold.left:
            raise Refused("amount_above_reservation")
        hold.left -= amount
        if paid:
            hold.paid += amount
            self.house[hold.asset, "services"] += amount
        else:
            self.receive(hold.asset, amount)
        if not hold.left:
            del self.holds[hold_id]

    # --- trades

    def order(
        self,
        symbol: str,
        size: Fraction,
        *,
        leverage: Fraction | None = None,
        isolated: bool | None = None,
        reduce_only: bool = False,
    ) -> None:
        """Fill `size` contracts, below zero for a sale."""
        before = self.copy()
        lot = self.lots.get(symbol)
        against = lot is not None and (lot.size > 0) != (size > 0)
        closing = min(abs(size), abs(lot.size)) if lot is not None and against else Fraction(0)
        if reduce_only and not closing:
            raise Refused("nothing_to_reduce")
        if reduce_only and abs(size) > closing:
            raise Refused("would_flip")
        if closing:
            self.close(symbol, closing)
        price = self.price(symbol)
        self.cash[symbol] -= size * MARKETS[symbol].contract * price
        rest = size - (closing if size > 0 else -closing)
        if rest:
            self.seen["flips"] += bool(closing)
            self.open(symbol, rest, leverage, isolated)
            if self.free["USDC"] < 0:
                raise Refused("insufficient_margin")
            self.check_raise(before)

    def close(self, symbol: str, size: Fraction) -> None:
        lot = self.lots[symbol]
        sign = 1 if lot.size > 0 else -1
        exact = sign * size * lot.market.contract * (self.price(symbol) - lot.entry)
        gain = Fraction(floor(exact * 10**6), 10**6)
        self.house["USDC", "trading"] -= gain
        self.closes += 1
        lot.realized += gain
        self.realized[symbol] += gain
        if lot.isolated:
            self._close_isolated(lot, size, gain)
        elif gain > 0:
            self.receive("USDC", gain)
        else:
            self.pay("USDC", -gain)
        lot.size -= sign * size
        if not lot.size:
            del self.lots[symbol]

    def _close_isolated(self, lot: Lot, size: Fraction, gain: Fraction) -> None:
        part = size / abs(lot.size)
        self.seen["part of an isolated position closes"] += part < 1
        share = lot.own if part == 1 else Fraction(floor(lot.own * part * 10**6), 10**6)
        loss = max(-gain, Fraction(0))
        lost = min(loss, lot.own)
        lot.own -= lost
        self.house["USDC", "deficit"] -= loss - lost
        self.seen["a deficit"] += loss > lost
        if gain > 0:
            self.receive("USDC", gain)
        back = max(share - lost, Fraction(0))
        lot.own -= back
        self.receive("USDC", back)

    def open(self, symbol: str, size: Fraction, leverage: Fraction | None, isolated: bool | None) -> None:
        price = self.price(symbol)
        lot = self.lots.get(symbol)
        grows = deepcopy(lot)
        if lot is None:
            apart = not self.netting if isolated is None else isolated
            lot = self.lots[symbol] = Lot(symbol, size, price, leverage, apart)
        else:
            if isolated is not None and isolated != lot.isolated:
                raise Refused("margin_mode_conflict")
            self.seen["grows"] += 1
            total = lot.size + size
            average = (lot.size * lot.entry + size * price) / total
            # against the agent: a long has paid more than it has, a short has received less
            lot.entry = Fraction(-floor(-average * 10**18) if size > 0 else floor(average * 10**18), 10**18)
            lot.size = total
            lot.leverage = lot.leverage if leverage is None else leverage
        if lot.isolated:
            margin = abs(size) * lot.market.contract * price * lot.rate
            if grows is not None:
                # what was open before brings what it has, less its loss
                loss = max(Fraction(-floor(grows.gain(price) * 10**6), 10**6), Fraction(0))
                margin = max(margin, lot.rate * abs(lot.exposure(price)) - (grows.own - loss))
            posted = Fraction(-floor(-margin * 10**6), 10**6)
            lot.own += posted
            self.free["USDC"] -= posted

    def allocate(self, symbol: str, amount: Fraction) -> None:
        before, lot = self.copy(), self.lots[symbol]
        if not lot.isolated:
            raise Refused("not_isolated")
        if amount > 0:
            lot.own += amount
            self.free["USDC"] -= amount
            if self.free["USDC"] < 0:
                raise Refused("insufficient_funds")
            self.check_raise(before)
            return
        if -amount > lot.own:
            raise Refused("insufficient_funds")
        lot.own += amount
        self.receive("USDC", -amount)
        worth = lot.own + min(lot.gain(self.price(symbol)), Fraction(0))
        needed = lot.rate * abs(lot.exposure(self.price(symbol)))
        if worth < needed:
            self._refuse("insufficient_margin", close=needed - worth < CLOSE_CALL * needed)

    # --- figures

    def price(self, symbol: str) -> Fraction:
        return self.prices[MARKETS[symbol].underlying]

    def value(self, asset: str, amount: Fraction) -> Fraction:
        return amount * self.prices[asset] * (1 - HAIRCUTS[asset])

    @property
    def equity(self) -> Fraction:
        held = sum(self.value(asset, amount) for (bucket, asset), amount in self.purses() if bucket != "owed")
        return Fraction(held - self.debt + sum(lot.gain(self.price(s)) for s, lot in self.lots.items()))

    @property
    def debt(self) -> Fraction:
        return sum((amount * self.prices[asset] for asset, amount in self.owed.items()), Fraction(0))

    @property
    def pool_equity(self) -> Fraction:
        apart = [lot for lot in self.lots.values() if lot.isolated]
        return self.equity - sum(lot.own + lot.gain(self.price(lot.symbol)) for lot in apart)

    @property
    def gross(self) -> Fraction:
        return Fraction(sum(abs(lot.exposure(self.price(s))) for s, lot in self.lots.items()))

    @property
    def required(self) -> Fraction:
        """Return the initial margin of the pool and what is reserved, USD."""
        pooled = [lot for lot in self.lots.values() if not lot.isolated]
        total = sum((self.value(hold.asset, hold.left) for hold in self.holds.values()), Fraction(0))
        if not self.netting:
            return total + sum(lot.rate * abs(lot.exposure(self.price(lot.symbol))) for lot in pooled)
        for asset in ("BTC", "ETH"):
            here = [lot for lot in pooled if lot.market.underlying == asset]
            if here:
                net = sum((lot.exposure(self.prices[asset]) for lot in here), Fraction(0))
                total += max(lot.rate for lot in here) * abs(net)
        return total

    def purses(self) -> Iterator[tuple[tuple[str, str], Fraction]]:
        """Yield every (bucket, asset) and what it holds."""
        for asset in HAIRCUTS:
            yield ("free", asset), self.free[asset]
            yield ("owed", asset), self.owed[asset]
            held = (hold.left for hold in self.holds.values() if hold.asset == asset)
            yield ("reserved", asset), Fraction(sum(held))
        yield ("allocated", "USDC"), Fraction(sum(lot.own for lot in self.lots.values()))

    def check_raise(self, before: Shadow) -> None:
        """Raise Refused where the step from `before` to here is more than the account may carry."""
        if not self.lots and not any(self.owed.values()):
            return
        equity, required = self.pool_equity, self.required
        if required or equity < 0:
            self._check_gate(before, equity, required)
        total, gross = self.equity, self.gross
        if gross > CAP * total and not (gross <= before.gross and total >= before.equity):
            hardly = gross - before.gross < CLOSE_CALL * gross and before.equity - total < CLOSE_CALL * abs(total)
            self._refuse("leverage_above_cap", close=hardly or gross - CAP * total < CLOSE_CALL * gross)

        self._check_debt(before)

    def _check_debt(self, before: Shadow) -> None:
        backing = self.equity + self.debt
        over = self.debt - GATE * backing
        more, less = self.debt - before.debt, before.equity + before.debt - backing
        if self.debt and over > 0 and (more > 0 or less > 0):
            hardly = max(more, less) < CLOSE_CALL * abs(backing)
            self._refuse("insufficient_margin", close=hardly or over < CLOSE_CALL * self.debt)

    def _check_gate(self, before: Shadow, equity: Fraction, required: Fraction) -> None:
        if equity <= 0:
            raise Refused("insufficient_margin")
        now = required / equity
        if now <= GATE:
            return
        then = before.required / before.pool_equity if before.pool_equity > 0 else None
        if then is None or now > then:
            over = min(now - GATE, now if then is None else now - then)
            self._refuse("insufficient_margin", close=over < CLOSE_CALL)

    def _refuse(self, code: str, *, close: bool) -> None:
        if not close:
            raise Refused(code)
        if not self.lenient:
            raise Refused(f"?{code}")
