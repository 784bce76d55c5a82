"""The command line: what serves, what keeps a database, what quotes and reports, what shows."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr, ValidationError

from app.errors import PrimeriskError, StartupError
from app.settings import Settings
from app.telemetry import configure_logging

# What serves imports the web framework, what quotes imports the risk core: each command imports its own, and after
# it has read its settings and files, so that `primerisk settings` answers at once, and so does a refusal.

# Before numpy is loaded: on matrices as small as ours its threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Margin and risk for AI trading agents.",
)

history_cli = typer.Typer(no_args_is_help=True, help="Daily closes, the history that risk is estimated from.")
cli.add_typer(history_cli, name="history")

Host = Annotated[str | None, typer.Option(help="address to listen on [PRIMERISK_HOST]")]
Port = Annotated[int | None, typer.Option(help="port to listen on [PRIMERISK_PORT]")]


def main() -> None:
    """Run the command line; a failure that we know is one line on standard error and exit code 1."""
    try:
        cli(standalone_mode=True)
    except (StartupError, PrimeriskError) as error:
        sys.stderr.write(f"primerisk: {error}\n")
        raise SystemExit(1) from None


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Import without garbage collection: it takes an eighth of the time to find nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def read_settings(**overrides: Any) -> Settings:
    """Return the settings of the environment and .env with the command line's over them."""
    given = {name: value for name, value in overrides.items() if value is not None}
    if files := os.environ.get("PRIMERISK_SECRETS_DIR"):
        given["_secrets_dir"] = files
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]).upper()
        raise StartupError(f"PRIMERISK_{name}: {first['msg']}") from None


@cli.command()
def serve(host: Host = None, port: Port = None) -> None:
    """Run API and worker, with an embedded Postgres where PRIMERISK_DATABASE_URL is not set."""
    settings = read_settings(host=host, port=port)

    with _loading():
        from app import server  # noqa: PLC0415

    configure_logging(settings.log_level, settings.log_format)
    server.serve(settings)


@cli.command()
def api(host: Host = None, port: Port = None) -> None:
    """Run the API alone; `primerisk worker` runs beside it."""
    settings = read_settings(host=host, port=port)

    with _loading():
        from app import server  # noqa: PLC0415

    configure_logging(settings.log_level, settings.log_format)
    server.serve(settings, with_worker=False)


@cli.command()
def worker() -> None:
    """Run a worker alone: margin calls, liquidations, webhooks. Several may run at once."""
    settings = read_settings()

    with _loading():
        from app import server  # noqa: PLC0415

    configure_logging(settings.log_level, settings.log_format)
    server.work(settings)


@cli.command()
def migrate(
    reader: Annotated[str | None, typer.Option(help="a role of Postgres that may read the operator's views")] = None,
) -> None:
    """Bring the database to the schema of this release, beside whatever runs on it."""
    import asyncio  # noqa: PLC0415

    from app import keeping  # noqa: PLC0415
    from app.db.migrate import head  # noqa: PLC0415

    with keeping.running_database(read_settings()) as settings:
        asyncio.run(keeping.migrate_for(settings, reader))
    typer.echo(f"the database is at revision {head()}")


@cli.command()
def health(
    url: Annotated[str, typer.Argument(help="/readyz of an API process, or /metrics of a worker")],
) -> None:
    """Tell by the exit code whether a process is well; of a worker, whether it still looks at the accounts."""
    from app import probe  # noqa: PLC0415

    probe.check(url)


@cli.command()
def backup(file: Annotated[Path, typer.Argument(help="where the copy is written; it must not be there yet")]) -> None:
    """Write a copy of the whole database, as of one moment, while everything goes on."""
    from app import backup as copy  # noqa: PLC0415
    from app import keeping  # noqa: PLC0415

    with keeping.running_database(read_settings()) as settings:
        copy.backup(settings, file)
    typer.echo(f"{file}: {file.stat().st_size:,} bytes")


@cli.command()
def restore(file: Annotated[Path, typer.Argument(help="what `primerisk backup` wrote")]) -> None:
    """Fill an empty database from a copy, and bring it to the schema of this release."""
    import asyncio  # noqa: PLC0415

    from app import backup as copy  # noqa: PLC0415
    from app import keeping  # noqa: PLC0415

    with keeping.running_database(read_settings()) as settings:
        copy.restore(settings, file)
        asyncio.run(keeping.prepare(settings))
    typer.echo("restored")


@cli.command()
def agent(name: Annotated[str, typer.Argument(help="what the agent is called")]) -> None:
    """Make an agent and print its id and, on the next line, its API key, which is not shown again."""
    import asyncio  # noqa: PLC0415

    from app import keeping  # noqa: PLC0415

    with keeping.running_database(read_settings()) as settings:
        for line in asyncio.run(keeping.make_agent(settings, name)):
            typer.echo(line)


@cli.command()
def key(
    name: Annotated[str, typer.Argument(help="what the key is for")],
    scope: Annotated[list[str] | None, typer.Option(help="agent, coordinator, market or admin; may repeat")] = None,
) -> None:
    """Make an API key of the service and print it; it is not shown again."""
    import asyncio  # noqa: PLC0415

    from app import keeping  # noqa: PLC0415

    with keeping.running_database(read_settings()) as settings:
        typer.echo(asyncio.run(keeping.make_key(settings, name, scope or ["agent"])))


@cli.command()
def revoke(key_id: Annotated[str, typer.Argument(help="what stands between pr_ and the next _ of the key")]) -> None:
    """Revoke an API key; running processes refuse it after PRIMERISK_KEY_CACHE_SECONDS at the latest."""
    import asyncio  # noqa: PLC0415

    from app import keeping  # noqa: PLC0415

    with keeping.running_database(read_settings()) as settings:
        asyncio.run(keeping.revoke_key(settings, key_id))
    typer.echo(f"the key {key_id} is revoked")


@history_cli.command("import")
def import_history(
    file: Annotated[Path, typer.Argument(help="CSV: a column date and one an asset, or asset, date, close")],
    confirm: Annotated[bool, typer.Option("--confirm", help="store what is flagged as well")] = False,
) -> None:
    """Store the daily closes of a file, all or none; what looks wrong is named, and waits for --confirm."""
    import asyncio  # noqa: PLC0415

    from app import history  # noqa: PLC0415

    found = history.read_closes(file)

    from app import keeping  # noqa: PLC0415

    with keeping.running_database(read_settings()) as settings:
        tally = asyncio.run(history.import_all(settings, found, confirm=confirm))
    kept = confirm or not tally.flagged
    history.print_tally(tally, kept=kept)
    if not kept:
        raise StartupError(f"nothing is stored: {len(tally.flagged)} closes are flagged; look at them, then --confirm")


@cli.command()
def settings() -> None:
    """List every setting with its value; secrets are masked."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    current = read_settings()
    table = Table("setting", "value", "meaning", box=None)
    for name, field in Settings.model_fields.items():
        value = getattr(current, name)
        shown = "********" if isinstance(value, SecretStr) else "" if value is None else str(value)
        table.add_row(f"PRIMERISK_{name.upper()}", shown, field.description or "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@cli.command()
def quote(
    file: Annotated[Path, typer.Argument(help="a portfolio as the API takes it; - for standard input")],
    as_json: Annotated[bool, typer.Option("--json", help="the reply as the API gives it")] = False,
) -> None:
    """Quote the margin of a portfolio, offline, with the parameters that the package ships."""
    settings = read_settings()
    raw = _read(file, settings.body_bytes_max)

    from app import console  # noqa: PLC0415

    console.print_quote(raw, settings, as_json=as_json)


@cli.command()
def report(
    file: Annotated[Path, typer.Argument(help="a portfolio as the API takes it; - for standard input")],
    history: Annotated[Path | None, typer.Option(help="daily closes: a CSV as `history import` takes it")] = None,
    out: Annotated[Path, typer.Option(help="where the page is written")] = Path("report.html"),
    seed: Annotated[int, typer.Option(min=0, help="what the simulation is drawn from, where there is no history")] = 1,
    show: Annotated[bool, typer.Option("--open", help="show the page in a browser")] = False,
) -> None:
    """Write a portfolio's risk report, one page of HTML with pictures, offline."""
    settings = read_settings()
    raw = _read(file, settings.body_bytes_max)

    from app import report_file  # noqa: PLC0415

    report_file.write_report(raw, history, out, seed, settings, show=show)


@cli.command()
def demo(
    seed: Annotated[int, typer.Option(help="what the market and the agents' wallets are drawn from")] = 1,
    seconds: Annotated[float, typer.Option(min=8, max=600, help="how long the market is open")] = 32,
    address: Annotated[
        str | None, typer.Option(help="a running service without agents, with PRIMERISK_ADMIN_KEY; else one of its own")
    ] = None,
) -> None:
    """Show margin calls at work: a service of its own, a fleet of agents, and a market that crashes."""
    from app.demo import course, service  # noqa: PLC0415

    there = None
    if address is not None:
        key = read_settings().admin_key
        if key is None:
            raise StartupError("set PRIMERISK_ADMIN_KEY to the admin key of that service")
        there = service.Service(address.rstrip("/"), key.get_secret_value())
    course.demo(seed, seconds, there)


def _read(file: Path, bytes_max: int) -> bytes:
    """Return what a file holds, - being standard input. Raises StartupError, also for more than the API takes."""
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as source:
            raw = source.read(bytes_max + 1)
    except OSError as error:
        raise StartupError(f"{file}: {error.strerror}") from None
    if len(raw) > bytes_max:
        raise StartupError(f"{file}: a portfolio has at most {bytes_max} bytes")
    return raw


if __name__ == "__main__":
    main()
