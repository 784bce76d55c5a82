"""The one error tree: each class carries the code, status and title that a caller sees.

PrimeriskError
├── BadRequestError         400  not JSON, or not HTTP
├── UnauthorizedError       401  no key, or not a valid one
├── ForbiddenError          403  the key lacks the scope
├── NotFoundError           404  no such thing, or not yours
├── RequestTimeoutError     408  the headers or the body came too slowly
├── ConflictError           409  state or version conflict
├── PayloadTooLargeError    413  over a named limit of bytes
├── InvalidError            422  well-formed, but refused: `errors` points at the fields
├── RateLimitedError        429  too many requests for this key
├── HeadersTooLargeError    431  over the limit of a request's head
├── OverloadedError         503  too many requests or connections in this process
└── DatabaseUnavailableError 503 the database is away, busy or at fault
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldError:
    """One refused field: a JSON pointer (RFC 6901), a code and a sentence."""

    pointer: str
    code: str
    detail: str


@dataclass(eq=False)
class PrimeriskError(Exception):
    """Base of every error that a caller is meant to see; `detail` never carries a secret or SQL.

    `figures` are members of the problem document beyond the usual ones, such as a shortfall.
    """

    detail: str
    code: str = "error"
    errors: tuple[FieldError, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    status = 500
    title = "Error"

    def __str__(self) -> str:
        """Return the detail, so that logs and the command line read well."""
        return self.detail


class BadRequestError(PrimeriskError):
    """The request is not JSON, or not HTTP as this service speaks it."""

    status, title = 400, "Bad request"


class UnauthorizedError(PrimeriskError):
    """No API key, or not a valid one."""

    status, title = 401, "Unauthorized"


class ForbiddenError(PrimeriskError):
    """The key is valid but lacks the scope."""

    status, title = 403, "Forbidden"


class NotFoundError(PrimeriskError):
    """No such resource, or one of another agent."""

    status, title = 404, "Not found"


class RequestTimeoutError(PrimeriskError):
    """The headers or the body did not arrive in time."""

    status, title = 408, "Request timeout"


class ConflictError(PrimeriskError):
    """The state, or an earlier request, stands against it."""

    status, title = 409, "Conflict"


class PayloadTooLargeError(PrimeriskError):
    """More bytes than the limit that `detail` names."""

    status, title = 413, "Payload too large"


class InvalidError(PrimeriskError):
    """The payload is well-formed but refused; `errors` points at the fields."""

    status, title = 422, "Unprocessable content"


class RateLimitedError(PrimeriskError):
    """Too many requests for this key."""

    status, title = 429, "Too many requests"


class HeadersTooLargeError(PrimeriskError):
    """More bytes of headers than the limit that `detail` names."""

    status, title = 431, "Request header fields too large"


class OverloadedError(PrimeriskError):
    """Too many requests or connections in this process."""

    status, title = 503, "Overloaded"


class DatabaseUnavailableError(PrimeriskError):
    """The database does not answer, or can't do what it is asked."""

    status, title = 503, "Database unavailable"


class StartupError(Exception):
    """The service can't start; the message is one clear line for the operator."""


_TOKEN_CHARACTERS_MAX = 64


def pointer_to(*steps: str) -> str:
    """Return the JSON pointer (RFC 6901) of the steps; long names are cut, what is no text is replaced."""
    return "".join("/" + _token(step) for step in steps)


def _token(step: str) -> str:
    shown = step if len(step) <= _TOKEN_CHARACTERS_MAX else step[:_TOKEN_CHARACTERS_MAX] + "…"
    return shown.encode("utf-8", "replace").decode().replace("~", "~0").replace("/", "~1")


@contextmanager
def pointers_under(prefix: str, instead_of: str = "") -> Iterator[None]:
    """Put a prefix before the pointers of an error that is raised inside, in place of another one."""
    with pointers_by(lambda pointer: prefix + pointer.removeprefix(instead_of)):
        yield


@contextmanager
def pointers_by(name: Callable[[str], str]) -> Iterator[None]:
    """Rename the pointers of an error that is raised inside."""
    try:
        yield
    except PrimeriskError as error:
        error.errors = tuple(FieldError(name(e.pointer), e.code, e.detail) for e in error.errors)
        raise


def invalid(pointer: str, code: str, detail: str) -> InvalidError:
    """Return the 422 of one field."""
    return InvalidError(detail=detail, code=code, errors=(FieldError(pointer, code, detail),))


def conflict(pointer: str, code: str, detail: str, **figures: Any) -> ConflictError:
    """Return the 409 of one field; `figures` are further members of the problem document."""
    return ConflictError(detail, code=code, errors=(FieldError(pointer, code, detail),), figures=figures)


def one_line(error: PrimeriskError) -> str:
    """Return what an error says at a terminal: where, and what."""
    where = ", ".join(e.pointer for e in error.errors if e.pointer)
    return f"{where}: {error}" if where else str(error)
