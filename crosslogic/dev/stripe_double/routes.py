"""Which URL does what: method and pattern, the typed parameters it is checked against, and who answers it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from crosslogic.dev.stripe_double import catalog, invoicing, metering
from crosslogic.dev.stripe_double.books import Body, Books, part
from crosslogic.dev.stripe_double.refusals import Refusal

_LARGEST_PAGE = 100


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one URL. `schema` is a name below `stripe.params`; empty: no parameters but `expand`."""

    method: str
    pattern: str
    schema: str
    answer: Callable[..., Body]

    @property
    def name(self) -> str:
        """What faults and the list of calls know it by."""
        return f"{self.method} {self.pattern}"


def _get(kind: str) -> Callable[..., Body]:
    def answer(books: Books, params: Body, identifier: str) -> Body:
        return _expanded(books, books.get(kind, identifier), params.get("expand") or ())

    return answer


def _list(
    of: Callable[..., list[Body]] | str, *, is_newest_first: bool = False, name: str = "list"
) -> Callable[..., Body]:
    def answer(books: Books, params: Body, *identifiers: str) -> Body:
        if isinstance(of, str):
            found = [one for one in books.all(of, params.get("customer")) if _is_within(one, part(params, "created"))]
            found = found[::-1] if is_newest_first else found
        else:
            found = of(books, params, *identifiers)
        return _paged(found, params, name)

    return answer


def _of_invoice(answer: Callable[..., Body]) -> Callable[..., Body]:
    """Show an invoice with the first lines only, as Stripe embeds them."""

    def shown(books: Books, params: Body, *identifiers: str) -> Body:
        return _embedded(answer(books, params, *identifiers))

    return shown


def _paged(found: list[Body], params: Body, name: str) -> Body:
    limit = params.get("limit", 10)
    if not 1 <= limit <= _LARGEST_PAGE:
        raise Refusal(f"Invalid integer: limit must be between 1 and {_LARGEST_PAGE}", param="limit", is_kept=False)
    start = 0
    after = params.get("starting_after") or params.get("page")
    if after:
        ids = [one["id"] for one in found]
        if after not in ids:
            raise Refusal(f"No such object: '{after}'", code="resource_missing", param="starting_after", is_kept=False)
        start = ids.index(after) + 1
    page = found[start : start + limit]
    has_more = len(found) > start + limit
    shown = {"object": name, "data": [_embedded(one) for one in page], "has_more": has_more, "url": ""}
    return shown | ({"next_page": page[-1]["id"] if has_more else None} if name == "search_result" else {})


def _is_within(body: Body, created: Body) -> bool:
    return "created" not in body or created.get("gte", 0) <= body["created"] < created.get("lt", float("inf"))


def _embedded(body: Body) -> Body:
    if body.get("object") != "invoice" or "lines" not in body:
        return body
    lines = body["lines"]
    first = lines | {"data": lines["data"][:10], "has_more": len(lines["data"]) > 10}
    return body | {"lines": first}


def _expanded(books: Books, body: Body, names: Any) -> Body:
    for name in names:
        found = books.find(str(body.get(name)))
        if found is None:
            raise Refusal(f"This property cannot be expanded ({name}).", param="expand")
        body = body | {name: found}
    return body


def _list_v2(kind: str) -> Callable[..., Body]:
    def answer(books: Books, _: Body) -> Body:
        return {"data": [_shown_destination(one) for one in books.all(kind)], "next_page_url": None}

    return answer


def _get_destination(books: Books, _: Body, identifier: str) -> Body:
    return _shown_destination(books.get("v2.core.event_destination", identifier))


def _shown_destination(body: Body) -> Body:
    # Where it goes, and with which secret, is told only to who asks for it when it is made.
    return body | {"webhook_endpoint": None}


_GRANTS = "/v1/billing/credit_grants"
_METERS = "/v1/billing/meters"
_DESTINATIONS = "/v2/core/event_destinations"

OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", "/v1/balance", "BalanceRetrieveParams", catalog.balance),
    Operation("POST", "/v1/customers", "CustomerCreateParams", catalog.create_customer),
    Operation("GET", "/v1/customers", "CustomerListParams", _list("customer", is_newest_first=True)),
    Operation(
        "GET",
        "/v1/customers/search",
        "CustomerSearchParams",
        _list(catalog.search_customers, name="search_result"),
    ),
    Operation("POST", "/v1/customers/{id}", "CustomerUpdateParams", catalog.update_customer),
    Operation("GET", "/v1/customers/{id}", "CustomerRetrieveParams", catalog.get_customer),
    Operation("DELETE", "/v1/customers/{id}", "", catalog.delete_customer),
    Operation("POST", "/v1/products", "ProductCreateParams", catalog.create_product),
    Operation("GET", "/v1/products", "ProductListParams", _list("product", is_newest_first=True)),
    Operation("POST", "/v1/products/{id}", "ProductUpdateParams", catalog.update_product),
    Operation("GET", "/v1/products/{id}", "ProductRetrieveParams", _get("product")),
    Operation("POST", "/v1/prices", "PriceCreateParams", catalog.create_price),
    Operation("GET", "/v1/prices", "PriceListParams", _list(catalog.list_prices)),
    Operation("POST", "/v1/prices/{id}", "PriceUpdateParams", catalog.update_price),
    Operation("GET", "/v1/prices/{id}", "PriceRetrieveParams", _get("price")),
    Operation("POST", _METERS, "billing.MeterCreateParams", metering.create_meter),
    Operation("GET", _METERS, "billing.MeterListParams", _list("billing.meter")),
    Operation("POST", f"{_METERS}/{{id}}", "billing.MeterUpdateParams", metering.update_meter),
    Operation("GET", f"{_METERS}/{{id}}", "billing.MeterRetrieveParams", _get("billing.meter")),
    Operation("POST", f"{_METERS}/{{id}}/deactivate", "billing.MeterDeactivateParams", metering.deactivate_meter),
    Operation("POST", f"{_METERS}/{{id}}/reactivate", "billing.MeterReactivateParams", metering.reactivate_meter),
    Operation(
        "GET",
        f"{_METERS}/{{id}}/event_summaries",
        "billing.MeterEventSummaryListParams",
        _list(metering.summaries),
    ),
    Operation("POST", "/v1/billing/meter_events", "billing.MeterEventCreateParams", metering.create_event),
    Operation(
        "POST",
        "/v1/billing/meter_event_adjustments",
        "billing.MeterEventAdjustmentCreateParams",
        metering.adjust,
    ),
    Operation("POST", _GRANTS, "billing.CreditGrantCreateParams", invoicing.create_grant),
    Operation("GET", _GRANTS, "billing.CreditGrantListParams", _list("billing.credit_grant", is_newest_first=True)),
    Operation("GET", f"{_GRANTS}/{{id}}", "billing.CreditGrantRetrieveParams", _get("billing.credit_grant")),
    Operation("POST", f"{_GRANTS}/{{id}}/void", "billing.CreditGrantVoidGrantParams", invoicing.void_grant),
    Operation("POST", f"{_GRANTS}/{{id}}/expire", "billing.CreditGrantExpireParams", invoicing.expire_grant),
    Operation(
        "GET",
        "/v1/billing/credit_balance_summary",
        "billing.CreditBalanceSummaryRetrieveParams",
        invoicing.grant_balance,
    ),
    Operation("POST", "/v1/subscriptions", "SubscriptionCreateParams", invoicing.create_subscription),
    Operation("GET", "/v1/subscriptions", "SubscriptionListParams", _list(invoicing.list_subscriptions)),
    Operation("POST", "/v1/subscriptions/{id}", "SubscriptionUpdateParams", invoicing.update_subscription),
    Operation("GET", "/v1/subscriptions/{id}", "SubscriptionRetrieveParams", _get("subscription")),
    Operation("DELETE", "/v1/subscriptions/{id}", "SubscriptionCancelParams", invoicing.cancel_subscription),
    Operation("POST", "/v1/subscription_items", "SubscriptionItemCreateParams", invoicing.create_item),
    Operation("GET", "/v1/subscription_items", "SubscriptionItemListParams", _list(invoicing.list_items)),
    Operation("POST", "/v1/invoices", "InvoiceCreateParams", _of_invoice(invoicing.create_invoice)),
    Operation("POST", "/v1/invoices/create_preview", "InvoiceCreatePreviewParams", _of_invoice(invoicing.preview)),
    Operation("GET", "/v1/invoices", "InvoiceListParams", _list(invoicing.list_invoices)),
    Operation("POST", "/v1/invoices/{id}", "InvoiceUpdateParams", _of_invoice(invoicing.update_invoice)),
    Operation("GET", "/v1/invoices/{id}", "InvoiceRetrieveParams", _of_invoice(invoicing.get_invoice)),
    Operation("DELETE", "/v1/invoices/{id}", "", invoicing.delete_invoice),
    Operation("GET", "/v1/invoices/{id}/lines", "InvoiceLineItemListParams", _list(invoicing.invoice_lines)),
    Operation("POST", "/v1/invoices/{id}/finalize", "InvoiceFinalizeInvoiceParams", _of_invoice(invoicing.finalize)),
    Operation("POST", "/v1/invoices/{id}/pay", "InvoicePayParams", _of_invoice(invoicing.pay)),
    Operation("POST", "/v1/invoices/{id}/void", "InvoiceVoidInvoiceParams", _of_invoice(invoicing.void)),
    Operation(
        "POST",
        "/v1/invoices/{id}/mark_uncollectible",
        "InvoiceMarkUncollectibleParams",
        _of_invoice(invoicing.mark_uncollectible),
    ),
    Operation("POST", "/v1/invoiceitems", "InvoiceItemCreateParams", invoicing.create_invoice_item),
    Operation("GET", "/v1/invoiceitems", "InvoiceItemListParams", _list(invoicing.list_invoice_items)),
    Operation("GET", "/v1/invoiceitems/{id}", "InvoiceItemRetrieveParams", _get("invoiceitem")),
    Operation("DELETE", "/v1/invoiceitems/{id}", "", invoicing.delete_invoice_item),
    Operation("POST", "/v1/credit_notes", "CreditNoteCreateParams", invoicing.create_credit_note),
    Operation("GET", "/v1/credit_notes", "CreditNoteListParams", _list(invoicing.list_credit_notes)),
    Operation("GET", "/v1/credit_notes/{id}", "CreditNoteRetrieveParams", _get("credit_note")),
    Operation("GET", "/v1/payment_intents/{id}", "PaymentIntentRetrieveParams", _get("payment_intent")),
    Operation("GET", "/v1/charges/{id}", "ChargeRetrieveParams", _get("charge")),
    Operation("GET", "/v1/disputes", "DisputeListParams", _list("dispute", is_newest_first=True)),
    Operation("GET", "/v1/disputes/{id}", "DisputeRetrieveParams", _get("dispute")),
    Operation("GET", "/v1/events", "EventListParams", _list(catalog.list_events)),
    Operation("GET", "/v1/events/{id}", "EventRetrieveParams", _get("event")),
    Operation("POST", "/v1/webhook_endpoints", "WebhookEndpointCreateParams", catalog.create_endpoint),
    Operation("GET", "/v1/webhook_endpoints", "WebhookEndpointListParams", _list("webhook_endpoint")),
    Operation("POST", "/v1/webhook_endpoints/{id}", "WebhookEndpointUpdateParams", catalog.update_endpoint),
    Operation("GET", "/v1/webhook_endpoints/{id}", "WebhookEndpointRetrieveParams", _get("webhook_endpoint")),
    Operation("DELETE", "/v1/webhook_endpoints/{id}", "", catalog.delete_endpoint),
    Operation("GET", "/v2/core/events/{id}", "v2.core.EventRetrieveParams", _get("v2.core.event")),
    Operation("POST", _DESTINATIONS, "v2.core.EventDestinationCreateParams", catalog.create_destination),
    Operation("GET", _DESTINATIONS, "v2.core.EventDestinationListParams", _list_v2("v2.core.event_destination")),
    Operation("GET", f"{_DESTINATIONS}/{{id}}", "v2.core.EventDestinationRetrieveParams", _get_destination),
    Operation("DELETE", f"{_DESTINATIONS}/{{id}}", "", catalog.delete_destination),
)


def _compiled(operation: Operation) -> tuple[re.Pattern[str], Operation]:
    return re.compile(re.sub(r"\\\{id\\\}", "([^/]+)", re.escape(operation.pattern))), operation


_COMPILED = [_compiled(operation) for operation in OPERATIONS]


def find(method: str, path: str) -> tuple[Operation, Callable[..., Body]] | None:
    """The operation behind a URL, and its answer with the URL's id filled in: called with books and parameters."""
    for pattern, operation in _COMPILED:
        match = pattern.fullmatch(path) if operation.method == method else None
        if match:
            return operation, partial(_call, path, operation.answer, match.groups())
    return None


def _call(
    path: str, answer: Callable[..., Body], identifiers: tuple[str, ...], books: Books, params: Body, **more: Any
) -> Body:
    body = answer(books, params, *identifiers, **more)
    # The library asks there for the next page.
    return body | {"url": path} if body.get("object") in ("list", "search_result") else body
