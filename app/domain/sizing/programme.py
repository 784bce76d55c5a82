"""The weights with the largest expected gain that margin, leverage and concentration allow: a linear programme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linprog

from app.domain.black76 import Floats
from app.errors import invalid

TOLERANCE = 1e-9
"""Slack, relative to its limit or absolute where that is below 1, within which a constraint binds."""


@dataclass(frozen=True, slots=True)
class Programme:
    """What is to be sized: each (n,), `daily_volatility` per day, weights as exposure / equity, all ≥ 0.

    `edges` are expected gains per unit of weight, of either sign. Limits left None (or infinite) are none.
    """

    assets: Sequence[str]
    edges: Floats
    margin_rates: Floats
    daily_volatility: Floats
    utilization: float = 0.60
    leverage_cap: float | None = 3.5
    weight_min: float | Floats = 0.0
    weight_max: float | Floats | None = 0.25


@dataclass(frozen=True, slots=True)
class Constraint:
    """One limit at the answer: how much of it is used, whether it binds, and what one more unit of it would gain.

    `margin` counts Σ w (margin_rate + 2·utilization·σ_day) against the utilization; `leverage` Σ w; `weight` w of one
    asset.
    """

    name: Literal["margin", "leverage", "weight"]
    asset: str | None
    used: float
    limit: float
    binding: bool
    shadow_price: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The answer; with another status than `optimal` there are no weights, and `detail` says why."""

    status: Literal["optimal", "infeasible", "unbounded"]
    weights: Floats
    edge: float
    constraints: Sequence[Constraint]
    detail: str = ""


def allocate(programme: Programme) -> Allocation:
    """Return the weights (n,) that maximise Σ edge·w under the programme's limits.

    Σ w·margin_rate ≤ U(1 − 2Σ w σ_day): margin stays within the utilization U of what is left of equity after a day in
    which everything held loses two standard deviations. Where nothing is gained by an asset its weight is the least
    that is allowed. Solved by HiGHS. Raises InvalidError `out_of_range` for terms that are no programme.
    """
    _check(programme)
    count = len(programme.edges)
    least = np.broadcast_to(np.asarray(programme.weight_min, dtype=np.float64), count)
    most = _weight_max(programme)
    rows, limits = _rows(programme)
    if why := _impossible(programme, rows, limits, least, most):
        return Allocation("infeasible", np.empty(0), np.nan, (), why)
    # an asset without an edge only uses limits up: at an optimum it has the least
    worth = programme.edges > 0.0
    most = np.where(worth, most, least)
    finite = np.isfinite(limits)
    if why := _unlimited(programme, rows[finite], most):
        return Allocation("unbounded", np.empty(0), np.inf, (), why)
    found = linprog(
        -programme.edges,
        A_ub=rows[finite] if finite.any() else None,
        b_ub=limits[finite] if finite.any() else None,
        bounds=list(zip(least.tolist(), most.tolist(), strict=True)),
        method="highs",
    )
    if found.x is None:
        # there is an answer, and a finite one: what is left is trouble with the figures
        raise invalid("", "not_solved", f"the programme was not solved: {found.message}")
    weights = np.clip(found.x, least, most)
    prices = np.zeros(len(limits))
    if finite.any():
        prices[finite] = -found.ineqlin.marginals
    caps = np.where(worth, -found.upper.marginals, 0.0)
    shown = _constraints(programme, rows @ weights, limits, prices, weights, most, caps)
    return Allocation("optimal", weights, float(programme.edges @ weights), shown)


def _check(programme: Programme) -> None:
    count = len(programme.assets)
    for name in ("edges", "margin_rates", "daily_volatility"):
        column = getattr(programme, name)
        if column.shape != (count,) or not np.isfinite(column).all():
            raise invalid(f"/{name}", "out_of_range", f"a finite figure is needed for each of the {count} assets")
    for name in ("margin_rates", "daily_volatility"):
        if (getattr(programme, name) < 0.0).any():
            raise invalid(f"/{name}", "out_of_range", "a figure below 0 is none")
    for name in ("utilization", "leverage_cap"):
        if np.isnan(getattr(programme, name) or 0.0):
            raise invalid(f"/{name}", "out_of_range", "it is no number")
    least = np.asarray(programme.weight_min)
    if not (np.isfinite(least).all() and (least >= 0.0).all()):
        raise invalid("/weight_min", "out_of_range", "the least weight is a finite figure of 0 or more")
    if programme.weight_max is not None and not (np.asarray(programme.weight_max) >= 0.0).all():
        raise invalid("/weight_max", "out_of_range", "the largest weight is 0 or more")


def _weight_max(programme: Programme) -> Floats:
    most = np.inf if programme.weight_max is None else programme.weight_max
    return np.broadcast_to(np.asarray(most, dtype=np.float64), len(programme.edges))


def _rows(programme: Programme) -> tuple[Floats, Floats]:
    """Return the left sides (2, n) and limits (2,) of margin and leverage."""
    margin = programme.margin_rates + 2.0 * programme.utilization * programme.daily_volatility
    cap = np.inf if programme.leverage_cap is None else programme.leverage_cap
    return np.stack([margin, np.ones(len(margin))]), np.array([programme.utilization, cap])


def _impossible(programme: Programme, rows: Floats, limits: Floats, least: Floats, most: Floats) -> str:
    """Return why no weights fit, empty where some do: the least ones use the least of every limit."""
    for asset, low, high in zip(programme.assets, least.tolist(), most.tolist(), strict=True):
        if low > high:
            return f"the least weight of {asset}, {low:g}, is above the largest, {high:g}"
    for name, used, limit in zip(("margin", "leverage"), (rows @ least).tolist(), limits.tolist(), strict=True):
        if used - limit > TOLERANCE * max(1.0, limit):
            return f"the least weights alone take {used:g} of {name}, of which there is {limit:g}"
    return ""


def _unlimited(programme: Programme, rows: Floats, most: Floats) -> str:
    """Return which weight may grow for ever, empty where none may: no constraint of ours pays another one back."""
    free = (programme.edges > 0.0) & np.isinf(most) & (rows == 0.0).all(axis=0)
    names = [asset for asset, is_free in zip(programme.assets, free.tolist(), strict=True) if is_free]
    return f"nothing limits the weight of {names[0]}" if names else ""


def _constraints(
    programme: Programme,
    used: Floats,
    limits: Floats,
    prices: Floats,
    weights: Floats,
    most: Floats,
    caps: Floats,
) -> list[Constraint]:
    """Return margin and leverage where they are limited, and the largest weights that are reached."""
    names: tuple[Literal["margin", "leverage"], ...] = ("margin", "leverage")
    shown = [
        Constraint(name, None, u, limit, _binds(u, limit), max(0.0, price))
        for name, u, limit, price in zip(names, used.tolist(), limits.tolist(), prices.tolist(), strict=True)
        if np.isfinite(limit)
    ]
    each = zip(programme.assets, weights.tolist(), most.tolist(), caps.tolist(), programme.edges.tolist(), strict=True)
    return shown + [
        Constraint("weight", asset, w, high, binding=True, shadow_price=max(0.0, price))
        for asset, w, high, price, edge in each
        if edge > 0.0 and _binds(w, high)
    ]


def _binds(used: float, limit: float) -> bool:
    return bool(np.isfinite(limit)) and limit - used <= TOLERANCE * max(1.0, abs(limit))
