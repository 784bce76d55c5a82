"""Traces of a request, a decision and a webhook, as a collector receives them; and that none are made unasked."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from app.db.session import Database
from tests.flows.process import ROOT, Home, home, serving
from tests.flows.trader import BREACH, settings_of, trading, wait_for
from tests.receiver import receiving

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
"""The trace of a caller that sends one along."""


@dataclass(slots=True)
class Collector:
    """Decodes what it is sent with the protocol's own messages."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        raw = gzip.decompress(body) if request.headers.get("Content-Encoding") == "gzip" else body
        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return web.Response()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = "http://{}:{}".format(*runner.addresses[0][:2])
    try:
        yield collector
    finally:
        await runner.cleanup()


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


async def test_a_call_is_traced_from_the_request_to_the_webhook(place: Home, database: Database) -> None:
    async with collecting() as collector, receiving() as receiver:
        given = {"PYTHONPATH": str(ROOT), "PRIMERISK_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        with serving(place, **settings_of(database), **given) as served:
            async with trading(served.greeting.address, database, receiver) as (trader, _):
                await trader.prices(BREACH)
                await wait_for(receiver, "margin_call.opened")
                headers = {"Authorization": f"Bearer {trader.key}", "traceparent": f"00-{CALLER}-00f067aa0ba902b7-01"}
                async with httpx.AsyncClient(headers=headers) as client:
                    await client.get(f"{trader.address}/api/margin-calls")
                async with asyncio.timeout(20):
                    while not (collector.named("GET /api/margin-calls") and collector.named("deliver")):  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
    [asked] = collector.named("GET /api/margin-calls")
    assert asked.trace_id.hex() == CALLER
    told = {item.key: item.value.string_value or item.value.int_value for item in asked.attributes}
    assert (told["http.route"], told["http.response.status_code"]) == ("/api/margin-calls", 200)
    decided = {item.value.string_value for span in collector.named("decide") for item in span.attributes}
    assert trader.agent_id in decided


def test_unasked_nothing_of_it_is_loaded() -> None:
    code = "import sys, app.main, app.worker; assert not [m for m in sys.modules if m.startswith('opentelemetry.sdk')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
