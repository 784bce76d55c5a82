"""The margin models by name, all behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from app.domain.margin.cross import cross
from app.domain.margin.isolated import isolated
from app.domain.margin.portfolio import portfolio_margin
from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.margin.scenario import scenario
from app.domain.margin.span import span
from app.domain.margin.venues.registry import VENUES
from app.domain.portfolio import Portfolio

MarginModel = Callable[[Portfolio, MarginTerms], MarginResult]

MODELS: Mapping[str, MarginModel] = MappingProxyType(
    {
        "isolated": isolated,
        "cross": cross,
        "scenario": scenario,
        "portfolio": portfolio_margin,
        "span": span,
        **{name: venue.model for name, venue in VENUES.items()},
    }
)
