"""What every margin model takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.domain.margin.venues.terms import VenueInputs, VenueParameters
from app.domain.parameters import MarketParameters, Regime
from app.domain.record import record
from app.domain.scenarios import NAMED, Scenario

Indices = NDArray[np.intp]
Figure = float | str | bool | None


@dataclass(frozen=True, slots=True)
class SpanCharges:
    """USD charges of one underlying in the SPAN model."""

    intra_commodity: float = 0.0
    delivery: float = 0.0
    inter_commodity_credit: float = 0.0
    short_option_minimum: float = 0.0


@record(frozen=True, slots=True)
class MarginTerms:
    """What a model needs beside the portfolio: parameters, the scenario set, the regime, SPAN charges.

    `venues` is what the caller knows of an underlying at a venue, by venue and underlying; `stable_prices` are the USD
    prices of stablecoins, 1 where one has none.
    """

    parameters: MarketParameters = field(default_factory=MarketParameters)
    scenarios: Sequence[Scenario] = NAMED["moderate"]
    scenario_set: str = "moderate"
    regime: Regime = "normal"
    span_charges: Mapping[str, SpanCharges] = field(default_factory=lambda: MappingProxyType({}))
    venues: Mapping[str, Mapping[str, VenueInputs]] = field(default_factory=lambda: MappingProxyType({}))
    stable_prices: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@record(frozen=True, slots=True)
class Worst:
    """What binds: a scenario by its index, or a rule by its name, and its profit and loss in USD."""

    rule: str
    index: int | None
    pnl: float


@record(frozen=True, slots=True)
class ScenarioTable:
    """The scenarios of a model, in order, with the book's profit and loss in USD in each, weighted.

    `in_ranges` says that `price_move` is a multiple of each underlying's price range R, `vol_in_ranges` that all
    `vol_move` are multiples of its volatility range. `shocks` holds the own moves of single underlyings.
    """

    price_move: Sequence[float]
    vol_move: Sequence[float]
    weight: Sequence[float]
    pnl: Floats
    in_ranges: Sequence[bool]
    vol_in_ranges: bool = False
    shocks: Sequence[Mapping[str, float]] = ()


@record(frozen=True, slots=True)
class MarginResult:
    """The margin of one model, USD, with its work shown.

    `per_underlying` maps a figure's name to (J,) or (J, S) values in the order of the portfolio's underlyings;
    `position_initial` and `position_maintenance` (n,) sum to the requirement, rules on the whole book aside.
    """

    model: str
    initial_margin: float
    maintenance_margin: float
    position_initial: Floats
    position_maintenance: Floats
    per_underlying: Mapping[str, Floats]
    parameters: Mapping[str, Figure | VenueParameters]
    add_ons: Mapping[str, float] = field(default_factory=dict)
    worst: Worst | None = None
    scenarios: ScenarioTable | None = None
    notes: Mapping[str, Figure] = field(default_factory=dict)
    not_modelled: tuple[str, ...] = ()


def worst_scenarios(pnl: Floats) -> Indices:
    """Return the index of the lowest profit and loss along the last axis, the first on a tie to rounding.

    Equal losses reached by different sums differ in the last bits: within 1e-12 of the largest figure they are
    a tie.
    """
    tolerance = 1e-12 * np.abs(pnl).max(axis=-1, keepdims=True, initial=0.0)
    binding: Indices = np.argmax(pnl <= pnl.min(axis=-1, keepdims=True) + tolerance, axis=-1)
    return binding


def worst_scenario(pnl: Floats) -> int:
    """Return `worst_scenarios` of one book's profit and loss (S,): of some twenty figures, in less time."""
    figures = pnl.tolist()
    least = min(figures)
    limit = least + 1e-12 * max(*figures, -least)
    return next(index for index, figure in enumerate(figures) if figure <= limit)
