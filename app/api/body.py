"""The one way in and the one way out: bytes to typed structs once, structs to bytes once.

msgspec decodes straight from the bytes and validates in C. What it can't say (a NaN is not JSON, a key stands
twice) is found by a second look that only doubtful bodies pay for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
from starlette.responses import Response

from app.errors import BadRequestError, FieldError, InvalidError, invalid

T = TypeVar("T")

encoder = msgspec.json.Encoder(decimal_format="number")
"""Decimals leave as JSON numbers with their exact digits."""

_PATH = re.compile(r"^(?P<message>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_ANY_KEY = "..."
_UNKNOWN = re.compile(r"unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]*)`")


class Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Base of request bodies: unknown fields are refused, and re-encoding yields just what was given."""


class JsonResponse(Response):
    """A reply that is encoded once."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the content as JSON."""
        return encoder.encode(content)


class Body(Generic[T]):
    """A decoder of one request type. Every field left out must default to None."""

    def __init__(self, type_: type[T]) -> None:
        self.type = type_
        # lax: a decimal string counts as its number
        self._decoder = msgspec.json.Decoder(type_, strict=False)

    def decode(self, raw: bytes) -> T:
        """Return the body. Raises BadRequestError (not JSON), InvalidError (refused, with pointers)."""
        try:
            value = self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise self._refused(raw, str(error)) from None
        except msgspec.DecodeError as error:
            raise _malformed(raw, str(error)) from None
        except RecursionError:
            raise _too_deep() from None
        if _may_hide_keys(raw, value):
            _loads(raw)
        return value

    def _refused(self, raw: bytes, text: str) -> InvalidError:
        """Return the refusal with a pointer to the field, taken from the decoder's message."""
        match = _PATH.match(text)
        message, path = (match["message"], match["path"] or "") if match else (text, "")
        steps = [name or index for name, index in _STEP.findall(path)]
        code = "invalid_value"
        if unknown := _UNKNOWN.search(message):
            code, steps = "unknown_field", [*steps, unknown["name"]]
        elif absent := _MISSING.search(message):
            code, steps = "missing_field", [*steps, absent["name"]]
        elif "out of range" in message:
            code = "number_out_of_range"
        if _ANY_KEY in steps:
            steps = self._with_key(raw, steps)
        pointer = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
        return InvalidError(detail=message, code=code, errors=(FieldError(pointer, code, message),))

    def _with_key(self, raw: bytes, steps: list[str]) -> list[str]:
        """Replace the decoder's `...` by the key that it refused, found by halving the object's keys."""
        at = steps.index(_ANY_KEY)
        document = _loads(raw)
        parent = document
        for step in steps[: at - 1]:
            parent = parent[int(step)] if isinstance(parent, list) else parent[step]
        entries = parent[steps[at - 1]]
        while len(entries) > 1:
            keys = list(entries)
            half = {key: entries[key] for key in keys[: len(keys) // 2]}
            parent[steps[at - 1]] = half
            refused = self._refuses(document)
            entries = half if refused else {key: entries[key] for key in keys[len(keys) // 2 :]}
        return [*steps[:at], *entries, *steps[at + 1 :]]

    def _refuses(self, document: Any) -> bool:
        try:
            msgspec.convert(document, self.type, strict=False)
        except msgspec.ValidationError:
            return True
        return False


def _may_hide_keys(raw: bytes, value: object) -> bool:
    """Whether the body may hold a key twice: it has more colons than what was understood of it.

    Nulls, escapes and other spellings of a time raise the doubt as well; the second look settles it.
    """
    return b"\\" in raw or raw.count(b":") != encoder.encode(value).count(b":")


def _malformed(raw: bytes, message: str) -> BadRequestError | InvalidError:
    """Tell a body with NaN or Infinity, which other encoders emit, from one that is no JSON at all."""
    try:
        value = _loads(raw)
    except InvalidError as error:
        return error
    except (ValueError, UnicodeDecodeError):
        return BadRequestError(detail=message, code="not_json")
    pointer = next(_not_finite(value, ""), None)
    if pointer is None:
        return BadRequestError(detail=message, code="not_json")
    detail = "a number must be finite"
    return invalid(pointer, "not_finite", detail)


def _too_deep() -> InvalidError:
    detail = "the JSON is nested too deeply"
    return invalid("", "nested_too_deeply", detail)


def _loads(raw: bytes) -> Any:
    """Parse strictly. Raises InvalidError for a key that stands twice or nesting that is too deep."""
    try:
        return json.loads(raw, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise _too_deep() from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    detail = f"the key {twice[:64]!r} stands twice in one object"
    raise InvalidError(
        detail=detail, code="duplicate_key", errors=(FieldError(f"/{twice[:64]}", "duplicate_key", detail),)
    )


def _not_finite(value: Any, pointer: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield pointer
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f"{pointer}/{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{pointer}/{index}")
