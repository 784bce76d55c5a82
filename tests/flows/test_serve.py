"""`primerisk serve` from its start to its end, as a newcomer and an operator meet it."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import stat
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.flows.process import PRIMERISK, Home, home, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

ADMIN_KEY = "an admin key that is long enough"
DEBIAN = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@pytest.fixture
def empty() -> Iterator[Home]:
    with home() as made:
        yield made


def _bash(line: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], check=True, capture_output=True, timeout=20,
        env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip
    assert done.stderr == b""
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def _status(address: str, key: str) -> int:
    answer = httpx.get(f"{address}/api/market/assets", headers={"Authorization": f"Bearer {key}"})
    return answer.status_code


def _main_pid(place: Home) -> int:
    """Return the pid of Postgres' main process, 0 while it starts."""
    try:
        return int((place.data / "postgres" / "postmaster.pid").read_text().split()[0])
    except (FileNotFoundError, IndexError):
        return 0


def _ready(address: str) -> int:
    return httpx.get(f"{address}/readyz", timeout=10).status_code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_line_that_it_prints_works_and_a_signal_stops_everything(place: Home, number: int) -> None:
    with serving(place) as served:
        greeting = served.greeting
        assert greeting.address.startswith("http://127.0.0.1:")
        assert greeting.key.startswith("pr_")
        assert _bash(greeting.curl)["equity"] == 48_450
        assert httpx.get(f"{greeting.address}/readyz").status_code == 200
        assert stat.S_IMODE((place.data / "first_key").stat().st_mode) == 0o600
        assert place.servers() != []
        code = served.stop(number)
    assert code == (0 if number == signal.SIGINT else 128 + number)
    assert place.servers() == []


def test_two_interrupts_stop_everything_as_well(place: Home) -> None:
    with serving(place) as served:
        served.process.send_signal(signal.SIGINT)
        served.stop(signal.SIGINT)
    assert place.servers() == []


def test_after_a_kill_it_starts_again_with_the_same_key(place: Home) -> None:
    with serving(place) as served:
        key = served.greeting.key
        assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    assert place.servers() != []
    with serving(place) as served:
        assert served.greeting.key == key
        assert _status(served.greeting.address, key) == 200
        served.stop(signal.SIGINT)
    assert place.servers() == []


def test_a_postgres_that_was_killed_is_started_again(place: Home) -> None:
    with serving(place) as served:
        main = _main_pid(place)
        os.kill(main, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while _main_pid(place) in (0, main) or _ready(served.greeting.address) != 200:
            assert time.monotonic() < deadline, (place.path / "serve.log").read_text()
            time.sleep(0.1)
        assert _status(served.greeting.address, served.greeting.key) == 200
        assert served.stop(signal.SIGINT) == 0
    assert place.servers() == []


def test_two_share_a_data_directory(place: Home) -> None:
    with serving(place) as first, serving(place) as second:
        assert first.greeting.key == second.greeting.key
        assert first.stop(signal.SIGINT) == 0
        assert _status(second.greeting.address, second.greeting.key) == 200
        assert second.stop(signal.SIGINT) == 0
    assert place.servers() == []


def test_a_signal_while_it_starts_leaves_nothing(place: Home) -> None:
    for seconds in (0.5, 1.5):
        process = subprocess.Popen([PRIMERISK, "serve"], cwd=place.path, env=place.environment())
        time.sleep(seconds)
        process.terminate()
        process.wait(30)
        assert place.servers() == []


def test_an_admin_key_of_the_settings(place: Home) -> None:
    with serving(place, PRIMERISK_ADMIN_KEY=ADMIN_KEY) as served:
        greeting = served.greeting
        assert ADMIN_KEY not in (place.path / "serve.log").read_text()
        assert _bash(greeting.curl, PRIMERISK_ADMIN_KEY=ADMIN_KEY)["equity"] == 48_450
        assert (_status(greeting.address, ADMIN_KEY), _status(greeting.address, ADMIN_KEY + "x")) == (200, 401)
        served.stop(signal.SIGINT)


def test_a_key_made_by_the_command_line(place: Home) -> None:
    made = place.run("key", "feed", "--scope", "market", "--scope", "agent")
    assert (made.returncode, place.servers()) == (0, [])
    key = made.stdout.decode().strip()
    assert key.startswith("pr_")
    with serving(place) as served:
        again = place.run("key", "while it serves")
        assert again.returncode == 0
        assert [_status(served.greeting.address, k) for k in (key, again.stdout.decode().strip())] == [200, 200]
        prices = httpx.post(
            f"{served.greeting.address}/api/market/prices",
            json={"prices": {"BTC": 1}},
            headers={"Authorization": f"Bearer {key}"},
        )
        assert prices.status_code == 202
        served.stop(signal.SIGINT)
    _fails(place, "Scopes", "key", "x", "--scope", "root")


def test_an_agent_made_by_the_command_line(place: Home) -> None:
    made = place.run("agent", "Bob")
    assert (made.returncode, place.servers()) == (0, [])
    agent_id, key = made.stdout.decode().splitlines()
    with serving(place) as served:
        answer = httpx.get(f"{served.greeting.address}/api/keys", headers={"Authorization": f"Bearer {key}"})
        assert [(k["agent_id"], k["name"], k["scopes"]) for k in answer.json()["keys"]] == [
            (agent_id, "Bob", ["agent"])
        ]
        assert key not in (place.path / "serve.log").read_text()
        served.stop(signal.SIGINT)
    _fails(place, "name", "agent", "")


def test_migrate_leaves_nothing_running(place: Home) -> None:
    done = place.run("migrate")
    assert (done.returncode, done.stdout.decode().strip()[:27]) == (0, "the database is at revision")
    assert place.servers() == []


# --- what can't start


def _fails(place: Home, word: str, *arguments: str, **given: str) -> str:
    """Check that a command ends with exit code 1 and one line on standard error, with nothing left running."""
    done = place.run(*arguments, given=given)
    said = done.stderr.decode()
    assert done.returncode == 1, said
    assert said.count("\n") == 1, said
    assert said.startswith("primerisk: ")
    assert word in said
    assert done.stdout == b""
    assert place.servers() == []
    return said


def test_a_port_that_is_taken(empty: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in _fails(empty, "is taken", "serve", "--port", port)


def test_a_port_that_is_taken_while_it_starts(place: Home) -> None:
    """Another that has bound the port as well, and listens first."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        command = [str(PRIMERISK), "serve", "--port", str(taken.getsockname()[1])]
        process = subprocess.Popen(command, cwd=place.path, env=place.environment(), stderr=subprocess.PIPE)
        try:
            time.sleep(0.5)
            try:
                taken.listen()
            except OSError:
                return  # it listens from its start: the other is refused, as it should be
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, said.decode().count("\n")) == (1, 1), said.decode()[-500:]


@pytest.mark.parametrize(
    ("word", "given"),
    [
        ("database URL", {"PRIMERISK_DATABASE_URL": "nonsense"}),
        ("mysql", {"PRIMERISK_DATABASE_URL": "mysql://u:secret-word@127.0.0.1/d"}),
        ("names no database", {"PRIMERISK_DATABASE_URL": "postgresql://u:secret-word@127.0.0.1"}),
        ("can't be reached", {"PRIMERISK_DATABASE_URL": "postgresql://u:secret-word@127.0.0.1:1/d"}),
        ("PRIMERISK_PORT", {"PRIMERISK_PORT": "abc"}),
        ("PRIMERISK_ADMIN_KEY", {"PRIMERISK_ADMIN_KEY": "secret-word"}),
        ("can't listen", {"PRIMERISK_HOST": "no such host"}),
        ("can't be used", {"PRIMERISK_DATA_DIR": "/proc/primerisk"}),
    ],
)
def test_settings_that_can_not_be(empty: Home, word: str, given: dict[str, str]) -> None:
    assert "secret-word" not in _fails(empty, word, "serve", **given)


def test_a_file_where_the_data_directory_should_be(empty: Home) -> None:
    empty.data.write_text("a file")
    assert str(empty.data) in _fails(empty, "not a directory", "serve")
    assert empty.data.read_text() == "a file"


# --- settings


def test_settings_are_listed_and_secrets_are_not(empty: Home) -> None:
    (empty.path / ".env").write_text("PRIMERISK_HOST=0.0.0.0\nPRIMERISK_ADMIN_KEY=another admin key, a secret-word\n")
    url = "postgresql://u:secret-word@db/d"
    done = empty.run("settings", given={"PRIMERISK_DATABASE_URL": url, "PRIMERISK_PORT": "8123"})
    said = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    for word in ("PRIMERISK_DATABASE_URL", "PRIMERISK_ADMIN_KEY", "********", "0.0.0.0", "8123", str(empty.data)):
        assert word in said
    assert "secret-word" not in said


# --- a server of the operator's own


@contextmanager
def _debian_postgres() -> Iterator[str]:
    """Run Debian's Postgres 15 as the user postgres (or nobody) and yield its URL."""
    account = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody"))
    as_user: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    if os.geteuid() != 0:
        as_user = {}
    with home() as made, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        if as_user:
            os.chown(made.path, account.pw_uid, account.pw_gid)
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {made.path} -c fsync=off"

        def run(*command: str) -> None:
            done = subprocess.run(
                [DEBIAN / command[0], "-D", made.path / "pg", *command[1:]],
                check=False, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60, **as_user,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr.decode()

        run("initdb", "-A", "trust", "-U", "postgres")
        run("pg_ctl", "start", "-w", "-s", "-l", str(made.path / "log"), "-o", options)
        try:
            yield f"postgresql://postgres:secret-word@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "-m", "immediate", "-w", "-s")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"no Postgres 15 in {DEBIAN}")
def test_on_a_postgres_of_the_operators_own(empty: Home) -> None:
    with _debian_postgres() as url:
        settings = {"PRIMERISK_DATABASE_URL": url, "PRIMERISK_ADMIN_KEY": ADMIN_KEY}
        with serving(empty, **settings) as served:
            assert _bash(served.greeting.curl, PRIMERISK_ADMIN_KEY=ADMIN_KEY)["equity"] == 48_450
            assert httpx.get(f"{served.greeting.address}/readyz").status_code == 200
            made = empty.run("key", "mine", given=settings)
            assert _status(served.greeting.address, made.stdout.decode().strip()) == 200
            assert served.stop(signal.SIGTERM) == 128 + signal.SIGTERM
        assert "secret-word" not in (empty.path / "serve.log").read_text()
        assert not empty.data.exists()
        nowhere = url.removesuffix("postgres") + "nope"
        assert "secret-word" not in _fails(empty, "no database named nope", "serve", PRIMERISK_DATABASE_URL=nowhere)
        with serving(empty, PRIMERISK_DATABASE_URL=url) as served:
            # no key is made unasked on an operator's database: the greeting must not name one that is not there
            assert served.greeting.key != "$PRIMERISK_ADMIN_KEY"
            served.stop(signal.SIGINT)
