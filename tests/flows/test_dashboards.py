"""Prometheus scrapes two API processes and two workers while the demonstration plays: every panel shows something.

The whole service is started as an operator starts it; the expressions are those of the committed dashboards.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx
from sqlalchemy import text

from app.db import embedded
from app.db.session import Database
from app.demo.fleet import FLEET
from app.services import ledger
from ops.grafana.build import PLACE
from tests import prometheus
from tests.flows.process import PRIMERISK, ROOT, Home, home, running, serving
from tests.flows.trader import ADMIN_KEY, settings_of, wait_for_workers
from tests.prometheus import Prometheus, scraping

pytestmark = prometheus.needed

DEMO_SECONDS = 8
VARIABLES = {"$__rate_interval": "20s", "$__interval": "1s", "$__range": "5m"}


@dataclass(frozen=True, slots=True)
class Stack:
    """Two API processes and two workers, each where it shows its metrics."""

    place: Home
    apis: tuple[str, str]
    workers: tuple[str, str]
    doomed: Sequence[subprocess.Popen[bytes]]
    """The second of each."""


@contextmanager
def _standing(database: Database) -> Iterator[Stack]:
    """Run the processes, each with a home of its own for its log."""
    with ExitStack() as stack:
        homes = [stack.enter_context(home()) for _ in range(4)]
        given = {"PYTHONPATH": str(ROOT), **settings_of(database), "PRIMERISK_FIGURES_SECONDS": "0.5"}
        given["PRIMERISK_AGENTS_MAY_DEPOSIT"] = "false"  # as docker-compose.yml has it
        workers = tuple(f"127.0.0.1:{embedded._free_port()}" for _ in range(2))
        working = [
            stack.enter_context(
                running(place, "worker", **given, PRIMERISK_WORKER_METRICS_PORT=shown.rpartition(":")[2])
            )
            for place, shown in zip(homes[2:], workers, strict=True)
        ]
        served = [stack.enter_context(serving(place, command="api", **given)) for place in homes[:2]]
        first, second = (one.greeting.address for one in served)
        doomed = served[1].process, working[1]
        yield Stack(homes[0], (first, second), (workers[0], workers[1]), doomed)


def _expressions() -> list[tuple[str, str]]:
    """Return every expression of every panel with where it stands."""
    return [
        (f"{path.stem}: {panel['title']}: {target['legendFormat']}", target["expr"])
        for path in sorted(PLACE.glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
        if "expr" in target
    ]


def _tables() -> list[str]:
    boards = [json.loads(path.read_text()) for path in sorted(PLACE.glob("*.json"))]
    panels = [panel for board in boards for panel in board["panels"]]
    return [target["rawSql"] for panel in panels for target in panel.get("targets", ()) if "rawSql" in target]


def _filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def _play(stack: Stack) -> str:
    command = [str(PRIMERISK), "demo", "--seconds", str(DEMO_SECONDS), "--address", stack.apis[0]]
    given = stack.place.environment(PYTHONPATH=str(ROOT), PRIMERISK_ADMIN_KEY=ADMIN_KEY)
    done = subprocess.run(
        command, check=False, cwd=stack.place.path, env=given, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_the_demonstration_fills_every_panel(database: Database) -> None:
    with _standing(database) as stack:
        await wait_for_workers(database, 2)
        apis = [address.removeprefix("http://") for address in stack.apis]
        targets = {"primerisk-api": apis, "primerisk-worker": list(stack.workers)}
        with scraping(stack.place.path, targets) as asked:
            while asked.targets_up() < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            started = time.time()  # noqa: TID251  Prometheus's clock
            await asyncio.sleep(2.0)  # what counts from zero is seen at zero
            said = await asyncio.to_thread(_play, stack)
            assert re.search(r"[1-9]\d* webhooks received", said), said
            await asyncio.sleep(3.0)
            ended = time.time()  # noqa: TID251
            _check_panels(asked, started, ended)
            _check_rules(asked)
            _check_agreement(stack)
            await _check_survivors(stack, database)
        async with database.transaction("test") as tx:
            assert await ledger.imbalances(tx) == {}
            for statement in _tables():
                assert (await tx.connection.execute(text(statement))).keys()


def _check_panels(asked: Prometheus, started: float, ended: float) -> None:
    empty = []
    for where, expression in _expressions():
        found = asked.series(_filled(expression), started, ended)
        if not any(not math.isnan(value) for values in found for value in values):
            empty.append((where, expression))
    assert empty == []


def _check_rules(asked: Prometheus) -> None:
    groups = asked.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert firing <= {"PrimeriskDeficit", "PrimeriskLoanDeficit", "PrimeriskAgentsOwe", "PrimeriskCallsSlow"}, (
        "whatever a crash may bring"
    )


def _check_agreement(stack: Stack) -> None:
    """Check that both API processes and both workers say the same of the service."""
    addresses = [*stack.apis, *(f"http://{worker}" for worker in stack.workers)]
    shown = [httpx.get(f"{address}/metrics").text for address in addresses]
    for name in ("accounts", "margin_calls", "shards", "loans", "escrows_open", "netting_agreements", "fleets"):
        pattern = rf"^primerisk_{name}\{{.*$"
        told = [re.findall(pattern, text, re.MULTILINE) for text in shown]
        assert told[0]
        assert all(one == told[0] for one in told), told


async def _check_survivors(stack: Stack, database: Database) -> None:
    """Kill an API process and a worker: what the others say of the service is right again within seconds."""
    async with database.transaction("test") as tx:
        everybody = (await tx.connection.execute(text("SELECT count(*) FROM accounts"))).scalar_one()
    assert everybody > len(FLEET), "those who lend and pay too"
    for process in stack.doomed:
        process.kill()
    wanted = {'primerisk_shards{state="held"} 64.0', "primerisk_workers 1.0"}
    async with httpx.AsyncClient() as client, asyncio.timeout(30):
        while True:
            shown = (await client.get(f"{stack.apis[0]}/metrics")).text
            accounts = re.findall(r"^primerisk_accounts\{.*\} (\S+)$", shown, re.MULTILINE)
            if wanted <= set(shown.splitlines()) and sum(map(float, accounts)) == everybody:
                return
            await asyncio.sleep(0.2)


def test_the_rules_are_those_that_are_tested() -> None:
    tests = sorted((ROOT / "ops/prometheus").glob("rules*_test.yml"))
    command = ["promtool", "test", "rules", *map(str, tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    alerts = set(re.findall(r"- alert: (\w+)", prometheus.RULES.read_text()))
    fired = set(re.findall(r'alertname="(\w+)"', "".join(path.read_text() for path in tests)))
    assert alerts
    assert alerts == fired
