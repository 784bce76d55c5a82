"""The installed `primerisk` as a process of its own, always stopped by its pid."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PRIMERISK = Path(sys.executable).with_name("primerisk")
ROOT = Path(__file__).parents[2]
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Home:
    """A directory of our own: the data directory in it, and the environment of what runs there."""

    path: Path

    @property
    def data(self) -> Path:
        return self.path / "data"

    def environment(self, **given: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        return kept | {"HOME": str(self.path), "PRIMERISK_DATA_DIR": str(self.data), "PRIMERISK_PORT": "0"} | given

    def run(
        self, *arguments: str, stdin: bytes = b"", given: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        command = [str(PRIMERISK), *arguments]
        return subprocess.run(
            command, check=False, cwd=self.path, env=self.environment(**given or {}), input=stdin, capture_output=True,
            timeout=START_SECONDS_MAX,
        )  # fmt: skip

    def servers(self) -> list[psutil.Process]:
        """Return every process that names a path of ours: postgres' main one, and what a command left behind."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and any(str(self.path) in part for part in process.cmdline()):
                    found.append(process)
        return found


@contextmanager
def home() -> Iterator[Home]:
    """Yield a home, and leave no process of it behind."""
    made = Home(Path(tempfile.mkdtemp(prefix="primerisk-serve-")))
    try:
        yield made
    finally:
        for process in made.servers():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGQUIT)
                process.wait(STOP_SECONDS_MAX)
        shutil.rmtree(made.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What `primerisk serve` printed."""

    address: str
    key: str
    curl: str


@dataclass(frozen=True, slots=True)
class Serving:
    """A `primerisk serve` that has greeted."""

    process: subprocess.Popen[bytes]
    greeting: Greeting

    def stop(self, number: int) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS_MAX)


@contextmanager
def serving(place: Home, *arguments: str, command: str = "serve", **given: str) -> Iterator[Serving]:
    """Run `primerisk serve` (or `api`) until it has greeted; kill it at the end if it is still there."""
    log = place.path / f"{command}.log"
    log.unlink(missing_ok=True)  # one that was here before has greeted in it
    with running(place, command, *arguments, **given) as process:
        yield Serving(process, _greeting(process, log))


@contextmanager
def running(place: Home, command: str, *arguments: str, **given: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command meanwhile, its words in a file of its name; kill it at the end if it is still there."""
    with (place.path / f"{command}.log").open("ab") as out:
        process = subprocess.Popen(
            [PRIMERISK, command, *arguments], cwd=place.path, env=place.environment(**given), stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(STOP_SECONDS_MAX)


def _greeting(process: subprocess.Popen[bytes], log: Path) -> Greeting:
    deadline = time.monotonic() + START_SECONDS_MAX
    pattern = re.compile(
        r"primerisk is at (?P<address>\S+).*?^key: +(?P<key>\S+)[^\n]*$.*?^try: +(?P<curl>[^\n]+)\n",
        re.MULTILINE | re.DOTALL,
    )
    while (found := pattern.search(log.read_text())) is None:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return Greeting(**found.groupdict())
