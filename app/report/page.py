"""The page: one file of HTML that needs no script, no network and no server."""

from __future__ import annotations

from string import Template

from app.report.figures import Report
from app.report.style import CSS
from app.report.tables import Table, escaped, level, section, table_html
from app.report.words import move, usd

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What a browser may do with the page: nothing but show it. It has no script, and loads nothing."""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="primerisk $version">
<title>$title: risk report</title>
<style>$css</style>
</head>
<body>
<header>
<p class="kicker">Risk report</p>
<h1>$title</h1>
<p class="when">$when</p>
<p class="scales">$scales</p>
<dl class="tiles">$tiles</dl>
</header>
<main>$sections</main>
<footer>$footer</footer>
</body>
</html>
""")


def page(report: Report, version: str) -> str:
    """Return the page of a report, made by this version of the package; the same figures give the same bytes."""
    # matplotlib takes a second to load: nobody waits for it but who draws
    from app.report import sections  # noqa: PLC0415

    subject, beliefs, risk = report.subject, report.beliefs, report.risk
    parts = [sections.health(report)]
    if risk is not None:
        parts += [sections.distribution(risk), sections.components(report, risk)]
    parts.append(sections.scenarios(report.scenarios))
    if report.grid is not None:
        parts.append(sections.grid(report.grid))
    parts += [sections.liquidation(report), sections.stressed(report)]
    if beliefs is not None:
        parts += [sections.correlations(report, beliefs), sections.market(report, beliefs)]
    return _PAGE.substitute(
        policy=escaped(POLICY),
        version=escaped(version),
        css=CSS,
        title=escaped(subject.title),
        when=escaped(f"{report.quote.as_of:%Y-%m-%d %H:%M:%S} UTC, {len(report.quote.portfolio):,} positions"),
        scales=_scales(report),
        tiles=_tiles(report),
        sections="\n".join(parts),
        footer=_footer(report, version),
    )


def _scales(report: Report) -> str:
    health = report.quote.health
    named = (("zone", health.zone), ("alert level", health.alert_level), ("status", health.status))
    return "".join(f"<span>{escaped(name)} {level(value).html}</span>" for name, value in named)


def _tiles(report: Report) -> str:
    """Return the figures that an owner asks for first."""
    quote, health = report.quote, report.quote.health
    bands = {name: band.band for name, band in health.bands.items()}
    far = quote.distances
    to_end = "there already" if far.liquidatable else "none" if far.to_liquidation is None else move(far.to_liquidation)
    tiles = [
        ("equity", usd(quote.equity), "USD"),
        ("required initial", usd(health.required_initial), f"USD, {health.model} margin"),
        ("required maintenance", usd(health.required_maintenance), f"USD, {health.model} margin"),
        ("utilization", _share(health.utilization), bands["utilization"]),
        ("margin ratio", _share(health.margin_ratio), bands["margin_ratio"]),
        ("health score", f"{health.health_score:.1f}", "of 100"),
        ("to liquidation", to_end, "if all prices move together"),
    ]
    if report.risk is not None:
        tail = report.risk.tails[-1]
        tiles.append((f"VaR {tail.confidence:.0%}", usd(tail.value_at_risk), "USD, one day"))
    return "".join(_tile(*tile) for tile in tiles)


def _tile(name: str, value: str, note: str) -> str:
    said = level(note).html if note in ("safe", "warning", "critical") else f"<small>{escaped(note)}</small>"
    return f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd><dd>{said}</dd></div>"


def _share(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2%}"


def _footer(report: Report, version: str) -> str:
    """Return what it takes to compute the report again."""
    subject, risk = report.subject, report.risk
    margin = subject.terms.margin
    whole = subject.daily.whole
    history = (
        "none" if not len(whole.dates) else f"{whole.dates[0]} to {whole.dates[-1]}, {', '.join(whole.assets[:20])}"
    )
    rows = [
        ["as of", report.quote.as_of.isoformat()],
        ["parameters", f"version {margin.parameters.version}"],
        ["margin mode", report.quote.health.model],
        ["regime", margin.regime],
        ["daily history", history],
        ["method", "none: no positions" if risk is None else risk.method.replace("_", " ")],
        ["seed", str(subject.seed)],
        ["breach", f"utilization {margin.parameters.policy.breach_utilization:.2f}, or equity below maintenance"],
        ["primerisk", version],
    ]
    table = table_html(Table("What it takes to compute this again", ["", ""], rows, words=2))
    return section("method", "How it was computed", table)
