"""An account's ratios, scales, bands and advisories. Definitions: docs/quotes.md, "Health"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

import numpy as np

from app.domain.collateral import Collateral
from app.domain.curves import AccountCurve
from app.domain.parameters import HealthPolicy
from app.domain.record import record

MAINTENANCE_MIN = 1e-9
"""USD below which there is nothing to keep: a ratio to it says nothing."""

Band = Literal["safe", "warning", "critical"]
ZONES = ("GREEN", "YELLOW", "ORANGE", "RED")


@record(frozen=True, slots=True)
class BandValue:
    """One figure and the band it lies in; None where the figure is not defined."""

    value: float | None
    band: Band


@record(frozen=True, slots=True)
class Advisory:
    """Something a careful owner would look at: a code, a sentence, the figure and the limit it passed."""

    code: str
    detail: str
    value: float | None = None
    limit: float | None = None


@record(frozen=True, slots=True)
class Health:
    """The figures of an account's pooled book, USD or fractions. None: not defined at this equity.

    Three scales, never merged: `zone` by utilization, `alert_level` by margin_ratio, `status` by both.
    """

    model: str
    equity: float
    required_initial: float
    required_maintenance: float
    reserved: float
    utilization: float | None
    margin_ratio: float | None
    liquidation_buffer: float | None
    net_exposure_ratio: float | None
    stress_survival: float | None
    gross_leverage: float | None
    free_margin: float
    headroom: float
    shortfall: float
    health_score: float
    insolvent: bool
    zone: str
    alert_level: str
    status: str
    bands: Mapping[str, BandValue] = field(default_factory=dict)


@record(frozen=True, slots=True)
class Standing:
    """What health is judged on, USD: equity, requirements with reservations, exposures."""

    model: str
    equity: float
    required_initial: float
    required_maintenance: float
    reserved: float
    net_exposure: float
    gross_exposure: float


@record(frozen=True, slots=True)
class Scales:
    """The two ratios of an account, None where equity leaves them undefined, and its place on the three scales."""

    utilization: float | None
    margin_ratio: float | None
    insolvent: bool
    zone: str
    alert_level: str
    status: str


def scales(equity: float, initial: float, maintenance: float, policy: HealthPolicy) -> Scales:
    """Return where equity and the required margins, USD, stand."""
    insolvent = equity < 0.0 or (equity == 0.0 and initial > 0.0)
    utilization = _ratio(initial, equity, insolvent)
    margin_ratio = _ratio(maintenance, equity, insolvent)
    return Scales(
        utilization=utilization,
        margin_ratio=margin_ratio,
        insolvent=insolvent,
        zone=_zone(utilization, policy),
        alert_level=_alert_level(margin_ratio, policy),
        status=_status(utilization, margin_ratio, policy),
    )


def assess(standing: Standing, curve: AccountCurve, policy: HealthPolicy) -> Health:
    """Return the health of a standing; `curve` gives the figures after the survival moves."""
    equity, initial = standing.equity, standing.required_initial
    found = scales(equity, initial, standing.required_maintenance, policy)
    insolvent, utilization, margin_ratio = found.insolvent, found.utilization, found.margin_ratio
    # one division, not 1 - margin_ratio: at a ratio of .80 the buffer is .20 to the last bit
    spare = equity - standing.required_maintenance
    buffer = None if insolvent else 1.0 if standing.required_maintenance == 0.0 else spare / equity
    net = _ratio(abs(standing.net_exposure), equity, insolvent)
    survival = None if insolvent else stress_survival(curve, policy.survival_move)
    return Health(
        model=standing.model,
        equity=equity,
        required_initial=initial,
        required_maintenance=standing.required_maintenance,
        reserved=standing.reserved,
        utilization=utilization,
        margin_ratio=margin_ratio,
        liquidation_buffer=buffer,
        net_exposure_ratio=net,
        stress_survival=survival,
        gross_leverage=_ratio(standing.gross_exposure, equity, insolvent),
        free_margin=max(0.0, equity - initial),
        headroom=max(0.0, equity - initial / policy.target_utilization),
        shortfall=max(0.0, initial / policy.shortfall_utilization - equity),
        health_score=0.0 if margin_ratio is None else 100.0 * min(max(1.0 - margin_ratio, 0.0), 1.0),
        insolvent=insolvent,
        zone=found.zone,
        alert_level=found.alert_level,
        status=found.status,
        bands=_bands(utilization, margin_ratio, buffer, net, survival, policy, insolvent=insolvent),
    )


def _ratio(numerator: float, equity: float, insolvent: bool) -> float | None:
    if numerator == 0.0 and not insolvent:
        return 0.0
    return None if equity <= 0.0 else numerator / equity


def stress_survival(curve: AccountCurve, move: float) -> float | None:
    """Return the smaller, over a fall and a rise, of equity after / maintenance after; None: nothing to keep."""
    ratios = [
        after.equity / after.maintenance for after in curve.points((-move, move)) if after.maintenance > MAINTENANCE_MIN
    ]
    return min(ratios, default=None)


def _zone(utilization: float | None, policy: HealthPolicy) -> str:
    if utilization is None or utilization >= policy.zone_red:
        return "RED"
    if utilization >= policy.zone_orange:
        return "ORANGE"
    return "YELLOW" if utilization >= policy.zone_yellow else "GREEN"


def _alert_level(margin_ratio: float | None, policy: HealthPolicy) -> str:
    if margin_ratio is None or margin_ratio >= policy.alert_emergency:
        return "EMERGENCY"
    if margin_ratio >= policy.alert_danger:
        return "DANGER"
    return "WARNING" if margin_ratio >= policy.alert_warning else "OK"


def _status(utilization: float | None, margin_ratio: float | None, policy: HealthPolicy) -> str:
    if utilization is None or margin_ratio is None or margin_ratio >= policy.status_liquidation:
        return "LIQUIDATION"
    if utilization >= policy.status_danger:
        return "DANGER"
    return "WARNING" if utilization >= policy.status_warning else "SAFE"


def _rising(value: float | None, warning: float, critical: float) -> BandValue:
    """Band of a figure that is worse the higher it is."""
    if value is None or value >= critical:
        return BandValue(value, "critical")
    return BandValue(value, "warning" if value >= warning else "safe")


def _falling(value: float | None, safe: float, warning: float) -> BandValue:
    """Band of a figure that is worse the lower it is."""
    if value is None or value < warning:
        return BandValue(value, "critical")
    return BandValue(value, "safe" if value >= safe else "warning")


def _bands(
    utilization: float | None,
    margin_ratio: float | None,
    buffer: float | None,
    net: float | None,
    survival: float | None,
    policy: HealthPolicy,
    *,
    insolvent: bool,
) -> dict[str, BandValue]:
    p = policy
    survives = _falling(survival, p.band_survival_safe, p.band_survival_warning)
    if survival is None and not insolvent:
        survives = BandValue(None, "safe")
    return {
        "margin_ratio": _rising(margin_ratio, p.band_margin_ratio_warning, p.band_margin_ratio_critical),
        "utilization": _rising(utilization, p.band_utilization_warning, p.band_utilization_critical),
        "liquidation_buffer": _falling(buffer, p.band_buffer_safe, p.band_buffer_warning),
        "net_exposure_ratio": _rising(net, p.band_net_exposure_warning, p.band_net_exposure_critical),
        "stress_survival": survives,
    }


def advisories(
    collateral: Collateral, allocated: float, gross_leverage: float | None, policy: HealthPolicy
) -> list[Advisory]:
    """Return what is worth a look: stablecoin share, one coin's share, lent share, gross leverage, allocations.

    Shares are of the market value of all holdings, before haircuts. A stablecoin is not a concentration. `allocated`
    is what isolated positions hold for themselves, USD.
    """
    found = [*_share_advisories(collateral, policy), *_lent_advisories(collateral, policy)]
    if gross_leverage is not None and gross_leverage > policy.leverage_cap:
        detail = f"gross exposure is {gross_leverage:.2f} times equity"
        found.append(Advisory("leverage_above_cap", detail, gross_leverage, policy.leverage_cap))
    value = collateral.collateral_value
    if allocated > value:
        detail = f"isolated positions are allocated {allocated:,.2f} of a collateral value of {value:,.2f}"
        found.append(Advisory("allocated_above_collateral", detail, allocated, value))
    return found


def _share_advisories(collateral: Collateral, policy: HealthPolicy) -> list[Advisory]:
    columns = (collateral.amount, collateral.price, collateral.stable)
    held = zip(collateral.assets, *(column[: collateral.holdings].tolist() for column in columns), strict=False)
    stables, coins = 0.0, dict[str, float]()
    for asset, amount, price, is_stable in held:
        if is_stable:
            stables += amount * price
        else:
            coins[asset] = coins.get(asset, 0.0) + amount * price
    total = stables + sum(coins.values())
    if total <= 0.0:
        return []
    found = []
    stable = stables / total
    if stable < policy.stable_share_min:
        detail = f"stablecoins are {stable:.0%} of collateral"
        found.append(Advisory("stable_share_low", detail, stable, policy.stable_share_min))
    for asset in sorted(coins):
        share = coins[asset] / total
        if share > policy.asset_share_max:
            detail = f"{asset} is {share:.0%} of collateral"
            found.append(Advisory("asset_share_high", detail, share, policy.asset_share_max))
    return found


def _lent_advisories(collateral: Collateral, policy: HealthPolicy) -> list[Advisory]:
    if not np.count_nonzero(collateral.lent):
        return []
    share = np.divide(collateral.lent, collateral.amount, out=np.zeros_like(collateral.lent), where=collateral.lent > 0)
    return [
        Advisory(
            "lent_share_high",
            f"{share[k]:.0%} of {collateral.assets[k]} is lent out",
            float(share[k]),
            policy.lent_share_max,
        )
        for k in np.flatnonzero(share > policy.lent_share_max)
    ]
