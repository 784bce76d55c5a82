"""Is a process well? For health checks of containers, which have no curl. It runs often, and imports little."""

from __future__ import annotations

import re
import urllib.request
from email.utils import parsedate_to_datetime

from app.errors import StartupError

SECONDS_MAX = 4.0
SILENT_SECONDS_MAX = 15.0
_BEAT = re.compile(r"^primerisk_worker_heartbeat_timestamp_seconds (\S+)$", re.MULTILINE)


def check(url: str) -> None:
    """Return if `/readyz` answers 200, or `/metrics` has a heartbeat of late; else raise StartupError."""
    if not url.startswith(("http://", "https://")):
        raise StartupError(f"{url} is no http:// address")
    try:
        with urllib.request.urlopen(url, timeout=SECONDS_MAX) as answer:  # noqa: S310  the scheme is checked
            told, dated = answer.read().decode(), answer.headers["Date"]
    except OSError as error:  # a status of 400 and above is one
        raise StartupError(f"{url}: {error}") from None
    if not url.endswith("/metrics"):
        return
    beat = _BEAT.search(told)
    silent = None if beat is None else parsedate_to_datetime(dated).timestamp() - float(beat[1])
    if silent is None or silent > SILENT_SECONDS_MAX:
        since = "never" if silent is None else f"{silent:.0f} s ago"
        raise StartupError(f"{url}: the worker last looked at the accounts {since}")
