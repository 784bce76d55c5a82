"""When a webhook is tried again: tables with the time as input. Signatures: against the scheme's own package."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from app.domain.webhooks import (
    EVENT_TYPES,
    Attempts,
    format_secret,
    is_filter,
    is_urgent,
    next_retry,
    patterns_of,
    read_retry_after,
    signatures,
)

NOW = datetime(2026, 11, 22, 3, tzinfo=UTC)
SLOW = [5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 36_000.0]


def _waits(*, urgent: bool, deadline: float | None = None, retry_after: float | None = None) -> list[float]:
    """Return the seconds between the attempts of a delivery that always fails at once."""
    now, behind, waits = NOW, Attempts(1, 0), list[float]()
    until = None if deadline is None else NOW + timedelta(seconds=deadline)
    asked = None if retry_after is None else timedelta(seconds=retry_after)
    while (retry := next_retry(behind, now, urgent=urgent, deadline=until, retry_after=asked)) is not None:
        waits.append((retry.at - now).total_seconds())
        now, behind = retry.at, Attempts(behind.made + 1, retry.slow)
    return waits


@pytest.mark.parametrize(
    ("urgent", "deadline", "expected"),
    [
        (False, None, SLOW),
        (False, 300, SLOW),
        (True, None, [2, 5, 10, 20, 40, *SLOW]),
        (True, 0, [2, 5, 10, 20, 40, *SLOW]),
        (True, 136, [2, 5, 10, 20, 40, *SLOW]),
        (True, 137, [2, 5, 10, 20, 40, 60, *SLOW]),
        (True, 300, [2, 5, 10, 20, 40, 60, 60, 60, *SLOW]),
    ],
)
def test_the_two_schedules(urgent: bool, deadline: float | None, expected: list[float]) -> None:
    assert _waits(urgent=urgent, deadline=deadline) == expected


@pytest.mark.parametrize(
    ("urgent", "asked", "first"),
    [
        (False, 0, 5),
        (False, 3, 5),
        (False, 120, 120),
        (False, 1e6, 36_000),
        (True, 1, 2),
        (True, 30, 30),
        (True, 900, 60),
    ],
)
def test_a_receiver_may_ask_for_a_longer_wait_within_bounds(urgent: bool, asked: float, first: float) -> None:
    assert _waits(urgent=urgent, deadline=3_600, retry_after=asked)[0] == first


@pytest.mark.parametrize(("draw", "seconds"), [(0.0, 270), (0.5, 300), (0.999999, 330)])
def test_slow_retries_are_spread(draw: float, seconds: float) -> None:
    retry = next_retry(Attempts(2, 1), NOW, urgent=False, draw=draw)
    assert retry is not None
    assert (retry.at - NOW).total_seconds() == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        ("99999999999999999999", 10**8),
        ("Sun, 22 Nov 2026 03:01:00 GMT", 60),
        ("Sun, 22 Nov 2026 02:00:00 GMT", 0),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("٣", None),
    ],
)
def test_what_retry_after_says(text: str, seconds: float | None) -> None:
    wait = read_retry_after(text, NOW)
    assert (None if wait is None else wait.total_seconds()) == seconds


@given(st.text())
def test_any_retry_after_is_read(text: str) -> None:
    wait = read_retry_after(text, NOW)
    assert wait is None or wait >= timedelta(0)


def test_filters() -> None:
    assert is_filter("margin_call.opened")
    assert is_filter("margin_call.*")
    for wrong in ("", "*", "margin_call", "margin_call.", "margin_call.never", "no_such.*", "margin_call.*.*"):
        assert not is_filter(wrong), wrong
    assert patterns_of("zone.changed") == ("zone.changed", "zone.*")
    assert {name for name in EVENT_TYPES if is_urgent(name)} == {
        name for name in EVENT_TYPES if name.startswith(("margin_call.", "liquidation."))
    }


@given(st.binary(min_size=24, max_size=64), st.binary(min_size=24, max_size=64), st.text())
def test_signatures_verify_with_the_schemes_own_package(one: bytes, two: bytes, text: str) -> None:
    secrets = [format_secret(one), format_secret(two)]
    body = text.encode("utf-8", "replace")
    header = signatures(secrets, "evt_1", int(NOW.timestamp()), body)
    assert header == " ".join(Webhook(secret).sign("evt_1", NOW, body.decode()) for secret in secrets)
