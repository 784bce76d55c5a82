"""Two API processes and two workers on one database, as an operator runs them: each can be killed and started again."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import text

from app import probe
from app.db import embedded
from app.db.session import Database
from app.errors import StartupError
from app.services.shards import SHARDS
from tests.flows.process import PRIMERISK, ROOT, START_SECONDS_MAX, STOP_SECONDS_MAX, Home, home

EXPOSED = {"api": "/readyz", "worker": "/metrics"}
"""Where each kind of process says that it is well."""

_HOLDER = text(
    "SELECT worker_id FROM screen_shards"
    " WHERE lease_until > now() AND shard = hashtextextended(:agent_id, 0) & (:shards - 1)"
)
_SHARES = text("SELECT count(*) FROM screen_shards WHERE lease_until > now() GROUP BY worker_id")


@dataclass(slots=True)
class Process:
    """One of the four. Killed and started again, it is where it was."""

    kind: Literal["api", "worker"]
    place: Home
    given: Mapping[str, str]
    port: int = field(default_factory=embedded._free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        setting = "PRIMERISK_PORT" if self.kind == "api" else "PRIMERISK_WORKER_METRICS_PORT"
        given = self.place.environment(PYTHONPATH=str(ROOT), **self.given, **{setting: str(self.port)})
        with (self.place.path / "log").open("ab") as out:
            self.process = subprocess.Popen(
                [PRIMERISK, self.kind], cwd=self.place.path, env=given, stdout=out, stderr=out
            )

    def stop(self) -> int:
        """Tell it to end, and return its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(STOP_SECONDS_MAX)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_SECONDS_MAX)

    def wait_until_well(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while (ill := self._ill()) is not None:
            said = (self.place.path / "log").read_text()
            assert self.is_alive, said
            assert time.monotonic() < deadline, f"{ill}: {said}"
            time.sleep(0.02)

    def _ill(self) -> StartupError | None:
        """Return what a health check has to say of it."""
        try:
            probe.check(self.address + EXPOSED[self.kind])
        except StartupError as error:
            return error
        return None


@dataclass(frozen=True, slots=True)
class Topology:
    """The four processes."""

    apis: tuple[Process, Process]
    workers: tuple[Process, Process]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(api.address for api in self.apis)

    def restore(self) -> None:
        """Start again whoever is gone, all at once, and return when all are well."""
        everybody = (*self.apis, *self.workers)
        for process in everybody:
            if not process.is_alive:
                process.start()
        for process in everybody:
            process.wait_until_well()


@contextmanager
def standing(
    given: Mapping[str, str],
    apis: Sequence[Mapping[str, str]] = ({}, {}),
    workers: Sequence[Mapping[str, str]] = ({}, {}),
) -> Iterator[Topology]:
    """Run the four on the database of `given`, each with some environment of its own, until the block ends."""
    with ExitStack() as stack:

        def process(kind: Literal["api", "worker"], own: Mapping[str, str]) -> Process:
            made = Process(kind, stack.enter_context(home()), {**given, **own})
            stack.callback(_end, made)
            return made

        first, second = (process("api", own) for own in apis)
        third, fourth = (process("worker", own) for own in workers)
        made = Topology((first, second), (third, fourth))
        made.restore()
        yield made


def _end(process: Process) -> None:
    if process.is_alive:
        process.kill()


async def process_watching(topology: Topology, database: Database, agent_id: str) -> Process:
    """Return the worker that has the account on its screen, once one has."""
    async with asyncio.timeout(20):
        while True:
            async with database.transaction("test") as tx:
                asked = {"agent_id": agent_id, "shards": SHARDS}
                holder = (await tx.connection.execute(_HOLDER, asked)).scalar_one_or_none()
            found = [worker for worker in topology.workers if holder and f"-{worker.pid}-" in holder]
            if found:
                return found[0]
            await asyncio.sleep(0.02)


async def shared_out(database: Database) -> None:
    """Wait until the accounts are shared out evenly among two workers."""
    async with asyncio.timeout(20):
        while True:
            async with database.transaction("test") as tx:
                shares = sorted((await tx.connection.execute(_SHARES)).scalars())
            if shares == [SHARDS // 2] * 2:
                return
            await asyncio.sleep(0.02)
