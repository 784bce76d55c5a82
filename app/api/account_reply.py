"""Replies about an agent's book: exact amounts as stored, risk figures as the core gives them."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from decimal import Decimal
from typing import Any

from app.domain.book import THRESHOLDS, Book, Holding, OpenPosition, OpenReservation, PendingOrder, reserved_value
from app.domain.gates import stale_symbols
from app.domain.money import plain, to_float
from app.domain.moves import SETTLEMENT_ASSET
from app.domain.prices import PriceFinder
from app.domain.quote import AccountFigures
from app.services.market_cache import MarketView
from app.services.orders import StoredFill, StoredOrder
from app.services.positions import Position
from app.services.wallet import Reservation


def account_reply(book: Book, figures: AccountFigures, view: MarketView, age_max: timedelta) -> dict[str, Any]:
    """Return the account: money, positions, health, and which prices are too old to act on."""
    stale = stale_symbols(figures, figures.as_of, age_max.total_seconds())
    return {
        "id": book.agent_id,
        "agent_id": book.agent_id,
        "as_of": figures.as_of,
        "margin_mode": book.settings.margin_mode,
        "collateral": figures.collateral.collateral_value,
        "collateral_value": figures.collateral.collateral_value,
        "liabilities": figures.collateral.liabilities,
        "equity": figures.equity,
        "unrealized_pnl": figures.unrealized_pnl,
        "allocated_collateral": figures.allocated,
        "gross_notional": figures.gross_notional,
        "balances": balances(book),
        "positions": open_positions(book, figures),
        "reservations": [open_reservation(r, view) for r in book.reservations],
        "pending_orders": [pending_order(o) for o in book.pending],
        "health": figures.health,
        "reduce_only": book.opens_nothing is not None
        or (book.settings.margin_mode == "portfolio" and not figures.eligible),
        "stale_prices": stale,
        "parameters_version": view.parameters.version,
        "version": book.version,
    }


def balances(book: Book) -> list[dict[str, Any]]:
    """Return the units held and owed of each asset."""
    return [
        {
            "asset": asset,
            "amount": plain(held.held),
            "free": plain(held.free),
            "reserved": plain(held.reserved),
            "allocated": plain(held.allocated),
            "owed": plain(held.owed),
            **_of_loans(held),
        }
        for asset, held in sorted(book.holdings.items())
    ]


def _of_loans(held: Holding) -> dict[str, Any]:
    """Return what of an asset is on offer, lent, pledged for own loans, and borrowed."""
    return {name: plain(getattr(held, name)) for name in ("offered", "lent", "pledged", "borrowed")}


def balance_reply(book: Book, figures: AccountFigures) -> dict[str, Any]:
    """Return the wallet. `reserved` and `free` are of USDC, as `usdc_balance` is."""
    usdc = book.holding(SETTLEMENT_ASSET)
    return {
        "usdc_balance": plain(usdc.held),
        "free": plain(usdc.free),
        "reserved": plain(usdc.reserved),
        "allocated": plain(usdc.allocated),
        "owed": plain(usdc.owed),
        **_of_loans(usdc),
        "collateral_value": figures.collateral.collateral_value,
        "equity": figures.equity,
        "balances": balances(book),
    }


def open_positions(book: Book, figures: AccountFigures) -> list[dict[str, Any]]:
    """Return the open positions with their figures at the mark; margins are of each position alone."""
    table = figures.portfolio
    rows = zip(
        book.positions,
        table.mark.tolist(),
        table.notional.tolist(),
        table.unrealized_pnl.tolist(),
        table.initial_rate.tolist(),
        figures.isolated.position_initial.tolist(),
        figures.isolated.position_maintenance.tolist(),
        strict=True,
    )
    return [
        {
            "id": position.id,
            "symbol": position.symbol,
            "side": position.side,
            "size": plain(position.size),
            "entry_price": plain(position.entry_price),
            "current_price": mark,
            "leverage": leverage(position, rate),
            "notional_usd": notional,
            "initial_margin": initial,
            "maintenance_margin": maintenance,
            "unrealized_pnl": pnl,
            "realized_pnl": plain(position.realized_pnl),
            "margin_mode": _mode(position, book),
            "allocated_collateral": plain(position.allocated),
            "reducible": position.reducible,
            "opened_at": position.opened_at,
        }
        for position, mark, notional, pnl, rate, initial, maintenance in rows
    ]


def _mode(position: OpenPosition, book: Book) -> str:
    if position.margin_mode == "isolated":
        return "isolated"
    return "portfolio" if book.settings.margin_mode == "portfolio" else "cross"


def leverage(position: OpenPosition, initial_rate: float) -> Decimal | float:
    """Return the leverage that was asked for, else what the margin rate comes to."""
    return plain(position.leverage) if position.leverage is not None else 1.0 / initial_rate


def open_reservation(reservation: OpenReservation, view: MarketView) -> dict[str, Any]:
    """Return an open reservation with its worth as collateral."""
    return {
        "id": reservation.id,
        "service": reservation.service,
        "asset": reservation.asset,
        "amount": plain(reservation.amount),
        "remaining": plain(reservation.remaining),
        "usd_value": reserved_value([reservation], view.parameters, view.prices),
        "reference": reservation.reference,
        "reducible": reservation.reducible,
        "created_at": reservation.created_at,
        "bound_to": reservation.bound_to,
    }


def portfolio_rows(book: Book, figures: AccountFigures, view: MarketView) -> list[dict[str, Any]]:
    """Return what uses the wallet: positions under the service trading, then every service's reservations."""
    rows = [
        {
            "id": row["id"],
            "service": "trading",
            "symbol": row["symbol"],
            "side": row["side"],
            "notional_usd": row["notional_usd"],
            "margin_reserved": row["initial_margin"],
            "leverage": row["leverage"],
            "reducible": row["reducible"],
        }
        for row in open_positions(book, figures)
    ]
    for reservation in book.reservations:
        price = PriceFinder(view.parameters, {}, view.prices).asset(reservation.asset, "/market/prices")
        rows.append(
            {
                "id": reservation.id,
                "service": reservation.service,
                "symbol": reservation.asset,
                "side": None,
                "notional_usd": to_float(reservation.remaining) * price,
                "margin_reserved": reserved_value([reservation], view.parameters, view.prices),
                "leverage": 1,
                "reducible": reservation.reducible,
            }
        )
    return rows


def settings_reply(book: Book, view: MarketView) -> dict[str, Any]:
    """Return the settings as given, and the levels that hold: the stricter of the account's and the market's."""
    settings = asdict(book.settings)
    own = {name: settings.pop(name) for name in THRESHOLDS if name != "target_utilization"}
    policy = book.settings.policy(view.parameters.policy)
    return {
        "agent_id": book.agent_id,
        **settings,
        "thresholds": own,
        "effective": {name: getattr(policy, name) for name in THRESHOLDS},
    }


def stored_position(position: Position) -> dict[str, Any]:
    """Return a stored position, open or closed."""
    row = asdict(position)
    del row["seq"], row["agent_id"]
    for name in ("size", "entry_price", "allocated", "realized_pnl"):
        row[name] = plain(row[name])
    row["allocated_collateral"] = row.pop("allocated")
    row["status"] = "open" if position.closed_at is None else "closed"
    return row


def stored_order(order: StoredOrder) -> dict[str, Any]:
    """Return an order under the names that clients know."""
    row = asdict(order)
    del row["seq"], row["agent_id"], row["margin_mode"]
    for name in ("size", "filled_size", "realized_pnl", "fees"):
        row[name] = plain(row[name])
    row["fill_price"] = None if order.fill_price is None else plain(order.fill_price)
    return {"order_id": order.id, **row}


def stored_fill(fill: StoredFill) -> dict[str, Any]:
    """Return a venue's fill, with what its order had come to: the same whenever it is asked for."""
    row = asdict(fill)
    for name in ("size", "price", "fee", "realized_pnl", "filled_size"):
        row[name] = plain(row[name])
    return {"id": fill.fill_id, **row}


def pending_order(order: PendingOrder) -> dict[str, Any]:
    """Return an order that waits for fills."""
    return {
        "order_id": order.id,
        "symbol": order.symbol,
        "side": order.side,
        "remaining": plain(order.remaining),
        "reduce_only": order.reduce_only,
        "margin_call_id": order.margin_call_id,
    }


def stored_reservation(reservation: Reservation) -> dict[str, Any]:
    """Return a reservation, open or closed."""
    row = asdict(reservation)
    del row["seq"], row["agent_id"]
    for name in ("amount", "remaining", "settled"):
        row[name] = plain(row[name])
    return row
