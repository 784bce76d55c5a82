"""Plans that reduce a book, shown and never booked: deleveraging, and what a rung of the drawdown ladder asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from msgspec import Meta
from starlette.responses import Response

from app.api import body as wire
from app.api.deps import Parts, document, parts_of
from app.api.quote_request import Limits, Positive, Signed, check_work
from app.api.risk_book import AgentId, Asked, PlannedBook, RiskBookIn, asked_of, planned_book
from app.domain import ladder
from app.domain.book import MINIMUM_VIABLE, LentLoan
from app.domain.cheapest import RESTARTED_MAX, SEARCHED_MAX
from app.domain.deleverage import (
    DeleveragePlan,
    DeleveragePolicy,
    PlannedOrder,
    cheapest_cure,
    keep_top_n,
    recall_first,
    smallest_first,
)
from app.domain.liquidate import Target
from app.domain.money import plain
from app.domain.trade import Order
from app.domain.watch import drawdown
from app.errors import invalid

router = APIRouter(prefix="/api/quotes", tags=["quotes"])

KEEP = 3
NOT_MODELLED = ("prices moved by the orders, and fees", "the notice of recalled loans: after counts them as back")


class DeleverageIn(RiskBookIn):
    """POST /api/quotes/deleverage; `target` is of utilization, `n` for keep_top_n alone."""

    policy: DeleveragePolicy | None = None
    target: Annotated[float, Meta(gt=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=0, le=5_000)] | None = None


class DrawdownIn(RiskBookIn, kw_only=True):
    """POST /api/quotes/drawdown: of `equity` alone, of a portfolio, or of the account.

    `applied` is the deepest rung acted on in this fall, 0 for none.
    """

    peak_equity: Positive
    equity: Signed | None = None
    applied: Annotated[int, Meta(ge=0, le=4)] | None = None


_DELEVERAGE = wire.Body(DeleverageIn)
_DRAWDOWN = wire.Body(DrawdownIn)


@router.post("/deleverage", openapi_extra=document("A plan to bring utilization down", request=DeleverageIn))
async def quote_deleverage(request: Request, agent_id: AgentId = None) -> Response:
    """Plan reduce-only orders; the stored account asks for a key with the scope agent."""
    parts = parts_of(request)
    asked = await asked_of(request, _DELEVERAGE, agent_id)
    return Response(await parts.workshop.run(_deleverage, parts, asked), media_type="application/json")


@router.post("/drawdown", openapi_extra=document("What the drawdown ladder asks for", request=DrawdownIn))
async def quote_drawdown(request: Request, agent_id: AgentId = None) -> Response:
    """Show the rung of a drawdown and its plan; the stored account asks for a key with the scope agent."""
    parts = parts_of(request)
    asked = await asked_of(request, _DRAWDOWN, agent_id)
    return Response(await parts.workshop.run(_drawdown, parts, asked), media_type="application/json")


def _deleverage(parts: Parts, asked: Asked[DeleverageIn]) -> bytes:
    body = asked.body
    policy = body.policy or "smallest_first"
    _check_terms(body, policy)
    planned = planned_book(parts, asked)
    check_plan_work(parts, planned, policy)
    before = planned.assess(planned.held)
    recalled, left = list[LentLoan](), planned.held
    if policy != "keep_top_n":
        recalled, left = recall_first(left, before, _target(body, planned))
    found = replace(_planned(body, policy, replace(planned, held=left)), before=before.health)
    return wire.encoder.encode(_deleverage_reply(body, found, planned, recalled, is_account=asked.held is not None))


def _check_terms(body: DeleverageIn, policy: DeleveragePolicy) -> None:
    if policy == "keep_top_n" and body.target is not None:
        raise invalid("/target", "not_allowed", "keep_top_n keeps so many positions, whatever they come to")
    if policy != "keep_top_n" and body.n is not None:
        raise invalid("/n", "not_allowed", f"{policy} keeps no fixed number of positions")


def check_plan_work(parts: Parts, planned: PlannedBook, policy: DeleveragePolicy) -> None:
    """Refuse a plan that would take too long to work out. Raises InvalidError `too_much_work`."""
    is_portfolio = planned.held.settings.margin_mode == "portfolio"
    work = estimated_work(policy, len(planned.held.positions), is_portfolio=is_portfolio)
    instead = "a plan of fewer positions, or the policy smallest_first or keep_top_n"
    check_work(work, Limits.of(parts.settings), "/policy", instead)


def estimated_work(policy: DeleveragePolicy, positions: int, *, is_portfolio: bool) -> float:
    """Return roughly the milliseconds of one core that a plan takes, from what was measured on small machines.

    An assessment of the book and a reduction of it, times how many of them the search was seen to make.
    """
    each = 0.95 + positions * 0.003 + (0.7 if is_portfolio else 0.0)
    copies = positions**2 * 1.5e-4
    if policy == "keep_top_n":
        return 2.0 * each + copies
    if policy == "smallest_first":
        return (2.0 * positions + 25.0) * each + copies
    searched = min(positions, SEARCHED_MAX)
    restarts = 70.0 * searched if searched <= RESTARTED_MAX else 250.0 + 15.0 * searched
    if is_portfolio:
        restarts = 240.0 * searched if searched <= RESTARTED_MAX else 1_500.0 + 90.0 * searched
    each += 5e-5 * searched * positions  # every point of the search closes a part of what is searched
    return (restarts + positions / SEARCHED_MAX) * each + copies


def _planned(body: DeleverageIn, policy: DeleveragePolicy, planned: PlannedBook) -> DeleveragePlan:
    target = _target(body, planned)
    if policy == "keep_top_n":
        return keep_top_n(planned.held, planned.assess, planned.reduce, KEEP if body.n is None else body.n)
    if policy == "smallest_first":
        return smallest_first(planned.held, planned.assess, planned.reduce, target)
    return cheapest_cure(planned.held, planned.assess, planned.reduce, target)


def _target(body: DeleverageIn, planned: PlannedBook) -> float:
    return planned.parameters.models.deleverage_utilization if body.target is None else body.target


def _deleverage_reply(
    body: DeleverageIn, found: DeleveragePlan, planned: PlannedBook, recalled: Sequence[LentLoan], *, is_account: bool
) -> dict[str, Any]:
    keeps = found.policy == "keep_top_n"
    return {
        "book": "account" if is_account else "request",
        "as_of": planned.now,
        "policy": found.policy,
        "target": None if keeps else _target(body, planned),
        "n": (KEEP if body.n is None else body.n) if keeps else None,
        "reached": found.reached,
        "recalls": [_recall_shown(loan) for loan in recalled],
        "orders": [planned_shown(order) for order in found.orders],
        "dollars_traded": found.dollars_traded,
        "margin_freed": found.margin_freed,
        "before": found.before,
        "after": found.after,
        "not_modelled": NOT_MODELLED,
        "parameters": {"version": planned.parameters.version, "settings": planned.parameters.policy},
    }


def _recall_shown(loan: LentLoan) -> dict[str, Any]:
    """Return a loan to recall first, by POST /api/lending/{loan_id}/recall."""
    return {
        "loan_id": loan.id,
        "asset": loan.asset,
        "amount": plain(loan.principal),
        "recall_notice_hours": loan.notice_seconds / 3600,
    }


def planned_shown(planned: PlannedOrder) -> dict[str, Any]:
    """Return an order of a plan as POST /api/orders takes it, and what it is for."""
    return {
        "position_id": planned.position_id,
        **order_shown(planned.order),
        "notional": planned.notional,
        "is_whole": planned.is_whole,
    }


def order_shown(order: Order) -> dict[str, Any]:
    """Return an order as POST /api/orders takes it."""
    return {"symbol": order.symbol, "side": order.side, "size": plain(order.size), "reduce_only": order.reduce_only}


def _drawdown(parts: Parts, asked: Asked[DrawdownIn]) -> bytes:
    body = asked.body
    has_book = asked.held is not None or body.positions is not None
    if has_book and body.equity is not None:
        raise invalid("/equity", "not_allowed", "the book has an equity of its own")
    if not has_book:
        return wire.encoder.encode(_of_equity(parts, body))
    planned = planned_book(parts, asked)
    check_plan_work(parts, planned, "keep_top_n")
    return wire.encoder.encode(_of_book(planned, body, is_account=asked.held is not None))


def _of_equity(parts: Parts, body: DrawdownIn) -> dict[str, Any]:
    if body.equity is None:
        raise invalid("/equity", "missing", 'give equity, positions, or "book": "account"')
    parameters = parts.market.view.parameters
    fallen = drawdown(max(body.peak_equity, body.equity), body.equity)
    rung = ladder.rung_at(fallen, parameters.policy)
    return {
        "book": None,
        **_rung(body, body.equity, fallen, rung),
        "kept_share": ladder.kept_share(rung, parameters.policy),
        "plan": None,
        "bounds": ladder.bounds(parameters.policy),
        "parameters": {"version": parameters.version},
    }


def _of_book(planned: PlannedBook, body: DrawdownIn, *, is_account: bool) -> dict[str, Any]:
    figures, policy = planned.assess(planned.held), planned.parameters.policy
    fallen = drawdown(max(body.peak_equity, figures.equity), figures.equity)
    rung = ladder.rung_at(fallen, policy)
    asked = ladder.plan(planned.held, figures, policy, rung, min(body.applied or 0, rung))
    left = planned.held
    for cut in asked.cuts:
        left = planned.reduce(left, Target(cut.position, cut.position.size, 0.0), cut.size)
    after = planned.assess(left)
    return {
        "book": "account" if is_account else "request",
        "as_of": planned.now,
        **_rung(body, figures.equity, fallen, rung),
        "kept_share": ladder.kept_share(rung, policy),
        "plan": {
            "gross": asked.gross,
            "gross_target": asked.gross_target,
            "gross_after": after.gross_notional,
            "orders": [{"position_id": cut.position.id, **order_shown(cut.order)} for cut in asked.cuts],
            "hedges": asked.hedges,
            "before": figures.health,
            "after": after.health,
        },
        "bounds": ladder.bounds(policy),
        "parameters": {"version": planned.parameters.version},
    }


def _rung(body: DrawdownIn, equity: float, fallen: float, rung: int) -> dict[str, Any]:
    return {
        "peak_equity": max(body.peak_equity, equity),
        "equity": equity,
        "drawdown": fallen,
        "rung": ladder.RUNGS[rung],
        "opens_nothing": rung == MINIMUM_VIABLE,
    }
