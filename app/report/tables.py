"""HTML out of text: whatever comes from a caller is escaped here, and nowhere else put together."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

_UNSEEN = "\N{REPLACEMENT CHARACTER}"

_LEVELS = {
    "safe": "good", "GREEN": "good", "OK": "good", "SAFE": "good",
    "warning": "warn", "YELLOW": "warn", "WARNING": "warn",
    "ORANGE": "high", "DANGER": "high",
    "breach": "bad", "critical": "bad", "RED": "bad", "EMERGENCY": "bad", "LIQUIDATION": "bad",
}  # fmt: skip
"""How each band and each place on the three scales is coloured."""


@dataclass(frozen=True, slots=True)
class Markup:
    """HTML that is well-formed and escaped."""

    html: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its caption, the heads of its columns, its rows. The first column names the row.

    The first `words` columns hold text, and so does a column headed `note`; the others hold numbers.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    words: int = 1


def escaped(text: str) -> str:
    """Return the text for HTML; what does not print, or would turn the line around, is shown as unknown."""
    return html.escape("".join(c if c.isprintable() else _UNSEEN for c in text))


def level(word: str) -> Markup:
    """Return a band or a place on a scale, coloured as good as it is."""
    return Markup(f'<span class="level {_LEVELS.get(word, "high")}">{escaped(word)}</span>')


def table_html(table: Table) -> str:
    """Return the table, which scrolls in itself where it is wider than the page."""
    heads = "".join(f'<th scope="col"{_class(k, table)}>{escaped(head)}</th>' for k, head in enumerate(table.heads))
    rows = "".join(_row(row, table) for row in table.rows)
    return (
        f'<div class="scroll"><table><caption>{escaped(table.caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Return content under a line that folds it away; it is open at first, and on paper."""
    return f"<details open><summary>{escaped(summary)}</summary>{content}</details>"


def figure(svg: str, caption: str) -> str:
    """Return a picture with the sentence that explains it."""
    return f"<figure>{svg}<figcaption>{escaped(caption)}</figcaption></figure>"


def section(name: str, title: str, *parts: str) -> str:
    """Return a section of the page, named for links."""
    body = "".join(parts)
    return (
        f'<section id="{name}" aria-labelledby="{name}-head"><h2 id="{name}-head">{escaped(title)}</h2>{body}</section>'
    )


def paragraph(text: str, kind: str = "note") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{kind}">{escaped(text)}</p>'


def _row(cells: Sequence[str | Markup], table: Table) -> str:
    found = []
    for k, cell in enumerate(cells):
        text = cell.html if isinstance(cell, Markup) else escaped(cell)
        tag = 'th scope="row"' if k == 0 else "td"
        found.append(f"<{tag}{_class(k, table)}>{text}</{tag[:2]}>")
    return f"<tr>{''.join(found)}</tr>"


def _class(column: int, table: Table) -> str:
    return "" if column < table.words or table.heads[column] == "note" else ' class="n"'
