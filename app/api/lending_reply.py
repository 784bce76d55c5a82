"""Replies about lending: offers and loans as their owner sees them, markets, quotes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from decimal import Decimal
from typing import Any

from app.domain.book import ZERO, Book
from app.domain.health import Advisory
from app.domain.lending import curve_rate, interest_for
from app.domain.money import plain, to_decimal, to_float
from app.domain.parameters import LendingParameters
from app.errors import InvalidError
from app.services import lending
from app.services.holdings import HoldingSettings
from app.services.lending import Priced, Wanted
from app.services.loans import Loan, Market, Offer
from app.services.margin import Scene

CURVE_POINTS = tuple(Decimal(k) / 10 for k in range(11))
_YEAR = timedelta(days=365)


def offer_reply(offer: Offer, lent: Sequence[Loan], market: Market | None, scene: Scene) -> dict[str, Any]:
    """Return an offer with its live loans as one loan of its lender's: what is lent of it and what still waits."""
    curve = ZERO if market is None else market.rate
    principal = sum((loan.principal for loan in lent), ZERO)
    idle = max(offer.minimum_rate, curve)
    earned = sum((loan.principal * loan.rate_at(curve) for loan in lent), ZERO)
    decimals = scene.market.parameters.loans_of(offer.asset).decimals
    return {
        "id": offer.id,
        "loan_id": offer.id,
        "role": "lender",
        "asset": offer.asset,
        "amount": plain(offer.remaining + principal),
        "usdc_value": usd(scene, offer.asset, offer.remaining + principal),
        "offered": plain(offer.remaining),
        "lent": plain(principal),
        "borrow_rate_apy": plain(rounded(earned / principal if principal else idle)),
        "min_borrow_rate_apy": plain(offer.minimum_rate),
        "recall_notice_hours": offer.notice_seconds / 3600,
        "status": _status(offer, lent),
        "due_at": max((loan.due_at for loan in lent if loan.due_at is not None), default=None),
        "interest_due": plain(sum((loan.interest(decimals) for loan in lent), ZERO)),
        "created_at": offer.created_at,
        "loans": [lent_reply(loan, curve, decimals) for loan in lent],
    }


def _status(offer: Offer, lent: Sequence[Loan]) -> str:
    if not lent:
        return "offered" if offer.remaining > 0 else "closed"
    is_all_recalled = offer.remaining == 0 and all(loan.status == "recalled" for loan in lent)
    return "recalled" if is_all_recalled else "active"


def lent_reply(loan: Loan, curve: Decimal, decimals: int) -> dict[str, Any]:
    """Return a loan as both of its parties may see it."""
    return {
        "id": loan.id,
        "loan_id": loan.id,
        "asset": loan.asset,
        "amount": plain(loan.principal),
        "initial_amount": plain(loan.amount),
        "borrow_rate_apy": plain(loan.rate_at(curve)),
        "rate": loan.rate_kind,
        "recall_notice_hours": loan.notice_seconds / 3600,
        "status": loan.status,
        "recalled": plain(loan.recalled),
        "due_at": loan.due_at,
        "interest_due": plain(loan.interest(decimals)) if loan.is_live else ZERO,
        "interest_paid": plain(loan.interest_paid),
        "collateral": {"asset": loan.collateral_asset, "amount": plain(loan.collateral)},
        "collateral_low": loan.is_low,
        "deficit": plain(loan.deficit),
        "opened_at": loan.opened_at,
        "closed_at": loan.closed_at,
    }


def borrowed_reply(loan: Loan, market: Market | None, scene: Scene) -> dict[str, Any]:
    """Return a loan as its borrower sees it: with what it owes and how well that is secured."""
    terms = scene.market.parameters.loans_of(loan.asset)
    shown = lent_reply(loan, ZERO if market is None else market.rate, terms.decimals)
    debt = loan.principal + loan.interest(terms.decimals) if loan.is_live else ZERO
    return shown | {
        "role": "borrower",
        "usdc_value": usd(scene, loan.asset, loan.principal),
        "debt": plain(debt),
        "ratio": _ratio(scene, loan, debt),
        "collateral_ratio": terms.collateral_ratio,
        "low_ratio": terms.low_ratio,
        "liquidation_ratio": terms.liquidation_ratio,
    }


def _ratio(scene: Scene, loan: Loan, debt: Decimal) -> float | None:
    """Return the value of collateral after haircut over the debt, None where a price is missing or nothing is owed."""
    if debt == 0:
        return None
    try:
        prices = lending.prices_of(scene, loan.asset, loan.collateral_asset)
    except InvalidError:
        return None
    return to_float(prices.ratio(loan.collateral, debt))


def usd(scene: Scene, asset: str, amount: Decimal) -> float | None:
    """Return the worth of units at the stored price, USD, None where there is none."""
    try:
        return to_float(amount) * scene.price(asset)
    except InvalidError:
        return None


def rounded(rate: Decimal) -> Decimal:
    """Return a mean of rates with as many decimals as a rate has."""
    return rate.quantize(Decimal("0.00000001"))


def lent_advisories(held: Book, chosen: Mapping[str, HoldingSettings], ceiling: float) -> list[Advisory]:
    """Return the holdings of which more is lent or on offer than their ceilings allow now."""
    found = []
    for asset, holding in sorted(held.holdings.items()):
        out = holding.lent + holding.offered
        limit = chosen.get(asset, HoldingSettings()).ceiling(ceiling)
        if out > 0 and out > limit * holding.own:
            share = to_float(out / max(holding.own, out))
            detail = f"{share:.0%} of {asset} is lent out or on offer"
            found.append(Advisory("lent_share_high", detail, share, to_float(limit)))
    return found


def market_reply(market: Market, terms: LendingParameters, cheapest: Decimal | None) -> dict[str, Any]:
    """Return a market: its curve, where it stands on it, and what the next loan would cost and earn."""
    next_rate = market.rate if cheapest is None else max(market.rate, cheapest)
    return {
        "id": market.asset,
        "asset": market.asset,
        "supplied": plain(market.supplied),
        "borrowed": plain(market.borrowed),
        "available": plain(market.supplied - market.borrowed),
        "utilization": to_float(market.utilization),
        "curve_rate_apy": plain(market.rate),
        "borrow_rate_apy": plain(next_rate),
        "lend_rate_apy": plain(next_rate),
        "min_borrow_rate_apy": terms.minimum_rate,
        "curve": curve_reply(terms),
        "collateral_ratio": terms.collateral_ratio,
        "low_ratio": terms.low_ratio,
        "liquidation_ratio": terms.liquidation_ratio,
        "changed_at": market.changed_at,
    }


def curve_reply(terms: LendingParameters) -> dict[str, Any]:
    """Return the parameters of a curve, and eleven of its points."""
    names = ("base_rate", "slope", "steep_slope", "target_utilization")
    points = [{"utilization": used, "borrow_rate_apy": plain(curve_rate(used, terms))} for used in CURVE_POINTS]
    return {name: getattr(terms, name) for name in names} | {"points": points}


def quote_reply(scene: Scene, wanted: Wanted, priced: Priced) -> dict[str, Any]:
    """Return what a loan would cost and need, and at which price of its collateral it would be sold."""
    terms, prices = scene.market.parameters.loans_of(wanted.asset), priced.prices
    year = [
        interest_for(m.amount, rate, _YEAR, terms.decimals)
        for m, rate in zip(priced.matches, priced.rates, strict=True)
    ]
    low = wanted.amount * prices.asset * to_decimal(terms.liquidation_ratio)
    fixed_price = wanted.asset == wanted.collateral_asset
    return {
        "asset": wanted.asset,
        "amount": plain(wanted.amount),
        "rate": wanted.rate_kind,
        "borrow_rate_apy": plain(rounded(priced.rate)),
        "curve_rate_apy": plain(priced.market.rate),
        "utilization": to_float(priced.market.utilization),
        "interest_per_year": plain(sum(year, ZERO)),
        "interest_per_day": plain(interest_for(wanted.amount, priced.rate, timedelta(days=1), terms.decimals)),
        "collateral": {
            "asset": wanted.collateral_asset,
            "amount": plain(priced.collateral),
            "usdc_value": usd(scene, wanted.collateral_asset, priced.collateral),
            "haircut": to_float(1 - prices.kept),
        },
        "collateral_ratio": terms.collateral_ratio,
        "low_ratio": terms.low_ratio,
        "liquidation_ratio": terms.liquidation_ratio,
        "liquidation_price": None if fixed_price else to_float(low / (priced.collateral * prices.kept)),
        "stale_prices": lending.stale_of(scene, wanted.asset, wanted.collateral_asset),
        "matches": [
            {
                "amount": plain(m.amount),
                "borrow_rate_apy": plain(rate),
                "recall_notice_hours": m.offer.notice_seconds / 3600,
            }
            for m, rate in zip(priced.matches, priced.rates, strict=True)
        ],
    }


def holding_reply(asset: str, chosen: HoldingSettings, market: float) -> dict[str, Any]:
    """Return what an owner has said of its units of an asset, and the ceiling that follows."""
    return {"id": asset, "asset": asset, **asdict(chosen), "ceiling": chosen.ceiling(market)}
