"""An escrow: what its parties may do to it, what becomes of it at its time-out, and who receives what at its end.

The rule of time: from `deadline_at` on, by the database's clock under the row's lock, an escrow that is not disputed
can only time out, whether its timer has fired yet or not. A dispute stops the clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Literal

from app.domain.fees import decimals_of, fee_on, shared
from app.domain.money import plain, round_owed, round_owned
from app.errors import ForbiddenError, conflict

State = Literal["funded", "accepted", "disputed", "released", "refunded", "cancelled", "resolved"]
Role = Literal["payer", "payee", "arbiter", "admin"]
Kind = Literal["confirm", "cancel", "dispute", "resolve"]
FeePayer = Literal["payer", "payee", "split"]
OnTimeout = Literal["release", "refund"]

LIVE_STATES: tuple[State, ...] = ("funded", "accepted", "disputed")
ZERO = Decimal(0)

_MAY: dict[Kind, tuple[Role, ...]] = {
    "confirm": ("payer", "payee"),
    "cancel": ("payer", "payee"),
    "dispute": ("payer", "payee"),
    "resolve": ("arbiter", "admin"),
}


@dataclass(frozen=True, slots=True)
class Leg:
    """Units of an asset that one party delivers to the other."""

    asset: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed at funding. The fee is on `leg`; `referral_share` is 0 where nobody referred.

    `counter` is what the payee delivers for it, both at once or neither.
    """

    leg: Leg
    counter: Leg | None
    fee_rate: Decimal
    referral_share: Decimal
    fee_payer: FeePayer
    on_timeout: OnTimeout
    deadline_at: datetime

    @property
    def reserved(self) -> Decimal:
        """What is set aside of the payer's wallet: the amount, and its own part of the fee."""
        return self.leg.amount + self._split(self.fee)[0]

    @property
    def fee(self) -> Decimal:
        """The fee if all is paid to the payee."""
        return fee_on(self.leg.asset, self.leg.amount, self.fee_rate)

    def payout(self, to_payee: Decimal) -> Payout:
        """Return who receives what when so much of the amount, 0 to all of it, goes to the payee.

        The fee is on what is paid; of the counter leg the same share goes to the payer, rounded down.
        """
        if not 0 <= to_payee <= self.leg.amount:
            raise ValueError(f"{to_payee} of an escrow of {self.leg.amount}")
        fee = fee_on(self.leg.asset, to_payee, self.fee_rate)
        of_payer, of_payee = self._split(fee)
        parts = shared(self.leg.asset, fee, self.referral_share)
        given = self._counter_given(to_payee)
        return Payout(
            payee=to_payee - of_payee,
            referrer=parts.referral,
            platform=parts.platform,
            payer=self.reserved - to_payee - of_payer,
            counter_to_payer=given,
            counter_to_payee=ZERO if self.counter is None else self.counter.amount - given,
        )

    def _split(self, fee: Decimal) -> tuple[Decimal, Decimal]:
        """Return the payer's and the payee's part of a fee; of a split one the odd digit is the payer's."""
        if self.fee_payer == "split":
            half = round_owed(fee / 2, decimals_of(self.leg.asset))
            return half, fee - half
        return (fee, ZERO) if self.fee_payer == "payer" else (ZERO, fee)

    def _counter_given(self, to_payee: Decimal) -> Decimal:
        if self.counter is None:
            return ZERO
        if to_payee == self.leg.amount:
            return self.counter.amount
        return round_owned(self.counter.amount * to_payee / self.leg.amount, decimals_of(self.counter.asset))


@dataclass(frozen=True, slots=True)
class Payout:
    """An escrow's end. The first four sum to what was reserved of the payer, the others to the counter leg."""

    payee: Decimal
    referrer: Decimal
    platform: Decimal
    payer: Decimal
    counter_to_payer: Decimal
    counter_to_payee: Decimal

    @property
    def fee(self) -> Decimal:
        """What was charged."""
        return self.referrer + self.platform


@dataclass(frozen=True, slots=True)
class Contract:
    """An escrow as it stands. `to_payee` is set at its end: how much of the amount went to the payee, fee included."""

    terms: Terms
    state: State
    payer_confirmed: bool = False
    payee_confirmed: bool = False
    to_payee: Decimal | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing can become of it any more."""
        return self.state not in LIVE_STATES


@dataclass(frozen=True, slots=True)
class Action:
    """What a party does; `to_payee` is what a resolution gives the payee of the amount."""

    kind: Kind
    role: Role
    to_payee: Decimal | None = None


def step(contract: Contract, action: Action, now: datetime) -> Contract:
    """Return the contract after an action; unchanged where it was confirmed by this party before.

    Raises ConflictError where it is over, frozen, past its deadline or too far on for this; ForbiddenError where this
    is not the party's to do.
    """
    if action.role not in _MAY[action.kind]:
        raise ForbiddenError(f"the {action.role} of an escrow does not {action.kind} it", code="not_your_part")
    if contract.is_over:
        raise conflict("/state", "escrow_closed", f"the escrow is {contract.state}")
    if action.kind == "resolve":
        return _resolved(contract, action)
    if contract.state == "disputed":
        raise conflict("/state", "escrow_disputed", "the escrow is frozen until its dispute is resolved")
    if now >= contract.terms.deadline_at:
        then = "is released" if contract.terms.on_timeout == "release" else "is refunded"
        raise conflict(
            "/deadline_at", "escrow_expired", f"its time was over at {contract.terms.deadline_at}: it {then}"
        )
    if action.kind == "confirm":
        return _confirmed(contract, action.role)
    if action.kind == "cancel":
        if contract.state != "funded":
            raise conflict("/state", "escrow_accepted", "an escrow is cancelled before it is accepted: dispute it")
        return replace(contract, state="cancelled", to_payee=ZERO)
    if contract.state != "accepted":
        raise conflict("/state", "not_accepted", "an escrow is disputed once it is accepted: until then, cancel it")
    return replace(contract, state="disputed")


def time_out(contract: Contract, now: datetime) -> Contract:
    """Return the contract after its timer fired: unchanged where there is nothing to do yet, or any more.

    What was to be released is refunded where the payee has not delivered its leg.
    """
    if contract.state not in ("funded", "accepted") or now < contract.terms.deadline_at:
        return contract
    delivered = contract.terms.counter is None or contract.payee_confirmed
    if contract.terms.on_timeout == "release" and delivered:
        return replace(contract, state="released", to_payee=contract.terms.leg.amount)
    return replace(contract, state="refunded", to_payee=ZERO)


def _confirmed(contract: Contract, role: Role) -> Contract:
    payer = contract.payer_confirmed or role == "payer"
    payee = contract.payee_confirmed or role == "payee"
    after = replace(contract, payer_confirmed=payer, payee_confirmed=payee)
    if payer and payee:
        return replace(after, state="released", to_payee=contract.terms.leg.amount)
    return replace(after, state="accepted" if payee else contract.state)


def _resolved(contract: Contract, action: Action) -> Contract:
    if contract.state != "disputed":
        raise conflict("/state", "not_disputed", f"the escrow is {contract.state}: only a dispute is resolved")
    leg = contract.terms.leg
    to_payee = ZERO if action.to_payee is None else action.to_payee
    if to_payee > leg.amount:
        raise conflict("/to_payee", "amount_above_escrow", f"the escrow holds {plain(leg.amount):f} {leg.asset}")
    return replace(contract, state="resolved", to_payee=to_payee)
