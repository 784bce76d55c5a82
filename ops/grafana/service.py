"""The service itself: requests, errors, timings, room, workers, figures."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from ops.grafana.panels import board, figure, graph, quantiles, row, stacked


def dashboard() -> Dashboard:
    """Return the dashboard of the service."""
    made = board("primerisk: service", "service", "Rate, errors and duration of requests; room; workers; the database.")
    for part in (_now, _requests, _work, _room):
        made = part(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    errors = 'sum(rate(primerisk_http_requests_total{status=~"5.."}[5m])) or vector(0)'
    return (
        made.with_row(row("Now"))
        .with_panel(figure("Processes", "Targets that answer.", "short", 'sum(up{job=~"primerisk.*"})'))
        .with_panel(
            figure("Requests", "A second, of all processes.", "reqps", "sum(rate(primerisk_http_requests_total[5m]))")
        )
        .with_panel(figure("Errors", "Answers of status 5xx a second.", "reqps", errors, 0.01, 1.0))
        .with_panel(
            figure(
                "Worker seen", "Time since any worker was seen.", "s", "min(primerisk_worker_seen_seconds)", 3.0, 10.0
            )
        )
        .with_panel(
            figure(
                "Unwatched shards",
                "Shares of the accounts that no worker screens.",
                "short",
                'min(primerisk_shards{state="free"})',
                1.0,
                8.0,
            )
        )
        .with_panel(
            figure(
                "Ledger off",
                "Units by which balances differ from their entries: 0, or something is broken.",
                "short",
                "max(primerisk_ledger_imbalance)",
                alarm=1e-18,
            )
        )
    )


def _requests(made: Dashboard) -> Dashboard:
    return (
        made.with_row(row("Requests"))
        .with_panel(
            graph(
                "Rate by route",
                "Answers a second.",
                "reqps",
                {"{{route}}": "sum by (route) (rate(primerisk_http_requests_total[$__rate_interval]))"},
            )
        )
        .with_panel(
            graph(
                "Answers by status",
                "Answers a second.",
                "reqps",
                {"{{status}}": "sum by (status) (rate(primerisk_http_requests_total[$__rate_interval]))"},
            )
        )
        .with_panel(
            graph(
                "Duration by route, p99",
                "From the first byte in to the last byte out.",
                "s",
                quantiles("primerisk_http_request_duration_seconds", "route", 0.99),
            )
        )
        .with_panel(
            graph(
                "Risk core",
                "Time of the risk core for one quote, by kind.",
                "s",
                quantiles("primerisk_quote_core_seconds", "kind", 0.5, 0.99),
            )
        )
        .with_panel(
            graph(
                "Positions quoted",
                "The median, by kind of quote.",
                "short",
                quantiles("primerisk_quote_positions", "kind", 0.5),
            )
        )
        .with_panel(
            graph(
                "Replays and streams",
                "Requests answered again from their Idempotency-Key, a second; event streams that are open.",
                "short",
                {
                    "replays/s": "sum(rate(primerisk_idempotent_replays_total[$__rate_interval]))",
                    "streams": "sum(primerisk_event_streams)",
                },
            )
        )
    )


def _work(made: Dashboard) -> Dashboard:
    return (
        made.with_row(row("Workers"))
        .with_panel(
            graph(
                "Screen and decisions",
                "Time of one look at all accounts, and of one decision with its transaction.",
                "s",
                {
                    f"{what} {legend}": expression
                    for what, name in (("look", "primerisk_screen_seconds"), ("decision", "primerisk_decision_seconds"))
                    for legend, expression in quantiles(name).items()
                },
            )
        )
        .with_panel(
            graph(
                "Waiting and failing decisions",
                "Accounts on the agenda; decisions that a fault prevented, a second.",
                "short",
                {
                    "waiting": "sum(primerisk_decisions_waiting)",
                    "failures/s": "sum(rate(primerisk_decision_failures_total[$__rate_interval]))",
                },
            )
        )
        .with_panel(
            stacked(
                "Shards by worker",
                "Shares of the accounts that each screens.",
                "short",
                {"{{instance}}": "sum by (instance) (primerisk_screen_shards) > 0"},
            )
        )
        .with_panel(
            graph(
                "Age of the figures",
                "How old what is shown of the service is, by kind.",
                "s",
                {"{{figures}}": "min by (figures) (primerisk_figures_age_seconds)"},
            )
        )
        .with_panel(
            graph(
                "Cost of the figures",
                "Time that each kind took when last taken; and failures.",
                "s",
                {
                    "{{figures}}": "max by (figures) (primerisk_figures_seconds)",
                    "failures/s": "sum(rate(primerisk_figure_failures_total[$__rate_interval]))",
                },
            )
        )
        .with_panel(
            graph(
                "Heartbeats",
                "Time since each worker told that it lives.",
                "s",
                {
                    "{{instance}}": "time() - (primerisk_worker_heartbeat_timestamp_seconds > 0)",
                },
            )
        )
    )


def _room(made: Dashboard) -> Dashboard:
    return (
        made.with_row(row("Room"))
        .with_panel(
            graph(
                "Requests under way",
                "As a share of the limit, by process.",
                "percentunit",
                {
                    "{{instance}}": "primerisk_http_requests_under_way / on (job, instance)"
                    ' primerisk_limit{limit="requests_under_way"}'
                },
            )
        )
        .with_panel(
            graph(
                "Connections to the database",
                "By pool and state, of all processes; whether each reaches it.",
                "short",
                {
                    "{{pool}} {{state}}": "sum by (pool, state) (primerisk_database_connections)",
                    "reach it": "sum(primerisk_database_up)",
                },
            )
        )
        .with_panel(
            graph("Memory", "Resident memory by process.", "bytes", {"{{instance}}": "process_resident_memory_bytes"})
        )
        .with_panel(
            graph(
                "Processor",
                "Cores in use by process.",
                "short",
                {"{{instance}}": "rate(process_cpu_seconds_total[$__rate_interval])"},
            )
        )
        .with_panel(
            graph(
                "Market in memory",
                "Age of each process's copy of prices and parameters; its version.",
                "s",
                {"{{instance}}": "primerisk_market_snapshot_age_seconds", "version": "max(primerisk_market_version)"},
            )
        )
        .with_panel(
            graph(
                "Releases",
                "Processes by version: two during an upgrade.",
                "short",
                {"{{version}}": "count by (version) (primerisk_build_info)"},
            )
        )
    )
