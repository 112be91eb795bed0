"""The double does what Stripe documents, as the unmodified library sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe

from crosslogic.dev.stripe_double import parameters, routes
from crosslogic.dev.stripe_double.server import API_VERSION
from tests.stripe_double import KEY, START, Double

EVENTS = "POST /v1/billing/meter_events"
HOUR = int(START.timestamp()) // 3600 * 3600
JULY = datetime(2026, 7, 1, tzinfo=UTC)


def make_customer(double: Double) -> str:
    return double.client.v1.customers.create({"name": "acme"}).id


def make_meter(double: Double, name: str = "rated", **more: Any) -> stripe.billing.Meter:
    params: Any = {
        "event_name": name,
        "display_name": name,
        "default_aggregation": {"formula": "sum"},
        "event_time_window": "hour",
        **more,
    }
    return double.client.v1.billing.meters.create(params)


def subscribe(double: Double, customer: str, meter: str, unit_cents: str = "0.0001") -> stripe.Subscription:
    client = double.client.v1
    product = client.products.create({"name": "Usage"}).id
    price = client.prices.create(
        {
            "product": product,
            "currency": "usd",
            "unit_amount_decimal": Decimal(unit_cents),
            "recurring": {"interval": "month", "usage_type": "metered", "meter": meter},
        }
    )
    return client.subscriptions.create(
        {
            "customer": customer,
            "items": [{"price": price.id}],
            "billing_mode": {"type": "flexible"},
            "billing_cycle_anchor": int(JULY.timestamp()),
            "backdate_start_date": HOUR,
            "proration_behavior": "none",
        }
    )


def send(
    double: Double,
    customer: str,
    value: int | str,
    identifier: str,
    *,
    at: int = HOUR,
    key: str = "",
    name: str = "rated",
) -> stripe.billing.MeterEvent:
    return double.client.v1.billing.meter_events.create(
        {
            "event_name": name,
            "identifier": identifier,
            "timestamp": at,
            "payload": {"stripe_customer_id": customer, "value": str(value)},
        },
        {"idempotency_key": key or f"key {identifier}"},
    )


def total(double: Double, customer: str, meter: str, hours: int = 24) -> float:
    page = double.client.v1.billing.meters.event_summaries.list(
        meter, {"customer": customer, "start_time": HOUR - 3600, "end_time": HOUR + hours * 3600}
    )
    return page.data[0].aggregated_value


class TestRequests:
    def test_are_held_to_the_librarys_typed_parameters(self, double: Double) -> None:
        """B12."""
        wrong: list[tuple[str, dict[str, str], str]] = [
            ("/v1/customers", {"nickname": "x"}, "nickname"),
            ("/v1/billing/meters", {"display_name": "x", "event_name": "x"}, "default_aggregation"),
            ("/v1/subscriptions", {"items[0][prize]": "x"}, "items[0][prize]"),
            ("/v1/invoiceitems", {"amount": "1.5"}, "amount"),
            ("/v1/billing/meter_events", {"event_name": "x", "payload": "1"}, "payload"),
        ]
        for path, form, param in wrong:
            answer = httpx.post(double.url + path, data=form, headers={"authorization": f"Bearer {KEY}"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    def test_every_operation_has_parameters_that_can_be_read(self) -> None:
        for operation in routes.OPERATIONS:
            if operation.schema:
                with pytest.raises(parameters.Refusal, match="unknown parameter: no_such"):
                    parameters.checked({"no_such": "x"}, operation.schema)

    def test_enumerations_are_closed(self) -> None:
        body = {"event_name": "a", "display_name": "a", "default_aggregation": {"formula": "median"}}
        with pytest.raises(parameters.Refusal, match="must be one of"):
            parameters.checked(body, "billing.MeterCreateParams")

    def test_need_the_key_and_the_librarys_version(self, double: Double) -> None:
        assert stripe.api_version == API_VERSION
        with pytest.raises(stripe.AuthenticationError):
            stripe.StripeClient("sk_test_other", base_addresses={"api": double.url}).v1.balance.retrieve()
        with pytest.raises(stripe.InvalidRequestError, match="Invalid Stripe API version"):
            double.client.v1.balance.retrieve(options={"stripe_version": "2020-08-27"})

    def test_for_an_unknown_path_name_it(self, double: Double) -> None:
        with pytest.raises(stripe.InvalidRequestError, match=r"GET: /v1/coupons") as refusal:
            double.client.v1.coupons.list()
        assert refusal.value.http_status == 404

    def test_lists_come_in_pages(self, double: Double) -> None:
        made = [make_customer(double) for _ in range(5)]
        page = double.client.v1.customers.list({"limit": 2})
        assert [one.id for one in page.auto_paging_iter()] == made[::-1]


class TestIdempotency:
    def test_a_key_repeats_its_answer_for_a_day(self, double: Double) -> None:
        create = double.client.v1.customers.create
        first = create({"name": "a"}, {"idempotency_key": "k"})
        assert create({"name": "a"}, {"idempotency_key": "k"}).id == first.id
        double.advance(86_401)
        assert create({"name": "a"}, {"idempotency_key": "k"}).id != first.id

    def test_a_key_with_other_parameters_is_refused(self, double: Double) -> None:
        double.client.v1.customers.create({"name": "a"}, {"idempotency_key": "k"})
        with pytest.raises(stripe.IdempotencyError):
            double.client.v1.customers.create({"name": "b"}, {"idempotency_key": "k"})

    @pytest.mark.parametrize(("kind", "customers"), [("error_before", 0), ("error_after", 1)])
    def test_a_stored_500_is_repeated_with_and_without_its_effect(
        self, double: Double, kind: str, customers: int
    ) -> None:
        double.fail("POST /v1/customers", kind)
        for _ in range(2):
            with pytest.raises(stripe.APIError):
                double.client.v1.customers.create({"name": "a"}, {"idempotency_key": "k"})
        assert len(double.client.v1.customers.list().data) == customers

    def test_what_fails_validation_is_not_stored(self, double: Double) -> None:
        create = double.client.v1.customers.create
        with pytest.raises(stripe.InvalidRequestError):
            create({"nick": "a"}, {"idempotency_key": "k"})  # type: ignore[typeddict-item]
        assert create({"name": "a"}, {"idempotency_key": "k"}).id

    def test_a_lost_reply_has_its_effect_and_its_key_still_answers(self, double: Double) -> None:
        double.fail("POST /v1/customers", "lost_reply")
        with pytest.raises(stripe.APIConnectionError):
            double.client.v1.customers.create({"name": "a"}, {"idempotency_key": "k"})
        assert double.client.v1.customers.create({"name": "a"}, {"idempotency_key": "k"}).id
        assert len(double.client.v1.customers.list().data) == 1

    def test_two_calls_at_once_with_one_key_are_a_conflict(self, double: Double) -> None:
        double.fail("POST /v1/customers", "slow", delay_s=1)
        slow = threading.Thread(
            target=lambda: double.client.v1.customers.create({"name": "a"}, {"idempotency_key": "k"})
        )
        slow.start()
        _wait_until(lambda: not double.control.get("/behaviour").json()["faults"][0]["count"])
        with pytest.raises(stripe.APIError) as refusal:
            double.client.v1.customers.create({"name": "a"}, {"idempotency_key": "k"})
        slow.join()
        assert refusal.value.http_status == 409

    @pytest.mark.parametrize(("kind", "status"), [("conflict", 409), ("rate_limited", 429), ("unavailable", 503)])
    def test_what_never_ran_is_not_stored(self, double: Double, kind: str, status: int) -> None:
        double.fail("POST /v1/customers", kind)
        with pytest.raises(stripe.StripeError) as refusal:
            double.client.v1.customers.create({"name": "a"}, {"idempotency_key": "k"})
        assert refusal.value.http_status == status
        assert double.client.v1.customers.create({"name": "a"}, {"idempotency_key": "k"}).id

    def test_more_calls_than_allowed_are_refused(self, double: Double) -> None:
        double.behave(calls_per_s=1)
        reader = ThreadPoolExecutor(3)
        done = [reader.submit(double.client.v1.balance.retrieve) for _ in range(3)]
        assert any(isinstance(one.exception(), stripe.RateLimitError) for one in done)


class TestMeterEvents:
    def test_of_an_hour_the_last_counts_and_hours_add_up(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        for value, identifier, hour in ((5, "a", 0), (7, "b", 0), (3, "c", -1)):
            send(double, customer, value, identifier, at=HOUR + hour * 3600)
        assert total(double, customer, meter.id) == 10.0

    def test_without_a_window_all_count(self, double: Double) -> None:
        customer = make_customer(double)
        plain = double.client.v1.billing.meters.create(
            {"event_name": "raw", "display_name": "raw", "default_aggregation": {"formula": "sum"}}
        )
        for identifier in "ab":
            send(double, customer, 5, identifier, name="raw")
        assert total(double, customer, plain.id) == 10.0

    def test_an_identifier_is_refused_for_a_day_only(self, double: Double) -> None:
        customer = make_customer(double)
        make_meter(double)
        send(double, customer, 5, "a")
        with pytest.raises(stripe.InvalidRequestError, match="An event already exists with identifier a"):
            send(double, customer, 5, "a", key="another")
        double.advance(86_401)
        assert send(double, customer, 5, "a", key="a third").identifier == "a"

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"value": "1.5"}, "whole number"),
            ({"value": 10**15}, "15 digits"),
            ({"at": HOUR - 36 * 86_400}, "35 days"),
            ({"at": HOUR + 7200}, "5 minutes"),
            ({"identifier": "x" * 101}, "100 characters"),
            ({"name": "nothing"}, "No active meter"),
        ],
    )
    def test_outside_the_limits_are_refused(self, double: Double, more: dict[str, Any], words: str) -> None:
        make_meter(double)
        given: dict[str, Any] = {"value": 1, "identifier": "a", **more}
        with pytest.raises(stripe.InvalidRequestError, match=words):
            send(double, make_customer(double), **given)

    def test_are_one_at_a_time_for_a_customer_and_meter(self, double: Double) -> None:
        customer = make_customer(double)
        make_meter(double)
        double.fail(EVENTS, "slow", delay_s=1)
        slow = threading.Thread(target=lambda: send(double, customer, 1, "a"))
        slow.start()
        _wait_until(lambda: not double.control.get("/behaviour").json()["faults"][0]["count"])
        with pytest.raises(stripe.RateLimitError) as refusal:
            send(double, customer, 1, "b")
        slow.join()
        body: Any = refusal.value.json_body
        assert body["error"]["code"] == "lock_timeout"

    def test_show_in_summaries_after_the_lag(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        double.behave(summary_lag_s=6 * 3600)
        send(double, customer, 5, "a")
        assert total(double, customer, meter.id) == 0.0
        double.advance(6 * 3600)
        assert total(double, customer, meter.id) == 5.0

    def test_out_of_order_the_older_wins(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        double.fail(EVENTS, "reorder")
        send(double, customer, 5, "older")
        send(double, customer, 7, "newer")
        assert total(double, customer, meter.id) == 5.0

    def test_are_cancelled_within_a_day(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        cancel: Any = {"event_name": "rated", "type": "cancel", "cancel": {"identifier": "a"}}
        send(double, customer, 5, "a")
        double.client.v1.billing.meter_event_adjustments.create(cancel)
        assert total(double, customer, meter.id) == 0.0
        send(double, customer, 5, "b")
        double.advance(86_401)
        with pytest.raises(stripe.InvalidRequestError, match="24 hours"):
            double.client.v1.billing.meter_event_adjustments.create(cancel | {"cancel": {"identifier": "b"}})

    def test_meters_change_their_name_only(self, double: Double) -> None:
        meter = make_meter(double)
        assert double.client.v1.billing.meters.update(meter.id, {"display_name": "new"}).display_name == "new"
        with pytest.raises(stripe.InvalidRequestError, match="unknown parameter"):
            double.client.v1.billing.meters.update(meter.id, {"event_time_window": "day"})  # type: ignore[typeddict-unknown-key]


class TestInvoices:
    def test_a_period_ends_in_a_draft_that_becomes_final_and_is_paid(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        subscription = subscribe(double, customer, meter.id)
        send(double, customer, 1_234_567, "a")
        double.set_time(JULY)
        (draft,) = double.client.v1.invoices.list({"subscription": subscription.id}).data
        assert (draft.status, draft.total, draft.period_end) == ("draft", 123, int(JULY.timestamp()))
        send(double, customer, 2_000_000, "b")  # An hour of June that was sent late, while there is a draft.
        double.advance(3600)
        final = double.client.v1.invoices.retrieve(draft.id)
        assert (final.status, final.total, final.amount_paid) == ("paid", 200, 200)
        assert final.lines.data[0].quantity == 2_000_000

    def test_usage_after_finalization_is_never_billed(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        subscription = subscribe(double, customer, meter.id)
        double.set_time(JULY)
        double.advance(3601)
        send(double, customer, 5_000_000, "late")
        double.advance(40 * 86_400)
        invoices = double.client.v1.invoices.list({"subscription": subscription.id}).data
        assert [invoice.total for invoice in invoices] == [0, 0]

    def test_too_little_to_charge_waits_for_the_next(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        subscription = subscribe(double, customer, meter.id)
        send(double, customer, 300_000, "a")
        double.set_time(JULY)
        double.advance(3600)
        send(double, customer, 400_000, "b", at=int(JULY.timestamp()))
        double.advance(31 * 86_400)
        second, first = double.client.v1.invoices.list({"subscription": subscription.id}).data
        assert (first.total, first.amount_due, second.total, second.amount_due) == (30, 0, 40, 70)

    def test_credit_is_used_promotional_first_and_shows_on_the_line(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        subscription = subscribe(double, customer, meter.id)
        grants = {
            category: double.client.v1.billing.credit_grants.create(
                {
                    "customer": customer,
                    "category": category,
                    "amount": {"type": "monetary", "monetary": {"currency": "usd", "value": 100}},
                    "applicability_config": {"scope": {"price_type": "metered"}},
                }
            ).id
            for category in ("paid", "promotional")
        }
        send(double, customer, 1_500_000, "a")
        double.set_time(JULY)
        double.advance(3600)
        (invoice,) = double.client.v1.invoices.list({"subscription": subscription.id}).data
        credits = [(one.credit_balance_transaction, one.amount) for one in invoice.total_pretax_credit_amounts or ()]
        assert credits == [(grants["promotional"], 100), (grants["paid"], 50)]
        assert (invoice.subtotal, invoice.total) == (150, 0)

    def test_a_payment_fails_is_tried_again_and_lifts_the_subscription(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        subscription = subscribe(double, customer, meter.id)
        double.let_pay(customer, "fail")
        send(double, customer, 5_000_000, "a")
        double.set_time(JULY)
        double.advance(3600)
        (invoice,) = double.client.v1.invoices.list({"subscription": subscription.id}).data
        assert (invoice.status, invoice.attempt_count) == ("open", 1)
        assert double.client.v1.subscriptions.retrieve(subscription.id).status == "past_due"
        with pytest.raises(stripe.CardError):
            double.client.v1.invoices.pay(invoice.id)
        double.let_pay(customer, "succeed")
        double.advance(3 * 86_400)
        assert double.client.v1.invoices.retrieve(invoice.id).status == "paid"
        assert double.client.v1.subscriptions.retrieve(subscription.id).status == "active"

    def test_credit_notes_never_exceed_the_invoice(self, double: Double) -> None:
        customer, meter = make_customer(double), make_meter(double)
        subscription = subscribe(double, customer, meter.id)
        send(double, customer, 5_000_000, "a")
        double.set_time(JULY)
        double.advance(3600)
        (invoice,) = double.client.v1.invoices.list({"subscription": subscription.id}).data
        create = double.client.v1.credit_notes.create
        with pytest.raises(stripe.InvalidRequestError, match="must equal"):
            create({"invoice": invoice.id, "amount": 100})
        create({"invoice": invoice.id, "amount": 400, "credit_amount": 400})
        assert double.client.v1.customers.retrieve(customer).balance == -400
        with pytest.raises(stripe.InvalidRequestError, match="exceed"):
            create({"invoice": invoice.id, "amount": 101, "credit_amount": 101})

    def test_a_subscription_holds_twenty_items(self, double: Double) -> None:
        customer = make_customer(double)
        subscription = subscribe(double, customer, make_meter(double).id)
        product = double.client.v1.products.create({"name": "Tokens"}).id
        for number in range(20):
            price = double.client.v1.prices.create(
                {
                    "product": product,
                    "currency": "usd",
                    "unit_amount": 0,
                    "recurring": {
                        "interval": "month",
                        "usage_type": "metered",
                        "meter": make_meter(double, f"tokens-{number}").id,
                    },
                }
            )
            item: Any = {"subscription": subscription.id, "price": price.id}
            if number < 19:
                double.client.v1.subscription_items.create(item)
            else:
                with pytest.raises(stripe.InvalidRequestError, match="at most 20"):
                    double.client.v1.subscription_items.create(item)


class Receiver:
    """An HTTP server that takes deliveries; the first ones it refuses, if it is told to."""

    def __init__(self) -> None:
        self.taken: list[tuple[bytes, str]] = []
        self.refuse = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.taken.append((body, self.headers["stripe-signature"]))
                outer.refuse -= 1
                self.send_response(200 if outer.refuse < 0 else 500)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.server.shutdown()
    one.server.server_close()


class TestWebhooks:
    def test_are_signed_and_delivered_again_until_taken(self, double: Double, receiver: Receiver) -> None:
        double.behave(webhook_retry_s=0.05)
        endpoint = double.client.v1.webhook_endpoints.create(
            {"url": receiver.url, "enabled_events": ["customer.created"]}
        )
        receiver.refuse = 1
        customer = make_customer(double)
        _wait_until(lambda: len(receiver.taken) == 2)
        for body, signature in receiver.taken:
            event = double.client.construct_event(body, signature, str(endpoint.secret))
            assert event.data.object["id"] == customer
        with pytest.raises(stripe.SignatureVerificationError):
            double.client.construct_event(receiver.taken[0][0], receiver.taken[0][1], "whsec_other")

    def test_come_reversed_and_twice_when_ordered(self, double: Double, receiver: Receiver) -> None:
        double.behave(webhook_copies=0)
        double.client.v1.webhook_endpoints.create({"url": receiver.url, "enabled_events": ["*"]})
        made = [make_customer(double) for _ in range(3)]
        double.behave(webhook_copies=2, webhook_order="reversed")
        _wait_until(lambda: len(receiver.taken) == 6)
        order = [next(one for one in made if one.encode() in body) for body, _ in receiver.taken]
        assert order == [one for one in made[::-1] for _ in range(2)]

    @pytest.mark.parametrize("how", ["unknown customer", "ordered"])
    def test_tell_of_events_that_were_thrown_away_later(self, double: Double, receiver: Receiver, how: str) -> None:
        meter, customer = make_meter(double), make_customer(double)
        destination = double.client.v2.core.event_destinations.create(
            {
                "name": "errors",
                "type": "webhook_endpoint",
                "event_payload": "thin",
                "enabled_events": ["v1.billing.meter.error_report_triggered"],
                "webhook_endpoint": {"url": receiver.url},
                "include": ["webhook_endpoint.signing_secret"],
            }
        )
        if how == "ordered":
            double.fail(EVENTS, "reject_later")
        assert send(double, customer if how == "ordered" else "cus_nobody", 5, "a", key="the-key").identifier == "a"
        assert total(double, customer, meter.id) == 0.0
        _wait_until(lambda: bool(receiver.taken))
        target: Any = destination.webhook_endpoint
        notice: Any = double.client.parse_event_notification(*receiver.taken[0], target.signing_secret)
        assert notice.related_object.id == meter.id
        sample = notice.fetch_event().data.reason.error_types[0].sample_errors[0]
        assert sample.request.identifier == "the-key"


class TestBooks:
    def test_lose_nothing_acknowledged_to_a_sigkill(self, tmp_path: Path) -> None:
        double = Double(tmp_path)
        double.start()
        try:
            double.set_time(START)
            customer, meter = make_customer(double), make_meter(double)
            send(double, customer, 5, "a")
            double.fail("POST /v1/customers", "unavailable")
            double.kill()
            double.start()
            assert total(double, customer, meter.id) == 5.0
            assert send(double, customer, 5, "a").identifier == "a"  # The key still knows its answer.
            with pytest.raises(stripe.APIError):
                make_customer(double)
        finally:
            double.stop()


def _wait_until(is_so: Any, within_s: float = 30.0) -> None:
    until = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)
