"""A copy of the database in one file, and a database from such a copy: pg_dump and pg_restore of the wheel.

A copy is of one moment, whatever goes on meanwhile. It holds everything: keys as hashes, webhook secrets as they are.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from sqlalchemy import URL

from app.db import embedded
from app.db.session import parse_database_url
from app.errors import StartupError
from app.settings import Settings

OWNER_ONLY = 0o600


def backup(settings: Settings, file: Path) -> None:
    """Write a copy to a new file that only its owner reads. Raises StartupError."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, OWNER_ONLY))
    except OSError as error:
        raise StartupError(f"{file}: {error.strerror}") from None
    try:
        _run("pg_dump", settings, "--format=custom", "--no-owner", f"--file={file}")
    except StartupError:
        file.unlink()  # half a copy is none
        raise


def restore(settings: Settings, file: Path) -> None:
    """Fill the database, which must be empty, from a copy: all of it or nothing. Raises StartupError."""
    if not file.is_file():
        raise StartupError(f"{file}: there is no such file")
    found = _run("psql", settings, "--tuples-only", "--no-align", "--command=SELECT to_regclass('accounts')")
    if found.strip():
        raise StartupError("the database is not empty: restore into a new one")
    options = ("--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges")
    _run("pg_restore", settings, *options, str(file))


def _run(client: str, settings: Settings, *arguments: str) -> str:
    """Run a client on the database and return what it said; the password goes by its environment."""
    if settings.database_url is None:
        raise StartupError("no database: set PRIMERISK_DATABASE_URL")
    url = parse_database_url(settings.database_url.get_secret_value())
    command = [str(embedded.client(client)), *arguments, f"--dbname={_without_password(url)}"]
    given = {**os.environ, "PGPASSWORD": url.password or ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=given)  # noqa: S603
    if done.returncode != 0:
        raise StartupError(f"{client}: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
    return done.stdout


def _without_password(url: URL) -> str:
    """Return the URL as libpq takes it."""
    query = {"sslmode" if name == "ssl" else name: value for name, value in url.query.items()}
    shown = URL.create("postgresql", url.username, None, url.host, url.port, url.database, query)
    return shown.render_as_string(hide_password=False)
