"""Errors as RFC 9457 problem documents: one handler, never a stack trace, SQL or a secret."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import telemetry
from app.api.body import encoder
from app.errors import PrimeriskError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_CODES = {404: "no_such_route", 405: "method_not_allowed"}


def problem_response(error: PrimeriskError) -> Response:
    """Return the problem document of an error."""
    body: dict[str, Any] = {
        "type": f"urn:primerisk:problem:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "request_id": telemetry.request_id.get(),
        "errors": error.errors,
        **error.figures,
    }
    return Response(encoder.encode(body), error.status, error.headers, MEDIA_TYPE)


class _RouterError(PrimeriskError):
    """An error that the router raised: no such route, wrong method."""


def _of_router(error: HTTPException) -> _RouterError:
    problem = _RouterError(
        detail=str(error.detail), code=_CODES.get(error.status_code, "http_error"), headers=dict(error.headers or {})
    )
    problem.status, problem.title = error.status_code, HTTPStatus(error.status_code).phrase
    return problem


def internal_error() -> PrimeriskError:
    """Return what a caller may know of a fault of ours."""
    return PrimeriskError(
        detail="The service made an error; it is logged under this request_id.", code="internal_error"
    )


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem document."""

    async def known(_: Request, error: Exception) -> Response:
        return problem_response(error if isinstance(error, PrimeriskError) else internal_error())

    async def routed(_: Request, error: Exception) -> Response:
        return problem_response(_of_router(error)) if isinstance(error, HTTPException) else await known(_, error)

    app.add_exception_handler(PrimeriskError, known)
    app.add_exception_handler(HTTPException, routed)
