"""The OpenAPI document: FastAPI's routes with the schemas of the msgspec structs that they read."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.account import AccountSettingsIn
from app.api.agents import AgentPost, KeyPost
from app.api.backtest import BacktestIn
from app.api.escrows import EscrowActionPost, EscrowPost, ResolvePost
from app.api.fleets import (
    CascadePost,
    DryPowderPost,
    FleetPatch,
    FleetPost,
    MemberPatch,
    MemberPost,
    RebalancePost,
    SweepPost,
)
from app.api.history import HistoryPost
from app.api.lending import BorrowPost, HoldingPut, LendingPut, OfferPost, PledgePost, RecallPost, ReturnPost
from app.api.margin_calls import AcknowledgePost
from app.api.market import AssetPut, AssetsPut, CorrelationPut, InstrumentPut, InstrumentsPut, ParametersPut
from app.api.netting import AgreementActionPost, AgreementPost, ObligationPost
from app.api.plans import DeleverageIn, DrawdownIn
from app.api.prices import PricesPost
from app.api.quote_request import MarginQuoteIn
from app.api.sizing_request import SizingIn
from app.api.stress import StressIn
from app.api.trading import CancelPost, CollateralPost, FillPost, OrderPost, ReducePost
from app.api.var_request import VarQuoteIn
from app.api.venue_wire import PARAMETERS_PUT
from app.api.wallet import AmountIn, PartIn, ReservationPost
from app.api.webhooks import NothingIn, RecoverPost, WebhookPost
from app.api.what_if import WhatIfIn
from app.errors import FieldError

BODIES = (
    MarginQuoteIn,
    AssetPut,
    AssetsPut,
    InstrumentPut,
    InstrumentsPut,
    PricesPost,
    HistoryPost,
    ParametersPut,
    CorrelationPut,
    *PARAMETERS_PUT.values(),
    AccountSettingsIn,
    AmountIn,
    ReservationPost,
    PartIn,
    EscrowPost,
    EscrowActionPost,
    ResolvePost,
    AgreementPost,
    AgreementActionPost,
    ObligationPost,
    OrderPost,
    FillPost,
    CancelPost,
    ReducePost,
    CollateralPost,
    FleetPatch,
    FleetPost,
    MemberPost,
    MemberPatch,
    DryPowderPost,
    SweepPost,
    RebalancePost,
    CascadePost,
    WhatIfIn,
    VarQuoteIn,
    BacktestIn,
    StressIn,
    SizingIn,
    DeleverageIn,
    DrawdownIn,
    OfferPost,
    BorrowPost,
    ReturnPost,
    PledgePost,
    RecallPost,
    HoldingPut,
    LendingPut,
    AcknowledgePost,
    AgentPost,
    KeyPost,
    WebhookPost,
    RecoverPost,
    NothingIn,
)
_OPEN_PATHS = ("/healthz", "/readyz", "/metrics", "/metrics/accounts")


class Problem(msgspec.Struct):
    """An RFC 9457 problem document."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[FieldError]


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the document, made once and kept on the app."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    _, schemas = msgspec.json.schema_components((*BODIES, Problem), ref_template="#/components/schemas/{name}")
    components = document.setdefault("components", {})
    components["schemas"] = schemas
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path not in _OPEN_PATHS:
                operation["security"] = [{"key": []}]
    app.openapi_schema = document
    return document
