"""What the demonstration says of an event: the word, the figures, the colour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from app.demo.stage import Player

_Told = tuple[str, str, str]


def _percent(ratio: float | None) -> str:
    return "insolvent" if ratio is None else f"utilization {ratio:.1%}"


def _opened(player: Player, data: Mapping[str, Any]) -> _Told:
    player.calls += 1
    player.is_called, player.answered = True, ""
    grace = _seconds(data["opened_at"], data["deadline_at"])
    asked = data["cure"]["deposit"]["amount"]
    return "margin call", f"{_percent(data['utilization'])}, {asked:,.2f} USDC would cure, {grace:.0f} s left", "yellow"


def _reminded(_: Player, data: Mapping[str, Any]) -> _Told:
    return "is reminded", f"{_percent(data['utilization'])}, shortfall {data['shortfall']:,.2f}", "yellow"


def _cured(player: Player, data: Mapping[str, Any]) -> _Told:
    player.is_called = False
    how = player.answered or ("its fleet" if player.member.plan == "draws" else "the price")
    player.cures.append(how)
    return "cured", f"by {how}, {_percent(data['utilization'])}", "green"


def _expired(_: Player, data: Mapping[str, Any]) -> _Told:
    return "call expired", f"{_percent(data['utilization'])}, equity {data['equity']:,.2f}", "red"


def _executed(player: Player, data: Mapping[str, Any]) -> _Told:
    player.slices += 1
    part = "all of it" if data["is_whole"] else "a part"
    sold = f"{data['side']} {data['size']:g} {data['symbol']} at {data['fill_price']:,.2f}, {part}"
    return "liquidated", f"{sold}, {data['realized_pnl']:+,.2f} USDC, {_percent(data['utilization'])}", "bold red"


def _completed(player: Player, data: Mapping[str, Any]) -> _Told:
    player.is_called = False
    slices = "1 slice" if data["slices"] == 1 else f"{data['slices']} slices"
    return "completed", f"{slices}, deficit {data['deficit']:,.2f}, {_percent(data['utilization'])}", "red"


def _zone(_: Player, data: Mapping[str, Any]) -> _Told:
    style = {"GREEN": "green", "YELLOW": "yellow", "ORANGE": "dark_orange", "RED": "red"}[data["zone"]]
    return f"is {data['zone']}", f"after {data['zone_before']}, {_percent(data['utilization'])}", style


def _fleet_zone(player: Player, data: Mapping[str, Any]) -> _Told:
    _, more, style = _zone(player, data)
    return f"fleet {data['zone']}", more, style


def _powder(_: Player, data: Mapping[str, Any]) -> _Told:
    return "powder is out", f"{data['dry_powder']:.0%} of the wallet, {data['reason']}", "yellow"


def _restored(_: Player, data: Mapping[str, Any]) -> _Told:
    return "powder is back", f"{data['reason']}, {data['drawn']:,.2f} are drawn", "green"


def _capped(_: Player, data: Mapping[str, Any]) -> _Told:
    return "is capped", f"{data['drawn']:,.2f} of {data['max_margin']:,.2f} USDC are drawn", "yellow"


def _loan_opened(player: Player, data: Mapping[str, Any]) -> _Told:
    return player.member.plan, f"{data['principal']:,.2f} {data['asset']} at {data['rate_apy']:.1%} a year", "green"


def _loan_low(_: Player, data: Mapping[str, Any]) -> _Told:
    more = f"collateral is {data['ratio']:.1%} of the debt, {data['top_up']:g} {data['collateral_asset']} are missing"
    return "loan is low", more, "yellow"


def _loan_closed(_: Player, data: Mapping[str, Any]) -> _Told:
    paid = data["returned"] + data["interest"]
    sold = f"{data['collateral_sold']:.4f} {data['collateral_asset']} are sold"
    return "loan is closed", f"{sold} for {paid:,.2f} {data['asset']}, deficit {data['deficit']:,.2f}", "red"


TOLD = {
    "fleet.zone_changed": _fleet_zone,
    "fleet.dry_powder_released": _powder,
    "fleet.dry_powder_restored": _restored,
    "fleet.member_capped": _capped,
    "loan.opened": _loan_opened,
    "loan.collateral_low": _loan_low,
    "loan.liquidated": _loan_closed,
    "margin_call.opened": _opened,
    "margin_call.reminded": _reminded,
    "margin_call.cured": _cured,
    "margin_call.expired": _expired,
    "liquidation.executed": _executed,
    "liquidation.completed": _completed,
    "zone.changed": _zone,
}


def _seconds(start: str, end: str) -> float:
    begun, ended = (np.datetime64(moment.removesuffix("Z").removesuffix("+00:00"), "us") for moment in (start, end))
    return float((ended - begun) / np.timedelta64(1, "s"))
