"""Every setting, read once from the environment (prefix PRIMERISK_) or a .env file, and passed down."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One frozen value; the descriptions are the README's table."""

    model_config = SettingsConfigDict(
        env_prefix="PRIMERISK_", env_file=".env", frozen=True, extra="ignore", env_ignore_empty=True
    )

    database_url: Annotated[
        SecretStr | None, Field(description="postgresql://… of a server; unset: an embedded Postgres")
    ] = None
    data_dir: Annotated[Path, Field(description="where the embedded Postgres and the first key live")] = Path(
        platformdirs.user_data_dir("primerisk")
    )
    admin_key: Annotated[SecretStr | None, Field(min_length=16, description="a key with every scope, when set")] = None
    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0 picks a free one")] = 8000
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="least severe line that is logged")
    ] = "info"
    log_format: Annotated[Literal["json", "text"], Field(description="json, or text for people")] = "text"
    database_pool_size: Annotated[int, Field(ge=2, le=200, description="connections a process")] = 10
    database_connect_seconds: Annotated[
        float, Field(gt=0, le=60, description="longest wait for a connection before 503")
    ] = 5.0
    connections_max: Annotated[int, Field(ge=1, description="open connections of one process before 503")] = 800
    header_seconds_max: Annotated[float, Field(gt=0, description="longest time that a request's headers may take")] = (
        10.0
    )
    body_bytes_max: Annotated[int, Field(ge=1024, description="largest request body")] = 2_000_000
    body_seconds_max: Annotated[float, Field(gt=0, description="longest time that a body may take")] = 10.0
    requests_under_way_max: Annotated[int, Field(ge=1, description="requests under way in one process before 503")] = (
        256
    )
    requests_per_second: Annotated[
        float, Field(ge=0, description="sustained requests a second per key before 429; 0 turns it off")
    ] = 2_000.0
    requests_burst: Annotated[int, Field(ge=1, description="requests a key may make at once")] = 4_000
    unknown_keys_per_second: Annotated[
        float, Field(ge=0, description="keys never seen before that are looked up, before 429; 0 turns it off")
    ] = 50.0
    positions_max: Annotated[int, Field(ge=1, description="positions a portfolio")] = 5_000
    scenarios_max: Annotated[int, Field(ge=1, description="scenarios a request")] = 1_000
    underlyings_max: Annotated[int, Field(ge=1, description="different underlyings a portfolio")] = 500
    quote_milliseconds_max: Annotated[
        float, Field(gt=0, description="estimated work of one quote before it is refused")
    ] = 5_000.0
    heavy_threads: Annotated[int, Field(ge=1, le=64, description="threads for quotes that take long")] = 2
    heavy_waiting_max: Annotated[int, Field(ge=0, description="requests that wait for such a thread before 503")] = 32
    market_refresh_seconds: Annotated[
        float, Field(gt=0, le=60, description="how often a process reads new prices and parameters")
    ] = 0.5
    key_cache_seconds: Annotated[
        float, Field(ge=0, le=60, description="how long a checked key is trusted before it is read again")
    ] = 2.0
    price_age_seconds_max: Annotated[
        float, Field(gt=0, description="age past which a stored price is called stale")
    ] = 60.0
    worker_poll_seconds: Annotated[
        float, Field(gt=0, le=10, description="how often a worker looks for changes and due timers")
    ] = 0.1
    worker_metrics_port: Annotated[
        int | None, Field(ge=1, le=65535, description="port on which `primerisk worker` shows its metrics")
    ] = None
    figures_seconds: Annotated[
        float, Field(gt=0, le=60, description="how often a process reads the figures of the whole service")
    ] = 2.0
    ledger_check_seconds: Annotated[
        float, Field(gt=0, le=86_400, description="how often the ledger of the next 2,000 accounts is checked")
    ] = 5.0
    metrics_accounts_max: Annotated[
        int, Field(ge=0, le=100, description="accounts that /metrics/accounts names; 0 turns it off")
    ] = 0
    otlp_endpoint: Annotated[
        str | None, Field(description="http://host:4318 of a collector of OpenTelemetry traces; unset: no traces")
    ] = None
    liquidation_policy: Annotated[
        Literal["smallest_first", "largest_relief", "keep_top_n"],
        Field(description="which position is closed first"),
    ] = "smallest_first"
    liquidation_slippage: Annotated[
        Decimal, Field(ge=0, lt=1, description="how far below the mark a forced sale fills, a fraction")
    ] = Decimal("0.005")
    liquidation_keep: Annotated[
        int, Field(ge=1, le=1_000, description="positions that keep_top_n keeps until last, the largest")
    ] = 3
    liquidation_venue_seconds: Annotated[
        float, Field(gt=0, le=86_400, description="time that a venue has to fill what a liquidation asks for")
    ] = 30.0
    liquidation_venue_attempts: Annotated[
        int, Field(ge=1, le=1_000, description="requests to a venue before an operator is told")
    ] = 3
    fill_distance_max: Annotated[
        Decimal, Field(gt=0, description="how far from the mark a venue's fill is booked unasked, a fraction")
    ] = Decimal("0.1")
    account_items_max: Annotated[
        int, Field(ge=1, description="open positions, reservations and assets of one account")
    ] = 1_000
    agents_may_deposit: Annotated[
        bool, Field(description="whether agents book their own deposits; false: only admin keys do")
    ] = True
    price_history_days: Annotated[int, Field(ge=1, le=3_650, description="how long bars of prices are kept")] = 30
    event_days: Annotated[int, Field(ge=7, le=3_650, description="how long events and deliveries are kept")] = 90
    snapshot_days: Annotated[
        int, Field(ge=2, le=3_650, description="how long the daily snapshots of accounts are kept")
    ] = 730
    close_deviations_max: Annotated[
        float, Field(gt=0, description="robust deviations past which a daily close asks for confirmation")
    ] = 12.0
    price_skew_seconds_max: Annotated[
        float, Field(ge=0, description="how far in the future a posted price may be dated")
    ] = 5.0
    webhook_allow_private: Annotated[
        bool, Field(description="whether webhooks may go to loopback and private addresses: development and tests")
    ] = False
    webhook_seconds_max: Annotated[float, Field(gt=0, le=60, description="longest time that a receiver may take")] = (
        10.0
    )
    event_streams_max: Annotated[int, Field(ge=0, description="event streams that a process holds open")] = 100
