"""What the service is measured against.

`fastapi`: an empty FastAPI route. `guarded`: the same on the service's own server, behind its protocol (limits of the
wire) and its middleware (ids, limits, metrics). `asgi`: an app with no framework at all.

`python -m benchmarks.baselines PORT` runs `guarded`; the others are run by plain uvicorn.
"""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI, Request
from starlette.types import Receive, Scope, Send

from app.api.front import front
from app.api.middleware import Guard
from app.settings import Settings
from app.telemetry import Metrics

fastapi = FastAPI()


@fastapi.post("/api/quotes/margin")
async def empty(request: Request) -> dict[str, str]:
    """Read the body, answer nothing."""
    await request.body()
    return {}


guarded = FastAPI()
guarded.add_api_route("/api/quotes/margin", empty, methods=["POST"])
guarded.add_middleware(Guard, settings=Settings(), metrics=Metrics())


async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body, answer the number of bytes that the query asks for."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    size = int(scope["query_string"].partition(b"=")[2])
    headers = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b" " * size})


def main() -> None:
    """Serve `guarded` as the service is served."""
    config = uvicorn.Config(
        guarded,
        port=int(sys.argv[1]),
        log_config=None,
        access_log=False,
        server_header=False,
        http=front(Settings()),
        ws="none",
    )
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
