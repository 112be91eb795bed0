"""Customers, products, prices, and who is told of events."""

from __future__ import annotations

import re
import secrets
from decimal import Decimal
from typing import Any

from crosslogic.dev.stripe_double.books import Body, Books, iso
from crosslogic.dev.stripe_double.refusals import Refusal


def balance(_books: Books, _params: Body) -> Body:
    """GET /v1/balance."""
    return {"object": "balance", "livemode": False, "available": [], "pending": []}


def create_customer(books: Books, params: Body) -> Body:
    """POST /v1/customers."""
    made = books.add(
        "customer",
        "cus",
        {
            "email": params.get("email"),
            "name": params.get("name"),
            "description": params.get("description"),
            "metadata": params.get("metadata") or {},
            "balance": params.get("balance", 0),
            "currency": "usd",
            "delinquent": False,
            "invoice_settings": {"default_payment_method": None},
        },
    )
    books.emit("customer.created", made)
    return made


def update_customer(books: Books, params: Body, identifier: str) -> Body:
    """POST /v1/customers/{id}."""
    updated = books.save(merged(_customer(books, identifier), params))
    books.emit("customer.updated", updated)
    return updated


def get_customer(books: Books, _: Body, identifier: str) -> Body:
    """GET /v1/customers/{id}: one that was deleted is a stub."""
    return books.get("customer", identifier)


def delete_customer(books: Books, _: Body, identifier: str) -> Body:
    """DELETE /v1/customers/{id}: its subscriptions end with it."""
    customer = _customer(books, identifier)
    for subscription in books.all("subscription", identifier):
        if subscription["status"] != "canceled":
            ended = books.save(subscription | {"status": "canceled", "ended_at": books.second})
            books.emit("customer.subscription.deleted", ended)
    books.emit("customer.deleted", customer)
    return books.save({"id": identifier, "object": "customer", "deleted": True})


def search_customers(books: Books, params: Body) -> list[Body]:
    """GET /v1/customers/search, for clauses on metadata joined by AND; behind the truth by the search lag."""
    clauses = [clause.strip() for clause in re.split(r"(?i)\s+and\s+", params["query"])]
    wanted: dict[str, str] = {}
    for clause in clauses:
        match = re.fullmatch(r"""metadata\[['"]([^'"]+)['"]\]\s*:\s*['"]([^'"]*)['"]""", clause)
        if match is None:
            raise Refusal(f"We were unable to parse your search query: {clause}", param="query")
        wanted[match[1]] = match[2]
    visible = books.now - books.behaviour.search_lag_s
    return [
        customer
        for customer in books.all("customer")
        if not customer.get("deleted")
        and customer["created"] <= visible
        and wanted.items() <= customer["metadata"].items()
    ]


def create_product(books: Books, params: Body) -> Body:
    """POST /v1/products, under an id of the caller's if there is one."""
    fields: Body = {
        "name": params["name"],
        "active": params.get("active", True),
        "description": params.get("description"),
        "metadata": params.get("metadata") or {},
        "tax_code": params.get("tax_code"),
        "unit_label": params.get("unit_label"),
        "type": "service",
    }
    return books.add("product", "prod", fields, identifier=params.get("id", ""))


def update_product(books: Books, params: Body, identifier: str) -> Body:
    """POST /v1/products/{id}."""
    return books.save(merged(books.get("product", identifier), params))


def create_price(books: Books, params: Body) -> Body:
    """POST /v1/prices: metered ones name their meter."""
    product = books.get("product", params.get("product", ""), "product")
    recurring = params.get("recurring")
    if recurring and recurring.get("usage_type") == "metered" and not recurring.get("meter"):
        raise Refusal("Metered prices must be backed by a meter.", param="recurring[meter]")
    if recurring and recurring.get("meter"):
        books.get("billing.meter", recurring["meter"], "recurring[meter]")
    amount, exact = params.get("unit_amount"), params.get("unit_amount_decimal")
    if (amount is None) == (exact is None):
        raise Refusal("Exactly one of unit_amount and unit_amount_decimal must be set.", param="unit_amount")
    exact = Decimal(amount or 0) if exact is None else Decimal(exact)
    if exact != round(exact, 12):
        raise Refusal("unit_amount_decimal has more than 12 decimal places", param="unit_amount_decimal")
    key = params.get("lookup_key")
    if key:
        for other in books.all("price"):
            if other["lookup_key"] == key:
                if not params.get("transfer_lookup_key"):
                    raise Refusal(f"A price with the lookup key {key} exists already.", param="lookup_key")
                books.save(other | {"lookup_key": None})
    fields: dict[str, Any] = {
        "active": params.get("active", True),
        "billing_scheme": params.get("billing_scheme", "per_unit"),
        "currency": params["currency"],
        "lookup_key": key,
        "metadata": params.get("metadata") or {},
        "nickname": params.get("nickname"),
        "product": product["id"],
        "recurring": None,
        "tax_behavior": params.get("tax_behavior", "unspecified"),
        "type": "recurring" if recurring else "one_time",
        "unit_amount": int(exact) if exact == int(exact) else None,
        "unit_amount_decimal": format(exact.normalize(), "f"),
    }
    if recurring:
        fields["recurring"] = {"interval_count": 1, "usage_type": "licensed", "meter": None, **recurring}
    return books.add("price", "price", fields)


def update_price(books: Books, params: Body, identifier: str) -> Body:
    """POST /v1/prices/{id}: what it costs never changes."""
    return books.save(merged(books.get("price", identifier), params))


def list_prices(books: Books, params: Body) -> list[Body]:
    """GET /v1/prices."""
    keys = params.get("lookup_keys")
    return [
        price
        for price in books.all("price")
        if (keys is None or price["lookup_key"] in keys)
        and price["product"] == params.get("product", price["product"])
        and price["active"] == params.get("active", price["active"])
    ]


def create_endpoint(books: Books, params: Body) -> Body:
    """POST /v1/webhook_endpoints: its secret is told this once."""
    made = books.add(
        "webhook_endpoint",
        "we",
        {
            "api_version": params.get("api_version"),
            "application": None,
            "description": params.get("description"),
            "enabled_events": params["enabled_events"],
            "metadata": params.get("metadata") or {},
            "status": "enabled",
            "url": params["url"],
        },
    )
    secret = _secret(books, made["id"])
    return made | {"secret": secret}


def update_endpoint(books: Books, params: Body, identifier: str) -> Body:
    """POST /v1/webhook_endpoints/{id}."""
    params = dict(params)
    if "disabled" in params:
        params["status"] = "disabled" if params.pop("disabled") else "enabled"
    return books.save(merged(books.get("webhook_endpoint", identifier), params))


def delete_endpoint(books: Books, _: Body, identifier: str) -> Body:
    """DELETE /v1/webhook_endpoints/{id}."""
    return _delete(books, "webhook_endpoint", identifier)


def create_destination(books: Books, params: Body) -> Body:
    """POST /v2/core/event_destinations: where thin events go."""
    if params["type"] != "webhook_endpoint" or params["event_payload"] != "thin":
        raise Refusal("The double delivers thin events to webhook endpoints only.", param="type")
    made = books.add(
        "v2.core.event_destination",
        "ed",
        {
            "created": iso(books.now),
            "description": params.get("description", ""),
            "enabled_events": params["enabled_events"],
            "event_payload": "thin",
            "events_from": ["self"],
            "metadata": params.get("metadata") or {},
            "name": params["name"],
            "status": "enabled",
            "type": "webhook_endpoint",
            "updated": iso(books.now),
            "webhook_endpoint": {"url": params["webhook_endpoint"]["url"]},
        },
    )
    shown = {"url": made["webhook_endpoint"]["url"], "signing_secret": _secret(books, made["id"])}
    included = {name.rpartition(".")[2] for name in params.get("include", ())}
    return made | {"webhook_endpoint": {name: shown.get(name) if name in included else None for name in shown}}


def delete_destination(books: Books, _: Body, identifier: str) -> Body:
    """DELETE /v2/core/event_destinations/{id}."""
    return _delete(books, "v2.core.event_destination", identifier)


def list_events(books: Books, params: Body) -> list[Body]:
    """GET /v1/events, newest first."""
    kinds = params.get("types") or ([params["type"]] if "type" in params else None)
    return [event for event in books.all("event")[::-1] if kinds is None or event["type"] in kinds]


def secret_of(books: Books, endpoint: str) -> str:
    """What an endpoint's deliveries are signed with."""
    return str(books.note(f"secret {endpoint}")["secret"])


def merged(body: Body, params: Body) -> Body:
    """An object with new values; metadata is merged key by key, and an empty value takes its key away."""
    params = dict(params)
    metadata = params.pop("metadata", None)
    if metadata is not None:
        joined: Body = {} if metadata == "" else body["metadata"] | metadata
        params["metadata"] = {name: value for name, value in joined.items() if value != ""}
    params.pop("expand", None)
    return body | params


def _customer(books: Books, identifier: str) -> Body:
    customer = books.get("customer", identifier)
    if customer.get("deleted"):
        raise Refusal(f"No such customer: '{identifier}'", status=404, code="resource_missing", param="id")
    return customer


def _secret(books: Books, endpoint: str) -> str:
    secret = f"whsec_{secrets.token_hex(16)}"
    books.write_note(f"secret {endpoint}", {"secret": secret})
    return secret


def _delete(books: Books, kind: str, identifier: str) -> Body:
    found = books.get(kind, identifier)
    books.database.execute("DELETE FROM objects WHERE id = ?", (identifier,))
    return {"id": identifier, "object": found["object"], "deleted": True}
