"""Figures of the whole service: taken from the database by one process at a time, shown by every process.

Each kind is a row. Whoever finds one that is old enough takes it anew, under the row's lock; the others pass by and
read what it wrote. So they are the same in every process, right after any of them was killed, and a scrape costs no
query. They need no worker: that one is missing is among the things to be seen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Double, Text, bindparam, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import SQLAlchemyError

from app.db.session import Database, Tx
from app.db.tables import service_figures
from app.errors import DatabaseUnavailableError

log = logging.getLogger(__name__)

Values = Mapping[str, Any]

REST = 10.0
"""A kind is left alone for so many times as long as it took last: it never costs more than a tenth of a core."""
RETRY_SECONDS = 30.0
"""How long a kind is left alone after a fault of ours."""
NAMED_MAX = 100
"""Values of a label that comes from the database, such as assets."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One kind: how often it is taken, how, given what was taken before, and the series that show it.

    `show` is given the values and the database's time.
    """

    name: str
    every_seconds: float
    take: Callable[[Tx, Values], Awaitable[Values]]
    show: Callable[[Values, datetime], Iterable[Metric]]


@dataclass(frozen=True, slots=True)
class Taken:
    """Values of a kind, when they were taken, and how long that took."""

    taken_at: datetime
    seconds: float
    values: Values


_PLACE = text(
    """
    INSERT INTO service_figures (name, taken_at, seconds, figures) VALUES (:name, 'epoch', 0, '{}')
    ON CONFLICT (name) DO NOTHING
    """
)
_CLAIM = text(
    """
    SELECT figures FROM service_figures
    WHERE name = :name AND taken_at + make_interval(secs => greatest(:every, :rest * seconds)) <= now()
    FOR UPDATE SKIP LOCKED
    """
).bindparams(bindparam("every", type_=Double), bindparam("rest", type_=Double))
_STORE = text(
    "UPDATE service_figures SET taken_at = now(), seconds = :seconds, figures = :figures WHERE name = :name"
).bindparams(bindparam("seconds", type_=Double), bindparam("figures", type_=JSONB), bindparam("name", type_=Text))


class Keeper(Collector):
    """Keeps the figures of a process up to date, and gives them to its registry. Collecting reads memory alone."""

    def __init__(
        self, database: Database, kinds: Sequence[Figure], poll_seconds: float, registry: CollectorRegistry
    ) -> None:
        self._database = database
        self._kinds = kinds
        self._poll_seconds = poll_seconds
        self._known: Mapping[str, Taken] = {}
        self._again_at: dict[str, float] = {}
        self.failures = Counter(
            "primerisk_figure_failures_total",
            "Figures of the service that a fault of ours kept from being taken; the log says why.",
            registry=registry,
        )
        registry.register(self)

    async def run(self) -> None:
        """Keep them for ever; through an outage the last ones stand, and their age tells."""
        while True:
            try:
                await self.round()
            except (DatabaseUnavailableError, SQLAlchemyError) as error:
                log.debug("the service's figures can't be read: %s", type(error).__name__)
            except Exception:  # else this process would show the same ones for ever
                self.failures.inc()
                log.exception("the service's figures can't be read")
            await asyncio.sleep(self._poll_seconds)

    async def round(self) -> None:
        """Take what is due and nobody else is taking, then read all. Raises DatabaseUnavailableError."""
        known = await self._read()
        if missing := [kind.name for kind in self._kinds if kind.name not in known]:
            async with self._database.transaction("figures") as tx:
                await tx.connection.execute(_PLACE, [{"name": name} for name in missing])
        due = [kind for kind in self._kinds if self._is_due(kind, known.get(kind.name))]
        for kind in due:
            await self._take_unless_it_fails(kind)
        self._known = await self._read() if due else known

    def _is_due(self, kind: Figure, taken: Taken | None) -> bool:
        """Tell whether it is worth asking for; `_CLAIM` says the same under the lock."""
        if time.monotonic() < self._again_at.get(kind.name, 0.0):
            return False
        rest = 0.0 if taken is None else max(kind.every_seconds, REST * taken.seconds)
        return taken is None or (self._database.clock.now() - taken.taken_at).total_seconds() >= rest

    async def _take_unless_it_fails(self, kind: Figure) -> None:
        """Take a kind; one that can't be taken, or takes longer than a statement may, keeps no other from it."""
        try:
            await self._take(kind)
        except Exception as error:
            if isinstance(error, DatabaseUnavailableError) and error.code == "database_unavailable":
                raise
            self.failures.inc()
            log.exception("the figures of %s can't be taken", kind.name)
            self._again_at[kind.name] = time.monotonic() + RETRY_SECONDS

    async def _take(self, kind: Figure) -> None:
        async with self._database.transaction("figures") as tx:
            asked = {"name": kind.name, "every": kind.every_seconds, "rest": REST}
            row = (await tx.connection.execute(_CLAIM, asked)).first()
            if row is None:
                return
            started = time.perf_counter()
            values = await kind.take(tx, row.figures)
            stored = {"name": kind.name, "seconds": time.perf_counter() - started, "figures": values}
            await tx.connection.execute(_STORE, stored)

    async def _read(self) -> dict[str, Taken]:
        columns = service_figures.c
        async with self._database.transaction("figures") as tx:
            rows = await tx.connection.execute(select(columns.name, columns.taken_at, columns.seconds, columns.figures))
            return {name: Taken(taken_at, seconds, values) for name, taken_at, seconds, values in rows}

    def values(self, name: str) -> Values:
        """Return the values of a kind that are shown now, empty before the first."""
        taken = self._known.get(name)
        return {} if taken is None else taken.values

    def describe(self) -> Iterable[Metric]:
        """Name nothing ahead: the registry need not collect to register."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Give every kind's series, and how old and how dear each kind is."""
        known = self._known
        age = GaugeMetricFamily(
            "primerisk_figures_age_seconds", "Age of the service's figures, by kind.", labels=["figures"]
        )
        took = GaugeMetricFamily(
            "primerisk_figures_seconds", "Time that the service's figures took when last taken, by kind.",
            labels=["figures"],
        )  # fmt: skip
        now = self._database.clock.now() if known else None
        for kind in self._kinds:
            taken = known.get(kind.name)
            if now is None or taken is None or not taken.values:  # never taken yet
                continue
            shown = self._shown(kind, taken.values, now)
            if shown:
                age.add_metric([kind.name], max(0.0, (now - taken.taken_at).total_seconds()))
                took.add_metric([kind.name], taken.seconds)
            yield from shown
        yield from (age, took)

    def _shown(self, kind: Figure, values: Values, now: datetime) -> list[Metric]:
        """Return a kind's series; none where another release took it and means something else: the others are shown."""
        try:
            return list(kind.show(values, now))
        except Exception:
            self.failures.inc()
            log.exception("the figures of %s can't be shown", kind.name)
            return []


def gauge(name: str, help_text: str, value: float | Mapping[str, float], label: str | None = None) -> GaugeMetricFamily:
    """Return a gauge of one value, or of a value for each of a few values of a label."""
    if not isinstance(value, Mapping):
        return GaugeMetricFamily(name, help_text, value=value)
    family = GaugeMetricFamily(name, help_text, labels=[label or ""])
    for of in sorted(value):
        family.add_metric([of], value[of])
    return family


def earliest(moments: Iterable[datetime | None]) -> float | None:
    """Return the earliest of some moments as Unix time, none where there is none."""
    return min((moment.timestamp() for moment in moments if moment is not None), default=None)


def seconds_since(moment: float | None, now: datetime) -> float:
    """Return the seconds since a moment of Unix time; 0 for none, and for one to come."""
    return 0.0 if moment is None else max(0.0, now.timestamp() - moment)
