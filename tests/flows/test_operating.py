"""The operator's page: its commands are run as they stand, one after the other, in one shell."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.db import embedded
from app.db.session import Database
from tests.flows.process import PRIMERISK, ROOT, STOP_SECONDS_MAX, Home, home
from tests.flows.trader import settings_of

PAGE = (ROOT / "docs" / "operating.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PORTS = ("8001", "8002", "9101", "9102")


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


def _script(database: Database, ports: dict[str, str]) -> str:
    """Return the page's commands, with ports that are free and names that are this test's own."""
    names = {"restored": f"restored_{database.url.database}", "primerisk_reader": f"reader_{database.url.database}"}
    script = "\n".join(BLOCKS)
    for given, own in (names | ports).items():
        script = re.sub(rf"\b{given}\b", own, script)
    return script


def test_the_commands_of_the_page_work(place: Home, database: Database) -> None:
    assert len(BLOCKS) >= 6
    free = {port: str(embedded._free_port()) for port in PORTS}
    script = _script(database, free)
    path = f"{PRIMERISK.parent}{os.pathsep}{embedded.client('psql').parent}{os.pathsep}{os.environ['PATH']}"
    given = place.environment(**settings_of(database), PYTHONPATH=str(ROOT)) | {"PATH": path}
    # in a session of its own, so that what it leaves in the background is stopped by its group
    with (place.path / "operating.log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", "-eux", "-c", script], cwd=place.path, env=given, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(240)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    said = (place.path / "operating.log").read_text()
    assert code == 0, said[-3_000:]
    assert {path.name for path in place.path.glob("*.backup")} == {"primerisk.backup", "before-upgrade.backup"}
    _drop(database, given)


def _drop(database: Database, given: dict[str, str]) -> None:
    """Take away what the commands made beside the test's own database."""
    name = database.url.database
    for statement in (
        f"DROP DATABASE restored_{name} WITH (FORCE)",
        f"DROP OWNED BY reader_{name}",
        f"DROP ROLE reader_{name}",
    ):
        command = [str(embedded.client("psql")), given["PRIMERISK_DATABASE_URL"], "--quiet", "--command", statement]
        subprocess.run(command, check=True, timeout=STOP_SECONDS_MAX, capture_output=True)


def test_a_backup_is_one_file_and_fills_only_an_empty_database(place: Home) -> None:
    """Of the embedded Postgres, from nothing: what was booked is there again."""
    made = place.run("agent", "Alice")
    assert made.returncode == 0, made.stderr
    saved = place.run("backup", "all.backup")
    assert saved.returncode == 0, saved.stderr
    assert (place.path / "all.backup").stat().st_mode & 0o777 == 0o600
    assert place.run("backup", "all.backup").returncode == 1, "nothing is overwritten"
    refused = place.run("restore", "all.backup")
    assert refused.returncode == 1
    assert b"not empty" in refused.stderr
    with home() as other:
        shutil.copy(place.path / "all.backup", other.path)
        restored = other.run("restore", "all.backup")
        assert restored.returncode == 0, restored.stderr
        again = other.run("backup", "again.backup")
        assert again.returncode == 0
        sizes = [Path(p, n).stat().st_size for p, n in ((place.path, "all.backup"), (other.path, "again.backup"))]
        assert abs(sizes[0] - sizes[1]) < 200
        listed = subprocess.run(
            [embedded.client("pg_restore"), "--file=-", "--data-only", "--table=agents", other.path / "again.backup"],
            check=True, capture_output=True, timeout=STOP_SECONDS_MAX,
        )  # fmt: skip
        assert made.stdout.split()[0] in listed.stdout
