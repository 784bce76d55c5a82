"""All dashboards, by the name of their file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard

from ops.grafana import clearing, fleets, lending, margins, service
from ops.grafana.panels import plain

DASHBOARDS: Mapping[str, Callable[[], Dashboard]] = {
    "service": service.dashboard,
    "margins": margins.dashboard,
    "lending": lending.dashboard,
    "clearing": clearing.dashboard,
    "fleets": fleets.dashboard,
}
PLACE = Path(__file__).parent / "dashboards"


def rendered() -> dict[str, str]:
    """Return the JSON of every dashboard by its name."""
    return {name: _rendered(make()) for name, make in DASHBOARDS.items()}


def _rendered(made: Dashboard) -> str:
    whole = plain(made.build())
    for number, panel in enumerate(whole["panels"], start=1):
        panel["id"] = number
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def write() -> None:
    """Write every dashboard's file."""
    PLACE.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (PLACE / f"{name}.json").write_text(text)
