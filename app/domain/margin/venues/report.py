"""What the units of a book come to at a venue, laid out as every model's result is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from app.domain.black76 import Floats
from app.domain.margin.result import Figure, MarginResult, MarginTerms, ScenarioTable, Worst
from app.domain.margin.venues.unit import Unit
from app.domain.margin.venues.venue import Venue
from app.domain.parameters import DEFAULT_ASSET
from app.domain.portfolio import Portfolio
from app.domain.record import record
from app.errors import invalid, pointer_to

SCENARIOS_MAX = 1_000
"""Scenarios of one reply: each is a column of every underlying, and each underlying may have its own."""
NO_NOTES: Mapping[str, Figure] = {}


class Label(NamedTuple):
    """How a scenario is shown: its moves, its weight, and whether the price move is a multiple of the unit's range."""

    price_move: float
    vol_move: float
    weight: float = 1.0
    in_range: bool = False


@record(frozen=True, slots=True)
class UnitMargin:
    """One underlying's margin, USD, with its work: `pnl` (S,) as it counts in each labelled scenario, the binding one.

    `figures` are the terms of the venue's formula by name; shares (m,) sum to the margins. `worst` is given where
    something else than a scenario may bind, its index then counted among the unit's labels.
    """

    unit: Unit
    initial: float
    maintenance: float
    labels: tuple[Label, ...]
    pnl: Floats
    binding: int
    figures: Mapping[str, float]
    initial_share: Floats
    maintenance_share: Floats
    not_modelled: tuple[str, ...] = ()
    worst: Worst | None = None


@record(frozen=True, slots=True)
class Layout:
    """How a venue's result is laid out: what a binding scenario is called, and which figures, USD, are its add-ons."""

    rule: str
    charges: tuple[str, ...]
    in_vol_ranges: bool = False


@record(frozen=True, slots=True)
class AccountCharge:
    """What a venue asks of an account as a whole, USD, and the figures by name that it comes from.

    `of` are the underlyings and assets that it takes inputs of, with or without a position.
    """

    initial: float
    maintenance: float
    figures: Mapping[str, float]
    of: Collection[str]


NO_CHARGE = AccountCharge(0.0, 0.0, {}, ())


def report(
    venue: Venue[Any, Any],
    portfolio: Portfolio,
    terms: MarginTerms,
    margins: Sequence[UnitMargin],
    layout: Layout,
    *,
    account: AccountCharge = NO_CHARGE,
    notes: Mapping[str, Figure] = NO_NOTES,
) -> MarginResult:
    """Return the result of the units' margins, which add up: a venue nets nothing across underlyings.

    A figure is 0 for an underlying without an open position.
    """
    initial_share, maintenance_share = np.zeros(len(portfolio)), np.zeros(len(portfolio))
    for margin in margins:
        initial_share[margin.unit.rows] = margin.initial_share
        maintenance_share[margin.unit.rows] = margin.maintenance_share
    columns = _columns(portfolio, margins)
    table, by_unit, binding = _scenarios(venue.name, portfolio, margins, in_vol_ranges=layout.in_vol_ranges)
    absent = _unused(venue, terms, {m.unit.name for m in margins}, account.of)
    return MarginResult(
        model=venue.name,
        initial_margin=sum(m.initial for m in margins) + account.initial,
        maintenance_margin=sum(m.maintenance for m in margins) + account.maintenance,
        position_initial=initial_share,
        position_maintenance=maintenance_share,
        per_underlying={**columns, "worst_index": binding, "scenario_pnl": by_unit},
        parameters={m.unit.name: venue.parameters_of(terms.parameters, m.unit.name) for m in margins},
        add_ons={**{name: sum(m.figures[name] for m in margins) for name in layout.charges}, **account.figures},
        worst=_worst(margins, layout.rule, binding),
        scenarios=table,
        notes={**notes, **({"unused_inputs": ", ".join(absent)} if absent else {})},
        not_modelled=tuple(dict.fromkeys(name for m in margins for name in m.not_modelled)),
    )


def _unused(venue: Venue[Any, Any], terms: MarginTerms, units: AbstractSet[str], used: Collection[str]) -> list[str]:
    """Return of what the request says something that is not used; of all others, `default`, it can say parameters."""
    given = terms.venues.get(venue.name, {})
    others = given.get(DEFAULT_ASSET)
    has_inputs = others is not None and len(others.missing) < len(fields(others))
    is_followed = not has_inputs and any(venue.follows_default(terms.parameters, name) for name in units)
    return sorted(given.keys() - units - {*used, *((DEFAULT_ASSET,) if is_followed else ())})


def _worst(margins: Sequence[UnitMargin], rule: str, binding: Floats) -> Worst | None:
    """Return what binds the book: one rule and one scenario where all units have the same, the P&L of all of them."""
    if not margins:
        return None
    found = [m.worst or Worst(rule, m.binding, float(m.pnl[m.binding])) for m in margins]
    rules = {worst.rule for worst in found}
    places = {None if w.index is None else int(binding[m.unit.column]) for w, m in zip(found, margins, strict=True)}
    return Worst(
        rules.pop() if len(rules) == 1 else "several",
        places.pop() if len(places) == 1 else None,
        sum(worst.pnl for worst in found),
    )


def _columns(portfolio: Portfolio, margins: Sequence[UnitMargin]) -> dict[str, Floats]:
    columns = {"net_exposure": portfolio.net, "gross_exposure": portfolio.gross}
    for margin in margins:
        own = {"initial_margin": margin.initial, "maintenance_margin": margin.maintenance, **margin.figures}
        for name, value in own.items():
            columns.setdefault(name, np.zeros(len(portfolio.prices)))[margin.unit.column] = value
    return columns


def _scenarios(
    venue: str, portfolio: Portfolio, margins: Sequence[UnitMargin], *, in_vol_ranges: bool
) -> tuple[ScenarioTable | None, Floats, Floats]:
    """Return the scenarios that the units have, each table once, their P&L by unit (J, S), and which binds each (J,).

    Units whose parameters lay out other scenarios add theirs behind; a scenario is NaN for the units without it. Raises
    InvalidError `too_many_items` for more than the limit.
    """
    starts: dict[tuple[Label, ...], int] = {}
    labels: list[Label] = []
    for margin in margins:
        if margin.labels not in starts:
            starts[margin.labels] = len(labels)
            labels += margin.labels
    if len(labels) > SCENARIOS_MAX:
        detail = f"at most {SCENARIOS_MAX} scenarios among all underlyings, not {len(labels)}"
        raise invalid(pointer_to("market", "venues", venue), "too_many_items", detail)
    by_unit = np.full((len(portfolio.prices), len(labels)), np.nan)
    binding = np.full(len(portfolio.prices), np.nan)
    for margin in margins:
        start = starts[margin.labels]
        by_unit[margin.unit.column, start : start + len(margin.labels)] = margin.pnl
        binding[margin.unit.column] = start + margin.binding
    if not labels:
        return None, by_unit, binding
    table = ScenarioTable(
        price_move=[label.price_move for label in labels],
        vol_move=[label.vol_move for label in labels],
        weight=[label.weight for label in labels],
        pnl=np.nansum(by_unit, axis=0),
        in_ranges=[label.in_range for label in labels],
        vol_in_ranges=in_vol_ranges,
    )
    return table, by_unit, binding
