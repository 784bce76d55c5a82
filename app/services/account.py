"""An account's own settings: margin mode, delays, levels of utilization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from app.db.session import Tx
from app.domain.book import THRESHOLDS, AccountSettings, Book
from app.errors import ConflictError, FieldError, InvalidError, conflict
from app.services import accounts, audit, market_rules, watch
from app.services.margin import Scene, refusal_error

_POINTERS = {name: f"/thresholds/{name}" for name in THRESHOLDS} | {"target_utilization": "/target_utilization"}
"""Where a level stands in what a caller sends."""

_EASED_BY_MORE = ("notice_delay_seconds", "grace_period_seconds", *(t for t in THRESHOLDS if t != "target_utilization"))
"""Settings of which more (of a level: none of its own) gives an account more time or slack."""


async def change_settings(tx: Tx, scene: Scene, before: Book, change: Mapping[str, Any]) -> Book:
    """Set the fields given and return the book, which is locked.

    A level of the account's own is never looser than the market's (InvalidError), and a margin mode must leave the
    open book within the gate (ConflictError); portfolio mode asks for its minimum equity on entry.
    """
    settings = replace(before.settings, **change)
    changed = {k: v for k, v in asdict(settings).items() if v != getattr(before.settings, k)}
    if not changed:
        return before
    _check_call(before, changed)
    if "execution" in changed and before.pending:
        detail = f"{len(before.pending)} orders wait for fills of the venue: cancel them first"
        raise conflict("/execution", "orders_pending", detail)
    if "execution" in changed and before.positions:
        detail = f"{len(before.positions)} positions are open where orders were filled until now: close them first"
        raise conflict("/execution", "positions_open", detail)
    after = replace(before, settings=settings)
    _check_levels(scene, settings)
    if "margin_mode" in changed:
        _check_mode(scene, before, after)
    await accounts.put_account_settings(tx, before.agent_id, changed)
    if after.settings.follows_peak and not before.settings.follows_peak:
        await watch.start_fall(tx, before.agent_id)
    await audit.record(tx, "account.settings", before.agent_id, before.agent_id, **changed)
    return after


def _check_call(before: Book, changed: Mapping[str, Any]) -> None:
    """Refuse to gain time or slack while a margin call lives; stricter is always allowed."""
    if before.live_call is None and not before.is_in_called_pool:
        return
    for name in _EASED_BY_MORE:
        now, then = getattr(before.settings, name), changed.get(name)
        if name in changed and (then is None or (now is not None and then > now)):
            raise _under_call(_POINTERS.get(name, f"/{name}"))
    if changed.get("auto_liquidate") is False:
        raise _under_call("/auto_liquidate")
    if "execution" in changed:
        raise _under_call("/execution")


def _under_call(pointer: str) -> ConflictError:
    return conflict(pointer, "call_is_live", "a margin call lives: until it is over this only becomes stricter")


def _check_levels(scene: Scene, settings: AccountSettings) -> None:
    market = scene.market.parameters.policy
    loose = [
        FieldError(_POINTERS[name], "looser_than_market", f"the market's {name} is {getattr(market, name):g}")
        for name in THRESHOLDS
        if (own := getattr(settings, name)) is not None and own > getattr(market, name)
    ]
    if loose:
        raise InvalidError(loose[0].detail, code="looser_than_market", errors=tuple(loose))
    try:
        parameters = scene.market.parameters
        market_rules.check_models(parameters.models, settings.policy(market), parameters.clearing)
    except InvalidError as error:
        pointed = tuple(replace(e, pointer=_POINTERS.get(e.pointer[1:], e.pointer)) for e in error.errors)
        raise InvalidError(error.detail, code=error.code, errors=pointed) from None


def _check_mode(scene: Scene, before: Book, after: Book) -> None:
    if not after.is_leveraged and after.settings.margin_mode != "portfolio":
        return
    exposed = scene.exposed(after)
    figures = scene.figures(exposed)
    scene.require_fresh(figures)
    if after.settings.margin_mode == "portfolio" and not figures.eligible:
        least = scene.market.parameters.models.portfolio_minimum_equity
        detail = f"portfolio margin asks for an equity of {least:,.0f} USD, this is {figures.equity:,.2f}"
        raise conflict("/margin_mode", "equity_below_minimum", detail, shortfall=least - figures.equity)
    refused = scene.judge(scene.figures(scene.exposed(before)), figures, exposed)
    if refused is not None:
        raise refusal_error(refused, "/margin_mode")
