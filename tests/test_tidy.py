"""The tree keeps its own rules: sizes, one writer a table, a manual that names everything a caller can meet."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric

from app.db import clearing_tables, event_tables, fleet_tables, lending_tables, tables, trading_tables
from app.domain.webhooks import EVENT_TYPES
from app.settings import Settings
from app.telemetry import Metrics
from tests.manual import MANUAL, README, ROOT

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70

SOURCES = sorted((ROOT / "app").rglob("*.py"))


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX
    long = [f.name for f in _functions(path) if (f.end_lineno or 0) - f.lineno + 1 > FUNCTION_LINES_MAX]
    assert long == []


def test_a_table_has_one_writer() -> None:
    modules = (tables, event_tables, trading_tables, lending_tables, clearing_tables, fleet_tables)
    found = {name: value for module in modules for name, value in vars(module).items()}
    names = [name for name in found if name in tables.metadata.tables]
    assert set(names) == set(tables.metadata.tables)
    for name in names:
        pattern = re.compile(rf"\b(?:insert|update|delete)\({name}\b|(?:INSERT INTO|UPDATE|DELETE FROM)\s+{name}\b")
        writers = {path.name for path in SOURCES if pattern.search(path.read_text())}
        assert len(writers) <= 1, f"{name} is written by {writers}"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_readme_names_every_setting(name: str) -> None:
    assert f"`PRIMERISK_{name.upper()}`" in README


def test_the_readme_names_every_error_code() -> None:
    pattern = re.compile(
        r"code=\"([a-z_]+)\"|invalid\([^,()]+(?:\([^()]*\))?, \"([a-z_]+)\"|"
        r"FieldError\([^,]+, \"([a-z_]+)\"|_field\(i, name, \"([a-z_]+)\""
    )
    codes = {code for path in SOURCES for found in pattern.findall(path.read_text()) for code in found if code}
    assert len(codes) > 30
    assert {code for code in codes if f"`{code}`" not in README} == set()


def test_the_manual_names_every_metric() -> None:
    collected: list[Metric] = list(Metrics().registry.collect())
    own = {metric.name for metric in collected if metric.name.startswith("primerisk_")}
    for path in (ROOT / "app" / "services" / "figures").glob("*.py"):  # made at each scrape, of what there is then
        own |= set(re.findall(r"\"(primerisk_\w+)\"", path.read_text()))
    assert len(own) > 50
    assert {name for name in own if f"`{name}" not in MANUAL} == set()


def test_the_manual_names_every_event() -> None:
    assert {name for name in EVENT_TYPES if f"`{name}`" not in MANUAL} == set()


def test_the_manual_names_every_route() -> None:
    for path in (ROOT / "app" / "api").glob("*.py"):
        for template in re.findall(r"@router\.\w+\(\s*\"(/[^\"]+)\"", path.read_text()):
            noun = template.split("/")[1].partition("{")[0]
            assert f"/{noun}" in MANUAL, template


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
