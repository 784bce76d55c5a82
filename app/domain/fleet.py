"""A fleet's books as one: what a master and its members hold and owe together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from app.domain.book import Book, Holding
from app.domain.health import Health, scales
from app.domain.parameters import HealthPolicy

_BUCKETS = tuple(field.name for field in fields(Holding))


def merged(master: Book, members: Sequence[Book]) -> Book:
    """Return one book of a master's and its members', under the master's settings: what offsets, nets."""
    books = (master, *members)
    holdings: dict[str, Holding] = {}
    for held in books:
        for asset, units in held.holdings.items():
            known = holdings.get(asset)
            holdings[asset] = units if known is None else _sum(known, units)
    return replace(
        master,
        holdings=holdings,
        positions=[position for held in books for position in held.positions],
        reservations=[reservation for held in books for reservation in held.reservations],
        pending=[],
        loans=(),
        delegation=None,
    )


def _sum(a: Holding, b: Holding) -> Holding:
    return Holding(**{name: getattr(a, name) + getattr(b, name) for name in _BUCKETS})


@dataclass(frozen=True, slots=True)
class Part:
    """What an account brings into its fleet's pool, USD."""

    equity: float = 0.0
    required_initial: float = 0.0
    required_maintenance: float = 0.0

    @classmethod
    def of(cls, health: Health, *, leveraged: bool) -> Part:
        """Return an account's part: its equity and what it needs of that; of one with nothing at stake, what is free.

        What is set aside by who owes nobody backs nothing else, and needs no more. Equity below zero counts as none:
        the loss is where it is, and no other member's to make good.
        """
        if leveraged and health.required_initial > 0.0:
            return cls(max(0.0, health.equity), health.required_initial, health.required_maintenance)
        return cls(equity=max(0.0, health.equity - health.required_initial))

    def __add__(self, other: Part) -> Part:
        """Return both together."""
        return Part(
            self.equity + other.equity,
            self.required_initial + other.required_initial,
            self.required_maintenance + other.required_maintenance,
        )


def total_of(parts: Iterable[Part]) -> Part:
    """Return all parts together: of each sum one addition an account, for pools are summed slice after slice."""
    found = list(parts)
    return Part(
        sum(part.equity for part in found),
        sum(part.required_initial for part in found),
        sum(part.required_maintenance for part in found),
    )


def pool_policy(market: HealthPolicy, of_master: HealthPolicy) -> HealthPolicy:
    """Return the levels of a pool: the market's of breach, the master's own, where stricter, of cure and stop.

    No account's breach level is above the market's. So a pool that is past it has an account that is past its own, and
    whoever watches accounts has seen the pool's breach: with sums of positive numbers, R₁ + R₂ ≥ b·(E₁ + E₂) needs
    R₁ ≥ b·E₁ or R₂ ≥ b·E₂, and likewise for equity below maintenance.
    """
    return replace(of_master, breach_utilization=market.breach_utilization)


def pool_health(parts: Part, policy: HealthPolicy) -> Health:
    """Return the health of a pool: sums over its accounts, each margined by itself, so that nothing nets.

    What no sum gives (exposures, survival, bands) is left out: None, and empty.
    """
    equity, initial, maintenance = parts.equity, parts.required_initial, parts.required_maintenance
    found = scales(equity, initial, maintenance, policy)
    ratio = found.margin_ratio
    return Health(
        model="fleet",
        equity=equity,
        required_initial=initial,
        required_maintenance=maintenance,
        reserved=0.0,
        utilization=found.utilization,
        margin_ratio=ratio,
        liquidation_buffer=None if ratio is None else 1.0 - ratio,
        net_exposure_ratio=None,
        stress_survival=None,
        gross_leverage=None,
        free_margin=max(0.0, equity - initial),
        headroom=max(0.0, equity - initial / policy.target_utilization),
        shortfall=max(0.0, initial / policy.shortfall_utilization - equity),
        health_score=0.0 if ratio is None else 100.0 * min(max(1.0 - ratio, 0.0), 1.0),
        insolvent=found.insolvent,
        zone=found.zone,
        alert_level=found.alert_level,
        status=found.status,
    )
