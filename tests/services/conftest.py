from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from app.db.session import Database
from tests.database import make_settings
from tests.services.clearing import Clearing
from tests.services.desk import Desk
from tests.services.muster import PRICES, Muster
from tests.services.squadron import Squadron

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL


@pytest.fixture
async def clearing(database_url: URL) -> AsyncIterator[Clearing]:
    """Yield clearing on a desk with prices, over a dozen connections."""
    database = Database(database_url, make_settings(database_pool_size=12, database_connect_seconds=20))
    desk = Desk(database)
    await desk.prices({"BTC": "60000", "ETH": "3000"})
    await desk.market.refresh()
    yield Clearing(desk)
    await database.close()


@pytest.fixture
async def squadron(database_url: URL) -> AsyncIterator[Squadron]:
    """Yield fleets on a desk with prices, over many connections; money adds up at the end."""
    database = Database(database_url, make_settings(database_pool_size=20, database_connect_seconds=20))
    desk = Desk(database)
    await desk.prices(PRICES)
    await desk.market.refresh()
    yield Squadron(desk)
    assert await desk.imbalances() == {}
    await database.close()


@pytest.fixture
async def muster(squadron: Squadron) -> Muster:
    """Return a fleet of five members with positions."""
    return await Muster.gathered(squadron)
