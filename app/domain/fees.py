"""What clearing charges: a fee rounded up against whoever owes it, and shares of it that lose no digit."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from app.domain.money import DECIMALS_MAX, round_owed, round_owned
from app.domain.moves import SETTLEMENT_ASSET, SETTLEMENT_DECIMALS


def decimals_of(asset: str) -> int:
    """Return the decimals that an asset is cleared in: fees and shares are rounded at the last of them."""
    return SETTLEMENT_DECIMALS if asset == SETTLEMENT_ASSET else DECIMALS_MAX


def fee_on(asset: str, amount: Decimal, rate: Decimal) -> Decimal:
    """Return the fee on an amount, rounded up; never above the amount where the rate is 1 or less.

    The amount has no more decimals than the asset is cleared in.
    """
    return round_owed(amount * rate, decimals_of(asset))


@dataclass(frozen=True, slots=True)
class SharedFee:
    """A fee by who receives it: the referrer's share rounded down, the platform's is the rest."""

    referral: Decimal
    platform: Decimal


def shared(asset: str, fee: Decimal, referral_share: Decimal) -> SharedFee:
    """Return a fee's two parts, which sum to it."""
    referral = round_owned(fee * referral_share, decimals_of(asset))
    return SharedFee(referral, fee - referral)
