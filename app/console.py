"""A margin quote for people: tables on a terminal."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.api.body import encoder
from app.api.quote_reply import margin_reply
from app.api.quote_request import MARGIN_QUOTE, Limits, quote_terms, quote_time
from app.db.session import system_now
from app.domain.parameters import MarketParameters
from app.domain.quote import margin_quote
from app.errors import PrimeriskError, StartupError, one_line
from app.report.words import move, number, price, usd
from app.settings import Settings

POSITIONS_SHOWN_MAX = 40

_STYLE = {
    "safe": "green", "warning": "yellow", "critical": "bold red",
    "GREEN": "green", "YELLOW": "yellow", "ORANGE": "dark_orange", "RED": "bold red",
    "OK": "green", "WARNING": "yellow", "DANGER": "dark_orange", "EMERGENCY": "bold red",
    "SAFE": "green", "LIQUIDATION": "bold red",
}  # fmt: skip


def offline_quote(raw: bytes, settings: Settings) -> bytes:
    """Return the API's reply to a request body, with the package's own parameters and no stored prices."""
    body = MARGIN_QUOTE.decode(raw)
    as_of = quote_time(body, system_now())
    terms = quote_terms(body, MarketParameters(), Limits.of(settings), as_of)
    quote = margin_quote(terms, {}, as_of)
    return encoder.encode(margin_reply(quote, terms, body.columns["id"], settings.price_age_seconds_max))


def print_quote(raw: bytes, settings: Settings, *, as_json: bool) -> None:
    """Print the quote of a request body. Raises StartupError, one line, for a body that is refused."""
    try:
        reply = offline_quote(raw, settings)
    except PrimeriskError as error:
        raise StartupError(one_line(error)) from None
    if as_json:
        sys.stdout.write(msgspec.json.format(reply, indent=2).decode() + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in quote_tables(msgspec.json.decode(reply)):
        console.print(part)


def quote_tables(reply: dict[str, Any]) -> list[Table | Text | str]:
    """Return the parts of a readable quote, in the order in which an owner asks."""
    return [
        _summary(reply),
        _models(reply),
        _health(reply["health"]),
        _positions(reply),
        _liquidation(reply),
        *[Text(f"! {a['detail']}", "yellow") for a in reply["advisories"]],
        Text(f"parameters: version {reply['parameters']['version']}, regime {reply['parameters']['regime']}", "dim"),
    ]


def _summary(reply: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    for name in ("equity", "collateral_value", "liabilities", "unrealized_pnl", "options_value"):
        table.add_row(name.replace("_", " "), usd(reply[name]))
    return table


def _models(reply: dict[str, Any]) -> Table:
    table = Table(title="margin by model, USD", title_justify="left")
    table.add_column("model")
    for name in ("initial", "maintenance", "capital freed"):
        table.add_column(name, justify="right")
    table.add_column("binding")
    for name, model in reply["models"].items():
        freed = f"{reply['capital_freed'][name]:.1%}"
        table.add_row(name, usd(model["initial_margin"]), usd(model["maintenance_margin"]), freed, _binding(model))
    return table


def _binding(model: dict[str, Any]) -> str:
    worst = model["worst"]
    if worst is None:
        return ""
    if worst["index"] is None or not model["scenarios"]:
        return f"{worst['rule']}, {usd(worst['pnl'])}"
    scenario = model["scenarios"][worst["index"]]
    unit = " R" if scenario["price_move_unit"] == "price_range" else ""
    moves = f"{scenario['price_move']:+.2f}{unit}" if unit else f"{scenario['price_move']:+.1%}"
    in_ranges = scenario["vol_move_unit"] != "relative"
    vol = f"{scenario['vol_move']:+.0f} range" if in_ranges else f"{scenario['vol_move']:+.0%}"
    return f"{worst['rule']}: price {moves}, vol {vol}, {usd(worst['pnl'])}"


def _health(health: dict[str, Any]) -> Table:
    table = Table(title=f"health ({health['model']} margin)", title_justify="left")
    for name in ("figure", "value", "band"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for name, band in health["bands"].items():
        table.add_row(name.replace("_", " "), number(band["value"]), Text(band["band"], _STYLE[band["band"]]))
    for name in ("zone", "alert_level", "status"):
        table.add_row(name.replace("_", " "), "", Text(health[name], _STYLE[health[name]]))
    for name in ("required_initial", "required_maintenance", "free_margin", "headroom", "shortfall"):
        table.add_row(name.replace("_", " "), usd(health[name]), "")
    table.add_row("health score", f"{health['health_score']:.1f}", "")
    return table


def _positions(reply: dict[str, Any]) -> Table:
    shown = reply["positions"][:POSITIONS_SHOWN_MAX]
    left = len(reply["positions"]) - len(shown)
    title = f"positions ({left} more with --json)" if left else "positions"
    table = Table(title=title, title_justify="left")
    table.add_column("symbol")
    for name in ("exposure", "mark", "pnl", "initial", "maintenance", "liquidation at"):
        table.add_column(name, justify="right")
    for p in shown:
        table.add_row(
            p["symbol"],
            usd(p["exposure"]),
            price(p["mark_price"]),
            usd(p["unrealized_pnl"]),
            usd(p["initial_margin"]),
            usd(p["maintenance_margin"]),
            _at(p),
        )
    return table


def _at(position: dict[str, Any]) -> str:
    if position["breached"]:
        return "breached"
    if position["liquidation_price"] is None:
        return "none"
    return f"{price(position['liquidation_price'])} ({move(position['liquidation_distance'])})"


def _liquidation(reply: dict[str, Any]) -> Text:
    far = reply["liquidation"]
    return Text(f"if all coins move together: {_breach(far)}, {_liquidated(far)}")


def _breach(far: dict[str, Any]) -> str:
    if far["breached"]:
        return "breached already"
    return "no breach" if far["to_breach"] is None else f"breach at {move(far['to_breach'])}"


def _liquidated(far: dict[str, Any]) -> str:
    """Say where liquidation begins, or, of an account that is there, where it would end."""
    to_end = far["to_liquidation"]
    if far["liquidatable"]:
        return "in liquidation" if to_end is None else f"in liquidation until {move(to_end)}"
    return "no liquidation" if to_end is None else f"liquidation at {move(to_end)}"
