"""A report made of a book, and a strict reader of the page: what does not close, or closes twice, is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from html.parser import HTMLParser

import numpy as np

from app.domain.collateral import CollateralTerms
from app.domain.margin.result import MarginTerms
from app.domain.quote import QuoteTerms
from app.report.figures import Report, Subject, report_of
from app.report.history import daily_of
from app.report.page import page
from tests.domain.book import NOW, Book, columns

Closes = Mapping[str, Mapping[date, float]]

VOID = {"meta", "br", "link", "img", "input", "hr"}
FIRST = date(2024, 1, 1)


def closes(*assets: str, days: int = 300, seed: int = 7, together: float = 0.6) -> dict[str, dict[date, float]]:
    """Return closes that wander, more or less together."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0.0, 0.03, days)
    found = {}
    for asset in assets:
        moves = together * common + (1.0 - together) * rng.normal(0.0, 0.03, days)
        levels = 100.0 * np.cumprod(1.0 + moves)
        found[asset] = {FIRST + timedelta(days=k): float(level) for k, level in enumerate(levels)}
    return found


def terms_of(book: Book) -> QuoteTerms:
    """Return what the book asks for, as the service would read it."""
    return QuoteTerms(
        positions=columns(book.rows),
        margin=MarginTerms(book.parameters(), regime=book.regime),
        collateral=[CollateralTerms(h.asset, h.amount, None, h.lent) for h in book.held],
        liabilities=[CollateralTerms(h.asset, h.amount) for h in book.owed],
        margin_mode=book.mode,
        reserved=book.reserved,
        prices=book.prices,
    )


def reported(book: Book, history: Closes | None = None, *, title: str = "A book", seed: int = 1) -> Report:
    return report_of(Subject(title, terms_of(book), {}, NOW, daily_of(history or {}), seed))


def paged(book: Book, history: Closes | None = None, *, title: str = "A book", seed: int = 1) -> str:
    return page(reported(book, history, title=title, seed=seed), "1.2.3")


@dataclass
class Picture:
    """An SVG of the page: what names it, what describes it, the text in it."""

    labelled_by: tuple[str, ...]
    title: str = ""
    description: str = ""
    texts: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """What a page says. Raises AssertionError where a tag is not closed, or something else is."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[Picture] = []
        self.text: list[str] = []
        self._caption = ""
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), f"an attribute of {tag} stands twice"
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in given.items()]
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "svg":
            self.pictures.append(Picture(tuple(given.get("aria-labelledby", "").split())))
        if tag == "table":
            self._caption, self._rows = "", []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} is closed and was not opened"
        assert self.open.pop() == tag
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        inside = set(self.open)
        if "svg" in inside:
            self._in_picture(self.open[-1], data)
        elif "caption" in inside:
            self._caption += data
        elif "td" in inside or "th" in inside:
            self._rows[-1][-1] += data
        if not inside & {"style", "script"}:
            self.text.append(data)

    def _in_picture(self, tag: str, data: str) -> None:
        picture = self.pictures[-1]
        if tag == "title":
            picture.title += data
        elif tag == "desc":
            picture.description += data
        elif tag == "text":
            picture.texts.append(data)

    def table(self, start: str) -> list[dict[str, str]]:
        """Return the rows of the one table whose caption begins so, by the heads of its columns."""
        ((_, (heads, *rows)),) = [item for item in self.tables.items() if item[0].startswith(start)]
        return [dict(zip(heads, row, strict=True)) for row in rows]


def amount(cell: str) -> float:
    """Return the number that a cell shows."""
    if cell.endswith("%"):
        return float(cell[:-1].replace(",", "")) / 100.0
    return float(cell.replace(",", ""))
