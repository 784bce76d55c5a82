"""The dashboards are what the code makes, Grafana's own library reads them, and they name only what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.grafana.build import DASHBOARDS, PLACE, rendered
from ops.grafana.panels import DATABASE, METRICS, plain
from tests.manual import MANUAL

ROOT = Path(__file__).parents[2]
RULES = ROOT / "ops/prometheus/rules.yml"


def _board(name: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((PLACE / f"{name}.json").read_text())
    return board


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_committed_dashboard_is_what_the_code_makes(name: str) -> None:
    assert (PLACE / f"{name}.json").read_text() == rendered()[name], "make dashboards"


def test_there_is_no_other_file() -> None:
    assert {path.stem for path in PLACE.iterdir()} == DASHBOARDS.keys()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafanas_library_reads_it_back_unchanged(name: str) -> None:
    board = _board(name)
    again = plain(Dashboard.from_json(board))
    assert [p["title"] for p in again["panels"]] == [p["title"] for p in board["panels"]]
    for panel, read in zip(board["panels"], again["panels"], strict=True):
        expressions = [target["expr"] for target in panel.get("targets", ()) if "expr" in target]
        assert [target["expr"] for target in read.get("targets", ()) if "expr" in target] == expressions
        assert read.get("gridPos") == panel.get("gridPos")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_are_told_apart_explained_and_lie_side_by_side(name: str) -> None:
    panels = _board(name)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]


def test_the_sources_are_those_that_are_provisioned() -> None:
    given = yaml.safe_load((ROOT / "ops/grafana/provisioning/datasources/primerisk.yml").read_text())["datasources"]
    assert {(one["uid"], one["type"]) for one in given} == {(s.uid, s.type_val) for s in (METRICS, DATABASE)}
    used = {panel["datasource"]["uid"] for name in DASHBOARDS for panel in _board(name)["panels"] if "targets" in panel}
    assert used == {METRICS.uid, DATABASE.uid}


def test_rules_and_panels_name_series_that_are_told_of() -> None:
    """That each is really there is seen in `tests/flows/test_dashboards.py`."""
    text = RULES.read_text() + "".join((PLACE / f"{name}.json").read_text() for name in DASHBOARDS)
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    names = set(re.findall(r"(?<![\w:])primerisk_\w+(?![\w:])", text))
    assert len(names) > 40
    series = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    assert {
        name for name in series if f"`{name}" not in MANUAL and f"`{name.removesuffix('_total')}" not in MANUAL
    } == set()
    assert recorded


def test_every_alert_has_its_entry_in_the_operators_page() -> None:
    page = (ROOT / "docs/operating.md").read_text()
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert f"### {rule['alert']}\n" in page, rule["alert"]
                assert rule["annotations"]["runbook"] == f"docs/operating.md#{rule['alert'].lower()}"
