"""The venues by name. Another venue is one more entry here, and its name in `MarginModelName`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from app.domain.margin.venues.deribit import DERIBIT
from app.domain.margin.venues.derive import DERIVE
from app.domain.margin.venues.okx import OKX
from app.domain.margin.venues.paradex import PARADEX
from app.domain.margin.venues.venue import Venue

VENUES: Mapping[str, Venue[Any, Any]] = MappingProxyType(
    {venue.name: venue for venue in (DERIBIT, OKX, DERIVE, PARADEX)}
)
