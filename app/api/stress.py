"""Stress of a portfolio or of the stored account: scenarios, replay, regimes, feedback and reverse stress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from msgspec import Meta
from starlette.responses import Response

from app.api import body as wire
from app.api import stress_reply
from app.api.deps import Parts, document, parts_of
from app.api.quote_request import Limits, Move, Positive, Symbol, Text, check_length, check_work
from app.api.risk_book import AgentId, Asked, RiskBook, RiskBookIn, asked_of, history_of, risk_book
from app.api.stress_reply import Labelled
from app.domain.feedback import ROUNDS_MAX, Feedback, FeedbackTerms, collateral_step, feedback
from app.domain.parameters import Regime
from app.domain.regimes import stored_regime
from app.domain.replay import Replay, replay
from app.domain.reverse import reverse_stress
from app.domain.scenarios import NAMED, Scenario, ScenarioGrid
from app.domain.stress import TWENTY_PERCENT, StressAccount, market_shocks, stress, stress_account
from app.errors import invalid, pointers_under
from app.services.history_cache import Known

router = APIRouter(prefix="/api/quotes", tags=["quotes"])

REPLAYS_MAX = 50
HISTORY_DAYS, HISTORY_DAYS_MAX = 1_830, 3_660
CELLS_MAX = 4_000_000
"""Assets x market states assessed at once: what they take of memory is 32 MB an array."""
SEARCHED_MOVES = 81
"""Market states that a direction of the reverse search begins with; finding the roots takes as many again at most."""
NAMED_SETS: Mapping[str, Sequence[Scenario]] = {"twenty_percent": TWENTY_PERCENT, **NAMED}


class ShockIn(wire.Request):
    """One market: `shocks` are the own moves of single assets, `price_move` that of all others but stablecoins."""

    price_move: Move | None = None
    vol_move: Annotated[float, Meta(ge=-1, le=100)] | None = None
    shocks: dict[Symbol, Move] | None = None
    name: Text | None = None


class ReplayIn(wire.Request):
    """The worst windows of the stored closes."""

    window_days: Literal[1, 7] = 1
    count: Annotated[int, Meta(ge=1, le=REPLAYS_MAX)] = 10
    history_days: Annotated[int, Meta(ge=7, le=HISTORY_DAYS_MAX)] = HISTORY_DAYS


class FeedbackIn(wire.Request):
    """Forced sales after one of the scenarios, the worst where none is named; `adv` USD a day by asset."""

    adv: dict[Symbol, Positive] | None = None
    scenario: Annotated[int, Meta(ge=0)] | None = None
    impact: Annotated[float, Meta(ge=0, le=1)] | None = None
    slippage: Annotated[float, Meta(ge=0, le=1)] | None = None


class StressIn(RiskBookIn):
    """POST /api/quotes/stress."""

    scenarios: str | list[str | ShockIn] | None = None
    replay: ReplayIn | None = None
    regimes: Regime | list[Regime] | None = None
    feedback: FeedbackIn | None = None
    reverse: bool | None = None


_STRESS = wire.Body(StressIn)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that has been read: the account, its scenarios, and the regimes as asked for and as margined."""

    account: StressAccount
    book: RiskBook
    scenarios: Sequence[Labelled]
    regimes: Sequence[tuple[Regime, Regime]]


@router.post("/stress", openapi_extra=document("Stress of a portfolio or of the account", request=StressIn))
async def quote_stress(request: Request, agent_id: AgentId = None) -> Response:
    """Assess a book on shocked markets; the stored account asks for a key with the scope agent."""
    parts = parts_of(request)
    asked = await asked_of(request, _STRESS, agent_id)
    prepared = await parts.workshop.run(_prepared, parts, asked)
    history = None
    if asked.body.replay is not None:
        days = asked.body.replay.history_days
        history = await history_of(parts, prepared.account.names, days, "/replay/history_days")
    reply = await parts.workshop.run(_answer, asked, prepared, history)
    return Response(reply, media_type="application/json")


def _prepared(parts: Parts, asked: Asked[StressIn]) -> Prepared:
    body, limits = asked.body, Limits.of(parts.settings)
    scenarios = _scenarios(body, limits)
    found = risk_book(parts, asked)
    wanted = [body.regimes] if isinstance(body.regimes, str) else body.regimes or ["normal"]
    regimes = [(r, r if asked.held is None else stored_regime(r, found.parameters)) for r in wanted]
    prepared = Prepared(
        stress_account(found.terms, found.stored, found.now, found.reserved),
        found,
        scenarios,
        list(dict.fromkeys(regimes)),
    )
    _check_work(prepared, body, limits)
    return prepared


def _scenarios(body: StressIn, limits: Limits) -> list[Labelled]:
    given = body.scenarios
    if given is None:
        return [] if body.replay is not None else _of_set("twenty_percent", "/scenarios")
    if isinstance(given, str):
        return _of_set(given, "/scenarios")
    check_length("/scenarios", given, limits.scenarios_max)
    if not given:
        raise invalid("/scenarios", "no_scenarios", "give at least one scenario")
    found: list[Labelled] = []
    for i, item in enumerate(given):
        pointer = f"/scenarios/{i}"
        found += _of_set(item, pointer) if isinstance(item, str) else [_own(item, pointer)]
    check_length("/scenarios", found, limits.scenarios_max)
    return found


def _of_set(name: str, pointer: str) -> list[Labelled]:
    if name not in NAMED_SETS:
        raise invalid(pointer, "unknown_scenario_set", f"the named sets are {', '.join(NAMED_SETS)}")
    return [Labelled(name, None, scenario) for scenario in NAMED_SETS[name]]


def _own(item: ShockIn, pointer: str) -> Labelled:
    if item.price_move is None and item.vol_move is None and not item.shocks:
        raise invalid(pointer, "empty_scenario", "a scenario moves a price or the volatility")
    return Labelled("own", item.name, Scenario(item.price_move or 0.0, item.vol_move or 0.0, item.shocks or {}))


def _check_work(prepared: Prepared, body: StressIn, limits: Limits) -> None:
    account = prepared.account
    count = len(prepared.scenarios) + (body.replay.count if body.replay else 0)
    directions = 1 + int((~account.table.stable).sum()) if body.reverse else 0
    pointer = "/scenarios" if not body.reverse else "/reverse"
    if len(account.names) * (count + directions * SEARCHED_MOVES) > CELLS_MAX:
        detail = f"{len(account.names)} assets on {count + directions * SEARCHED_MOVES} markets: ask for fewer"
        raise invalid(pointer, "too_much_work", detail)
    rounds = ROUNDS_MAX if body.feedback is not None else 0
    each = count + rounds + directions * SEARCHED_MOVES
    milliseconds = estimated_work(account, each, repairs=prepared.book.repairs) * len(prepared.regimes)
    check_work(milliseconds, limits, pointer, "fewer scenarios, regimes or options, no reverse, or another margin mode")


def estimated_work(account: StressAccount, markets: int, *, repairs: bool = False) -> float:
    """Return roughly the milliseconds of one core that so many assessments of an account take, in one regime.

    From what was measured on small machines. Under portfolio margin each asks for the model itself.
    """
    options, lanes = len(account.whole.options), len(account.names)
    matrix = 5.0 + 1.6e-5 * lanes**3
    if account.pool.mode != "portfolio":
        return matrix + markets * (0.003 + lanes * 0.00015 + options * 0.0003)
    pairs = lanes**2 * (0.005 if repairs else 0.00004)
    return matrix + markets * (0.05 + pairs + options * 0.0025)


def _answer(asked: Asked[StressIn], prepared: Prepared, history: Known | None) -> bytes:
    body, account = asked.body, prepared.account
    replayed = None
    if body.replay is not None and history is not None:
        with pointers_under("/replay"):
            replayed = replay(account, history.panel, body.replay.window_days, body.replay.count)
    grid = _grid(account, [labelled.scenario for labelled in prepared.scenarios], replayed)
    found = [_in_regime(body, prepared, grid, *regime) for regime in prepared.regimes]
    reply = stress_reply.reply(
        account,
        prepared.book,
        stress_reply.scenario_rows(account, prepared.scenarios, replayed),
        found,
        history,
    )
    is_account = asked.held is not None
    return wire.encoder.encode({"book": "account" if is_account else "request", **reply})


def _grid(account: StressAccount, scenarios: Sequence[Scenario], replayed: Replay | None) -> ScenarioGrid:
    """Return the unshocked market, the scenarios and the replayed windows, in this order."""
    grid = market_shocks([Scenario(0.0, 0.0), *scenarios], account)
    if replayed is None:
        return grid
    moves = np.concatenate([grid.moves, replayed.moves], axis=1)
    vols = np.concatenate([grid.vol_moves, np.zeros_like(replayed.moves)], axis=1)
    return replace(grid, moves=moves, vol_moves=vols, weights=np.ones(moves.shape[1]))


def _in_regime(
    body: StressIn, prepared: Prepared, grid: ScenarioGrid, regime: Regime, margined: Regime
) -> dict[str, Any]:
    account = prepared.account.under(margined)
    stressed = stress(account, grid)
    figures = stress_reply.figures(stressed)
    worst = min(range(1, len(figures)), key=lambda k: figures[k]["equity"])
    survivals = [row["survival"] for row in figures[1:] if row["survival"] is not None]
    reply = {
        "regime": regime,
        "margined_as": margined,
        "margin_multiplier": account.parameters.models.regime_multiplier(margined),
        "correlation": stress_reply.correlation(account, regime),
        "before": figures[0],
        "scenarios": [{"index": k, **row} for k, row in enumerate(figures[1:])],
        "worst": {"index": worst - 1, **figures[worst]},
        "survival": min(survivals, default=None),
    }
    if body.feedback is not None:
        chosen = worst - 1 if body.feedback.scenario is None else body.feedback.scenario
        reply["feedback"] = _fed_back(body.feedback, account, grid, chosen)
    if body.reverse:
        reply["reverse"] = stress_reply.reverse(reverse_stress(account))
    return reply


def _fed_back(asked: FeedbackIn, account: StressAccount, grid: ScenarioGrid, scenario: int) -> dict[str, Any]:
    column = scenario + 1
    if column >= grid.moves.shape[1]:
        raise invalid("/feedback/scenario", "out_of_range", f"there are {grid.moves.shape[1] - 1} scenarios, from 0")
    models = account.parameters.models
    terms = FeedbackTerms(
        adv=asked.adv or {},
        impact=models.impact_coefficient if asked.impact is None else asked.impact,
        slippage=models.forced_sale_slippage if asked.slippage is None else asked.slippage,
    )
    part = slice(column, column + 1)
    shock = ScenarioGrid(grid.moves[:, part], grid.vol_moves[:, part], np.ones(1))
    with pointers_under("/feedback"):
        loop: Feedback = feedback(account, shock, terms)
    held = account.collateral
    step = collateral_step(held, shock.moves[account.lanes_of(held.assets), 0], terms.slippage)
    return stress_reply.feedback(loop, step, scenario)
