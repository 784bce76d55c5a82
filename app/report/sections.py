"""The sections of the report, each a picture with its figures beside it in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.domain.black76 import Floats
from app.domain.collateral import Collateral
from app.domain.portfolio import Rows
from app.domain.quote import MarginQuote
from app.domain.stress import TWENTY_PERCENT
from app.report import pictures
from app.report.figures import GRID_PRICES, GRID_VOLS, Report, ScenarioMap, StressRow
from app.report.pictures import Bar, Caption, Cells, Mark
from app.report.risk import Believed, Risk
from app.report.tables import Markup, Table, figure, folded, level, paragraph, section, table_html
from app.report.words import NOTHING, move, number, price, scenario, short, usd

TOP = 20
COLUMNS_TOP = 7
ASSETS_TOP = 12
SCENARIOS_TOP = 40
MISSING_TOP = 2
NEAR, CLOSE = 0.10, 0.25
"""Distances to liquidation up to which a bar is red, and amber."""
QUANTILES = (0.01, 0.05, 0.25, 0.50, 0.75, 0.95, 0.99)

HELD = {"position": "", "collateral": " held", "liability": " owed"}
DAY_LOSS = "A day's profit and loss"
WHO = "Who makes the risk"


def distribution(risk: Risk) -> str:
    """Return the histogram of a day's profit and loss, with VaR and ES."""
    marks = [
        Mark(f"{word} {tail.confidence:.0%}: -{short(amount)}" if amount > 0.0 else f"{word} {tail.confidence:.0%}: 0",
             -amount, colour, dashed)
        for tail, colour in zip(risk.tails, ("warn", "loss"), strict=True)
        for word, amount, dashed in (("VaR", tail.value_at_risk, False), ("ES", tail.expected_shortfall, True))
    ]  # fmt: skip
    said = "; ".join(
        f"at {t.confidence:.0%} VaR {usd(t.value_at_risk)} and ES {usd(t.expected_shortfall)} USD" for t in risk.tails
    )
    marks.sort(key=lambda mark: mark.at)
    caption = Caption("distribution", DAY_LOSS, f"A histogram of the profit and loss of the account: {said}.")
    drawn = pictures.distribution(caption, risk.pnl, marks)
    note = (
        "VaR: the loss passed on one day in twenty (95 %), in a hundred (99 %). ES: the mean of the losses beyond it."
    )
    return section(
        "distribution", DAY_LOSS, paragraph(method(risk), "lead"), figure(drawn, note),
        '<div class="pair">', table_html(_tails(risk)), table_html(_quantiles(risk)), "</div>",
    )  # fmt: skip


def method(risk: Risk) -> str:
    """Return how the distribution was found."""
    if risk.method == "historical":
        found = f"Historical: today's account on each of {len(risk.pnl)} days from {risk.first} to {risk.last}."
    else:
        found = (
            "Monte Carlo, as history of at least 60 days in common is missing: "
            f"{risk.paths:,} paths of Student-t moves, "
            f"{risk.degrees:g} degrees of freedom, seed {risk.seed}, at the volatilities and correlations below."
        )
    left_out = f" Not modelled: {', '.join(risk.not_modelled).replace('_', ' ')}." if risk.not_modelled else ""
    return f"{found} One day ahead, of the positions and of the coins held and owed, without haircut.{left_out}"


def _tails(risk: Risk) -> Table:
    simulated = risk.method == "monte_carlo"
    heads = ["confidence", "VaR", "ES", *(["± VaR", "± ES"] if simulated else []), "normal VaR", "normal ES"]
    rows = []
    for tail, plain in zip(risk.tails, risk.parametric.tails, strict=True):
        errors = [usd(tail.var_error), usd(tail.es_error)] if simulated else []
        row = [f"{tail.confidence:.0%}", usd(tail.value_at_risk), usd(tail.expected_shortfall), *errors]
        rows.append([*row, usd(plain.value_at_risk), usd(plain.expected_shortfall)])
    return Table("Value at risk and expected shortfall, USD", heads, rows)


def _quantiles(risk: Risk) -> Table:
    found = np.quantile(risk.pnl, QUANTILES).tolist()
    rows = [["worst", usd(float(risk.pnl.min()))]]
    rows += [[f"{q:.0%}", usd(value)] for q, value in zip(QUANTILES, found, strict=True)]
    rows.append(["best", usd(float(risk.pnl.max()))])
    return Table("Quantiles of the profit and loss, USD", ["share of outcomes below", "P&L"], rows)


def components(report: Report, risk: Risk) -> str:
    """Return what each underlying and each position adds to VaR and ES."""
    book, parts = report.exposed.portfolio, risk.components
    rows = tuple(f"{s}{HELD[kind]}" for s, kind in zip(book.symbols, report.exposed.kind, strict=True))
    groups = (
        ("underlying", book.underlyings.names, book.net, parts.var_by_underlying, parts.es_by_underlying, ASSETS_TOP),
        ("position", rows, book.exposure, parts.var_by_position, parts.es_by_position, TOP),
    )
    found = []
    for what, names, exposure, var, es, count in groups:
        order, rest = top(var, count)
        order = order[np.argsort(-var[order], kind="stable")]
        columns = [_with_rest(column, order, rest) for column in (exposure, var, es)]
        labels = [*(names[i] for i in order.tolist()), *_others(rest)]
        found.append(_components(what, labels, columns, parts.confidence, others=len(labels) - len(order)))
    note = (
        f"Parts of VaR and ES at {parts.confidence:.0%}; they sum to the whole. Below zero: a hedge, which lowers it."
    )
    return section("components", WHO, paragraph(note), *found)


def _components(
    what: str, labels: Sequence[str], columns: Sequence[list[float]], confidence: float, *, others: int
) -> str:
    exposure, var, es = columns
    rows = [Bar(n, v, short(v), "accent" if v >= 0.0 else "gain-5") for n, v in zip(labels, var, strict=True)]
    title = f"Component VaR by {what}"
    caption = Caption(f"components-{what}", title, f"Bars: what each {what} adds to VaR at {confidence:.0%}, USD.")
    table = Table(
        f"{title}, USD",
        [what, "net exposure" if what == "underlying" else "exposure", f"VaR {confidence:.0%}", f"ES {confidence:.0%}"],
        [[n, usd(x), usd(v), usd(e)] for n, x, v, e in zip(labels, exposure, var, es, strict=True)],
    )
    drawn = pictures.bars(caption, rows, "USD", others=others)
    return f'<div class="beside">{figure(drawn, title)}{table_html(table)}</div>'


def scenarios(found: ScenarioMap) -> str:
    """Return profit and loss by scenario and underlying."""
    title = "Scenarios"
    if not found.underlyings:
        return section("scenarios", title, paragraph("No scenario moves anything: there are no open positions."))
    total = found.pnl.sum(axis=1)
    rows = _scenario_rows(found, total)
    order, rest = top(np.abs(found.pnl).max(axis=0), COLUMNS_TOP)
    parts = [found.pnl[:, order]] + ([found.pnl[:, rest].sum(axis=1)[:, None]] if len(rest) else [])
    values = np.concatenate([*parts, total[:, None]], axis=1)[rows]
    columns = [*(found.underlyings[j] for j in order.tolist()), *_others(rest), "total"]
    shown = [found.scenarios[i] for i in rows.tolist()]
    labels = [scenario(s) for _, s in shown]
    worst = int(np.argmin(values[:, -1]))
    caption = Caption(
        "scenarios", "Profit and loss by scenario and underlying",
        f"A heat map of {len(labels)} scenarios; the worst, {labels[worst]}, comes to {usd(values[worst, -1])} USD.",
    )  # fmt: skip
    texts = [[short(v) for v in row] for row in values.tolist()]
    breaks = [i for i in range(1, len(shown)) if shown[i][0] != shown[i - 1][0]]
    cells = Cells(labels, columns, values, texts, set_apart=1, rules=breaks)
    largest = float(np.abs(values).max())
    note = f"Red loses, green earns; the darkest is {short(largest)} USD. R: an asset's scan range."
    table = Table(
        "Profit and loss by scenario, USD", ["scenario", "set", *columns],
        [[n, name, *map(usd, row)] for n, (name, _), row in zip(labels, shown, values.tolist(), strict=True)], words=2,
    )  # fmt: skip
    drawn = pictures.heat_map(caption, cells, largest)
    told = paragraph("All positions, revalued in full; the named sets of the margin models, without their weights.")
    return section("scenarios", title, told, figure(drawn, note), folded("the figures", table_html(table)))


def _scenario_rows(found: ScenarioMap, total: Floats) -> Rows:
    """Return the scenarios that are shown, in their order: all, or of very many the worst."""
    count = len(found.scenarios)
    return np.arange(count) if count <= SCENARIOS_TOP else np.sort(np.argsort(total, kind="stable")[:SCENARIOS_TOP])


def grid(values: Floats) -> str:
    """Return profit and loss over common moves of prices and volatilities."""
    title = "Price and volatility"
    columns, rows = [f"price {p:+.0%}" for p in GRID_PRICES], [f"vol {v:+.0%}" for v in GRID_VOLS]
    worst = np.unravel_index(int(np.argmin(values)), values.shape)
    caption = Caption(
        "grid", title,
        "A heat map of the profit and loss at moves of all prices and all volatilities; the worst is "
        f"{usd(float(values.min()))} USD at {columns[int(worst[1])]}, {rows[int(worst[0])]}.",
    )  # fmt: skip
    texts = [[short(v) for v in row] for row in values.tolist()]
    largest = float(np.abs(values).max())
    drawn = pictures.heat_map(caption, Cells(rows, columns, values, texts, row_height=0.4), largest)
    table = Table(
        "Profit and loss by moves of prices and of volatilities, USD", ["volatility", *columns],
        [[n, *map(usd, row)] for n, row in zip(rows, values.tolist(), strict=True)],
    )  # fmt: skip
    note = "All prices but stablecoins' move together, and all implied volatilities; the book holds options or Greeks."
    return section("grid", title, figure(drawn, note), folded("the figures", table_html(table)))


@dataclass(frozen=True, slots=True)
class _Near:
    """Positions in one symbol with one distance: `rows` of the book."""

    symbol: str
    at: float
    there: bool
    rows: list[int]

    @property
    def label(self) -> str:
        return self.symbol if len(self.rows) == 1 else f"{self.symbol} ({len(self.rows)})"


def _nearest(quote: MarginQuote) -> list[_Near]:
    """Return what has a distance to liquidation, nearest first; positions alike are one."""
    found: dict[tuple[str, float, bool], _Near] = {}
    moves = quote.liquidation_move
    for i in np.flatnonzero(np.isfinite(moves) | (quote.breached & quote.portfolio.isolated)).tolist():
        symbol, at, there = quote.portfolio.symbols[i], float(moves[i]), bool(quote.breached[i])
        found.setdefault((symbol, round(at, 9), there), _Near(symbol, at, there, [])).rows.append(i)
    return sorted(found.values(), key=lambda near: (not near.there, abs(near.at)))


def liquidation(report: Report) -> str:
    """Return how far it is to liquidation: of all prices together, and of each position's own."""
    title = "Distance to liquidation"
    quote, book = report.quote, report.quote.portfolio
    far = quote.distances
    common = [
        _distance("all prices: breach", far.to_breach, there=far.breached),
        _distance("all prices: liquidation", far.to_liquidation, there=far.liquidatable),
    ]
    near = _nearest(quote)
    shown = near[:TOP]
    bars = [*common, *(_distance(n.label, n.at, there=n.there) for n in shown)]
    caption = Caption("liquidation", title, f"Bars: {'; '.join(f'{bar.label} {bar.note}' for bar in bars[:4])}.")
    drawn = pictures.bars(caption, bars, "move of the price", (-1.0, 1.0))
    rows = []
    for n in shown:
        mark = float(book.mark[n.rows[0]])
        moved = "breached" if n.there else move(n.at)
        rows.append([n.label, usd(float(book.exposure[n.rows].sum())), price(mark), price(mark * (1.0 + n.at)), moved])
    table = Table(
        "The positions that are nearest, each by its own underlying alone",
        ["position", "exposure", "mark", "liquidation at", "move"],
        rows,
    )
    together = Table("All prices but stablecoins' together", ["to", "move"], [[bar.label, bar.note] for bar in common])
    counted = sum(len(n.rows) for n in near)
    further, nowhere = counted - sum(len(n.rows) for n in shown), len(book) - counted
    rest = "".join(f" {n} more, {which}." for n, which in ((further, "further away"), (nowhere, "no such price")) if n)
    return section(
        "liquidation", title, figure(drawn, f"Bars end at ±100 %.{rest}"), '<div class="pair">', table_html(together),
        table_html(table) if rows else "", "</div>",
    )  # fmt: skip


def _distance(name: str, at: float | None, *, there: bool) -> Bar:
    if there:
        return Bar(name, 0.0, "there already", "loss")
    if at is None:
        return Bar(name, None, "none", "muted")
    size = abs(at)
    return Bar(name, at, move(at), "loss-5" if size < NEAR else "warn" if size < CLOSE else "accent")


def stressed(report: Report) -> str:
    """Return the account after a fall and a rise, and on the worst days and weeks of the past."""
    whole = report.subject.daily.whole
    told = (
        f"Replays are the worst days and weeks for this account between {whole.dates[0]} and {whole.dates[-1]}."
        if len(report.stress) > len(TWENTY_PERCENT)
        else "There is no daily history of what it holds, so no day of the past is replayed."
    )
    missing = sorted({name for row in report.stress for name in row.missing})
    if missing:
        told += f" Without history in some of them, so standing still: {', '.join(missing[:TOP])}."
    words = ("shock", "status", "breach")
    figures = ("P&L", "collateral", "equity after", "maintenance after", "utilization")
    rows = [_stress_row(row) for row in report.stress]
    table = Table("The whole account after each shock, USD", [*words, *figures, "note"], rows, words=len(words))
    return section("stress", "Stress", paragraph(told), table_html(table))


def _stress_row(row: StressRow) -> list[str | Markup]:
    figures = (row.pnl, row.collateral_change, row.equity, row.maintenance)
    utilization = "undefined" if row.utilization is None else f"{row.utilization:.1%}"
    breach = level("breach") if row.breached else NOTHING
    return [row.label, level(row.status), breach, *map(usd, figures), utilization, _without(row.missing)]


def _without(missing: Sequence[str]) -> str:
    """Return which assets have no history in a replay, the first few by name."""
    more = f" and {len(missing) - MISSING_TOP} more" if len(missing) > MISSING_TOP else ""
    return f"stands still: {', '.join(missing[:MISSING_TOP])}{more}" if missing else ""


def correlations(report: Report, beliefs: Believed) -> str:
    """Return the correlations that the report believes in, those marked that no history shows."""
    found, title = beliefs.covariance, "Correlations"
    order, rest = top(report.exposed.portfolio.gross, ASSETS_TOP)
    names = [found.names[j] for j in order.tolist()]
    matrix = found.correlation[np.ix_(order, order)]
    unknown = set(found.defaulted_pairs)
    marked = [[(min(a, b), max(a, b)) in unknown for b in names] for a in names]
    texts = [
        [f"{rho:.2f}{'*' if mark else ''}" for rho, mark in zip(row, marks, strict=True)]
        for row, marks in zip(matrix.tolist(), marked, strict=True)
    ]
    shown = sum(map(sum, marked)) // 2
    caption = Caption(
        "correlations", title,
        f"The correlations of {len(names)} assets; {shown} of {len(names) * (len(names) - 1) // 2} pairs are defaults.",
    )  # fmt: skip
    drawn = pictures.heat_map(caption, Cells(names, names, matrix, texts, 0.36, slanted=marked, gain="like"), 1.0)
    table = Table(
        "Correlations; * is a default", ["asset", *names], [[n, *t] for n, t in zip(names, texts, strict=True)]
    )
    left = f" {len(rest)} smaller assets are not shown." if len(rest) else ""
    note = f"{_believed(beliefs)} A pair marked * is no estimate but the parameters' default.{left}"
    return section(
        "correlations", title, paragraph(note), figure(drawn, title), folded("the figures", table_html(table))
    )


def _believed(beliefs: Believed) -> str:
    found = beliefs.covariance
    method_name = (
        "given by the parameters, for the regime" if found.method == "given" else f"the {found.method} estimate"
    )
    distance = f", repaired by {found.repair_distance:.4f}" if found.repair_distance > 0.0 else ""
    return f"Correlations are {method_name}{distance}."


def market(report: Report, beliefs: Believed) -> str:
    """Return what was taken of each underlying: its price, its volatility, its rates."""
    order, rest = top(report.exposed.portfolio.gross, TOP)
    words = ("underlying", "volatility from", "price from")
    figures = (
        "price",
        "net exposure",
        "gross exposure",
        "volatility",
        "scan range",
        "initial rate",
        "maintenance rate",
    )
    rows = [_market_row(report, beliefs, j) for j in order.tolist()]
    table = Table("What was taken of each underlying", [*words, *figures], rows, words=len(words))
    assumed = ", ".join(beliefs.assumed[:TOP]) + (" and others" if len(beliefs.assumed) > TOP else "")
    told = [
        "Volatilities are of a year.",
        f"Of {assumed} no volatility is set and too little history given: that of the most volatile listed asset is "
        "assumed."
        if assumed
        else "",
        f"{len(rest)} smaller ones are not shown." if len(rest) else "",
    ]
    return section("market", "Prices and volatilities", paragraph(" ".join(filter(None, told))), table_html(table))


def _market_row(report: Report, beliefs: Believed, j: int) -> list[str]:
    quote, found = report.quote, beliefs.covariance
    book, name = report.exposed.portfolio, found.names[j]
    asset, known = report.subject.terms.margin.parameters.asset(name), quote.prices.get(name)
    source = "parameters" if name in found.defaulted_volatilities else "history"
    return [
        name,
        "assumed" if name in beliefs.assumed else source,
        "position" if known is None else known.source,
        price(float(book.prices[j])),
        usd(float(book.net[j])),
        usd(float(book.gross[j])),
        f"{found.volatility[j]:.1%}",
        f"{book.underlyings.price_range[j]:.0%}",
        f"{asset.initial_margin_rate:.1%}",
        f"{asset.maintenance_margin_rate:.1%}",
    ]


def health(report: Report) -> str:
    """Return the bands of health, the margin models, and what backs the account."""
    quote = report.quote
    bands: list[list[str | Markup]] = [
        [name.replace("_", " "), number(b.value), level(b.band)] for name, b in quote.health.bands.items()
    ]
    models = [
        [n, usd(m.initial_margin), usd(m.maintenance_margin), f"{quote.capital_freed[n]:.1%}"]
        for n, m in quote.models.items()
    ]
    heads = ("model", "initial", "maintenance", "capital freed")
    tables = [
        Table(f"Health under {quote.health.model} margin", ["figure", "value", "band"], bands),
        Table("Margin of the whole book by model, USD", heads, models),
        *_backing(quote.collateral),
    ]
    told = [paragraph(a.detail, "advice") for a in quote.advisories]
    return section("health", "Health and margin", '<div class="pair">', *map(table_html, tables), "</div>", *told)


def _backing(held: Collateral) -> list[Table]:
    if not held.assets:
        return []
    order, rest = top(held.value, TOP)
    rows = [[held.assets[k], f"{held.amount[k]:,.8g}", usd(float(held.value[k]))] for k in order.tolist()]
    rows += [[name, NOTHING, usd(float(held.value[rest].sum()))] for name in _others(rest)]
    return [Table("What backs it, after haircut", ["asset", "amount", "USD"], rows)]


def top(values: Floats, count: int) -> tuple[Rows, Rows]:
    """Return the rows of the values largest in size, largest first, and those of all others."""
    order = np.argsort(-np.abs(values), kind="stable")
    # a single other row is shown as itself
    return (order, order[:0]) if len(order) <= count + 1 else (order[:count], order[count:])


def _with_rest(values: Floats, order: Rows, rest: Rows) -> list[float]:
    found: list[float] = values[order].tolist()
    return [*found, float(values[rest].sum())] if len(rest) else found


def _others(rest: Rows) -> list[str]:
    return [f"{len(rest)} others"] if len(rest) else []
