"""The service that the demonstration starts for itself."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.errors import StartupError

STOP_SECONDS_MAX = 30.0
_GREETING = "primerisk is at "


@dataclass(frozen=True, slots=True)
class Service:
    """A service that listens, and a key of it that may do anything."""

    address: str
    key: str


@contextmanager
def running_service() -> Iterator[Service]:
    """Run `primerisk serve` on an embedded Postgres in a directory of its own; both are gone afterwards.

    Raises StartupError, with what the service said, where it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="primerisk-demo-") as home:
        key = secrets.token_urlsafe(24)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PRIMERISK_")}
        own = {
            "PRIMERISK_DATA_DIR": f"{home}/data",
            "PRIMERISK_PORT": "0",
            "PRIMERISK_ADMIN_KEY": key,
            "PRIMERISK_WEBHOOK_ALLOW_PRIVATE": "true",  # the receiver is here
        }
        log = Path(home, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve"],
                cwd=home,
                env=kept | own,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for us: we stop it in order
            )
        try:
            yield Service(_address(process, log), key)
        finally:
            _stop(process)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    for raw in process.stdout or ():
        line = raw.decode()
        if line.startswith(_GREETING):
            return line.removeprefix(_GREETING).split()[0]
    said = log.read_text().strip().splitlines()
    raise StartupError(said[-1] if said else "the service did not start")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the service, whatever keys are pressed meanwhile: half a stop would leave Postgres behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    finally:
        signal.signal(signal.SIGINT, before)
