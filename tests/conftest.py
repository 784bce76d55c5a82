from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

pytest_plugins = ["tests.postgres", "tests.database"]


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection, and have less of it, as the service does when it starts."""
    gc.set_threshold(50_000, 20, 20)
    _settle_memory()


@pytest.fixture(autouse=True, scope="module")
def _settled_memory() -> Iterator[None]:
    """Leave out what a module has left behind, too.

    A cache of FastAPI's keeps every app alive that was ever made, of which the tests make a thousand: a collection of
    them all took seconds, within which requests of the test that it happened to met their time-outs.
    """
    yield
    _settle_memory()


def _settle_memory() -> None:
    gc.collect()
    gc.freeze()
