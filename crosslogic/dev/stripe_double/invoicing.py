"""Subscriptions, their periods and invoices, and how those are paid: as the documentation of flexible billing says."""

from __future__ import annotations

import calendar
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal

from crosslogic.dev.stripe_double import metering
from crosslogic.dev.stripe_double.books import Body, Books, part
from crosslogic.dev.stripe_double.catalog import merged
from crosslogic.dev.stripe_double.refusals import Refusal

MOST_ITEMS = 20  # of a subscription; source: the API reference of subscriptions
_MOST_LINES = 250  # invoice items of an invoice
_LEAST_CENTS = 50  # What is less cannot be charged in USD; it waits in the customer's balance.
_MOST_ATTEMPTS = 4


# Subscriptions.


def create_subscription(books: Books, params: Body) -> Body:
    """POST /v1/subscriptions, of metered prices. The first invoice comes at the end of the first period."""
    customer = _customer(books, params.get("customer", ""))
    wanted: list[Body] = params.get("items") or []
    if not wanted:
        raise Refusal("Missing required param: items.", code="parameter_missing", param="items")
    start = params.get("backdate_start_date", books.second)
    if start > books.second:
        raise Refusal("backdate_start_date must be in the past", param="backdate_start_date")
    anchor = _anchor(books, params)
    made = books.add(
        "subscription",
        "sub",
        {
            "customer": customer["id"],
            "status": "active",
            "billing_mode": params.get("billing_mode") or {"type": "flexible"},
            "billing_cycle_anchor": anchor,
            "cancel_at_period_end": False,
            "canceled_at": None,
            "collection_method": params.get("collection_method", "charge_automatically"),
            "days_until_due": params.get("days_until_due"),
            "automatic_tax": _automatic_tax(params),
            "currency": "usd",
            "ended_at": None,
            "latest_invoice": None,
            "metadata": params.get("metadata") or {},
            "start_date": start,
            "items": {"object": "list", "data": [], "has_more": False, "url": "/v1/subscription_items"},
        },
    )
    end = anchor if anchor > books.second else _after(anchor, books.second)
    for item in wanted:
        _add_item(books, made, item, start, end)
    books.save(made)
    books.emit("customer.subscription.created", made)
    return made


def update_subscription(books: Books, params: Body, identifier: str) -> Body:
    """POST /v1/subscriptions/{id}: metadata, collection and the end; items are added by /v1/subscription_items."""
    params = dict(params)
    if "items" in params:
        raise Refusal("The double changes items by /v1/subscription_items only.", param="items")
    updated = books.save(merged(books.get("subscription", identifier), params))
    books.emit("customer.subscription.updated", updated)
    return updated


def cancel_subscription(books: Books, params: Body, identifier: str) -> Body:
    """DELETE /v1/subscriptions/{id}; with `invoice_now`, what was used is invoiced."""
    subscription = books.get("subscription", identifier)
    if params.get("invoice_now") and subscription["items"]["data"]:
        _invoice_period(books, subscription, books.second, "subscription_update")
    ended = books.save(
        books.get("subscription", identifier)
        | {"status": "canceled", "canceled_at": books.second, "ended_at": books.second}
    )
    books.emit("customer.subscription.deleted", ended)
    return ended


def create_item(books: Books, params: Body) -> Body:
    """POST /v1/subscription_items."""
    subscription = books.get("subscription", params["subscription"], "subscription")
    items = subscription["items"]["data"]
    made = _add_item(books, subscription, params, items[0]["current_period_start"], items[0]["current_period_end"])
    books.save(subscription)
    books.emit("customer.subscription.updated", subscription)
    return made


def list_items(books: Books, params: Body) -> list[Body]:
    """GET /v1/subscription_items."""
    return list(books.get("subscription", params["subscription"], "subscription")["items"]["data"])


def list_subscriptions(books: Books, params: Body) -> list[Body]:
    """GET /v1/subscriptions: without a status, all but the ended ones."""
    status = params.get("status")
    found = books.all("subscription", params.get("customer"))
    if status is None:
        return [one for one in found if one["status"] != "canceled"]
    return [one for one in found if status in ("all", one["status"])]


def _add_item(books: Books, subscription: Body, given: Body, start: int, end: int) -> Body:
    items: list[Body] = subscription["items"]["data"]
    price = books.get("price", given.get("price", ""), "price")
    if len(items) >= MOST_ITEMS:
        raise Refusal(f"A subscription can have at most {MOST_ITEMS} items.", param="items")
    if any(item["price"]["id"] == price["id"] for item in items):
        raise Refusal(f"Cannot add multiple subscription items with the same price: {price['id']}", param="items")
    if not price["recurring"] or price["recurring"]["usage_type"] != "metered":
        raise Refusal("The double bills metered prices only.", param="items")
    item = books.add(
        "subscription_item",
        "si",
        {
            "price": price,
            "subscription": subscription["id"],
            "metadata": given.get("metadata") or {},
            "current_period_start": start,
            "current_period_end": end,
        },
    )
    items.append(item)
    return item


def _anchor(books: Books, params: Body) -> int:
    config = params.get("billing_cycle_anchor_config")
    if not config:
        anchor = params.get("billing_cycle_anchor", books.second)
        if anchor > _add_months(books.second, 1):
            raise Refusal("billing_cycle_anchor cannot be later than a period from now", param="billing_cycle_anchor")
        return int(anchor)
    now = datetime.fromtimestamp(books.second, UTC)
    time = {name: config.get(name, getattr(now, name)) for name in ("hour", "minute", "second")}
    for months in (0, 1):
        at = datetime.fromtimestamp(_add_months(books.second, months), UTC)
        last = calendar.monthrange(at.year, at.month)[1]
        anchor = int(at.replace(day=min(config["day_of_month"], last), **time).timestamp())
        if anchor > books.second:
            return anchor
    raise AssertionError("a day of the next month lies ahead")


def _add_months(at: int, months: int, day: int | None = None) -> int:
    """The same time of day so many months later, on `day` or the month's last."""
    moment = datetime.fromtimestamp(at, UTC)
    month = moment.month - 1 + months
    year, month = moment.year + month // 12, month % 12 + 1
    day = min(day or moment.day, calendar.monthrange(year, month)[1])
    return int(moment.replace(year=year, month=month, day=day).timestamp())


def _after(anchor: int, at: int) -> int:
    """The first end of a period after `at`."""
    months = 1
    while _add_months(anchor, months) <= at:
        months += 1
    return _add_months(anchor, months)


# Invoices.


def preview(books: Books, params: Body) -> Body:
    """POST /v1/invoices/create_preview: the running period's invoice as it stands."""
    subscription = books.get("subscription", params.get("subscription", ""), "subscription")
    start, end = _period(subscription)
    lag_s = books.behaviour.summary_lag_s
    lines = _usage_lines(books, subscription, start, end, lag_s) + _pending_lines(books, subscription["customer"])
    shown = _new_invoice(books, subscription, start, end, "upcoming")
    shown |= {"id": f"upcoming_in_{subscription['id']}", "object": "invoice", "created": books.second}
    return _totalled(shown, lines)


def create_invoice(books: Books, params: Body) -> Body:
    """POST /v1/invoices: one of its own, with the customer's pending items if they are asked for."""
    customer = _customer(books, params.get("customer", ""))
    fields = _new_invoice(books, None, books.second, books.second, "manual") | {
        "customer": customer["id"],
        "collection_method": params.get("collection_method", "charge_automatically"),
        "auto_advance": params.get("auto_advance", False),
        "description": params.get("description"),
        "metadata": params.get("metadata") or {},
        "automatic_tax": _automatic_tax(params),
    }
    if fields["auto_advance"]:
        fields["automatically_finalizes_at"] = books.second + int(books.behaviour.draft_s)
    made = books.add("invoice", "in", fields)
    if params.get("pending_invoice_items_behavior") == "include":
        _attach_pending(books, made)
    made = _refreshed(books, made)
    books.emit("invoice.created", made)
    return made


def get_invoice(books: Books, _: Body, identifier: str) -> Body:
    """GET /v1/invoices/{id}: a draft shows the usage as it stands."""
    return _refreshed(books, books.get("invoice", identifier))


def list_invoices(books: Books, params: Body) -> list[Body]:
    """GET /v1/invoices, newest first."""
    created = part(params, "created")
    found: list[Body] = []
    for invoice in books.all("invoice", params.get("customer"))[::-1]:
        if params.get("status", invoice["status"]) != invoice["status"]:
            continue
        if params.get("subscription", _subscription_of(invoice)) != _subscription_of(invoice):
            continue
        if not created.get("gte", 0) <= invoice["created"] < created.get("lt", invoice["created"] + 1):
            continue
        found.append(_refreshed(books, invoice))
    return found


def update_invoice(books: Books, params: Body, identifier: str) -> Body:
    """POST /v1/invoices/{id}."""
    invoice = books.get("invoice", identifier)
    if invoice["status"] != "draft" and params.keys() - {"metadata"}:
        raise Refusal("Finalized invoices can't be updated this way.", code="invoice_not_editable")
    updated = books.save(merged(invoice, params))
    books.emit("invoice.updated", updated)
    return _refreshed(books, updated)


def delete_invoice(books: Books, _: Body, identifier: str) -> Body:
    """DELETE /v1/invoices/{id}: drafts that no subscription made."""
    invoice = books.get("invoice", identifier)
    if invoice["status"] != "draft" or _subscription_of(invoice):
        raise Refusal("You can only delete draft invoices that no subscription made.", code="invoice_not_editable")
    books.database.execute("DELETE FROM objects WHERE id = ?", (identifier,))
    books.emit("invoice.deleted", invoice)
    return {"id": identifier, "object": "invoice", "deleted": True}


def invoice_lines(books: Books, _: Body, identifier: str) -> list[Body]:
    """GET /v1/invoices/{id}/lines."""
    return list(_refreshed(books, books.get("invoice", identifier))["lines"]["data"])


def finalize(books: Books, _: Body, identifier: str) -> Body:
    """POST /v1/invoices/{id}/finalize: what is used or added from now on is on no invoice of this period."""
    invoice = books.get("invoice", identifier)
    if invoice["status"] != "draft":
        raise Refusal("This invoice is already finalized.", code="invoice_not_editable")
    invoice = _refreshed(books, invoice)
    _apply_credits(books, invoice)
    customer = books.get("customer", invoice["customer"])
    owed = invoice["total"] + customer["balance"]
    if owed < _LEAST_CENTS:
        # Nothing, a credit, or too little: the next invoice takes it up.
        amount_due, ending = 0, owed
        if owed == invoice["total"] == 0:
            ending = 0
    else:
        amount_due, ending = owed, 0
    number = len([one for one in books.all("invoice", customer["id"]) if one["number"]]) + 1
    invoice |= {
        "status": "open",
        "number": f"{customer['id'][-8:]}-{number:04d}",
        "automatically_finalizes_at": None,
        "effective_at": books.second,
        "starting_balance": customer["balance"],
        "ending_balance": ending,
        "amount_due": amount_due,
        "amount_remaining": amount_due,
        "status_transitions": invoice["status_transitions"] | {"finalized_at": books.second},
    }
    books.save(customer | {"balance": ending})
    books.save(invoice)
    books.emit("invoice.finalized", invoice)
    if not amount_due:
        return _paid(books, invoice, 0)
    if invoice["collection_method"] == "charge_automatically":
        return _attempt(books, invoice)
    return invoice


def pay(books: Books, params: Body, identifier: str) -> Body:
    """POST /v1/invoices/{id}/pay: an attempt outside the schedule, or a payment that was made elsewhere."""
    invoice = books.get("invoice", identifier)
    if invoice["status"] != "open":
        raise Refusal(f"The invoice is {invoice['status']}, not open.", code="invoice_not_editable")
    if params.get("paid_out_of_band"):
        return _paid(books, invoice, invoice["amount_remaining"])
    attempted = _attempt(books, invoice)
    if attempted["status"] != "paid":
        # The attempt stands, so this must not roll it back: the caller sees the refusal as Stripe words it.
        return {"error": {"type": "card_error", "code": "card_declined", "message": "Your card was declined."}}
    return attempted


def void(books: Books, _: Body, identifier: str) -> Body:
    """POST /v1/invoices/{id}/void."""
    return _end(books, identifier, "void", "voided_at", "invoice.voided")


def mark_uncollectible(books: Books, _: Body, identifier: str) -> Body:
    """POST /v1/invoices/{id}/mark_uncollectible."""
    return _end(books, identifier, "uncollectible", "marked_uncollectible_at", "invoice.marked_uncollectible")


def create_invoice_item(books: Books, params: Body) -> Body:
    """POST /v1/invoiceitems: on a draft, or pending for the customer's next invoice."""
    customer = _customer(books, params.get("customer", ""))
    amount = params.get("amount")
    if amount is None:
        raise Refusal("The double wants an amount in cents.", code="parameter_missing", param="amount")
    target = params.get("invoice")
    if target:
        invoice = books.get("invoice", target, "invoice")
        if invoice["status"] != "draft":
            raise Refusal("Items can be added to draft invoices only.", code="invoice_not_editable", param="invoice")
        if invoice["customer"] != customer["id"]:
            raise Refusal("The invoice belongs to another customer.", param="invoice")
        if len([item for item in books.all("invoiceitem", customer["id"]) if item["invoice"] == target]) >= _MOST_LINES:
            raise Refusal(f"An invoice can have at most {_MOST_LINES} items.", param="invoice")
    made = books.add(
        "invoiceitem",
        "ii",
        {
            "customer": customer["id"],
            "amount": amount,
            "currency": params.get("currency", "usd"),
            "date": books.second,
            "description": params.get("description"),
            "discountable": params.get("discountable", True),
            "invoice": target,
            "metadata": params.get("metadata") or {},
            "period": params.get("period") or {"start": books.second, "end": books.second},
            "quantity": 1,
        },
    )
    books.emit("invoiceitem.created", made)
    return made


def list_invoice_items(books: Books, params: Body) -> list[Body]:
    """GET /v1/invoiceitems, newest first."""
    found = books.all("invoiceitem", params.get("customer"))[::-1]
    if "pending" in params:
        found = [item for item in found if (item["invoice"] is None) == params["pending"]]
    return [item for item in found if params.get("invoice", item["invoice"]) == item["invoice"]]


def delete_invoice_item(books: Books, _: Body, identifier: str) -> Body:
    """DELETE /v1/invoiceitems/{id}: pending or on a draft."""
    item = books.get("invoiceitem", identifier)
    if item["invoice"] and books.get("invoice", item["invoice"])["status"] != "draft":
        raise Refusal("The item's invoice is final.", code="invoice_not_editable")
    books.database.execute("DELETE FROM objects WHERE id = ?", (identifier,))
    books.emit("invoiceitem.deleted", item)
    return {"id": identifier, "object": "invoiceitem", "deleted": True}


def create_credit_note(books: Books, params: Body) -> Body:
    """POST /v1/credit_notes: lowers what is owed, or gives back what was paid."""
    invoice = books.get("invoice", params["invoice"], "invoice")
    amount = params.get("amount", sum(line.get("amount", 0) for line in params.get("lines") or ()))
    if invoice["status"] not in ("open", "paid"):
        raise Refusal(f"A {invoice['status']} invoice cannot be credited.", param="invoice")
    if amount <= 0:
        raise Refusal("The amount must be positive.", param="amount")
    before = sum(
        note["total"] for note in books.all("credit_note", invoice["customer"]) if note["invoice"] == invoice["id"]
    )
    if before + amount > invoice["total"]:
        raise Refusal("The credit notes would exceed the invoice's total.", param="amount")
    given = {name: params.get(f"{name}_amount", 0) for name in ("refund", "credit", "out_of_band")}
    is_before = invoice["status"] == "open"
    if not is_before and sum(given.values()) != amount:
        raise Refusal(
            "The sum of refund_amount, credit_amount and out_of_band_amount must equal the credit note's amount.",
            param="amount",
        )
    if is_before and amount > invoice["amount_remaining"]:
        raise Refusal("The amount exceeds what is still owed.", param="amount")
    made = books.add(
        "credit_note",
        "cn",
        {
            "customer": invoice["customer"],
            "invoice": invoice["id"],
            "amount": amount,
            "total": amount,
            "subtotal": amount,
            "currency": "usd",
            "memo": params.get("memo"),
            "metadata": params.get("metadata") or {},
            "number": f"{invoice['number']}-CN-{before + 1}",
            "out_of_band_amount": given["out_of_band"],
            "post_payment_amount": 0 if is_before else amount,
            "pre_payment_amount": amount if is_before else 0,
            "reason": params.get("reason"),
            "status": "issued",
            "type": "pre_payment" if is_before else "post_payment",
            "voided_at": None,
        },
    )
    field = "pre_payment_credit_notes_amount" if is_before else "post_payment_credit_notes_amount"
    invoice[field] += amount
    if is_before:
        invoice["amount_remaining"] -= amount
        invoice["amount_due"] -= amount
    if given["credit"]:
        customer = books.get("customer", invoice["customer"])
        books.save(customer | {"balance": customer["balance"] - given["credit"]})
    books.save(invoice)
    books.emit("credit_note.created", made)
    if is_before and not invoice["amount_remaining"]:
        _paid(books, invoice, 0)
    return made


def list_credit_notes(books: Books, params: Body) -> list[Body]:
    """GET /v1/credit_notes, newest first."""
    found = books.all("credit_note", params.get("customer"))[::-1]
    return [note for note in found if params.get("invoice", note["invoice"]) == note["invoice"]]


# Credit grants.


def create_grant(books: Books, params: Body) -> Body:
    """POST /v1/billing/credit_grants: cents that metered lines use up."""
    customer = _customer(books, params.get("customer", ""))
    monetary = part(params["amount"], "monetary")
    if monetary.get("value", 0) <= 0:
        raise Refusal("The amount must be positive.", param="amount[monetary][value]")
    expires = params.get("expires_at")
    if expires is not None and expires <= books.second:
        raise Refusal("expires_at must be in the future", param="expires_at")
    made = books.add(
        "billing.credit_grant",
        "credgr",
        {
            "customer": customer["id"],
            "amount": params["amount"],
            "applicability_config": params["applicability_config"],
            "category": params.get("category", "paid"),
            "effective_at": params.get("effective_at", books.second),
            "expires_at": expires,
            "metadata": params.get("metadata") or {},
            "name": params.get("name"),
            "priority": params.get("priority", 50),
            "updated": books.second,
            "voided_at": None,
        },
    )
    books.write_note(f"left {made['id']}", {"cents": monetary["value"]})
    books.emit("billing.credit_grant.created", made)
    return made


def void_grant(books: Books, _: Body, identifier: str) -> Body:
    """POST /v1/billing/credit_grants/{id}/void: possible until some of it was used."""
    grant = books.get("billing.credit_grant", identifier)
    if _left(books, grant) != grant["amount"]["monetary"]["value"]:
        raise Refusal("Some of this credit grant was used; expire it instead.", param="id")
    return books.save(grant | {"voided_at": books.second})


def expire_grant(books: Books, _: Body, identifier: str) -> Body:
    """POST /v1/billing/credit_grants/{id}/expire."""
    return books.save(books.get("billing.credit_grant", identifier) | {"expires_at": books.second})


def grant_balance(books: Books, params: Body) -> Body:
    """GET /v1/billing/credit_balance_summary: what is left of a customer's grants."""
    customer = params.get("customer", "")
    grants = [grant for grant in books.all("billing.credit_grant", customer) if _is_usable(books, grant)]
    wanted = part(params, "filter").get("credit_grant")
    cents = sum(_left(books, grant) for grant in grants if wanted in (None, grant["id"]))
    money = {"type": "monetary", "monetary": {"currency": "usd", "value": cents}}
    return {
        "object": "billing.credit_balance_summary",
        "customer": customer,
        "balances": [{"available_balance": money, "ledger_balance": money}],
        "livemode": False,
    }


def _left(books: Books, grant: Body) -> int:
    return int(books.note(f"left {grant['id']}")["cents"])


def _is_usable(books: Books, grant: Body) -> bool:
    has_ended = grant["expires_at"] is not None and grant["expires_at"] <= books.now
    return not has_ended and grant["voided_at"] is None and grant["effective_at"] <= books.now


def _apply_credits(books: Books, invoice: Body) -> None:
    """Use up grants on the metered lines: by priority, then what expires first, promotional, effective, oldest."""
    grants = [grant for grant in books.all("billing.credit_grant", invoice["customer"]) if _is_usable(books, grant)]
    grants.sort(
        key=lambda grant: (
            grant["priority"],
            grant["expires_at"] or float("inf"),
            grant["category"] != "promotional",
            grant["effective_at"],
            grant["created"],
        )
    )
    used: dict[str, int] = {}
    for grant in grants:
        scope = grant["applicability_config"]["scope"]
        prices = {price["id"] for price in scope.get("prices") or ()}
        left = _left(books, grant)
        for line in invoice["lines"]["data"]:
            is_metered = line["parent"]["type"] == "subscription_item_details"
            if not is_metered or (prices and line["pricing"]["price_details"]["price"] not in prices):
                continue
            open_cents = line["amount"] - sum(credit["amount"] for credit in line["pretax_credit_amounts"])
            taken = min(left, open_cents)
            if taken > 0:
                left -= taken
                used[grant["id"]] = used.get(grant["id"], 0) + taken
                line["pretax_credit_amounts"].append(
                    {"amount": taken, "type": "credit_balance_transaction", "credit_balance_transaction": grant["id"]}
                )
        books.write_note(f"left {grant['id']}", {"cents": left})
    invoice["total_pretax_credit_amounts"] = [
        {"amount": taken, "type": "credit_balance_transaction", "credit_balance_transaction": grant}
        for grant, taken in used.items()
    ]
    invoice["total"] -= sum(used.values())


# How an invoice comes to be and ends.


def _new_invoice(books: Books, subscription: Body | None, start: int, end: int, reason: str) -> Body:
    details = {"subscription": subscription["id"], "metadata": subscription["metadata"]} if subscription else None
    return {
        "customer": subscription["customer"] if subscription else "",
        "parent": {"type": "subscription_details", "subscription_details": details} if subscription else None,
        "status": "draft",
        "billing_reason": reason,
        "collection_method": subscription["collection_method"] if subscription else "charge_automatically",
        "auto_advance": True,
        "automatically_finalizes_at": None,
        "attempt_count": 0,
        "attempted": False,
        "next_payment_attempt": None,
        "amount_due": 0,
        "amount_paid": 0,
        "amount_remaining": 0,
        "starting_balance": 0,
        "ending_balance": None,
        "automatic_tax": subscription["automatic_tax"] if subscription else {"enabled": False, "status": None},
        "currency": "usd",
        "description": None,
        "due_date": None,
        "effective_at": None,
        "metadata": {},
        "number": None,
        "period_start": start,
        "period_end": end,
        "post_payment_credit_notes_amount": 0,
        "pre_payment_credit_notes_amount": 0,
        "status_transitions": dict.fromkeys(("finalized_at", "marked_uncollectible_at", "paid_at", "voided_at")),
        "subtotal": 0,
        "total": 0,
        "total_pretax_credit_amounts": [],
        "total_taxes": [],
        "lines": {"object": "list", "data": [], "has_more": False, "url": ""},
    }


def _invoice_period(books: Books, subscription: Body, end: int, reason: str) -> Body:
    start = _period(subscription)[0]
    fields = _new_invoice(books, subscription, start, end, reason)
    fields["automatically_finalizes_at"] = books.second + int(books.behaviour.draft_s)
    made = books.add("invoice", "in", fields)
    _attach_pending(books, made)
    for item in subscription["items"]["data"]:
        item |= {"current_period_start": end, "current_period_end": _add_months(end, 1, _anchor_day(subscription))}
    books.save(subscription | {"latest_invoice": made["id"]})
    made = _refreshed(books, made)
    books.emit("invoice.created", made)
    return made


def _attach_pending(books: Books, invoice: Body) -> None:
    for item in books.all("invoiceitem", invoice["customer"]):
        if item["invoice"] is None:
            books.save(item | {"invoice": invoice["id"]})


def _refreshed(books: Books, invoice: Body) -> Body:
    """A draft with its lines as of now; any other as it was made final."""
    if invoice["status"] != "draft":
        return invoice
    lines: list[Body] = []
    subscription = _subscription_of(invoice)
    if subscription:
        found = books.get("subscription", subscription)
        lines += _usage_lines(books, found, invoice["period_start"], invoice["period_end"])
    items = [item for item in books.all("invoiceitem", invoice["customer"]) if item["invoice"] == invoice["id"]]
    return books.save(_totalled(invoice, lines + [_item_line(item) for item in items]))


def _totalled(invoice: Body, lines: list[Body]) -> Body:
    total = sum(line["amount"] for line in lines)
    for line in lines:
        line["invoice"] = invoice["id"]
    listed = {"object": "list", "data": lines, "has_more": False, "url": f"/v1/invoices/{invoice['id']}/lines"}
    amounts = {"subtotal": total, "total": total, "amount_due": max(total, 0), "amount_remaining": max(total, 0)}
    return invoice | amounts | {"lines": listed}


def _usage_lines(books: Books, subscription: Body, start: int, end: int, lag_s: float = 0.0) -> list[Body]:
    lines: list[Body] = []
    for item in subscription["items"]["data"]:
        price = item["price"]
        meter = books.get("billing.meter", price["recurring"]["meter"])
        quantity = metering.aggregate(books, meter, subscription["customer"], start, end, lag_s)
        exact = max(quantity, 0) * Decimal(price["unit_amount_decimal"])
        line = _line(f"il_{item['id']}", int(exact.quantize(Decimal(1), ROUND_HALF_UP)), start, end)
        name = books.get("product", price["product"])["name"]
        line |= {
            "description": f"{quantity} × {name}",
            "quantity": max(quantity, 0),
            "parent": {
                "type": "subscription_item_details",
                "subscription_item_details": {"subscription": subscription["id"], "subscription_item": item["id"]},
            },
            "pricing": {
                "type": "price_details",
                "price_details": {"price": price["id"], "product": price["product"]},
                "unit_amount_decimal": price["unit_amount_decimal"],
            },
            "metadata": subscription["metadata"],
        }
        lines.append(line)
    return lines


def _pending_lines(books: Books, customer: str) -> list[Body]:
    return [_item_line(item) for item in books.all("invoiceitem", customer) if item["invoice"] is None]


def _item_line(item: Body) -> Body:
    return _line(f"il_{item['id']}", item["amount"], item["period"]["start"], item["period"]["end"]) | {
        "description": item["description"],
        "quantity": 1,
        "parent": {"type": "invoice_item_details", "invoice_item_details": {"invoice_item": item["id"]}},
        "pricing": None,
        "metadata": item["metadata"],
    }


def _line(identifier: str, amount: int, start: int, end: int) -> Body:
    return {
        "id": identifier,
        "object": "line_item",
        "amount": amount,
        "subtotal": amount,
        "currency": "usd",
        "period": {"start": start, "end": end},
        "pretax_credit_amounts": [],
        "taxes": [],
        "livemode": False,
    }


def _attempt(books: Books, invoice: Body) -> Body:
    """One attempt at the customer's payment method, which does as was ordered."""
    intent = _payment(books, invoice, is_paid := books.note(f"pays {invoice['customer']}").get("outcome") != "fail")
    invoice["attempted"] = True
    invoice["attempt_count"] += 1
    if is_paid:
        return _paid(books, invoice, invoice["amount_remaining"])
    has_next = invoice["attempt_count"] < _MOST_ATTEMPTS
    invoice["next_payment_attempt"] = books.second + int(books.behaviour.payment_retry_s) if has_next else None
    books.save(invoice)
    books.emit("payment_intent.payment_failed", intent)
    books.emit("invoice.payment_failed", invoice)
    _set_subscription_status(books, invoice, "past_due" if has_next else "unpaid")
    return invoice


def _payment(books: Books, invoice: Body, is_paid: bool) -> Body:
    status = "succeeded" if is_paid else "failed"
    shared = {"customer": invoice["customer"], "amount": invoice["amount_remaining"], "currency": "usd"}
    links = {"metadata": {"invoice": invoice["id"]}, "invoice": invoice["id"]}
    charge = books.add("charge", "ch", shared | links | {"status": status, "paid": is_paid, "payment_intent": None})
    intent = books.add(
        "payment_intent",
        "pi",
        shared
        | links
        | {"status": "succeeded" if is_paid else "requires_payment_method", "latest_charge": charge["id"]},
    )
    books.save(charge | {"payment_intent": intent["id"]})
    return intent


def _paid(books: Books, invoice: Body, cents: int) -> Body:
    invoice |= {
        "status": "paid",
        "amount_paid": invoice["amount_paid"] + cents,
        "amount_remaining": 0,
        "next_payment_attempt": None,
        "status_transitions": invoice["status_transitions"] | {"paid_at": books.second},
    }
    books.save(invoice)
    books.emit("invoice.paid", invoice)
    if cents:
        books.emit("invoice.payment_succeeded", invoice)
    _set_subscription_status(books, invoice, "active")
    return invoice


def _end(books: Books, identifier: str, status: str, moment: str, event: str) -> Body:
    invoice = books.get("invoice", identifier)
    if invoice["status"] not in ("open", "uncollectible"):
        raise Refusal(f"The invoice is {invoice['status']}, not open.", code="invoice_not_editable")
    ended = invoice | {"status": status, "next_payment_attempt": None}
    ended["status_transitions"] = invoice["status_transitions"] | {moment: books.second}
    books.save(ended)
    books.emit(event, ended)
    return ended


def _set_subscription_status(books: Books, invoice: Body, status: str) -> None:
    identifier = _subscription_of(invoice)
    subscription = books.get("subscription", identifier) if identifier else None
    if subscription and subscription["status"] not in ("canceled", status):
        books.emit("customer.subscription.updated", books.save(subscription | {"status": status}))


# Disputes: made by the control API, as a cardholder's bank would.


def open_dispute(books: Books, invoice_id: str) -> Body:
    """A cardholder disputes what paid an invoice. Raises Refusal when nothing did."""
    invoice = books.get("invoice", invoice_id)
    charges = [one for one in books.all("charge", invoice["customer"]) if one["invoice"] == invoice_id and one["paid"]]
    if not charges:
        raise Refusal("No payment of this invoice can be disputed.", param="invoice")
    fields = {"charge": charges[-1]["id"], "payment_intent": charges[-1]["payment_intent"], "reason": "fraudulent"}
    made = books.add(
        "dispute",
        "du",
        fields | {"amount": charges[-1]["amount"], "currency": "usd", "metadata": {}, "status": "needs_response"},
    )
    books.emit("charge.dispute.created", made)
    return made


def close_dispute(books: Books, identifier: str, status: str) -> Body:
    """The bank has decided: `won` or `lost`."""
    dispute = books.save(books.get("dispute", identifier) | {"status": status})
    books.emit("charge.dispute.closed", dispute)
    return dispute


# Time.


def next_due(books: Books) -> tuple[float, Callable[[], object]] | None:
    """What happens by itself next, and when: a period ends, a draft is finalized, a payment is tried again."""
    due: list[tuple[float, int, Callable[[], object]]] = []
    for subscription in books.all("subscription"):
        if subscription["status"] != "canceled" and subscription["items"]["data"]:
            end = _period(subscription)[1]
            due.append((end, 0, lambda s=subscription, at=end: _invoice_period(books, s, at, "subscription_cycle")))
    for invoice in books.all("invoice"):
        if invoice["status"] == "draft" and invoice["auto_advance"] and invoice["automatically_finalizes_at"]:
            due.append((invoice["automatically_finalizes_at"], 1, lambda i=invoice: finalize(books, {}, i["id"])))
        if invoice["status"] == "open" and invoice["next_payment_attempt"]:
            due.append((invoice["next_payment_attempt"], 2, lambda i=invoice: _attempt(books, i)))
    if not due:
        return None
    at, _, act = min(due, key=lambda one: one[:2])
    return at, act


def _period(subscription: Body) -> tuple[int, int]:
    first = subscription["items"]["data"][0]
    return first["current_period_start"], first["current_period_end"]


def _anchor_day(subscription: Body) -> int:
    return datetime.fromtimestamp(subscription["billing_cycle_anchor"], UTC).day


def _subscription_of(invoice: Body) -> str | None:
    parent = invoice["parent"]
    return parent["subscription_details"]["subscription"] if parent else None


def _automatic_tax(params: Body) -> Body:
    is_enabled = bool(part(params, "automatic_tax").get("enabled"))
    # The double knows no tax: it is accepted, and is zero.
    return {"enabled": is_enabled, "status": "complete" if is_enabled else None}


def _customer(books: Books, identifier: str) -> Body:
    if not identifier:
        raise Refusal("Missing required param: customer.", code="parameter_missing", param="customer")
    customer = books.get("customer", identifier, "customer")
    if customer.get("deleted"):
        raise Refusal(f"No such customer: '{identifier}'", code="resource_missing", param="customer")
    return customer
