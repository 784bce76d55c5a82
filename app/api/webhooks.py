"""Webhooks: where events are sent, what was sent, and sending it again. A secret is in the reply that makes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api import body as wire
from app.api.agents import AgentId, keeper_of, owner_of
from app.api.deps import AgentCaller, body_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.errors import NotFoundError
from app.services import outbox, webhooks
from app.services.outbox import Delivery
from app.services.webhooks import Endpoint

router = APIRouter(prefix="/api/webhooks", tags=["webhooks"])


class WebhookPost(wire.Request):
    """POST /api/webhooks: `filters` are event types or families such as `margin_call.*`; none: every type."""

    url: str
    filters: list[str] | None = None


class RecoverPost(wire.Request):
    """POST /api/webhooks/{id}/recover."""

    since: wire.Moment


class NothingIn(wire.Request):
    """A body without fields; none at all will do."""


_WEBHOOK = wire.Body(WebhookPost)
_RECOVER = wire.Body(RecoverPost)
_NOTHING = wire.Body(NothingIn)

_DIGITS_MAX = 18

State = Annotated[Literal["pending", "delivered", "failed"] | None, Query(description="only these")]


@router.post("", openapi_extra=document("Add a webhook", request=WebhookPost, scope="agent", status=201))
async def create_webhook(request: Request, caller: AgentCaller, agent_id: AgentId = None) -> Response:
    """Have events sent to a URL, signed with a secret that is shown this once."""
    asked = await body_of(request, _WEBHOOK)
    parts = parts_of(request)
    allow_private = parts.settings.webhook_allow_private
    async with parts.database.transaction(caller.key_id) as tx:
        owner = await keeper_of(tx, caller, agent_id)
        made, secret = await webhooks.create(tx, owner, asked.url, asked.filters or (), allow_private=allow_private)
    return wire.JsonResponse({**_endpoint(made), "secret": secret}, 201)


@router.get("", openapi_extra=document("Webhooks", scope="agent"))
async def list_webhooks(request: Request, caller: AgentCaller, agent_id: AgentId = None) -> Response:
    """List an agent's webhooks, oldest first; never a secret. They are few: there is one page."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await webhooks.list_endpoints(tx, await owner_of(tx, caller, agent_id))
    return wire.JsonResponse({"webhooks": [_endpoint(endpoint) for endpoint in found], "next_cursor": None})


@router.get("/{webhook_id}", openapi_extra=document("A webhook", scope="agent"))
async def get_webhook(request: Request, caller: AgentCaller, webhook_id: str, agent_id: AgentId = None) -> Response:
    """Show a webhook, and whether it is failing or disabled."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await webhooks.get(tx, await owner_of(tx, caller, agent_id), webhook_id)
    return wire.JsonResponse(_endpoint(found))


@router.delete("/{webhook_id}", openapi_extra=document("Delete a webhook", scope="agent", status=204))
async def delete_webhook(request: Request, caller: AgentCaller, webhook_id: str, agent_id: AgentId = None) -> Response:
    """Delete a webhook with its secrets; what waits for it is not sent."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        await webhooks.delete(tx, await keeper_of(tx, caller, agent_id), webhook_id)
    return Response(status_code=204)


@router.post("/{webhook_id}/rotate", openapi_extra=document("A new secret", request=NothingIn, scope="agent"))
async def rotate_secret(request: Request, caller: AgentCaller, webhook_id: str, agent_id: AgentId = None) -> Response:
    """Make a new secret, shown this once; until `secret_before_until` the one before signs as well."""
    await body_of(request, _NOTHING, empty=b"{}")
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found, secret = await webhooks.rotate(tx, await keeper_of(tx, caller, agent_id), webhook_id)
    return wire.JsonResponse({**_endpoint(found), "secret": secret})


@router.post("/{webhook_id}/enable", openapi_extra=document("Enable a webhook", request=NothingIn, scope="agent"))
async def enable_webhook(request: Request, caller: AgentCaller, webhook_id: str, agent_id: AgentId = None) -> Response:
    """Send to a webhook again that was disabled, from now on; see recover for what it missed."""
    await body_of(request, _NOTHING, empty=b"{}")
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await webhooks.enable(tx, await owner_of(tx, caller, agent_id), webhook_id)
    return wire.JsonResponse(_endpoint(found))


@router.post(
    "/{webhook_id}/test", openapi_extra=document("Send a test event", request=NothingIn, scope="agent", status=202)
)
async def send_test(request: Request, caller: AgentCaller, webhook_id: str, agent_id: AgentId = None) -> Response:
    """Send an event `webhook.test`, and answer with its delivery, which tells how it went."""
    await body_of(request, _NOTHING, empty=b"{}")
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        queued = await webhooks.send_test(tx, await owner_of(tx, caller, agent_id), webhook_id)
    return wire.JsonResponse(_delivery(queued), 202)


@router.post(
    "/{webhook_id}/recover",
    openapi_extra=document("Send again what was missed", request=RecoverPost, scope="agent", status=202),
)
async def recover_webhook(request: Request, caller: AgentCaller, webhook_id: str, agent_id: AgentId = None) -> Response:
    """Send every event since a moment that failed or was never sent here, the oldest first; `more`: ask once more."""
    asked = await body_of(request, _RECOVER)
    since = wire.moment(asked.since, "/since")
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        count = await webhooks.recover(tx, await owner_of(tx, caller, agent_id), webhook_id, since)
    return wire.JsonResponse({"recovered": count, "more": count >= outbox.RECOVERED_MAX}, 202)


@router.get("/{webhook_id}/deliveries", openapi_extra=document("Deliveries of a webhook", scope="agent"))
async def list_deliveries(
    request: Request,
    caller: AgentCaller,
    webhook_id: str,
    agent_id: AgentId = None,
    limit: Limit = PAGE_MAX,
    cursor: Cursor = "",
    state: State = None,
) -> Response:
    """List what was sent or waits, newest first."""
    before = number_cursor(cursor)
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        owner = await owner_of(tx, caller, agent_id)
        found = await webhooks.list_deliveries(tx, owner, webhook_id, limit, before, state)
    more = next_cursor([item.id for item in found], limit)
    return wire.JsonResponse({"deliveries": [_delivery(item) for item in found], "next_cursor": more})


@router.get("/deliveries/{delivery_id}", openapi_extra=document("A delivery with its attempts", scope="agent"))
async def get_delivery(request: Request, caller: AgentCaller, delivery_id: str, agent_id: AgentId = None) -> Response:
    """Show a delivery, and how its last attempts went, newest first."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        owner = await owner_of(tx, caller, agent_id)
        found = await outbox.get_delivery(tx, owner, _number(delivery_id))
        log = await outbox.list_attempts(tx, found.id)
    return wire.JsonResponse({**_delivery(found), "log": [asdict(attempt) for attempt in log]})


@router.post(
    "/deliveries/{delivery_id}/replay",
    openapi_extra=document("Send a delivery again", request=NothingIn, scope="agent", status=202),
)
async def replay_delivery(
    request: Request, caller: AgentCaller, delivery_id: str, agent_id: AgentId = None
) -> Response:
    """Send one delivery again, now, under the id of its event."""
    await body_of(request, _NOTHING, empty=b"{}")
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        owner = await owner_of(tx, caller, agent_id)
        queued = await webhooks.replay(tx, owner, _number(delivery_id))
    return wire.JsonResponse(_delivery(queued), 202)


def _number(delivery_id: str) -> int:
    """Return the number of a delivery's id. Raises NotFoundError for what is no id."""
    if delivery_id.isascii() and delivery_id.isdecimal() and len(delivery_id) <= _DIGITS_MAX:
        return int(delivery_id)
    raise NotFoundError("There is no such delivery.", code="delivery_not_found")


def _endpoint(endpoint: Endpoint) -> dict[str, Any]:
    shown = asdict(endpoint)
    del shown["seq"]
    return shown


def _delivery(delivery: Delivery) -> dict[str, Any]:
    shown = asdict(delivery)
    return shown | {"id": str(delivery.id), "webhook_id": shown.pop("endpoint_id")}
