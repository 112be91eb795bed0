"""Stripe: the only module that imports its library.

Every write carries an idempotency key of ours that its caller derives from what the write is for, so that whoever
repeats it, from whichever process, has its effect once. How a write is repeated is decided here, never by the library.
Amounts are whole cents; only a price per unit is a decimal number of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import partial
from typing import Any, Literal, TypeVar, cast

import stripe

from crosslogic.domain.errors import InvariantViolated, Rejected, Unavailable

Answer = TypeVar("Answer")

TIMEOUT_S = 20
SIGNATURE_TOLERANCE_S = 300

# Source of these limits: the API reference of billing.meter_events, subscriptions and list pages.
MOST_METER_VALUE = 10**15 - 1
MOST_IDENTIFIER = 100
MOST_SUBSCRIPTION_ITEMS = 20
_PAGE = 100

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0
# A stored 5xx is passed by with another key at once; so many of them in a row are an outage.
_MOST_SUFFIXES = 12
# A customer is found by search a while after it was made; until then in the list of the newest.
_SEARCH_LAG = timedelta(hours=1)
# Stripe has no code for it; source of the words: the API reference of billing.meter_events.
_DUPLICATE = "An event already exists"


class Delivery(StrEnum):
    """What became of a meter event: Stripe took it now, or says that it had it already. Delivered both times (B6)."""

    ACCEPTED = "accepted"
    KNOWN = "known"


@dataclass(frozen=True, slots=True)
class Subscription:
    """A customer's subscription with the ids of its prices. Its periods end with the month."""

    id: str
    status: str
    prices: frozenset[str]


@dataclass(frozen=True, slots=True)
class StripeInvoice:
    """Stripe's invoice. Cents; the period is half-open."""

    id: str
    customer: str
    subscription: str
    status: str
    reason: str
    period_start: datetime
    period_end: datetime
    total_cents: int
    amount_due_cents: int
    amount_remaining_cents: int
    attempts: int
    finalizes_at: datetime | None


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """One line of an invoice; without a `price` it is an item that was added by hand."""

    id: str
    price: str
    quantity: int
    amount_cents: int
    description: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Who is told of events. `secret` is told when it is made and never again."""

    id: str
    secret: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """A webhook whose signature was right: which event, about which object. Nothing else of it is believed."""

    event_id: str
    type: str
    subject_kind: str
    subject_id: str


@dataclass(frozen=True, slots=True)
class ObjectState:
    """One of Stripe's objects as it is now. `details` holds what suspension and closing look at."""

    kind: str
    id: str
    customer: str
    status: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MeterError:
    """Meter events that Stripe took and threw away later: a sample, by the idempotency key it was sent with."""

    meter: str
    code: str
    count: int
    key: str
    message: str


def connect(api_key: str, *, base_url: str | None = None) -> stripe.StripeClient:
    """A client for one account. `base_url` points it elsewhere than at Stripe."""
    # It would log a line for each call.
    logging.getLogger("stripe").setLevel(logging.WARNING)
    return stripe.StripeClient(
        api_key,
        # Whoever calls decides how often, and with which key.
        max_network_retries=0,
        base_addresses={"api": base_url} if base_url else {},
        http_client=stripe.HTTPXClient(timeout=TIMEOUT_S, allow_sync_methods=True),
    )


def check_account(client: stripe.StripeClient) -> str:
    """One line about the account behind the key: live or test, and the API version that we speak.

    Raises Rejected when Stripe refuses the key, Unavailable when it does not answer.
    """
    try:
        balance = client.v1.balance.retrieve()
    except stripe.StripeError as error:
        raise _family(error, "reading the balance") from error
    return f"Stripe account in {'live' if balance.livemode else 'test'} mode, API {stripe.api_version}"


@dataclass(slots=True)
class StripeAccount:
    """What billing does at Stripe.

    Every method raises Unavailable when Stripe is away, busy or fails for good (nothing, or the same thing, has
    happened: repeat the call later), and Rejected when Stripe refuses what was asked.
    """

    client: stripe.StripeClient
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    jitter: Callable[[], float] = random.random  # 0 to 1
    most_tries: int = 5

    # What is set up once.

    async def ensure_product(self, product: str, name: str) -> str:
        """A product under an id of ours."""

        async def find() -> str | None:
            return await self._or_none(lambda: self.client.v1.products.retrieve_async(product), "reading a product")

        return await self._ensure(
            "making a product",
            f"product/{product}",
            find,
            lambda options: self.client.v1.products.create_async({"id": product, "name": name}, options),
        )

    async def list_meters(self) -> dict[str, str]:
        """The active meters: id by event name."""
        pages = self._pages("listing meters", self.client.v1.billing.meters.list_async, {"status": "active"})
        return {meter.event_name: meter.id async for meter in pages}

    async def ensure_meter(self, event_name: str, display_name: str, known: Mapping[str, str] | None = None) -> str:
        """A meter of one absolute value an hour, which sums the hours up. `known`: what `list_meters` just said."""

        async def find() -> str | None:
            return (await self.list_meters()).get(event_name)

        return await self._ensure(
            "making a meter",
            f"meter/{event_name}",
            find if known is None else _said(known.get(event_name), find),
            lambda options: self.client.v1.billing.meters.create_async(
                {
                    "event_name": event_name,
                    "display_name": display_name,
                    "default_aggregation": {"formula": "sum"},
                    "event_time_window": "hour",
                    "customer_mapping": {"type": "by_id", "event_payload_key": "stripe_customer_id"},
                    "value_settings": {"event_payload_key": "value"},
                },
                options,
            ),
        )

    async def list_prices(self, product: str) -> dict[str, str]:
        """The active prices of a product: id by lookup key."""
        params = {"product": product, "active": True}
        pages = self._pages("listing prices", self.client.v1.prices.list_async, params)
        return {price.lookup_key: price.id async for price in pages if price.lookup_key}

    async def ensure_price(
        self,
        lookup_key: str,
        *,
        product: str,
        meter: str,
        unit_cents: Decimal,
        known: Mapping[str, str] | None = None,
    ) -> str:
        """A monthly price in USD of what a meter counts, by its lookup key. `known`: what `list_prices` just said."""

        async def find() -> str | None:
            page = await self._read(
                "finding a price", lambda: self.client.v1.prices.list_async({"lookup_keys": [lookup_key]})
            )
            return page.data[0].id if page.data else None

        return await self._ensure(
            "making a price",
            f"price/{lookup_key}",
            find if known is None else _said(known.get(lookup_key), find),
            lambda options: self.client.v1.prices.create_async(
                {
                    "currency": "usd",
                    "lookup_key": lookup_key,
                    "product": product,
                    "unit_amount_decimal": unit_cents,
                    "recurring": {"interval": "month", "usage_type": "metered", "meter": meter},
                },
                options,
            ),
        )

    async def find_webhook(self, url: str) -> str | None:
        """The id of the endpoint at this URL, if there is one."""
        page = await self._read(
            "listing webhook endpoints", lambda: self.client.v1.webhook_endpoints.list_async({"limit": _PAGE})
        )
        return next((endpoint.id for endpoint in page.data if endpoint.url == url), None)

    async def create_webhook(self, url: str, events: tuple[str, ...], *, key: str) -> Endpoint:
        """An endpoint for snapshot events. One that is made is not found again with its secret: keep that."""
        made = await self._write(
            "making a webhook endpoint",
            key,
            lambda options: self.client.v1.webhook_endpoints.create_async(
                cast(Any, {"url": url, "enabled_events": list(events), "api_version": stripe.api_version}), options
            ),
        )
        return Endpoint(made.id, str(made.secret))

    async def find_destination(self, name: str) -> str | None:
        """The id of the destination of this name, if there is one."""
        page = await self._read(
            "listing event destinations", lambda: self.client.v2.core.event_destinations.list_async()
        )
        return next((destination.id for destination in page.data if destination.name == name), None)

    async def create_destination(self, name: str, url: str, events: tuple[str, ...], *, key: str) -> Endpoint:
        """A destination for thin events."""
        made = await self._write(
            "making an event destination",
            key,
            lambda options: self.client.v2.core.event_destinations.create_async(
                {
                    "name": name,
                    "type": "webhook_endpoint",
                    "event_payload": "thin",
                    "enabled_events": list(events),
                    "webhook_endpoint": {"url": url},
                    "include": ["webhook_endpoint.signing_secret"],
                },
                options,
            ),
        )
        target = made.webhook_endpoint
        return Endpoint(made.id, str(target.signing_secret) if target else "")

    async def delete_endpoint(self, endpoint: str) -> None:
        """Nobody is told at this endpoint or destination any more; one that is gone is gone."""
        if endpoint.startswith("we_"):
            await self._or_none(
                lambda: self.client.v1.webhook_endpoints.delete_async(endpoint), "deleting a webhook endpoint"
            )
        else:
            await self._or_none(
                lambda: self.client.v2.core.event_destinations.delete_async(endpoint), "deleting an event destination"
            )

    # Customers and their subscriptions.

    async def ensure_customer(self, org_id: str, name: str, *, now: datetime) -> str:
        """The customer of an org, found by its metadata."""

        async def find() -> str | None:
            query = f"metadata['org_id']:'{org_id}'"
            found = await self._read(
                "searching customers", lambda: self.client.v1.customers.search_async({"query": query})
            )
            if found.data:
                return min(found.data, key=lambda customer: customer.created).id
            return await self._find_new_customer(org_id, now - _SEARCH_LAG)

        return await self._ensure(
            "making a customer",
            f"customer/{org_id}",
            find,
            lambda options: self.client.v1.customers.create_async(
                {"name": name, "metadata": {"org_id": org_id}}, options
            ),
        )

    async def _find_new_customer(self, org_id: str, since: datetime) -> str | None:
        pages = self._pages(
            "listing customers", self.client.v1.customers.list_async, {"created": {"gte": _unix(since)}}
        )
        return await _first(pages, lambda customer: _metadata(customer).get("org_id") == org_id)

    async def find_subscription(self, customer: str) -> Subscription | None:
        """The customer's subscription that has not ended."""
        page = await self._read(
            "listing subscriptions",
            lambda: self.client.v1.subscriptions.list_async({"customer": customer, "limit": _PAGE}),
        )
        return _subscription(min(page.data, key=lambda one: one.created)) if page.data else None

    async def ensure_subscription(
        self, customer: str, prices: tuple[str, ...], *, start: datetime, next_month: datetime
    ) -> Subscription:
        """The customer's one subscription, with at least these prices (at most 20, the billing one first).

        It starts at `start`, which may be past, so that usage of that hour is in it, and its periods end when
        `next_month` and every later month begins. Raises Rejected for more than 20 prices.
        """
        if len(prices) > MOST_SUBSCRIPTION_ITEMS:
            raise Rejected(
                f"A subscription at Stripe holds {MOST_SUBSCRIPTION_ITEMS} prices, not {len(prices)}: "
                "leave evidence out.",
                code="too_many_prices",
            )

        async def find() -> Subscription | None:
            return await self.find_subscription(customer)

        found = await find() or await self._write(
            "making a subscription",
            f"subscription/{customer}",
            lambda options: self._create_subscription(customer, prices, start, next_month, options),
            find,
        )
        for price in prices:
            if price not in found.prices:
                await self._add_price(found, customer, price)
        return Subscription(found.id, found.status, found.prices | set(prices))

    async def _create_subscription(
        self, customer: str, prices: tuple[str, ...], start: datetime, next_month: datetime, options: Any
    ) -> Subscription:
        made = await self.client.v1.subscriptions.create_async(
            {
                "customer": customer,
                "items": [{"price": price} for price in prices],
                "backdate_start_date": _unix(start),
                "billing_cycle_anchor": _unix(next_month),
                # In classic mode, usage before a price changes in mid-month would silently not be billed.
                "billing_mode": {"type": "flexible"},
                "proration_behavior": "none",
                "automatic_tax": {"enabled": True},
            },
            options,
        )
        return _subscription(made)

    async def _add_price(self, subscription: Subscription, customer: str, price: str) -> None:
        async def find() -> str | None:
            now = await self.find_subscription(customer)
            return price if now and price in now.prices else None

        await self._write(
            "adding a price",
            f"item/{subscription.id}/{price}",
            lambda options: self._add_item(subscription.id, price, options),
            find,
        )

    async def _add_item(self, subscription: str, price: str, options: Any) -> str:
        made = await self.client.v1.subscription_items.create_async(
            {"subscription": subscription, "price": price, "proration_behavior": "none"}, options
        )
        return made.id

    # Usage.

    async def send_meter_event(
        self, customer: str, event_name: str, identifier: str, value: int, hour: datetime
    ) -> Delivery:
        """Say what the whole of an hour is. Repeated with the same identifier it counts once, for a day (B4, B6).

        Raises Rejected before anything is sent when Stripe could not take the value (B8).
        """
        if not 0 <= value <= MOST_METER_VALUE or not 0 < len(identifier) <= MOST_IDENTIFIER:
            raise Rejected(
                f"Meter event {identifier!r} cannot be sent: the value must have at most 15 digits, the identifier at "
                f"most {MOST_IDENTIFIER} characters. Post a correction.",
                code="meter_event_out_of_range",
            )

        async def send(options: Any) -> Delivery:
            try:
                await self.client.v1.billing.meter_events.create_async(
                    {
                        "event_name": event_name,
                        "identifier": identifier,
                        "payload": {"stripe_customer_id": customer, "value": str(value)},
                        "timestamp": _unix(hour),
                    },
                    options,
                )
            except stripe.InvalidRequestError as error:
                if (error.user_message or "").startswith(_DUPLICATE):
                    return Delivery.KNOWN
                raise
            return Delivery.ACCEPTED

        # No read-back is better than the identifier itself: what Stripe has, it refuses to take again.
        return await self._write("sending a meter event", identifier, send)

    async def cancel_meter_event(self, event_name: str, identifier: str) -> None:
        """Take a meter event back, within a day of its receipt."""
        await self._write(
            "cancelling a meter event",
            f"cancel/{identifier}",
            lambda options: self.client.v1.billing.meter_event_adjustments.create_async(
                {"event_name": event_name, "type": "cancel", "cancel": {"identifier": identifier}}, options
            ),
        )

    async def read_summaries(self, customer: str, meter: str, start: datetime, end: datetime) -> dict[datetime, int]:
        """What Stripe has of [start, end), by hour; hours without usage are left out. Behind by minutes, or hours.

        Raises InvariantViolated for a value that is not whole.
        """
        params = {
            "customer": customer,
            "start_time": _unix(start),
            "end_time": _unix(end),
            "value_grouping_window": "hour",
        }
        found: dict[datetime, int] = {}
        of_meter = partial(self.client.v1.billing.meters.event_summaries.list_async, meter)
        async for summary in self._pages("reading summaries", of_meter, params):
            if summary.aggregated_value != int(summary.aggregated_value):
                raise InvariantViolated(f"Stripe's summary {summary.id} is no whole number")
            found[_instant(summary.start_time)] = int(summary.aggregated_value)
        return found

    # Invoices.

    async def find_invoice(self, customer: str, subscription: str, month_end: datetime) -> StripeInvoice | None:
        """The invoice of the period that ended when this month did."""
        params = {"customer": customer, "subscription": subscription, "created": {"gte": _unix(month_end)}}
        async for invoice in self._pages("listing invoices", self.client.v1.invoices.list_async, params):
            if invoice.period_end == _unix(month_end) and invoice.billing_reason == "subscription_cycle":
                return _invoice(invoice)
        return None

    async def read_invoice(self, invoice: str) -> StripeInvoice:
        """An invoice as it is now."""
        return _invoice(await self._read("reading an invoice", lambda: self.client.v1.invoices.retrieve_async(invoice)))

    async def preview_invoice(self, customer: str, subscription: str) -> int:
        """What the running period would cost by now, in cents."""
        shown = await self._read(
            "previewing an invoice",
            lambda: self.client.v1.invoices.create_preview_async({"customer": customer, "subscription": subscription}),
        )
        return shown.total

    async def list_invoice_lines(self, invoice: str) -> list[InvoiceLine]:
        """All lines of an invoice."""
        of_invoice = partial(self.client.v1.invoices.line_items.list_async, invoice)
        return [_line(line) async for line in self._pages("listing invoice lines", of_invoice, {})]

    async def finalize_invoice(self, invoice: str) -> StripeInvoice:
        """Make a draft final; one that is final already is shown as it is."""

        async def find() -> StripeInvoice | None:
            now = await self.read_invoice(invoice)
            return now if now.status != "draft" else None

        async def send(options: Any) -> StripeInvoice:
            return _invoice(await self.client.v1.invoices.finalize_invoice_async(invoice, {}, options))

        return await find() or await self._write("finalizing an invoice", f"finalize/{invoice}", send, find)

    async def add_invoice_item(
        self, customer: str, key: str, cents: int, description: str, *, invoice: str | None = None
    ) -> str:
        """An amount, positive or negative, on a draft or (without one) on the customer's next invoice."""

        async def find() -> str | None:
            pages = self._pages(
                "listing invoice items", self.client.v1.invoice_items.list_async, {"customer": customer}
            )
            return await _first(pages, lambda item: _metadata(item).get("key") == key)

        body: Any = {
            "customer": customer,
            "amount": cents,
            "currency": "usd",
            "description": description,
            "metadata": {"key": key},
        }
        if invoice:
            body["invoice"] = invoice
        return await self._ensure(
            "adding an invoice item",
            f"item/{key}",
            find,
            lambda options: self.client.v1.invoice_items.create_async(body, options),
        )

    async def issue_credit_note(self, invoice: str, key: str, cents: int, memo: str) -> str:
        """Lower a final invoice: what is still owed, or, of a paid one, credit for the customer's next."""

        async def find() -> str | None:
            pages = self._pages("listing credit notes", self.client.v1.credit_notes.list_async, {"invoice": invoice})
            return await _first(pages, lambda note: _metadata(note).get("key") == key)

        found = await find()
        if found:
            return found
        is_paid = (await self.read_invoice(invoice)).status == "paid"
        body: Any = {"invoice": invoice, "amount": cents, "memo": memo, "metadata": {"key": key}}
        if is_paid:
            body["credit_amount"] = cents
        # A body that changes with the invoice's state needs a key that does, too.
        return await self._ensure(
            "issuing a credit note",
            f"credit-note/{key}/{'paid' if is_paid else 'open'}",
            find,
            lambda options: self.client.v1.credit_notes.create_async(body, options),
        )

    async def grant_credit(
        self,
        customer: str,
        key: str,
        cents: int,
        *,
        name: str,
        category: Literal["paid", "promotional"],
        expires_at: datetime | None = None,
    ) -> str:
        """Credit that metered lines use up before anything is charged."""

        async def find() -> str | None:
            pages = self._pages(
                "listing credit grants", self.client.v1.billing.credit_grants.list_async, {"customer": customer}
            )
            return await _first(pages, lambda grant: _metadata(grant).get("key") == key)

        body: Any = {
            "customer": customer,
            "name": name,
            "category": category,
            "amount": {"type": "monetary", "monetary": {"currency": "usd", "value": cents}},
            "applicability_config": {"scope": {"price_type": "metered"}},
            # Lower comes first: promotional credit before paid, whatever expires when.
            "priority": 10 if category == "promotional" else 20,
            "metadata": {"key": key},
        }
        if expires_at is not None:
            body["expires_at"] = _unix(expires_at)
        return await self._ensure(
            "granting credit",
            f"grant/{key}",
            find,
            lambda options: self.client.v1.billing.credit_grants.create_async(body, options),
        )

    async def expire_credit(self, grant: str) -> None:
        """Take away what is left of a grant."""
        await self._write(
            "expiring credit",
            f"expire/{grant}",
            lambda options: self.client.v1.billing.credit_grants.expire_async(grant, {}, options),
        )

    async def credit_left(self, customer: str) -> int:
        """What is left of all grants, in cents."""
        summary = await self._read(
            "reading the credit balance",
            lambda: self.client.v1.billing.credit_balance_summary.retrieve_async(
                {"customer": customer, "filter": {"type": "applicability_scope"}}
            ),
        )
        return sum(one.available_balance.monetary.value for one in summary.balances if one.available_balance.monetary)

    # Webhooks.

    def verify_webhook(self, payload: bytes, signature: str, secrets: tuple[str, ...]) -> Notice:
        """The notice in a delivery that one of our endpoints' secrets has signed within 300 s. Raises Rejected."""
        for secret in secrets:
            try:
                stripe.WebhookSignature.verify_header(  # pyright: ignore[reportUnknownMemberType]
                    payload, signature, secret, SIGNATURE_TOLERANCE_S
                )
            except (stripe.SignatureVerificationError, UnicodeDecodeError):
                continue
            return _notice(json.loads(payload))
        raise Rejected(
            "The signature is not one of ours, or older than 300 s.", status=400, code="invalid_stripe_signature"
        )

    async def read_state(self, kind: str, identifier: str) -> ObjectState:
        """An object as it is now; one that is gone has the status `deleted`."""
        readers: dict[str, Callable[[], Awaitable[ObjectState]]] = {
            "invoice": lambda: self._invoice_state(identifier),
            "subscription": lambda: self._subscription_state(identifier),
            "dispute": lambda: self._dispute_state(identifier),
        }
        try:
            return await readers[kind]()
        except Rejected as error:
            if error.status == 404:
                return ObjectState(kind, identifier, "", "deleted", {})
            raise

    async def _invoice_state(self, identifier: str) -> ObjectState:
        now = await self.read_invoice(identifier)
        details = {
            "subscription": now.subscription,
            "period_start": now.period_start.isoformat(),
            "period_end": now.period_end.isoformat(),
            "total_cents": now.total_cents,
            "amount_remaining_cents": now.amount_remaining_cents,
            "attempts": now.attempts,
        }
        return ObjectState("invoice", now.id, now.customer, now.status, details)

    async def _subscription_state(self, identifier: str) -> ObjectState:
        now = await self._read(
            "reading a subscription", lambda: self.client.v1.subscriptions.retrieve_async(identifier)
        )
        return ObjectState("subscription", now.id, _id_of(now.customer), now.status, {})

    async def _dispute_state(self, identifier: str) -> ObjectState:
        now = await self._read(
            "reading a dispute", lambda: self.client.v1.disputes.retrieve_async(identifier, {"expand": ["charge"]})
        )
        customer = "" if isinstance(now.charge, str) else _id_of(now.charge.customer)
        return ObjectState("dispute", now.id, customer, now.status, {"amount_cents": now.amount})

    async def read_meter_errors(self, event: str) -> list[MeterError]:
        """What a thin event about a meter's errors tells when it is fetched: samples, not everything."""
        found: Any = await self._read("reading an event", lambda: self.client.v2.core.events.retrieve_async(event))
        meter = str(found.related_object.id) if found.related_object else ""
        return [
            MeterError(meter, kind.code, kind.error_count, sample.request.identifier, sample.error_message)
            for kind in found.data.reason.error_types
            for sample in kind.sample_errors
        ]

    # How a call is repeated.

    async def _read(self, what: str, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """A call without an effect, repeated while Stripe is away or busy."""
        tries = 1
        while True:
            try:
                return await call()
            except stripe.StripeError as error:
                if not _is_passing(error) or tries >= self.most_tries:
                    raise _family(error, what) from error
            await self._pause(tries)
            tries += 1

    async def _pages(
        self, what: str, list_page: Callable[[Any], Awaitable[Any]], params: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Everything of a list, page by page."""
        params = params | {"limit": _PAGE}
        while True:
            page = await self._read(what, partial(list_page, params))
            for found in page.data:
                yield found
            if not page.has_more:
                return
            params = params | {"starting_after": page.data[-1].id}

    async def _write(
        self,
        what: str,
        key: str,
        send: Callable[[Any], Awaitable[Answer]],
        find: Callable[[], Awaitable[Answer | None]] | None = None,
    ) -> Answer:
        """A call with an effect: the same key, until Stripe has stored a failure under it.

        A stored failure may have had its effect. `find` looks for that; only then the call is made with another key.
        """
        suffix, tries = 0, 1
        while True:
            try:
                return await send({"idempotency_key": f"{key}{f'+{suffix}' if suffix else ''}"})
            except stripe.StripeError as error:
                if not _is_passing(error) or tries >= self.most_tries or suffix >= _MOST_SUFFIXES:
                    raise _family(error, what) from error
                is_replay = dict(error.headers or {}).get("idempotent-replayed") == "true"
                if is_replay or error.http_status == 500:
                    found = await find() if find else None
                    if found is not None:
                        return found
                    suffix += 1
                if is_replay:
                    continue  # Stripe does not even look: it is an older attempt's failure.
                await self._pause(tries)
                tries += 1

    async def _ensure(
        self,
        what: str,
        key: str,
        find: Callable[[], Awaitable[str | None]],
        create: Callable[[Any], Awaitable[Any]],
    ) -> str:
        """The id of an object that there shall be once: found, or made."""

        async def send(options: Any) -> str:
            return str((await create(options)).id)

        return await find() or await self._write(what, key, send, find)

    async def _or_none(self, call: Callable[[], Awaitable[Any]], what: str) -> str | None:
        """The id of what is read or deleted; None if it is not there."""
        try:
            return str((await self._read(what, call)).id)
        except Rejected as error:
            if error.status == 404:
                return None
            raise

    async def _pause(self, tries: int) -> None:
        await self.sleep(min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S) * (0.5 + self.jitter() / 2))


def _is_passing(error: stripe.StripeError) -> bool:
    """Might the same call succeed later? No status: no answer came."""
    status = error.http_status
    return status is None or status in (409, 429) or status >= 500


def _family(error: stripe.StripeError, what: str) -> Rejected | Unavailable:
    """Stripe's error as one of ours. Its own words stay in the cause: they may quote what was sent."""
    status = error.http_status
    if status == 401:
        return Rejected("Stripe refuses CROSSLOGIC_STRIPE_API_KEY; copy the secret key again.", status=401)
    if status == 403:
        return Rejected(
            f"CROSSLOGIC_STRIPE_API_KEY is not allowed to do this ({what}); give the restricted key that permission.",
            status=403,
        )
    if _is_passing(error):
        return Unavailable(f"Stripe does not answer ({what}); nothing is lost, it is tried again.", retry_after_s=60)
    param = getattr(error, "param", None)
    return Rejected(
        f"Stripe refuses {what}: {error.code or type(error).__name__}{f', parameter {param}' if param else ''}.",
        status=status if status in (402, 404) else 400,
        code="stripe_refused",
    )


def _subscription(found: stripe.Subscription) -> Subscription:
    # `items` is a method of the library's objects, which are mappings.
    items: Any = found["items"]
    return Subscription(found.id, found.status, frozenset(item["price"]["id"] for item in items["data"]))


def _invoice(found: stripe.Invoice) -> StripeInvoice:
    details = found.parent.subscription_details if found.parent else None
    return StripeInvoice(
        id=found.id,
        customer=_id_of(found.customer),
        subscription=_id_of(details.subscription) if details else "",
        status=found.status or "",
        reason=found.billing_reason or "",
        period_start=_instant(found.period_start),
        period_end=_instant(found.period_end),
        total_cents=found.total,
        amount_due_cents=found.amount_due,
        amount_remaining_cents=found.amount_remaining,
        attempts=found.attempt_count,
        finalizes_at=_instant(found.automatically_finalizes_at) if found.automatically_finalizes_at else None,
    )


def _line(found: stripe.InvoiceLineItem) -> InvoiceLine:
    details = found.pricing.price_details if found.pricing else None
    return InvoiceLine(
        id=found.id,
        price=_id_of(details.price) if details else "",
        quantity=found.quantity or 0,
        amount_cents=found.amount,
        description=found.description or "",
        metadata=_metadata(found),
    )


def _notice(event: dict[str, Any]) -> Notice:
    # Thin events name their object, snapshots hold it.
    subject: Any = event.get("related_object") or event["data"]["object"]
    kind = subject.get("object") or subject.get("type")
    return Notice(str(event["id"]), str(event["type"]), str(kind), str(subject.get("id", "")))


def _said(known: str | None, find: Callable[[], Awaitable[str | None]]) -> Callable[[], Awaitable[str | None]]:
    """Answers first what is known already, and looks from then on."""
    answers = iter([known])

    async def look() -> str | None:
        for answer in answers:
            return answer
        return await find()

    return look


async def _first(pages: AsyncIterator[Any], is_it: Callable[[Any], bool]) -> str | None:
    async for found in pages:
        if is_it(found):
            return str(found.id)
    return None


def _metadata(found: Any) -> dict[str, str]:
    return {} if found.metadata is None else found.metadata.to_dict()


def _id_of(found: Any) -> str:
    """The id of what is either an id, or the object itself."""
    return found if isinstance(found, str) else "" if found is None else str(found.id)


def _unix(at: datetime) -> int:
    return int(at.timestamp())


def _instant(unix_s: int) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)
