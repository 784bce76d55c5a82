"""The report's pictures. Importing it loads matplotlib: only who draws does.

Colours are names of the page's theme (`svg.COLOURS`), text stays text, and nothing depends on time or place.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from app.domain.black76 import Floats
from app.report.svg import COLOURS, inlined
from app.report.words import short

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

WIDTH, NARROW, COLUMN = 9.6, 5.7, 0.95
"""Inches of a picture as wide as the page, of one beside a table, and of a heat map's column at most."""
BINS = 60
TRIMMED = 0.001
"""The share of outcomes on either side that lies outside the histogram."""
STEPS = 5
APART = 0.12
"""The gap before the columns of a heat map that stand off, in columns."""
CROWDED = 110
"""Characters of a heat map's column heads from which they are turned."""
LABEL_CHARACTERS_MAX = 26
_PLAIN = re.compile(r"[^A-Za-z0-9 ._:/+%,=()−–½×·%'-]")

_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["ink"],
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
_turn = threading.Lock()
"""matplotlib draws one picture at a time: its settings and its fonts are the process's."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A picture's name among the page's, its title, and what it shows in words."""

    name: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its label, its value (None: there is none, `note` says why), what stands at its end."""

    label: str
    value: float | None
    note: str
    colour: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across a histogram."""

    label: str
    at: float
    colour: str
    dashed: bool


def _drawn(caption: Caption, width: float, height: float, draw: Callable[[Axes], None]) -> str:
    """Return the picture that `draw` makes on one pair of axes."""
    style: dict[RcKeyType, Any] = {**_STYLE, "svg.hashsalt": caption.name}
    with _turn, mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return inlined(out.getvalue(), caption.name, caption.title, caption.text)


def label(text: str) -> str:
    """Return a name as a picture shows it: cut, and only in letters that every font has."""
    plain = _PLAIN.sub("?", text)
    return plain if len(plain) <= LABEL_CHARACTERS_MAX else plain[: LABEL_CHARACTERS_MAX - 3] + "..."


def distribution(caption: Caption, pnl: Floats, marks: Sequence[Mark]) -> str:
    """Return the histogram of a profit and loss (T,) with lines across it; the outermost .1 % are not in it."""

    def draw(axes: Axes) -> None:
        low, high = np.quantile(pnl, (TRIMMED, 1.0 - TRIMMED)).tolist()
        low, high = min([low, *(mark.at for mark in marks)]), max(high, 0.0)
        margin = 0.02 * (high - low) or 1.0
        counts, edges = np.histogram(pnl, bins=BINS, range=(low - margin, high + margin))
        colours = [COLOURS["loss-4" if edge < 0.0 else "gain-4"] for edge in (edges[:-1] + edges[1:]).tolist()]
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, linewidth=0)
        top = max(1.0, float(counts.max()))
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0.0, top * (1.06 + 0.11 * len(marks))), yticks=[])
        axes.spines["left"].set_visible(False)
        for k, mark in enumerate(marks):
            height = top * (1.06 + 0.11 * (len(marks) - 1 - k))
            _mark(axes, mark, height, right=mark.at < edges[0] + 0.6 * (edges[-1] - edges[0]))
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.set_xlabel("profit and loss of a day, USD")

    return _drawn(caption, WIDTH, 3.5, draw)


def _mark(axes: Axes, mark: Mark, height: float, *, right: bool) -> None:
    """Draw a line up to a height and its label at the top, to the right or to the left of it."""
    style = (0, (3, 2)) if mark.dashed else "-"
    axes.plot([mark.at, mark.at], [0.0, height], color=COLOURS[mark.colour], linestyle=style, linewidth=1.3)
    axes.annotate(
        mark.label, (mark.at, height), (5 if right else -5, 0), textcoords="offset points",
        ha="left" if right else "right", va="center", color=COLOURS[mark.colour], fontsize=8.5, in_layout=False,
    )  # fmt: skip


def bars(
    caption: Caption, rows: Sequence[Bar], unit: str, limits: tuple[float, float] | None = None, others: int = 0
) -> str:
    """Return horizontal bars, first on top, each with its note at its end; bars past `limits` are cut there.

    Without limits they reach as far as the longest but for the last `others`, which stand for many: past it these are
    cut, pale, and say so.
    """

    def draw(axes: Axes) -> None:
        values = [row.value or 0.0 for row in rows]
        low, high = limits or _span(values[: len(values) - others] or values)
        shown = np.clip(values, low, high).tolist()
        places = list(range(len(rows)))
        cut = [limits is None and at != value for at, value in zip(shown, values, strict=True)]
        colours = [COLOURS["line" if short_of else row.colour] for row, short_of in zip(rows, cut, strict=True)]
        axes.barh(places, shown, height=0.66, color=colours, linewidth=0)
        axes.axvline(0.0, color=COLOURS["muted"], linewidth=0.8)
        axes.set_yticks(places, [label(row.label) for row in rows])
        # room for the notes on both sides
        room = 0.2 * (high - low)
        axes.set(xlim=(low - room, high + room), ylim=(len(rows) - 0.4, -0.6), xlabel=unit)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        for place, row, at, short_of in zip(places, rows, shown, cut, strict=True):
            side = -1 if at < 0.0 else 1
            note = f"{row.note}, cut" if short_of else row.note
            axes.annotate(
                note, (at, place), (4 * side, 0), textcoords="offset points", fontsize=8,
                ha="right" if side < 0 else "left", va="center", color=COLOURS["muted"], in_layout=False,
            )  # fmt: skip
        axes.xaxis.set_major_formatter(
            (lambda value, _: f"{value:+.0%}") if limits else (lambda value, _: short(value))
        )
        if limits:
            axes.set_xticks(np.linspace(low, high, 9))

    return _drawn(caption, WIDTH if limits else NARROW, 0.75 + 0.235 * len(rows), draw)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    return (low, high) if high > low else (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Cells:
    """A table in colour: `values` (R, C) and what stands in each cell.

    `set_apart` columns at the end stand off, a rule lies above each row of `rules`, `slanted` cells are in italics;
    `gain` names the colours of what is above zero.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Floats
    texts: Sequence[Sequence[str]]
    row_height: float = 0.25
    set_apart: int = 0
    rules: Sequence[int] = ()
    slanted: Sequence[Sequence[bool]] = ()
    gain: str = "gain"


def heat_map(caption: Caption, cells: Cells, largest: float) -> str:
    """Return the cells in eleven colours from -largest (loss) to largest (gain), 0 between."""
    height, width = cells.values.shape
    # where each column begins
    lefts = [k + (APART if k >= width - cells.set_apart else 0.0) for k in range(width)]

    def draw(axes: Axes) -> None:
        for i in range(height):
            for k, left in enumerate(lefts):
                _cell(axes, cells, (i, k), left, largest)
        for rule in cells.rules:
            axes.axhline(rule, color=COLOURS["muted"], linewidth=0.8)
        names = [label(name) for name in cells.columns]
        crowded = max(map(len, names), default=0) * width > CROWDED
        centres = [left + 0.5 for left in lefts]
        axes.set_xticks(centres, names, rotation=40 if crowded else 0, ha="left" if crowded else "center")
        axes.set_yticks([i + 0.5 for i in range(height)], [label(name) for name in cells.rows])
        axes.xaxis.tick_top()
        axes.tick_params(axis="x", labelcolor=COLOURS["ink"])
        axes.set(xlim=(0.0, lefts[-1] + 1.0), ylim=(height, 0.0))
        axes.spines[:].set_visible(False)

    return _drawn(caption, min(WIDTH, 2.2 + COLUMN * width), 0.55 + cells.row_height * height, draw)


def _cell(axes: Axes, cells: Cells, at: tuple[int, int], left: float, largest: float) -> None:
    i, k = at
    colour = COLOURS[step(float(cells.values[i, k]), largest, cells.gain)]
    box = Rectangle((left, i), 1.0, 1.0, facecolor=colour, edgecolor=COLOURS["paper"], linewidth=1.0)
    # what lies within the axes takes no part in laying out, nor in finding limits: there are hundreds
    box.set_in_layout(False)
    axes.add_artist(box)
    style = "italic" if cells.slanted and cells.slanted[i][k] else "normal"
    axes.text(
        left + 0.5, i + 0.5, cells.texts[i][k], ha="center", va="center", fontsize=7.5, color=COLOURS["ink"],
        style=style, in_layout=False,
    )  # fmt: skip


def step(value: float, largest: float, gain: str = "gain") -> str:
    """Return the colour of a value: five steps each way by its size beside the largest, and one about 0."""
    share = abs(value) / largest if largest > 0.0 else 0.0
    level = min(STEPS, int(share * STEPS + 0.999)) if share > 0.005 else 0
    return "even" if level == 0 else f"{'loss' if value < 0.0 else gain}-{level}"
