"""A file of daily closes: read, imported with a progress bar, and what came of it said in words."""

from __future__ import annotations

import csv
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from app.db.session import Tx
from app.domain.closes import Close, Gap
from app.errors import StartupError
from app.keeping import prepared
from app.services import closes
from app.services.closes import CLOSES_A_POST_MAX, Finding
from app.settings import Settings

LINES_SHOWN_MAX = 50
LONG = {"asset", "date", "close"}


@dataclass(slots=True)
class Tally:
    """What an import came to so far, by asset."""

    stored: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    posted: Counter[str] = field(default_factory=Counter)
    flagged: list[Finding] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)


def read_closes(path: Path) -> list[Close]:
    """Return the closes of a CSV file, by asset and day.

    Wide, with a column `date` and one for each asset, where an empty cell is no close; or long, with the columns
    `asset`, `date` and `close`. Raises StartupError, which names the line, for anything else.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = list(_rows(csv.reader(file, strict=True), path))
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise StartupError(f"{path}: it is no CSV file in UTF-8 ({error})") from None
    by_day: dict[tuple[str, date], Close] = {}
    for close in found:
        if (other := by_day.setdefault((close.asset, close.day), close)) is not close:
            raise StartupError(f"{path}: {close.asset} has {close.day} twice, at {other.close} and at {close.close}")
    return [by_day[key] for key in sorted(by_day)]


def _rows(lines: Iterator[list[str]], path: Path) -> Iterator[Close]:
    header = [name.strip() for name in next(lines, [])]
    lowered = [name.lower() for name in header]
    if len(set(lowered)) < len(header) or "date" not in lowered or len(header) < 2:
        raise StartupError(f"{path}: the first line names the columns: date and assets, or asset, date and close")
    is_long = set(lowered) == LONG
    at = {name: k for k, name in enumerate(lowered)}
    for number, cells in enumerate(lines, 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise StartupError(f"{path}: line {number} has {len(cells)} cells instead of {len(header)}")
        day = _day(cells[at["date"]].strip(), path, number)
        if is_long:
            asset = cells[at["asset"]].strip()
            yield Close(asset, day, _price(cells[at["close"]].strip(), asset, path, number))
            continue
        for name, cell in zip(header, cells, strict=True):
            if name.lower() != "date" and cell.strip():
                yield Close(name, day, _price(cell.strip(), name, path, number))


def _day(text: str, path: Path, number: int) -> date:
    try:
        if len(text) == len("2024-12-31"):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise StartupError(f"{path}: line {number}: {text!r} is no day like 2024-12-31")


def _price(text: str, asset: str, path: Path, number: int) -> Decimal:
    try:
        price = Decimal(text)
    except InvalidOperation:
        price = Decimal("NaN")
    if not price.is_finite() or "_" in text or not text.isascii():
        raise StartupError(f"{path}: line {number}, {asset}: {text!r} is no number")
    return price


async def import_all(settings: Settings, found: Sequence[Close], *, confirm: bool) -> Tally:
    """Store daily closes, all of them or none: none where some are flagged, unless they are confirmed.

    Raises InvalidError for what is no close.
    """
    async with prepared(settings) as database, database.transaction("command-line") as tx:
        with progress() as bar:
            task = bar.add_task("closes", total=len(found))
            tally = await import_closes(tx, found, settings.close_deviations_max, lambda done: bar.advance(task, done))
        if tally.flagged and not confirm:
            await tx.connection.rollback()
        return tally


async def import_closes(tx: Tx, found: Sequence[Close], deviations_max: float, advance: Callable[[int], None]) -> Tally:
    """Store all closes in this transaction, the flagged ones too, and return what came of them, to be kept or undone.

    Raises InvalidError for what is no close.
    """
    tally = Tally()
    for start in range(0, len(found), CLOSES_A_POST_MAX):
        part = found[start : start + CLOSES_A_POST_MAX]
        examined = await closes.examine(tx, part, deviations_max)
        await closes.store(tx, examined)
        tally.stored.update(close.asset for close in examined.fresh)
        tally.changed.update(close.asset for close in examined.changed)
        tally.posted.update(close.asset for close in part)
        tally.flagged += examined.findings
        tally.gaps += examined.gaps
        advance(len(part))
    return tally


def progress() -> Progress:
    """Return a bar for standard error, shown where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def print_tally(tally: Tally, *, kept: bool) -> None:
    """Print what was stored by asset, then the gaps and what is flagged."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    flagged = Counter(finding.asset for finding in tally.flagged)
    gaps: defaultdict[str, int] = defaultdict(int)
    for gap in tally.gaps:
        gaps[gap.asset] += gap.days
    table = Table(
        "asset", *("stored" if kept else "to store", "changed", "unchanged", "flagged", "days missing"), box=None
    )
    for asset, posted in sorted(tally.posted.items()):
        stored, changed = tally.stored[asset], tally.changed[asset]
        figures = (stored, changed, posted - stored - changed, flagged[asset], gaps[asset])
        table.add_row(asset, *(f"{figure:,}" for figure in figures))
    console.print(table)
    lines = [f"{gap.asset}: no close from {gap.first} to {gap.last}" for gap in tally.gaps]
    lines += [f"{finding.code}: {finding.detail}" for finding in tally.flagged]
    for line in lines[:LINES_SHOWN_MAX]:
        console.print(line, markup=False)
    if len(lines) > LINES_SHOWN_MAX:
        console.print(f"and {len(lines) - LINES_SHOWN_MAX} more")
