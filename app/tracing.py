"""OpenTelemetry traces, where the extra `otel` is installed and a collector is named; else nothing, at no cost.

Spans: a request, a decision on an account, the delivery of a webhook. A caller's `traceparent` is carried on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from app.errors import StartupError
from app.telemetry import package_version

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_NOTHING = contextlib.nullcontext()
_tracer: Tracer | None = None


def span(name: str, **attributes: str) -> contextlib.AbstractContextManager[object]:
    """Return what measures the work done within it, if anything does."""
    return _NOTHING if _tracer is None else _tracer.start_as_current_span(name, attributes=attributes)


def request_span(method: str, headers: Iterable[tuple[bytes, bytes]]) -> contextlib.AbstractContextManager[object]:
    """Return what measures a request, as a part of its caller's trace where it has one."""
    if _tracer is None:
        return _NOTHING
    from opentelemetry.propagate import extract  # noqa: PLC0415  an extra
    from opentelemetry.trace import SpanKind  # noqa: PLC0415

    sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    return _tracer.start_as_current_span(
        method, context=extract(sent), kind=SpanKind.SERVER, attributes={"http.request.method": method}
    )


def name_request(method: str, route: str, status: int, identifier: str) -> None:
    """Name the request under way by its route, and say how it was answered."""
    if _tracer is None:
        return
    from opentelemetry.trace import get_current_span  # noqa: PLC0415

    current = get_current_span()
    current.update_name(f"{method} {route}")
    current.set_attributes({"http.route": route, "http.response.status_code": status, "request_id": identifier})


def configure(endpoint: str | None) -> Callable[[], None]:
    """Send spans to a collector from now on, if one is named; return what sends the last and ends it.

    Raises StartupError where the extra is not installed.
    """
    if endpoint is None:
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise StartupError(f"traces need the extra: pip install 'primerisk[otel]' ({error.name} is missing)") from None
    resource = Resource.create({"service.name": "primerisk", "service.version": package_version()})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")))
    global _tracer  # noqa: PLW0603  one of a process, as its log is
    _tracer = provider.get_tracer("primerisk", package_version())

    def end() -> None:
        global _tracer  # noqa: PLW0603
        _tracer = None
        provider.shutdown()

    return end
