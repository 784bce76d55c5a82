"""A real Prometheus that scrapes what a test runs, its rules loaded, asked over HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.db import embedded

RULES = Path(__file__).parents[1] / "ops" / "prometheus" / "rules.yml"
START_SECONDS_MAX = 60.0

needed = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus and promtool: apt-get install prometheus",
)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    address: str

    def ask(self, path: str, **parameters: Any) -> Any:
        """Return the data of an answer, which must be a success."""
        answer = httpx.get(f"{self.address}/api/v1/{path}", params=parameters, timeout=20, verify=False)
        assert answer.status_code == 200, (parameters, answer.text)
        return answer.json()["data"]

    def targets_up(self) -> int:
        return sum(target["health"] == "up" for target in self.ask("targets")["activeTargets"])

    def series(self, expression: str, start: float, end: float) -> list[list[float]]:
        """Return the values of each series of an expression, second by second."""
        found = self.ask("query_range", query=expression, start=start, end=end, step=1)["result"]
        return [[float(value) for _, value in one["values"]] for one in found]


@contextmanager
def scraping(place: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """Run Prometheus on targets (host:port) by job until the block ends."""
    jobs = [{"job_name": job, "static_configs": [{"targets": list(of)}]} for job, of in targets.items()]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": jobs,
    }
    written = place / "prometheus.json"  # JSON is YAML
    written.write_text(json.dumps(config))
    address = f"127.0.0.1:{embedded._free_port()}"
    command = [
        "prometheus",
        f"--config.file={written}",
        f"--storage.tsdb.path={place / 'tsdb'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (place / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=place, stdout=log, stderr=log)
    try:
        _wait_until_ready(process, f"http://{address}", place / "prometheus.log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(START_SECONDS_MAX)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{address}/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
