"""One Postgres, one API and two workers as processes of their own, killed with SIGKILL and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from app.db import embedded
from app.db.embedded import EmbeddedPostgres
from tests.flows.process import PRIMERISK, ROOT, STOP_SECONDS_MAX, Home, home

POSTGRES, API = "postgres", "api"
WORKERS = ("worker-1", "worker-2")
ROLES = (POSTGRES, API, *WORKERS)
KINDS = ((POSTGRES,), (API,), WORKERS)
ADMIN_KEY = "an admin key that is long enough"
LEASE_SECONDS = 6.0
"""How long what a killed worker was sending stays its own: a second for the receiver, five of slack."""

_TEND_SECONDS = 0.05
_PAUSE_SECONDS = 0.3
"""Before a process that has ended by itself, as one does that starts without a database, is started again."""


@dataclass(slots=True)
class Stack:
    """The processes by role. A role that is down comes back when its moment has come."""

    place: Home
    port: int
    server: EmbeddedPostgres
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    back_at: dict[str, float] = field(default_factory=dict)
    ended: list[tuple[str, int]] = field(default_factory=list)
    """Processes that ended without being killed, with their exit codes."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self, role: str) -> Path:
        return self.place.path / f"{role}.log"

    def start(self, role: str) -> None:
        command = [str(PRIMERISK), "api" if role == API else "worker"]
        given = self.place.environment(
            PYTHONPATH=str(ROOT),
            PRIMERISK_DATABASE_URL=self.server.url,
            PRIMERISK_PORT=str(self.port),
            PRIMERISK_ADMIN_KEY=ADMIN_KEY,
            PRIMERISK_WEBHOOK_ALLOW_PRIVATE="true",
            PRIMERISK_WEBHOOK_SECONDS_MAX="1",
        )
        with self.log(role).open("ab") as out:
            self.processes[role] = subprocess.Popen(command, cwd=self.place.path, env=given, stdout=out, stderr=out)
        self.back_at.pop(role, None)

    def is_alive(self, role: str) -> bool:
        if role == POSTGRES:
            return role not in self.back_at and embedded.is_running(self.place.data)
        return role in self.processes and self.processes[role].poll() is None

    def kill(self, role: str, seconds_down: float) -> None:
        """Kill a role that is alive; it comes back after so long."""
        if role == POSTGRES:
            self._kill_postgres()
        else:
            self.processes[role].kill()
            self.processes[role].wait(STOP_SECONDS_MAX)
        self.back_at[role] = time.monotonic() + seconds_down

    def _kill_postgres(self) -> None:
        """Kill the main process and every one of its children: no orderly goodbye from any."""
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.server.pid)
            for process in (main, *main.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    async def tend(self) -> None:
        """Start again whatever is down and due, for ever."""
        while True:
            for role in ROLES:
                if role in self.back_at:
                    if time.monotonic() >= self.back_at[role]:
                        await self._revive(role)
                elif not self.is_alive(role):
                    self._note_end(role)
            await asyncio.sleep(_TEND_SECONDS)

    def _note_end(self, role: str) -> None:
        if role != POSTGRES:
            self.ended.append((role, self.processes[role].wait()))
        self.back_at[role] = time.monotonic() + _PAUSE_SECONDS

    async def _revive(self, role: str) -> None:
        if role != POSTGRES:
            self.start(role)
            return
        before = self.server
        self.server = await asyncio.to_thread(embedded.start, self.place.data)
        before.close()  # a share of the same server: the new one keeps it up
        if self.server.url != before.url:
            raise RuntimeError("Postgres came back on another port")
        del self.back_at[role]

    def stop(self) -> None:
        """Stop what is left, each by its pid, workers and API before their database."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.server.close()


@asynccontextmanager
async def standing(given: Mapping[str, str] | None = None) -> AsyncIterator[Stack]:
    """Yield a whole stack, tended; leave nothing of it behind."""
    with home() as place:
        port = embedded._free_port()
        stack = Stack(place, port, await asyncio.to_thread(embedded.start, place.data))
        tending = None
        try:
            for role in (API, *WORKERS):
                stack.start(role)
            tending = asyncio.create_task(stack.tend())
            yield stack
            if tending.done():
                tending.result()
        finally:
            if tending is not None:
                tending.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await tending
            await asyncio.to_thread(stack.stop)
