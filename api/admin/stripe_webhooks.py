"""Stripe's notices: a signature lets them in, and the object they are about is read at Stripe, whatever they say (B10).

Two notices, in either order or twice, lead to the same state: each makes us read how the object stands now, and of two
readings that overlap the one that began later is kept. What is derived from a state is derived when it is asked for.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from api.admin.context import Admin, AdminContext, StoreRoute
from api.admin.schemas import ErrorOut
from crosslogic.domain.errors import Rejected
from crosslogic.store.stripe import StripeStore

if TYPE_CHECKING:
    from crosslogic.clients.stripe import Notice, StripeAccount

log = logging.getLogger("crosslogic.api")

_TRIES = 2  # Stripe waits for the answer, and delivers again.
_LARGEST_BODY = 1_000_000  # bytes; Stripe's events are a few kilobytes
_METER_ERRORS = ("v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found")
_KINDS = ("invoice", "subscription", "dispute")

# Beside the admin routes, not behind their door: Stripe has no token, it signs.
router = APIRouter(prefix="/stripe", tags=["billing"], route_class=StoreRoute)


@router.post(
    "/webhooks",
    summary="Where Stripe tells of invoices, payments, subscriptions, disputes and meter errors",
    responses={
        "4XX": {"model": ErrorOut, "description": "No signature of ours, or an old one: nothing was written."},
        "5XX": {"model": ErrorOut, "description": "503: Stripe or Postgres is away; it is to be delivered again."},
    },
)
async def receive(request: Request, admin: Admin) -> dict[str, str]:
    """Take one delivery. Answers 503 while Stripe cannot be asked, so that it is delivered again."""
    payload = await _body(request)
    store = StripeStore(admin.pool)
    account = await _account(request, admin)
    secrets = await _secrets(store, admin)
    notice = account.verify_webhook(payload, request.headers.get("stripe-signature", ""), secrets)
    if not await store.note_event(notice.event_id, notice.type, notice.subject_id):
        return {"status": "known"}
    await apply(notice, account, store)
    await store.mark_handled(notice.event_id)
    return {"status": "handled"}


async def apply(notice: Notice, account: StripeAccount, store: StripeStore) -> None:
    """Bring what we know of the notice's object up to date. Raises Unavailable; doing it again is harmless."""
    if notice.type in _METER_ERRORS:
        for error in await account.read_meter_errors(notice.event_id):
            await store.add_meter_error(notice.event_id, error.key, error.code, error.meter, error.count, error.message)
            log.error(
                "Stripe threw away %d meter events of %s (%s), such as %s: see docs/operating/stripe.md",
                error.count,
                error.meter or "no meter",
                error.code,
                error.key,
            )
        return
    if notice.subject_kind not in _KINDS:
        return
    reading = await store.next_reading()
    state = await account.read_state(notice.subject_kind, notice.subject_id)
    await store.keep_state(state.kind, state.id, state.customer, state.status, state.details, reading)


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_BODY:
            raise Rejected("A notice of Stripe is smaller than 1 MB.", status=413, code="too_large")
    return body


async def _account(request: Request, admin: AdminContext) -> StripeAccount:
    key = admin.settings.stripe_api_key
    if key is None:
        raise Rejected("Billing is off: CROSSLOGIC_STRIPE_API_KEY is not set.", status=404, code="billing_off")
    kept: Any = getattr(request.app.state, "stripe", None)
    if kept is None:
        # Half a second and 30 MB that only who bills shall pay.
        from crosslogic.clients import stripe

        url = admin.settings.stripe_url or None
        client = await run_in_threadpool(stripe.connect, key.get_secret_value(), base_url=url)
        kept = request.app.state.stripe = stripe.StripeAccount(client, most_tries=_TRIES)
    return cast("StripeAccount", kept)


async def _secrets(store: StripeStore, admin: AdminContext) -> tuple[str, ...]:
    from crosslogic.sealing import STRIPE_WEBHOOKS, unseal

    root = admin.settings.node_secret.get_secret_value() if admin.settings.node_secret else ""
    kept = [*(await store.objects("webhook")).values(), *(await store.objects("destination")).values()]
    return tuple(unseal(root, STRIPE_WEBHOOKS, one.sealed_secret) for one in kept if one.sealed_secret)
