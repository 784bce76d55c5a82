"""A second implementation of RISK.md sections 1 to 2.2, in plain loops: nothing of app.domain, no numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Row = Mapping[str, Any]

YEAR = 365 * 24 * 3600


@dataclass(frozen=True)
class Asset:
    haircut: float = 0.50
    initial_margin_rate: float = 0.30
    maintenance_margin_rate: float = 0.15
    price_range: float = 0.30
    concentration_limit: float | None = None
    stable: bool = False


ASSETS = {
    "BTC": Asset(0.10, price_range=0.15),
    "ETH": Asset(0.12, price_range=0.15),
    "SOL": Asset(0.15, price_range=0.20),
    "BNB": Asset(0.20, price_range=0.20),
    "USDC": Asset(0.0, stable=True),
    "USDT": Asset(0.0, stable=True),
}
STRESS = {"BTC ETH": 0.95, "BTC SOL": 0.90, "ETH SOL": 0.92, "BNB BTC": 0.88, "BNB ETH": 0.87, "BNB SOL": 0.85}
HEDGE = {"BTC ETH": 0.60, "BTC SOL": 0.50, "ETH SOL": 0.55}
REGIMES = {"normal": 1.0, "sideways": 0.85, "sell_off": 1.5, "liquidity_crisis": 2.0}
MODERATE = ((-0.10, 0.25), (-0.05, 0.10), (0.05, 0.10), (0.10, -0.15), (-0.15, 0.35), (0.15, -0.20))
WIDE = ((-0.20, 0.40), (-0.10, 0.25), (-0.05, 0.10), (0.05, 0.10), (0.10, -0.15), (0.20, -0.25))
SETS = {"moderate": MODERATE, "wide": WIDE}


def correlation(table: Mapping[str, float], other: float, a: str, b: str) -> float:
    return 1.0 if a == b else table.get(" ".join(sorted((a, b))), other)


def normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2.0)) / 2.0


@dataclass(frozen=True)
class Contract:
    """A European option on a forward; `phi` is 1 for a call, -1 for a put."""

    phi: float
    forward: float
    strike: float
    years: float
    iv: float
    rate: float

    def d1(self, forward: float, iv: float) -> float:
        deviation = iv * math.sqrt(self.years)
        return math.log(forward / self.strike) / deviation + deviation / 2

    def value(self, forward: float, iv: float) -> float:
        d1 = self.d1(forward, iv)
        d2 = d1 - iv * math.sqrt(self.years)
        undiscounted = self.phi * (forward * normal(self.phi * d1) - self.strike * normal(self.phi * d2))
        return max(0.0, math.exp(-self.rate * self.years) * undiscounted)

    def delta(self) -> float:
        return math.exp(-self.rate * self.years) * self.phi * normal(self.phi * self.d1(self.forward, self.iv))

    def term(self) -> float:
        days = 365 * self.years
        return float((30 / max(days, 1.0)) ** (0.30 if days < 30 else 0.13))


@dataclass(frozen=True)
class Leg:
    """One position. `quantity` is signed units of the underlying (options), `exposure` signed USD."""

    underlying: str
    notional: float
    exposure: float
    initial_rate: float
    maintenance_rate: float
    price_range: float
    gamma: float = 0.0
    vega: float = 0.0
    profit: float = 0.0
    quantity: float = 0.0
    contract: Contract | None = None
    allocation: float | None = None

    def value(self) -> float:
        c = self.contract
        return 0.0 if c is None else self.quantity * c.value(c.forward, c.iv)

    def change(self, move: float, vol_move: float, *, term: bool = False) -> float:
        """Return the profit of S(1+m) and IV(1+v), floors of RISK.md section 0."""
        move = max(move, 1e-6 - 1.0)
        c = self.contract
        if c is None:
            return self.exposure * move + self.gamma * self.notional * move * move / 2 + self.vega * vol_move
        iv = max(c.iv * (1.0 + vol_move * (c.term() if term else 1.0)), 0.01)
        return self.quantity * (c.value(c.forward * (1.0 + move), iv) - c.value(c.forward, c.iv))

    def alone(self, rate: float) -> float:
        """Return the margin of the position on its own."""
        if self.contract is None:
            return rate * self.notional
        if self.quantity >= 0.0:
            return self.value()
        return rate * self.notional - self.value()


@dataclass(frozen=True)
class Margin:
    initial: float
    maintenance: float


class Reference:
    """A book read by RISK.md: `request` is a tests.domain.book.Book, taken for its plain values alone."""

    def __init__(self, request: Any, now: datetime) -> None:
        self.request = request
        self.now = now
        self.prices: Mapping[str, float] = request.prices
        self.whole = [self.leg(row) for row in request.rows]
        self.pool = [leg for leg in self.whole if leg.allocation is None]

    # what the request says

    def asset(self, name: str) -> Asset:
        known = ASSETS.get(name, Asset())
        own = self.request.assets.get(name, {})
        return Asset(**{key: own.get(key, getattr(known, key)) for key in Asset.__dataclass_fields__})

    def leg(self, row: Row) -> Leg:
        underlying = row.get("underlying") or row["symbol"].partition("-")[0]
        asset = self.asset(underlying)
        market = self.request.instruments.get(row.get("symbol"), {})

        def figure(name: str) -> float:
            return float(market.get(name, getattr(asset, name)))

        leverage = row.get("leverage")
        initial = max(figure("initial_margin_rate"), 1 / leverage if leverage else 0.0)
        maintenance, width = figure("maintenance_margin_rate"), figure("price_range")
        sign = {"long": 1.0, "short": -1.0, None: 0.0}[row.get("side")]
        units = (row.get("size") or 0.0) * (row.get("contract_size") or market.get("contract_size", 1.0))
        isolated = row.get("margin_mode") == "isolated"
        given = row.get("allocated_collateral")
        if row.get("strike") is not None:
            price = self.prices[underlying]
            contract = Contract(
                phi=1.0 if row["type"] == "call" else -1.0,
                forward=row.get("forward") or price,
                strike=row["strike"],
                years=(row["expiry"] - self.now).total_seconds() / YEAR,
                iv=row["iv"],
                rate=row.get("rate") or 0.0,
            )
            exposure = sign * units * contract.delta() * contract.forward
            value = units * contract.value(contract.forward, contract.iv)
            # a long option posts what it is worth, a short one its rate on the underlying on top of that
            posted = value if sign > 0 else initial * units * price + value
            return Leg(
                underlying,
                units * price,
                exposure,
                initial,
                maintenance,
                width,
                quantity=sign * units,
                contract=contract,
                allocation=(posted if given is None else given) if isolated else None,
            )
        if row.get("notional") is not None:
            notional = row["notional"]
            posted = initial * notional
            return Leg(
                underlying,
                notional,
                row["delta"] * notional,
                initial,
                maintenance,
                width,
                gamma=row.get("gamma") or 0.0,
                vega=row.get("vega") or 0.0,
                allocation=(posted if given is None else given) if isolated else None,
            )
        mark = self.request.mark_of(row)
        entry = row.get("entry_price") or mark
        posted = initial * units * entry
        return Leg(
            underlying,
            units * mark,
            sign * units * mark,
            initial,
            maintenance,
            width,
            profit=sign * units * (mark - entry),
            allocation=(posted if given is None else given) if isolated else None,
        )

    # section 1

    def collateral_value(self) -> float:
        total = 0.0
        for asset, amount, lent in self.request.held:
            price = self.prices[asset]
            total += amount * price * (1 - self.asset(asset).haircut) - 0.05 * lent * price
        return total

    def liabilities(self) -> float:
        return float(sum(h.amount * self.prices[h.asset] for h in self.request.owed))

    def backing(self) -> float:
        return self.collateral_value() - self.liabilities()

    def equity(self) -> float:
        return self.backing() + sum(leg.profit + leg.value() for leg in self.whole)

    def pool_equity(self) -> float:
        allocated = sum(leg.allocation or 0.0 for leg in self.whole)
        return self.backing() - allocated + sum(leg.profit + leg.value() for leg in self.pool)

    def required(self) -> Margin:
        margin = getattr(self, self.request.mode)(self.pool)
        return Margin(margin.initial + self.request.reserved, margin.maintenance + self.request.reserved)

    def surplus(self) -> float:
        return self.pool_equity() - self.required().maintenance

    def room(self) -> float:
        """Return what is left before utilization .85."""
        return 0.85 * self.pool_equity() - self.required().initial

    def own_surplus(self, row: int) -> float:
        leg = self.whole[row]
        return (leg.allocation or 0.0) + leg.profit + leg.value() - leg.alone(leg.maintenance_rate)

    # section 2

    def model(self, name: str) -> Margin:
        margin: Margin = getattr(self, name)(self.whole)
        return margin

    def isolated(self, legs: Sequence[Leg]) -> Margin:
        return Margin(
            sum(leg.alone(leg.initial_rate) for leg in legs), sum(leg.alone(leg.maintenance_rate) for leg in legs)
        )

    def cross(self, legs: Sequence[Leg]) -> Margin:
        options = self.isolated([leg for leg in legs if leg.contract is not None])
        initial, maintenance = options.initial, options.maintenance
        for group in by_underlying(legs).values():
            plain = [leg for leg in group if leg.contract is None and leg.notional > 0]
            net = abs(sum(leg.exposure for leg in plain))
            initial += net * max((leg.initial_rate for leg in plain), default=0.0)
            maintenance += net * max((leg.maintenance_rate for leg in plain), default=0.0)
        return Margin(initial, maintenance)

    def scenario(self, legs: Sequence[Leg]) -> Margin:
        worst = min(sum(leg.change(m, v) for leg in legs) for m, v in SETS[self.request.scenario_set])
        initial = 1.2 * max(0.0, -worst)
        return Margin(initial, 0.8 * initial)

    def span(self, legs: Sequence[Leg]) -> Margin:
        requirement = 0.0
        for name, group in by_underlying(legs).items():
            width = group[0].price_range
            losses = [
                -sum(leg.change(m * width, v) for leg in group)
                for m in (0.0, 1 / 3, -1 / 3, 2 / 3, -2 / 3, 1.0, -1.0)
                for v in (0.25, -0.25)
            ]
            losses += [-0.35 * sum(leg.change(m * width, 0.0) for leg in group) for m in (2.0, -2.0)]
            charges = self.request.span_charges.get(name)
            extra, least = 0.0, 0.0
            if charges is not None:
                extra = charges.intra_commodity + charges.delivery - charges.inter_commodity_credit
                least = charges.short_option_minimum
            requirement += max(max(0.0, *losses) + extra, least, 0.0)
        return Margin(1.1 * requirement, requirement)

    def portfolio(self, legs: Sequence[Leg]) -> Margin:
        parts = self.portfolio_parts(legs)
        risk = max(parts["joint"], parts["parallel"]) * REGIMES[self.request.regime]
        initial = 1.2 * max(risk, parts["floor"]) + parts["concentration"]
        held = [leg for leg in legs if leg.notional > 0]
        if held and all(leg.contract is not None and leg.quantity > 0 for leg in held):
            initial = min(initial, sum(leg.value() for leg in held))
        return Margin(initial, 0.8 * initial)

    def portfolio_parts(self, legs: Sequence[Leg]) -> dict[str, float]:
        groups = by_underlying(legs)
        cells = [(p, v, 1.0) for p in (-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1) for v in (-0.25, 0.0, 0.25)]
        cells += [(-2, 0.25, 0.5), (2, 0.25, 0.5)]
        together = [0.0] * len(cells)
        d, n = {}, {}
        floor = concentration = 0.0
        for name, group in groups.items():
            width = group[0].price_range
            down = up = 0.0
            for k, (p, v, weight) in enumerate(cells):
                profit = weight * sum(leg.change(p * width, v, term=True) for leg in group)
                together[k] += profit
                if p <= 0:
                    down = max(down, -profit)
                if p >= 0:
                    up = max(up, -profit)
            d[name], n[name] = down - up, min(down, up)
            gross = sum(abs(leg.exposure) for leg in group)
            floor += 0.01 * gross + 0.01 * (gross - abs(sum(leg.exposure for leg in group)))
            limit = self.asset(name).concentration_limit
            if limit is not None and gross / self.prices[name] > limit:
                concentration += 0.10 * width * gross * (math.sqrt(gross / self.prices[name] / limit) - 1)
        directional = both_ways = 0.0
        for a in groups:
            for b in groups:
                stress = correlation(STRESS, 0.80, a, b)
                hedge = correlation(HEDGE, 0.40, a, b)
                directional += (stress if d[a] * d[b] >= 0 else hedge) * d[a] * d[b]
                both_ways += stress * n[a] * n[b]
        return {
            "joint": math.sqrt(max(0.0, directional)) + math.sqrt(max(0.0, both_ways)),
            "parallel": max(0.0, -min(together)),
            "floor": floor,
            "concentration": concentration,
        }


def by_underlying(legs: Iterable[Leg]) -> dict[str, list[Leg]]:
    groups: dict[str, list[Leg]] = {}
    for leg in legs:
        groups.setdefault(leg.underlying, []).append(leg)
    return groups


def nearest_root(surplus: Callable[[float], float], steps: int = 60) -> float | None:
    """Return the move nearest to none at which the sign changes: a walk outwards, then bisection."""
    found = []
    for edge in (math.log(1e-6), math.log(1001.0)):
        walk = [math.expm1(edge * (k / steps) ** 2) for k in range(steps + 1)]
        values = [surplus(0.0)]
        for near, far in itertools.pairwise(walk):
            values.append(surplus(far))
            if (values[-1] < 0) != (values[-2] < 0):
                found.append(bisected(surplus, near, far))
                break
    return min(found, key=abs) if found else None


def bisected(surplus: Callable[[float], float], near: float, far: float) -> float:
    sign = surplus(near) < 0
    for _ in range(90):
        middle = (near + far) / 2
        if (surplus(middle) < 0) == sign:
            near = middle
        else:
            far = middle
    return (near + far) / 2
