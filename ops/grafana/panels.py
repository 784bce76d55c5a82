"""Panels as all dashboards have them: one place for sources, sizes, units and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, dashboard

METRICS = dashboard.DataSourceRef(type_val="prometheus", uid="primerisk-prometheus")
DATABASE = dashboard.DataSourceRef(type_val="grafana-postgresql-datasource", uid="primerisk-postgres")

HEIGHT, WIDE, HALF, THIRD, SIXTH = 8, 24, 12, 8, 4

Expressions = Mapping[str, str]
"""PromQL by legend: a legend may have labels in it, as `{{route}}`."""


@dataclass
class _Sql(variants.Dataquery):
    """A query of Postgres, which the library has no builder for."""

    sql: str

    def to_json(self) -> dict[str, object]:
        """Return what Grafana stores of it."""
        return {
            "refId": "A",
            "datasource": {"type": DATABASE.type_val, "uid": DATABASE.uid},
            "format": "table",
            "rawQuery": True,
            "rawSql": self.sql,
            "editorMode": "code",
        }


class _SqlBuilder(Builder[variants.Dataquery]):
    def __init__(self, sql: str) -> None:
        self._sql = sql

    def build(self) -> variants.Dataquery:
        """Return the query."""
        return _Sql(self._sql)


def board(title: str, name: str, description: str) -> dashboards.Dashboard:
    """Return an empty dashboard; `name` is its place in Grafana's addresses."""
    return (
        dashboards.Dashboard(title)
        .uid(f"primerisk-{name}")
        .description(description)
        .tags(["primerisk"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("utc")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .readonly()
    )


def graph(title: str, description: str, unit: str, lines: Expressions, span: int = THIRD) -> timeseries.Panel:
    """Return a panel of lines over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(METRICS)
        .unit(unit)
        .min(0)
        .span(span)
        .height(HEIGHT)
        .fill_opacity(10)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
        )
    )
    for target in _targets(lines):
        panel = panel.with_target(target)
    return panel


def stacked(title: str, description: str, unit: str, lines: Expressions, span: int = THIRD) -> timeseries.Panel:
    """Return a panel of areas that add up."""
    return (
        graph(title, description, unit, lines, span)
        .fill_opacity(50)
        .stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    )


def figure(
    title: str, description: str, unit: str, expression: str, warn: float | None = None, alarm: float | None = None
) -> stat.Panel:
    """Return one number, green below `warn`, orange from there on, red from `alarm` on."""
    steps = [dashboard.Threshold(value=None, color="green")]
    for value, color in ((warn, "orange"), (alarm, "red")):
        if value is not None:
            steps.append(dashboard.Threshold(value=value, color=color))
    [target] = _targets({title: expression})
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(METRICS)
        .unit(unit)
        .span(SIXTH)
        .height(4)
        .color_mode(common.BigValueColorMode.BACKGROUND)
        .graph_mode(common.BigValueGraphMode.AREA)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboards.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(target)
    )


def rows(title: str, description: str, statement: str, span: int = HALF) -> table.Panel:
    """Return a table of what an operator's view holds."""
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(DATABASE)
        .span(span)
        .height(10)
        .with_target(_SqlBuilder(statement))
    )


def sql(text: str) -> str:
    """Return a statement on one line."""
    return " ".join(text.split())


def row(title: str) -> dashboards.Row:
    """Return the heading of what follows."""
    return dashboards.Row(title)


def _targets(lines: Expressions) -> Sequence[prometheus.Dataquery]:
    return [
        prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + place))
        for place, (legend, expression) in enumerate(lines.items())
    ]


def quantiles(name: str, by: str = "", *shares: float) -> dict[str, str]:
    """Return expressions of a histogram's quantiles over all processes; `by` is a label that stays."""
    kept, legend = (f"{by}, le", f"{{{{{by}}}}} ") if by else ("le", "")
    rate = f"sum by ({kept}) (rate({name}_bucket[$__rate_interval]))"
    return {f"{legend}p{share * 100:g}": f"histogram_quantile({share}, {rate})" for share in shares or (0.5, 0.99)}


def plain(built: Any) -> Any:
    """Return an object of the library's as JSON holds it."""
    if isinstance(built, Mapping):
        return {name: plain(value) for name, value in built.items()}
    if isinstance(built, list | tuple):
        return [plain(value) for value in built]
    if hasattr(built, "to_json"):
        return plain(built.to_json())
    return built
