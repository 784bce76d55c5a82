"""The OpenAPI document: whole, guarded, and changed only on purpose."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.api.service import Service

pytestmark = pytest.mark.asyncio(loop_scope="module")

SNAPSHOT = Path(__file__).with_name("openapi_routes.json")
OPEN = {"/healthz", "/readyz", "/metrics", "/metrics/accounts"}


async def _document(shared: Service) -> dict[str, Any]:
    answer = await shared.get("/openapi.json", key="")
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _resolved(document: dict[str, Any], reference: str) -> Any:
    found: Any = document
    assert reference.startswith("#/")
    for step in reference[2:].split("/"):
        found = found[step.replace("~1", "/").replace("~0", "~")]
    return found


async def test_every_reference_resolves(shared: Service) -> None:
    document = await _document(shared)
    references = set(_references(document))
    assert len(references) > 10
    for reference in references:
        assert _resolved(document, reference), reference


async def test_the_frame(shared: Service) -> None:
    document = await _document(shared)
    assert document["openapi"].startswith("3.1")
    assert document["info"]["title"] == "primerisk"
    assert document["info"]["version"]
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    ids = [operation["operationId"] for _, _, operation in _operations(document)]
    assert len(ids) == len(set(ids))


async def test_every_operation_needs_a_key_but_those_of_operations(shared: Service) -> None:
    for path, method, operation in _operations(await _document(shared)):
        assert ("security" in operation) == (path not in OPEN), (method, path)
        assert operation.get("security", [{"key": []}]) == [{"key": []}]


async def test_every_write_has_a_body_and_every_path_parameter_is_told(shared: Service) -> None:
    document = await _document(shared)
    for path, method, operation in _operations(document):
        told = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
        assert told == {part[1:-1] for part in path.split("/") if part.startswith("{")}, path
        assert ("requestBody" in operation) == (method in ("post", "put", "patch")), (method, path)
        if "requestBody" in operation:
            assert operation["requestBody"]["required"]
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert _resolved(document, schema["$ref"])["type"] == "object"


async def test_errors_are_told_as_problems(shared: Service) -> None:
    document = await _document(shared)
    problem = document["components"]["schemas"]["Problem"]
    assert problem["required"] == ["type", "title", "status", "detail", "code", "request_id", "errors"]
    for path, method, operation in _operations(document):
        assert "HTTPValidationError" not in json.dumps(operation)
        if path not in OPEN:
            media = operation["responses"]["default"]["content"]
            assert list(media) == ["application/problem+json"], (method, path)


async def test_the_body_of_a_quote_says_what_it_takes(shared: Service) -> None:
    schemas = (await _document(shared))["components"]["schemas"]
    assert schemas["MarginQuoteIn"]["required"] == ["positions"]
    fields = schemas["PositionIn"]["properties"]
    linear = {"symbol", "side", "size", "entry_price", "mark_price", "leverage", "margin_mode"}
    greeks, option = {"notional", "delta", "gamma", "vega"}, {"underlying", "type", "strike", "expiry", "iv", "rate"}
    assert linear | greeks | option <= fields.keys()


async def test_routes_are_those_of_the_snapshot(shared: Service) -> None:
    """After a change on purpose, write `found` to openapi_routes.json."""
    operations = _operations(await _document(shared))
    found = {f"{method.upper()} {path}": operation["summary"] for path, method, operation in operations}
    assert found == json.loads(SNAPSHOT.read_text())


async def test_the_pages_for_people(shared: Service) -> None:
    answer = await shared.get("/docs", key="")
    assert answer.status_code == 200
    assert "/openapi.json" in answer.text


async def test_the_pages_for_people_load_nothing_from_elsewhere(shared: Service) -> None:
    page = (await shared.get("/docs", key="")).text
    loaded = re.findall(r"<(?:script|link)[^>]*?(?:src|href)=\"([^\"]+)\"", page)
    assert len(loaded) >= 2
    for path in loaded:
        assert path.startswith("/")
        assert (await shared.get(path, key="")).status_code == 200
    assert "://" not in page
