"""The one way in and the one way out: bytes to typed structs once, structs to bytes once.

msgspec decodes straight from the bytes and validates in C. What it can't say (a NaN is not JSON, a key stands
twice) is found by a second look that only doubtful bodies pay for.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Generic, TypeVar, cast

import msgspec
import numpy as np
from msgspec import Meta
from starlette.responses import Response

from app.errors import BadRequestError, InvalidError, invalid, pointer_to

T = TypeVar("T")

encoder = msgspec.json.Encoder(decimal_format="number")
"""Decimals leave as JSON numbers with their exact digits."""

Moment = Annotated[str, Meta(max_length=40, extra_json_schema={"format": "date-time"})]
"""A time as text, read by `moment`: re-encoded it keeps its spelling, which the hunt for hidden keys relies on."""

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_PATH = re.compile(r"(?P<message>.*) - at (?:`key` in )?`\$(?P<path>[^`]*)`", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_ANY_KEY = "..."
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_MESSAGE_MAX = 200
_COUNTED_BYTES_MAX = 8_192
"""Bodies below this are counted faster by `bytes.count`."""
BRACKETS_MAX = 200_000
"""Arrays or objects that the second look takes: more than any limit of ours lets through."""


Number = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": ["number", "string"]})]
"""A number with all its digits, read by `exact`: the decoder's own Decimal takes `1_000` and Arabic digits as well."""

NOT_GIVEN = cast("msgspec.Raw", None)
"""The default of a number that may be left out: Raw takes null by itself, and no union with None."""

_NUMBER = re.compile(
    rb"""\s*(?P<quote>"?)(?P<digits>-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,9})?)(?P=quote)\s*"""
)


class Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Base of request bodies: unknown fields are refused, and re-encoding yields just what was given."""


class JsonResponse(Response):
    """A reply that is encoded once."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the content as JSON."""
        return encoder.encode(content)


class EncodedResponse(Response):
    """A reply that is JSON already, made without Starlette's look at kinds, charsets and headers of others."""

    def __init__(self, body: bytes) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]


def moment(text: str, pointer: str) -> datetime:
    """Return the time of an RFC 3339 text. Raises InvalidError, also for one without a zone.

    One that has no year in UTC is the first or the last that there is, so that whoever asks can convert it.
    """
    if _RFC3339.fullmatch(text):
        try:
            found = datetime.fromisoformat(text.upper())
            found.astimezone(UTC)
        except ValueError:
            pass  # such as the 30th of February: refused like any other text below
        except OverflowError:
            return (datetime.min if found.year == 1 else datetime.max).replace(tzinfo=UTC)
        else:
            return found
    raise invalid(pointer, "invalid_value", "a time is written like 2026-12-25T08:00:00Z, with its zone")


def exact(number: msgspec.Raw, pointer: str) -> Decimal:
    """Return a JSON number, or a string of one, with its exact digits. Raises InvalidError."""
    found = _NUMBER.fullmatch(bytes(number))
    if found is None:
        raise invalid(pointer, "invalid_value", "a number or a decimal string is expected")
    return Decimal(found["digits"].decode())


def exact_or_none(number: msgspec.Raw | None, pointer: str) -> Decimal | None:
    """Return as `exact` does, None for what was left out or null."""
    return None if number is None or bytes(number) == b"null" else exact(number, pointer)


class Body(Generic[T]):
    """A decoder of one request type. Every field left out must default to None or UNSET.

    `colons` tells how many a value has when it is written as JSON, for a type that can tell without writing it.
    """

    def __init__(self, type_: type[T], colons: Callable[[T], int] | None = None) -> None:
        self.type = type_
        self._colons = colons or colons_written
        # lax: a decimal string counts as its number
        self._decoder = msgspec.json.Decoder(type_, strict=False)

    def decode(self, raw: bytes) -> T:
        """Return the body. Raises BadRequestError (not JSON), InvalidError (refused, with pointers)."""
        try:
            value = self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise self._refused(raw, str(error)) from None
        except UnicodeDecodeError:
            raise BadRequestError(detail="the body is not UTF-8", code="not_json") from None
        except msgspec.DecodeError as error:
            raise _malformed(raw, str(error)) from None
        except RecursionError:
            raise _too_deep() from None
        # more colons than what was understood of it: a key may stand twice. Nulls and escapes raise the doubt as well
        if b"\\" in raw or _colons(raw) != self._colons(value):
            _second_look(raw, "the body holds a number that is too long")
        return value

    def _refused(self, raw: bytes, text: str) -> InvalidError:
        """Return the refusal with a pointer to the field, taken from the decoder's message."""
        match = _PATH.fullmatch(text)
        message, path = (match["message"], match["path"]) if match else (text, "")
        steps = [None if index == _ANY_KEY else name or index for name, index in _STEP.findall(path)]
        code = "invalid_value"
        if unknown := _UNKNOWN.fullmatch(message):
            code, steps = "unknown_field", [*steps, unknown["name"]]
        elif absent := _MISSING.fullmatch(message):
            code, steps = "missing_field", [*steps, absent["name"]]
        elif message.endswith("out of range"):
            code = "number_out_of_range"
        where = self._found(raw, steps) if None in steps else cast("list[str]", steps)
        return invalid(pointer_to(*where), code, _cut(message))

    def _found(self, raw: bytes, steps: _Steps) -> list[str]:
        """Return the steps with the keys of objects, which the decoder leaves out; up to the first that is not found.

        The decoder stopped there, so that what follows may be no JSON, or hold the same keys again. The message, and
        so the steps, may hold the caller's own text.
        """
        document = _plain(_second_look(raw, "the body is malformed"))
        told = self._refusal(document)
        found: list[str] = []
        for step in steps:
            key = self._refused_key(document, found, told) if step is None else step
            if key is None:
                break
            found.append(key)
        return found

    def _refused_key(self, document: Any, steps: list[str], told: str | None) -> str | None:
        """Return the key of the object at `steps` whose value is refused, found by halving its keys; None without one.

        Only what is told of the whole document counts: another value may be refused for another reason.
        """
        parent = _value_at(document, steps[:-1])
        place = _place(parent, steps[-1]) if steps else None
        entries = None if place is None else parent[place]
        if told is None or not isinstance(entries, dict) or not entries:
            return None
        while len(entries) > 1:
            items = list(entries.items())
            half = dict(items[: len(items) // 2])
            parent[place] = half
            entries = half if self._refusal(document) == told else dict(items[len(items) // 2 :])
        parent[place] = entries
        return cast("str", next(iter(entries)))

    def _refusal(self, document: Any) -> str | None:
        try:
            msgspec.convert(document, self.type, strict=False)
        except msgspec.ValidationError as error:
            return str(error)
        return None


_Steps = Sequence[str | None]
"""Names and indices of a path, None for a key that the decoder leaves out."""


def _place(parent: Any, step: str) -> str | int | None:
    """Return what a step is to its object or array, None where there is no such value."""
    if isinstance(parent, list):
        return int(step) if step.isdecimal() and int(step) < len(parent) else None
    return step if isinstance(parent, dict) and step in parent else None


def _value_at(document: Any, steps: Sequence[str]) -> Any:
    """Return the value at a path, None without one."""
    for step in steps:
        place = _place(document, step)
        if place is None:
            return None
        document = document[place]
    return document


def _cut(message: str) -> str:
    return message if len(message) <= _MESSAGE_MAX else message[:_MESSAGE_MAX] + "…"


def colons_written(value: object) -> int:
    """Return how many colons the value has when it is written as JSON."""
    return _colons(encoder.encode(value))


def _colons(raw: bytes) -> int:
    """Return how many there are: in large bodies ten times faster than `bytes.count`, which stops at each."""
    if len(raw) < _COUNTED_BYTES_MAX:
        return raw.count(b":")
    return int(np.count_nonzero(np.frombuffer(raw, np.uint8) == ord(":")))


class _Pairs(list[tuple[str, Any]]):
    """An object as it was written: keys may stand twice."""


def _parse(raw: bytes) -> Any:
    """Parse with every key kept. Raises ValueError where it is no JSON, InvalidError where it nests too deeply."""
    if max(raw.count(b"["), raw.count(b"{")) > BRACKETS_MAX:
        raise _too_deep()
    try:
        return json.loads(raw.decode(), object_pairs_hook=_Pairs)
    except RecursionError:
        raise _too_deep() from None


def _second_look(raw: bytes, message: str) -> Any:
    """Return the document, in which no key stands twice. Raises InvalidError, or BadRequestError with the message."""
    try:
        document = _parse(raw)
        if b"\\u" in raw:
            _check_text(document)
    except ValueError:
        raise BadRequestError(detail=message, code="not_json") from None
    _check_keys(document)
    return document


def _malformed(raw: bytes, message: str) -> BadRequestError | InvalidError:
    """Tell a body with NaN or Infinity, which other encoders emit, from one that is no JSON at all."""
    document = _second_look(raw, message)
    for value, path in _walk(document):
        if isinstance(value, float) and not math.isfinite(value):
            return invalid(pointer_to(*_steps(path)), "not_finite", "a number must be finite")
    return BadRequestError(detail=message, code="not_json")


def _too_deep() -> InvalidError:
    return invalid("", "nested_too_deeply", "the JSON is nested too deeply")


def _check_text(document: Any) -> None:
    """Refuse half a surrogate pair, which can't be said again in a reply. Raises ValueError."""
    for value, _ in _walk(document):
        texts = [name for name, _ in value] if isinstance(value, _Pairs) else [value]
        for text in texts:
            if isinstance(text, str):
                text.encode()


def _check_keys(document: Any) -> None:
    """Refuse a key that stands twice in one object. Raises InvalidError."""
    for value, path in _walk(document):
        if isinstance(value, _Pairs) and len(dict(value)) < len(value):
            name = next(name for name, count in Counter(name for name, _ in value).items() if count > 1)
            raise invalid(pointer_to(*_steps(path), name), "duplicate_key", "a key stands twice in one object")


_Path = tuple[Any, str] | None
"""A linked list from a value up to the document: (path of the parent, key or index)."""


def _walk(document: Any) -> Iterator[tuple[Any, _Path]]:
    """Yield every object, array and value with its path, without recursion: depth costs nothing."""
    stack: list[tuple[Any, _Path]] = [(document, None)]
    while stack:
        value, path = stack.pop()
        yield value, path
        if isinstance(value, _Pairs):
            stack.extend((item, (path, name)) for name, item in reversed(value))
        elif isinstance(value, list):
            stack.extend((value[i], (path, str(i))) for i in range(len(value) - 1, -1, -1))


def _steps(path: _Path) -> list[str]:
    steps: list[str] = []
    while path is not None:
        path, name = path
        steps.append(name)
    return steps[::-1]


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {name: _plain(item) for name, item in value}
    return [_plain(item) for item in value] if isinstance(value, list) else value
