"""Stress over HTTP: worked numbers, the reply held against margin quotes at the shocked market, hostile bodies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.api.bodies import WORKED
from tests.api.service import exact, problem

if TYPE_CHECKING:
    from tests.api.service import Service

STRESS = "/api/quotes/stress"
SHARED = pytest.mark.asyncio(loop_scope="module")


async def _stress(service: Service, **body: Any) -> dict[str, Any]:
    answer = await service.post(STRESS, json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


@SHARED
async def test_the_worked_account_survives_a_fall_of_a_fifth(shared: Service) -> None:
    reply = await _stress(shared, **WORKED)
    (result,) = reply["results"]
    down, up = result["scenarios"]
    assert down["survival"] == pytest.approx(4.20219, abs=5e-6)
    assert result["survival"] == down["survival"] < up["survival"]
    assert result["worst"]["index"] == 0
    # 48,450 less a fifth of 61,000 and of .45 x 61,000
    assert down["equity"] == pytest.approx(48_450 - 0.2 * 61_000 * 1.45)
    assert down["pnl"] == pytest.approx(-12_200)
    assert result["before"]["equity"] == 48_450
    assert (down["zone"], down["status"], down["breached"], down["liquidated"]) == ("GREEN", "SAFE", False, False)
