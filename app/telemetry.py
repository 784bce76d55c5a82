"""Metrics and logs of a process, and whom its work concerns. Labels are bounded: never an agent or a key."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

disable_created_metrics()  # type: ignore[no-untyped-call]  # a third of a scrape, and read by nobody

_QUOTED = re.compile(r"(DETAIL: +).*")
_NOBODY: Mapping[str, str] = {}

request_id: ContextVar[str] = ContextVar("request_id", default="")
concerned: ContextVar[Mapping[str, str]] = ContextVar("concerned", default=_NOBODY)
"""Whom the work under way concerns, by name: `agent_id`, `margin_call_id`. Every line of the log carries it."""

_FAST_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Fewer, since each route has them all: they are most of a scrape."""
_CALL_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_ORDER_RESULTS = ("filled", "pending", "refused")
_ATTEMPT_RESULTS = ("delivered", "refused", "timeout", "unreachable", "blocked")
_LOAN_EVENTS = ("loan.collateral_low", "loan.recalled", "loan.liquidated")
_ESCROW_EVENTS = ("funded", "accepted", "disputed", "released", "refunded", "cancelled", "resolved")
_RUN_OUTCOMES = ("settled", "defaulted")
_ZONES = ("GREEN", "YELLOW", "ORANGE", "RED")
_POSITIONS = (0, 1, 3, 10, 30, 100, 300, 1_000, 3_000, 5_000)


@contextlib.contextmanager
def concerning(**names: str) -> Iterator[None]:
    """Have the log say whom the work concerns that is done meanwhile."""
    token = concerned.set({**concerned.get(), **names})
    try:
        yield
    finally:
        concerned.reset(token)


def note(**names: str) -> None:
    """Have the log say from now on whom this request or decision concerns; its `concerning` ends it."""
    concerned.set({**concerned.get(), **names})


def package_version() -> str:
    """Return the installed version, or 0 where the package runs from a bare tree."""
    try:
        return version("primerisk")
    except PackageNotFoundError:
        return "0"


class Metrics:
    """Every series of one process, on a registry of its own so that tests may make many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._of_requests()
        self._of_quotes()
        self._of_books()
        self._of_webhooks()
        self._of_contracts()
        self._of_the_process()
        Info("primerisk_build", "Version of the service.", registry=self.registry).info({"version": package_version()})

    def _of_the_process(self) -> None:
        self.database_up = Gauge(
            "primerisk_database_up", "1 when the database answered last, else 0.", registry=self.registry
        )
        self.database_connections = Gauge(
            "primerisk_database_connections",
            "Connections of this process to the database, by pool and by whether they are in use.",
            ("pool", "state"),
            registry=self.registry,
        )
        self.limits = Gauge(
            "primerisk_limit",
            "Limits of this process, by name: what a figure is to be held against.",
            ("limit",),
            registry=self.registry,
        )

    def begin_events(self, events: Iterable[str]) -> None:
        """Show the events of margin calls and liquidations from zero on."""
        _begin(self.margin_events, events)

    def show_limits(self, limits: Mapping[str, float]) -> None:
        """Show limits, so that a dashboard and an alert know them."""
        for name, value in limits.items():
            self.limits.labels(name).set(value)

    def show_connections(self, read: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        """Show the connections that `read` finds by pool and state, at each scrape."""
        for pool, state in read():
            shown = self.database_connections.labels(pool, state)
            shown.set_function(lambda key=(pool, state): read()[key])  # type: ignore[misc]

    def _of_requests(self) -> None:
        self.requests = Counter(
            "primerisk_http_requests_total",
            "Requests by method, route template and status.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "primerisk_http_request_duration_seconds",
            "Time from the first byte in to the last byte out, by route template.",
            ("route",),
            buckets=_REQUEST_SECONDS,
            registry=self.registry,
        )
        self.requests_under_way = Gauge(
            "primerisk_http_requests_under_way", "Requests being answered now.", registry=self.registry
        )
        self.idempotent_replays = Counter(
            "primerisk_idempotent_replays_total",
            "Requests answered again from their Idempotency-Key.",
            registry=self.registry,
        )
        self.event_streams = Gauge("primerisk_event_streams", "Event streams that are open.", registry=self.registry)

    def _of_quotes(self) -> None:
        self.quote_seconds = Histogram(
            "primerisk_quote_core_seconds",
            "Time of the risk core for one quote, by kind, without decoding and encoding.",
            ("kind",),
            buckets=_FAST_SECONDS,
            registry=self.registry,
        )
        self.quote_positions = Histogram(
            "primerisk_quote_positions",
            "Positions of quoted portfolios, by kind.",
            ("kind",),
            buckets=_POSITIONS,
            registry=self.registry,
        )
        # looked up once: the label takes as long as the observation
        self.margin_quote_seconds = self.quote_seconds.labels("margin")
        self.margin_quote_positions = self.quote_positions.labels("margin")
        self.market_age_seconds = Gauge(
            "primerisk_market_snapshot_age_seconds",
            "Age of this process's copy of prices and parameters.",
            registry=self.registry,
        )
        self.market_version = Gauge(
            "primerisk_market_version", "Version of the parameters in use.", registry=self.registry
        )

    def _of_books(self) -> None:
        self.orders = Counter("primerisk_orders_total", "Orders by result.", ("result",), registry=self.registry)
        _begin(self.orders, _ORDER_RESULTS)
        self.margin_events = Counter(
            "primerisk_margin_events_total",
            "Margin calls and liquidations by event.",
            ("event",),
            registry=self.registry,
        )
        self.price_to_call_seconds = Histogram(
            "primerisk_price_to_call_seconds",
            "Time from the arrival of the newest price that an account depends on to its margin call's being written.",
            buckets=_CALL_SECONDS,
            registry=self.registry,
        )
        self.liquidations_escalated = Counter(
            "primerisk_liquidations_escalated_total",
            "Requests to a venue past the number after which an operator has to look.",
            registry=self.registry,
        )
        self.decision_seconds = Histogram(
            "primerisk_decision_seconds",
            "Time of one decision on an account, with its transaction.",
            buckets=_FAST_SECONDS,
            registry=self.registry,
        )
        self.decision_failures = Counter(
            "primerisk_decision_failures_total",
            "Decisions that a fault of ours prevented; the account is tried again, and the log says why.",
            registry=self.registry,
        )
        self.agenda = Gauge("primerisk_decisions_waiting", "Accounts that wait for a decision.", registry=self.registry)
        self.screen_shards = Gauge(
            "primerisk_screen_shards", "Shards of the accounts that this process screens.", registry=self.registry
        )
        self.account_snapshots = Counter(
            "primerisk_account_snapshots_total",
            "Daily snapshots of accounts that were written.",
            registry=self.registry,
        )
        self.screen_seconds = Histogram(
            "primerisk_screen_seconds",
            "Time of one look of the screen, with what it reads.",
            buckets=_FAST_SECONDS,
            registry=self.registry,
        )
        self.worker_beat = Gauge(
            "primerisk_worker_heartbeat_timestamp_seconds",
            "When the worker of this process last told that it lives, Unix time; 0: there is none.",
            registry=self.registry,
        )

    def _of_contracts(self) -> None:
        """Count what becomes of loans, contracts and fleets; what is open of them is in `services/figures`."""
        self.loan_events = Counter(
            "primerisk_loan_events_total",
            "What became of loans by themselves, by event.",
            ("event",),
            registry=self.registry,
        )
        self.escrow_events = Counter(
            "primerisk_escrow_events_total",
            "Escrows by what became of them: funded, accepted, disputed, released, refunded, cancelled, resolved.",
            ("event",),
            registry=self.registry,
        )
        self.netting_runs = Counter(
            "primerisk_netting_runs_total",
            "Runs of netting agreements by outcome: settled, defaulted.",
            ("outcome",),
            registry=self.registry,
        )
        self.netting_movements_saved = Counter(
            "primerisk_netting_movements_saved_total",
            "Payments that netting has spared: obligations settled less net movements.",
            registry=self.registry,
        )
        self.netting_fees_saved = Counter(
            "primerisk_netting_fees_saved_usd_total",
            "Fees that netting has spared against each obligation by itself, USD at the prices of the run.",
            registry=self.registry,
        )
        self.fleet_zone_changes = Counter(
            "primerisk_fleet_zone_changes_total",
            "Fleets that came into a zone, as it was told.",
            ("zone",),
            registry=self.registry,
        )
        self.fleet_look_seconds = Histogram(
            "primerisk_fleet_look_seconds",
            "Time of one look at the fleets of a worker.",
            buckets=_FAST_SECONDS,
            registry=self.registry,
        )
        self.fleet_top_ups = Counter(
            "primerisk_fleet_top_ups_total",
            "Members in breach that their fleet stood by with more of their delegation.",
            registry=self.registry,
        )
        self.fleet_drift_failures = Counter(
            "primerisk_fleet_drift_failures_total",
            "Fleets whose drift can't be computed, each counted once until it can; the log says why.",
            registry=self.registry,
        )
        self.clearing_failures = Counter(
            "primerisk_clearing_failures_total",
            "Time-outs and cut-offs that a fault of ours prevented; they are tried again, and the log says why.",
            registry=self.registry,
        )
        _begin(self.loan_events, _LOAN_EVENTS)
        _begin(self.escrow_events, _ESCROW_EVENTS)
        _begin(self.netting_runs, _RUN_OUTCOMES)
        _begin(self.fleet_zone_changes, _ZONES)

    def _of_webhooks(self) -> None:
        self.webhook_attempts = Counter(
            "primerisk_webhook_attempts_total",
            "Attempts to deliver a webhook by result: delivered, refused, timeout, unreachable, blocked.",
            ("result",),
            registry=self.registry,
        )
        self.webhook_faults = Counter(
            "primerisk_webhook_faults_total",
            "Faults of the delivery itself: something was not claimed, sent, recorded or tidied up.",
            registry=self.registry,
        )
        _begin(self.webhook_attempts, _ATTEMPT_RESULTS)


def _begin(counter: Counter, values: Iterable[str]) -> None:
    """Show a counter's series from zero on: else its first increase is not seen as one."""
    for value in values:
        counter.labels(value)


def _withheld(text: str) -> str:
    """Return a text without what Postgres quotes of rows that it refuses: they hold secrets."""
    return _QUOTED.sub(r"\1(withheld)", text)


class TextFormatter(logging.Formatter):
    """A line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return _withheld(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the ids of the request, and of the agent and the call that it concerns."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a JSON line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _withheld(record.getMessage()),
        }
        if identifier := request_id.get():
            line["request_id"] = identifier
        line |= concerned.get()
        if record.exc_info:
            line["exception"] = _withheld(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def configure_logging(level: str, form: str) -> None:
    """Send logs of this process to standard error, as JSON lines or as text for people."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # at debug it would write statements with their values, secrets among them
    logging.getLogger("sqlalchemy").setLevel(logging.WARNING)
    # it says on each look at the revision that it looked
    logging.getLogger("alembic").setLevel(logging.WARNING)
