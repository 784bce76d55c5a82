"""One venue: its model, and what it knows of each underlying."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.margin.venues.terms import VenueInputs, VenueParameters
from app.domain.parameters import DEFAULT_ASSET, MarketParameters
from app.domain.portfolio import Portfolio
from app.errors import invalid, pointer_to

P = TypeVar("P", bound=VenueParameters)
Q = TypeVar("Q", bound=VenueInputs)


@dataclass(frozen=True, slots=True)
class Venue(Generic[P, Q]):
    """A venue's name, its model, the types of its parameters and inputs, and its published parameters.

    `published` holds them by underlying; what stands under `default` holds for every other one.
    """

    name: str
    model: Callable[[Portfolio, MarginTerms], MarginResult]
    parameters: type[P]
    inputs: type[Q]
    published: Mapping[str, P]

    def listed(self, market: MarketParameters) -> Mapping[str, P]:
        """Return the parameters by underlying: stored ones in place of those that the package ships."""
        return {**self.published, **cast("Mapping[str, P]", market.venues.get(self.name, {}))}

    def known(self, market: MarketParameters, underlying: str) -> P | None:
        """Return an underlying's parameters, those for all others where it has none of its own, None without any."""
        found = self._own(market, underlying)
        return self._own(market, DEFAULT_ASSET) if found is None else found

    def _own(self, market: MarketParameters, underlying: str) -> P | None:
        stored = cast("Mapping[str, P]", market.venues.get(self.name, {}))
        return stored.get(underlying, self.published.get(underlying))

    def follows_default(self, market: MarketParameters, underlying: str) -> bool:
        """Whether an underlying has no parameters of its own."""
        return self._own(market, underlying) is None

    def parameters_of(self, market: MarketParameters, underlying: str) -> P:
        """Return an underlying's parameters. Raises InvalidError `missing_parameters` for one without any."""
        found = self.known(market, underlying)
        if found is None:
            pointer = pointer_to("market", "venues", self.name, underlying, "parameters")
            raise invalid(pointer, "missing_parameters", f"{self.name} has no parameters for {underlying}")
        return found

    def inputs_of(self, terms: MarginTerms, underlying: str) -> Q:
        """Return what the caller knows of an underlying, nothing where it says nothing."""
        given = cast("Mapping[str, Q]", terms.venues.get(self.name, {}))
        return given.get(underlying) or self.inputs()
