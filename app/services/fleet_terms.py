"""What a coordinator delegates to a member, and whether it may be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from app.domain.book import ZERO
from app.domain.money import checked_amount
from app.errors import invalid
from app.services import wallet

SERVICES_MAX = 32
PRIORITY_MAX = 1_000

Delegated = Literal["pooled", "isolated"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a coordinator delegates to a member."""

    max_margin: Decimal
    services: Sequence[str] = ()
    liquidation_priority: int = 0
    delegation: Delegated = "pooled"


def checked_terms(terms: Terms) -> Terms:
    """Return the terms with their digits alone. Raises InvalidError."""
    if not 0 <= terms.max_margin < Decimal("1e15"):
        raise invalid("/max_margin", "number_out_of_range", "max_margin is 0 or more, and below 1e15")
    if len(terms.services) > SERVICES_MAX:
        raise invalid("/services", "too_many", f"at most {SERVICES_MAX} services")
    for k, service in enumerate(terms.services):
        wallet.check_service(f"/services/{k}", service)
    if not 0 <= terms.liquidation_priority <= PRIORITY_MAX:
        detail = f"liquidation_priority is 0 to {PRIORITY_MAX}: the lowest is liquidated first"
        raise invalid("/liquidation_priority", "number_out_of_range", detail)
    most = digits("/max_margin", terms.max_margin)
    return Terms(most, sorted(set(terms.services)), terms.liquidation_priority, terms.delegation)


def digits(pointer: str, number: Decimal) -> Decimal:
    """Return a number that may be 0 with its digits alone. Raises InvalidError for more decimals than are kept."""
    return checked_amount(pointer, number) if number else ZERO
