"""`primerisk report`: a portfolio's risk report as a file, offline, with a progress line."""

from __future__ import annotations

import sys
import webbrowser
from datetime import date
from pathlib import Path

from rich.console import Console

from app.api.quote_request import MARGIN_QUOTE, Limits, quote_terms, quote_time
from app.db.session import system_now
from app.domain.money import to_float
from app.domain.parameters import MarketParameters
from app.errors import PrimeriskError, StartupError, one_line
from app.history import read_closes
from app.report.figures import Report, Subject, report_of
from app.report.history import Daily, daily_of
from app.report.page import page
from app.settings import Settings
from app.telemetry import package_version


def write_report(raw: bytes, history: Path | None, out: Path, seed: int, settings: Settings, *, show: bool) -> None:
    """Write the report of a request body to a file, and say what it stands on.

    Raises StartupError, one line, for a body or a history that is refused, and for a file that can't be written.
    """
    console = Console(stderr=True)
    with console.status("reading the history") as step:
        daily = daily_of({}) if history is None else read_history(history)
        try:
            step.update("margin, health, risk and stress")
            report = report_of(offline_subject(raw, daily, seed, settings))
            step.update("drawing")
            made = page(report, package_version()).encode()
        except PrimeriskError as error:
            raise StartupError(one_line(error)) from None
    try:
        out.write_bytes(made)
    except OSError as error:
        raise StartupError(f"{out}: {error.strerror}") from None
    sys.stdout.write(f"{out}: {_stands_on(report)}\n")
    if show:
        webbrowser.open(out.resolve().as_uri())


def offline_subject(raw: bytes, daily: Daily, seed: int, settings: Settings) -> Subject:
    """Return what is reported of a request body, with the package's own parameters and no stored prices."""
    body = MARGIN_QUOTE.decode(raw)
    as_of = quote_time(body, system_now())
    terms = quote_terms(body, MarketParameters(), Limits.of(settings), as_of)
    return Subject(body.name or "Portfolio", terms, {}, as_of, daily, seed)


def read_history(path: Path) -> Daily:
    """Return the daily returns of a CSV file of closes. Raises StartupError for anything else."""
    found: dict[str, dict[date, float]] = {}
    for close in read_closes(path):
        if close.close <= 0:
            raise StartupError(f"{path}: {close.asset} on {close.day} is at {close.close}: a close is above 0")
        found.setdefault(close.asset, {})[close.day] = to_float(close.close)
    return daily_of(found)


def _stands_on(report: Report) -> str:
    risk = report.risk
    if risk is None:
        return "no open positions, so no VaR"
    if risk.method == "historical":
        return f"historical VaR over {len(risk.pnl)} days, {risk.first} to {risk.last}"
    return f"Monte Carlo VaR, {risk.paths:,} paths, seed {risk.seed}; --history gives it the past"
