"""Fleets: in which zone they are, what is left of their wallets, whom they stand by."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from ops.grafana.panels import board, figure, graph, quantiles, row, rows, sql, stacked

RELEASE = "max(primerisk_fleet_release_seconds)"


def dashboard() -> Dashboard:
    """Return the dashboard of fleets."""
    made = board("primerisk: fleets", "fleets", "How fleets stand as one, what is delegated, drawn and kept dry.")
    for part in (_now, _wallets, _told):
        made = part(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    used = 'max(primerisk_fleet_usdc{kind="drawn"}) / max(primerisk_fleet_usdc{kind="balance"} > 0) or vector(0)'
    return (
        made.with_row(row("Now"))
        .with_panel(figure("Fleets", "", "short", "sum(max by (zone) (primerisk_fleets))"))
        .with_panel(
            figure(
                "In ORANGE or RED",
                "As last told.",
                "short",
                'sum(max by (zone) (primerisk_fleets{zone=~"ORANGE|RED"}))',
                1.0,
            )
        )
        .with_panel(figure("Drawn", "Share of all fleets' wallets that members hold.", "percentunit", used, 0.8, 0.85))
        .with_panel(figure("Dry powder out", "Of the release that is oldest.", "s", RELEASE, 1.0, 86_400.0))
        .with_panel(
            figure(
                "Reduce only",
                "Members that hold more than is delegated.",
                "short",
                'max(primerisk_fleet_members{state="reduce_only"})',
                1.0,
            )
        )
        .with_panel(
            figure(
                "Drifting",
                "Fleets whose recent correlations are far from calm ones.",
                "short",
                "max(primerisk_fleets_drifting)",
                1.0,
            )
        )
    )


def _wallets(made: Dashboard) -> Dashboard:
    kinds = {"{{kind}}": 'max by (kind) (primerisk_fleet_usdc{kind!="delegated"})'}
    return (
        made.with_row(row("Wallets"))
        .with_panel(graph("Wallets of all fleets", "What they hold, and how it is spoken for.", "currencyUSD", kinds))
        .with_panel(
            graph(
                "Delegated and drawn",
                "Delegations are lines: together they may be more than there is.",
                "currencyUSD",
                {"{{kind}}": 'max by (kind) (primerisk_fleet_usdc{kind=~"delegated|drawn"})'},
            )
        )
        .with_panel(stacked("Members by state", "", "short", {"{{state}}": "max by (state) (primerisk_fleet_members)"}))
    )


def _told(made: Dashboard) -> Dashboard:
    table = """
        SELECT name, zone, balance, drawn, delegated, dry_powder, now() - released_at AS released_for, release_reason,
               now() - drifted_at AS drifting_for, members, reduce_only, invited, fleet_id
        FROM operator_fleets
        ORDER BY array_position(ARRAY['RED', 'ORANGE', 'YELLOW', 'GREEN'], zone), drawn / greatest(balance, 1) DESC
        LIMIT 200"""
    return (
        made.with_row(row("What becomes of them"))
        .with_panel(stacked("By zone", "As last told.", "short", {"{{zone}}": "max by (zone) (primerisk_fleets)"}))
        .with_panel(
            graph(
                "Zone changes",
                "Fleets that came into a zone, an hour.",
                "short",
                {"{{zone}}": "sum by (zone) (increase(primerisk_fleet_zone_changes_total[1h]))"},
            )
        )
        .with_panel(
            graph(
                "Stood by",
                "Members in breach that their fleet drew for, an hour; fleets whose dry powder is out.",
                "short",
                {
                    "top-ups": "sum(increase(primerisk_fleet_top_ups_total[1h]))",
                    "released": "max(primerisk_fleets_released)",
                },
            )
        )
        .with_panel(
            graph(
                "Time of a look",
                "At all fleets of a worker, once a second.",
                "s",
                quantiles("primerisk_fleet_look_seconds"),
            )
        )
        .with_panel(rows("Fleets", "Those first that are in danger.", sql(table), span=16))
    )
