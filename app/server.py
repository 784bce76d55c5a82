"""Run the service in this process: a database, its migrations, a first key, and uvicorn until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop
from prometheus_client import start_http_server
from sqlalchemy import URL

from app import tracing
from app.api import workshop
from app.api.deps import Parts
from app.api.front import KEEP_ALIVE_SECONDS, front
from app.api.streams import Streams
from app.db import embedded
from app.db.session import Database, parse_database_url
from app.errors import StartupError
from app.keeping import prepare, running_database, url_of
from app.main import create_app
from app.services import accounts
from app.settings import Settings
from app.worker import Worker

log = logging.getLogger(__name__)

GRACE_SECONDS_AT_STOP = 10
_FIRST_KEY_FILE = "first_key"
_WATCH_SECONDS = 1.0
_WATCH_SECONDS_AFTER_FAILURE = 30.0

CURL_BODY = (
    '{"positions":[{"symbol":"BTC-PERP","side":"long","size":1,"entry_price":60000,"mark_price":61000,'
    '"leverage":3}],"collateral":[{"asset":"USDC","amount":20000},{"asset":"BTC","amount":0.5}]}'
)


def serve(settings: Settings, *, with_worker: bool = True) -> None:
    """Serve until SIGINT or SIGTERM, then stop everything that was started. Raises StartupError."""
    with (
        _prompt_end(),
        _terminable(),
        _traced(settings),
        _listener(settings) as listener,
        running_database(settings) as ready,
    ):
        embedded_in = None if settings.database_url else settings.data_dir
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(ready, listener, embedded_in, with_worker=with_worker))


@contextlib.contextmanager
def _traced(settings: Settings) -> Iterator[None]:
    """Send traces meanwhile, where a collector is named. Raises StartupError."""
    end = tracing.configure(settings.otlp_endpoint)
    try:
        yield
    finally:
        end()


async def _run(settings: Settings, listener: socket.socket, embedded_in: Path | None, *, with_worker: bool) -> None:
    await prepare(settings)
    app = create_app(settings)
    key = await _first_key(app.state.parts.database, settings, embedded_in)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS_AT_STOP,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        http=front(settings),
        ws="none",
    )
    _settle_memory()
    server = _Server(config)
    server.streams = app.state.parts.streams
    server.greeting = greeting(_address(listener), key, has_admin_key=settings.admin_key is not None)
    async with _watched(embedded_in, url_of(settings)), _working(app.state.parts if with_worker else None):
        await server.serve(sockets=[listener])


@contextlib.asynccontextmanager
async def _working(parts: Parts | None) -> AsyncIterator[None]:
    """Run a worker meanwhile, beside the API in the same process."""
    if parts is None:
        yield
        return
    task = asyncio.create_task(worker_of(parts).run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def worker_of(parts: Parts) -> Worker:
    """Return a worker on the parts of an app."""
    return Worker(parts.settings, parts.database, parts.market, parts.scenes, parts.metrics)


async def _work(settings: Settings) -> None:
    await prepare(settings)
    parts = create_app(settings).state.parts
    figures = asyncio.create_task(parts.figures_shown.run())
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        with _showing(parts):
            async with _working(parts):
                await stop.wait()
    finally:
        figures.cancel()
        await asyncio.wait([figures])
        await parts.database.close()


@contextlib.contextmanager
def _showing(parts: Parts) -> Iterator[None]:
    """Show the metrics of a worker that runs alone, where a port is set for them. Raises StartupError."""
    settings = parts.settings
    if settings.worker_metrics_port is None:
        yield
        return
    try:
        shown, thread = start_http_server(settings.worker_metrics_port, settings.host, parts.metrics.registry)
    except OSError as error:
        where = f"{settings.host}:{settings.worker_metrics_port}"
        raise StartupError(f"can't show metrics on {where}: {error.strerror or error}") from error
    try:
        yield
    finally:
        shown.shutdown()
        thread.join()


def work(settings: Settings) -> None:
    """Run a worker alone until it is told to stop."""
    with _traced(settings), running_database(settings) as ready:
        uvloop.run(_work(ready))


@contextlib.asynccontextmanager
async def _watched(embedded_in: Path | None, url: URL) -> AsyncIterator[None]:
    """Keep the embedded Postgres up meanwhile."""
    watch = asyncio.create_task(_watch(embedded_in, url)) if embedded_in is not None else None
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()


async def _watch(data_dir: Path, url: URL) -> None:
    """Start the server again where it was killed, as any other start of ours would."""
    while True:
        await asyncio.sleep(_WATCH_SECONDS)
        if embedded.is_running(data_dir):
            continue
        log.error("the embedded Postgres is gone: it is started again")
        try:
            port = await asyncio.to_thread(_revived_port, data_dir)
        except StartupError as error:
            log.error("%s", error)  # noqa: TRY400  one line, as at a start
            await asyncio.sleep(_WATCH_SECONDS_AFTER_FAILURE)
            continue
        if port == url.port:
            log.info("the embedded Postgres is back")
        else:
            log.error("the embedded Postgres is back on another port, its own was taken: restart the service")


def _revived_port(data_dir: Path) -> int | None:
    with embedded.start(data_dir) as server:  # let go at once: the lock of `serve` keeps it up
        return parse_database_url(server.url).port


async def _first_key(database: Database, settings: Settings, embedded_in: Path | None) -> str | None:
    """Return the key to show: none where the operator brought a database or a key of their own."""
    if settings.admin_key is not None or embedded_in is None:
        return None
    return await accounts.create_first_key(database, embedded_in / _FIRST_KEY_FILE)


def _settle_memory() -> None:
    """Leave what was loaded at start out of garbage collection, and let requests make less of it run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


class _Server(uvicorn.Server):
    """Greets once it really listens, so that the line it prints works when it is pasted."""

    greeting = ""
    streams: Streams

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            sys.stdout.write(self.greeting)
            sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.streams.close()  # they would be waited for
        await super().shutdown(sockets)


def greeting(address: str, key: str | None, *, has_admin_key: bool) -> str:
    """Return what a newcomer needs: the address, the key (or where to get one), and a line to paste."""
    variable = "$PRIMERISK_ADMIN_KEY" if has_admin_key else "$KEY"
    hint = variable if has_admin_key else f'{variable}  (make one: KEY=$(primerisk key "first key" --scope admin))'
    header = shlex.quote(f"Authorization: Bearer {key}") if key else f'"Authorization: Bearer {variable}"'
    curl = f"curl -sS {address}/api/quotes/margin -H {header} -d {shlex.quote(CURL_BODY)}"
    shown = key or hint
    return f"\nprimerisk is at {address}  (docs: {address}/docs)\nkey:  {shown}\ntry:  {curl}\n\n"


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"


@contextlib.contextmanager
def _listener(settings: Settings) -> Iterator[socket.socket]:
    """Listen first: a port that is taken is found before anything else is started."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # with the protocol named, the event loop turns Nagle's algorithm off: else each reply waits 40 ms for an ACK
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise StartupError(_why_not(settings, error)) from error
        listener.set_inheritable(False)
        yield listener


def _why_not(settings: Settings, error: OSError) -> str:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is taken: stop what listens there, or choose another with PRIMERISK_PORT or --port"
    return f"can't listen on {where}: {error.strerror or error}"


@contextlib.contextmanager
def _prompt_end() -> Iterator[None]:
    """End the process without waiting for a quote that is still worked on, once all else has stopped.

    Python's own end would stop such a thread at some line of numpy's or scipy's C++, which may crash.
    """
    try:
        yield
    except SystemExit as end:
        _end_if_at_work(end.code if isinstance(end.code, int) else 1)
        raise
    _end_if_at_work(0)


def _end_if_at_work(code: int) -> None:
    if workshop.is_at_work():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an orderly exit, so that what was started is stopped."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
