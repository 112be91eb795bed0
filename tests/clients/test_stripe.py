"""The client, against the double under every fault, and against Stripe itself where there is a key for it."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from crosslogic.clients import stripe
from crosslogic.clients.stripe import Delivery, StripeAccount
from crosslogic.dev.stripe_double.webhooks import sign
from crosslogic.domain.errors import Rejected, Unavailable
from tests.stripe_double import START, Double

HOUR = START.replace(minute=0)
JULY = datetime(2026, 7, 1, tzinfo=UTC)
EVENTS = "POST /v1/billing/meter_events"
REAL_KEY = os.environ.get("CROSSLOGIC_STRIPE_API_KEY", "")


class TestCheckAccount:
    @pytest.mark.parametrize(("key", "mode"), [("sk_test_good", "test"), ("sk_live_good", "live")])
    def test_tells_test_from_live(self, stripe_account: str, key: str, mode: str) -> None:
        said = stripe.check_account(stripe.connect(key, base_url=stripe_account))
        assert f"in {mode} mode" in said

    @pytest.mark.parametrize(("key", "status"), [("sk_test_wrong", 401), ("rk_live_narrow", 403)])
    def test_says_what_to_do_about_a_key_that_is_refused(self, stripe_account: str, key: str, status: int) -> None:
        with pytest.raises(Rejected, match="CROSSLOGIC_STRIPE_API_KEY") as refusal:
            stripe.check_account(stripe.connect(key, base_url=stripe_account))
        assert refusal.value.status == status
        assert key not in refusal.value.message

    def test_calls_an_outage_an_outage(self, stripe_account: str) -> None:
        with pytest.raises(Unavailable):
            stripe.check_account(stripe.connect("sk_live_outage", base_url=stripe_account))


@pytest.fixture
def account(double: Double) -> StripeAccount:
    return double.account()


async def make_all(account: StripeAccount) -> tuple[str, str, str, stripe.Subscription]:
    """A customer, the rated meter, its price, and the subscription that joins them."""
    customer = await account.ensure_customer("org_1", "acme", now=START)
    product = await account.ensure_product("cic_usage", "Inference")
    meter = await account.ensure_meter("cic_rated", "Rated")
    price = await account.ensure_price("cic_rated", product=product, meter=meter, unit_cents=Decimal("0.0001"))
    subscription = await account.ensure_subscription(customer, (price,), start=HOUR, next_month=JULY)
    return customer, meter, price, subscription


Step = Callable[[StripeAccount, str, str, str], Awaitable[Any]]

# Everything that is written to Stripe, as (operation, what is done, how often it is there at the end).
WRITES: dict[str, Step] = {
    "POST /v1/customers": lambda a, c, m, i: a.ensure_customer("org_2", "other", now=START),
    "POST /v1/products": lambda a, c, m, i: a.ensure_product("cic_more", "More"),
    "POST /v1/billing/meters": lambda a, c, m, i: a.ensure_meter("cic_more", "More"),
    "POST /v1/prices": lambda a, c, m, i: a.ensure_price(
        "cic_more", product="cic_usage", meter=m, unit_cents=Decimal(0)
    ),
    "POST /v1/invoiceitems": lambda a, c, m, i: a.add_invoice_item(c, "k", -5, "correction", invoice=i),
    "POST /v1/billing/credit_grants": lambda a, c, m, i: a.grant_credit(c, "k", 100, name="x", category="promotional"),
    "POST /v1/invoices/{id}/finalize": lambda a, c, m, i: a.finalize_invoice(i),
}
PATHS = {
    "POST /v1/customers": "/v1/customers",
    "POST /v1/products": "/v1/products",
    "POST /v1/billing/meters": "/v1/billing/meters",
    "POST /v1/prices": "/v1/prices",
    "POST /v1/invoiceitems": "/v1/invoiceitems",
    "POST /v1/billing/credit_grants": "/v1/billing/credit_grants",
}
FAULTS = ("conflict", "rate_limited", "lock_timeout", "unavailable", "error_before", "error_after", "lost_reply")


class TestWrites:
    @pytest.mark.parametrize("fault", FAULTS)
    async def test_have_their_effect_once_under_every_fault(
        self, double: Double, account: StripeAccount, fault: str
    ) -> None:
        customer, meter, _, subscription = await make_all(account)
        double.set_time(JULY)
        invoice = await account.find_invoice(customer, subscription.id, JULY)
        assert invoice is not None
        before = {path: len(_listed(double, path)) for path in PATHS.values()}
        for operation, write in WRITES.items():
            double.fail(operation, fault)
            answer = await write(account, customer, meter, invoice.id)
            assert not double.control.get("/behaviour").json()["faults"][0]["count"], operation
            # Another process, which knows nothing of the first one's tries, gets the same.
            assert await write(double.account(), customer, meter, invoice.id) == answer
        for path, count in before.items():
            assert len(_listed(double, path)) == count + 1, path

    async def test_stay_once_while_searches_lag(self, double: Double, account: StripeAccount) -> None:
        double.behave(search_lag_s=60, faults=[{"operation": "POST /v1/customers", "kind": "error_after"}])
        made = await account.ensure_customer("org_1", "acme", now=START)
        assert await double.account().ensure_customer("org_1", "acme", now=START) == made
        assert len(_listed(double, "/v1/customers")) == 1

    async def test_give_up_when_stripe_stays_away_and_tell_no_secret(
        self, double: Double, account: StripeAccount
    ) -> None:
        double.fail("POST /v1/customers", *["unavailable"] * 9)
        with pytest.raises(Unavailable) as away:
            await account.ensure_customer("org_1", "acme", now=START)
        assert "sk_test" not in away.value.message

    async def test_pass_by_what_earlier_processes_have_failed_at(self, double: Double, account: StripeAccount) -> None:
        double.fail("POST /v1/customers", *["error_before"] * 5)
        with pytest.raises(Unavailable):
            await account.ensure_customer("org_1", "acme", now=START)
        assert await double.account().ensure_customer("org_1", "acme", now=START)
        assert len(_listed(double, "/v1/customers")) == 1

    async def test_that_stripe_refuses_are_rejected(self, account: StripeAccount) -> None:
        with pytest.raises(Rejected, match="resource_missing") as refusal:
            await account.add_invoice_item("cus_nobody", "k", 5, "x")
        assert refusal.value.status == 404


class TestMeterEvents:
    @pytest.mark.parametrize("fault", [*FAULTS, "slow"])
    async def test_are_delivered_once_under_every_fault(
        self, double: Double, account: StripeAccount, fault: str
    ) -> None:
        """B4, B6: from whichever process."""
        customer, meter, *_ = await make_all(account)
        double.fail(EVENTS, fault, delay_s=0.1)
        await account.send_meter_event(customer, "cic_rated", "bucket/1", 5, HOUR)
        await double.account().send_meter_event(customer, "cic_rated", "bucket/1", 5, HOUR)
        assert await account.read_summaries(customer, meter, HOUR, JULY) == {HOUR: 5}

    async def test_that_stripe_has_already_count_as_delivered(self, double: Double, account: StripeAccount) -> None:
        """B6: a stored failure whose effect happened is passed by, and the identifier is refused."""
        customer, *_ = await make_all(account)
        double.fail(EVENTS, "error_after")
        assert await account.send_meter_event(customer, "cic_rated", "a", 5, HOUR) is Delivery.KNOWN
        double.fail(EVENTS, "error_before")
        assert await account.send_meter_event(customer, "cic_rated", "b", 6, HOUR) is Delivery.ACCEPTED

    @pytest.mark.parametrize(("value", "identifier"), [(10**15, "a"), (-1, "a"), (1, "x" * 101), (1, "")])
    async def test_out_of_range_are_never_sent(
        self, double: Double, account: StripeAccount, value: int, identifier: str
    ) -> None:
        """B8."""
        with pytest.raises(Rejected, match="correction"):
            await account.send_meter_event("cus_1", "cic_rated", identifier, value, HOUR)
        assert double.writes() == []

    async def test_are_read_back_hour_by_hour_over_many_pages(self, double: Double, account: StripeAccount) -> None:
        customer, meter, *_ = await make_all(account)
        hours = {HOUR - timedelta(hours=number): number + 1 for number in range(120)}
        for number, (hour, value) in enumerate(hours.items()):
            await account.send_meter_event(customer, "cic_rated", f"h{number}", value, hour)
        start = HOUR - timedelta(hours=120)
        assert await account.read_summaries(customer, meter, start, HOUR + timedelta(hours=1)) == hours

    async def test_are_cancelled(self, account: StripeAccount) -> None:
        customer, meter, *_ = await make_all(account)
        await account.send_meter_event(customer, "cic_rated", "a", 5, HOUR)
        await account.cancel_meter_event("cic_rated", "a")
        assert await account.read_summaries(customer, meter, HOUR, JULY) == {}


class TestInvoices:
    async def test_a_month_from_usage_to_a_correction(self, double: Double, account: StripeAccount) -> None:
        customer, _, price, subscription = await make_all(account)
        await account.send_meter_event(customer, "cic_rated", "a", 5_234_567, HOUR)
        assert await account.preview_invoice(customer, subscription.id) == 523
        await account.grant_credit(customer, "sign-up", 100, name="Sign-up", category="promotional")
        assert await account.find_invoice(customer, subscription.id, JULY) is None
        double.set_time(JULY)
        invoice = await account.find_invoice(customer, subscription.id, JULY)
        assert invoice is not None
        assert (invoice.status, invoice.period_start) == ("draft", HOUR)
        (line,) = await account.list_invoice_lines(invoice.id)
        assert (line.price, line.quantity, line.amount_cents) == (price, 5_234_567, 523)
        final = await account.finalize_invoice(invoice.id)
        assert (final.status, final.total_cents, await account.credit_left(customer)) == ("paid", 423, 0)
        note = await account.issue_credit_note(invoice.id, "correction/1", 23, "Re-rated")
        assert await account.issue_credit_note(invoice.id, "correction/1", 23, "Re-rated") == note

    async def test_nothing_is_written_twice(self, double: Double, account: StripeAccount) -> None:
        """B9."""
        await make_all(account)
        after = double.calls()[-1]["seq"]
        await make_all(double.account())
        assert double.writes(after) == []

    async def test_a_subscription_gets_what_it_lacks_and_no_more_than_fits(
        self, double: Double, account: StripeAccount
    ) -> None:
        customer, _, price, subscription = await make_all(account)
        meter = await account.ensure_meter("cic_tokens", "Tokens")
        tokens = await account.ensure_price("cic_tokens", product="cic_usage", meter=meter, unit_cents=Decimal(0))
        wider = await account.ensure_subscription(customer, (price, tokens), start=HOUR, next_month=JULY)
        assert (wider.id, wider.prices) == (subscription.id, {price, tokens})
        with pytest.raises(Rejected, match="20 prices"):
            await account.ensure_subscription(customer, ("price_x",) * 21, start=HOUR, next_month=JULY)

    async def test_an_item_of_the_next_invoice_is_there_once(self, double: Double, account: StripeAccount) -> None:
        customer, *_ = await make_all(account)
        for _ in range(2):
            await account.add_invoice_item(customer, "correction/2", 77, "Re-rated")
        assert len(_listed(double, "/v1/invoiceitems")) == 1


class TestVerifyWebhook:
    PAYLOAD = '{"id": "evt_1", "type": "invoice.paid", "data": {"object": {"object": "invoice", "id": "in_1"}}}'

    def test_believes_the_id_and_nothing_else(self, account: StripeAccount) -> None:
        signature = sign("whsec_b", self.PAYLOAD, int(time.time()))
        notice = account.verify_webhook(self.PAYLOAD.encode(), signature, ("whsec_a", "whsec_b"))
        assert notice == stripe.Notice("evt_1", "invoice.paid", "invoice", "in_1")

    @pytest.mark.parametrize("how", ["stale", "other secret", "other body", "none"])
    def test_refuses_what_is_not_signed_by_stripe_now(self, account: StripeAccount, how: str) -> None:
        """B10."""
        age_s = 301 if how == "stale" else 0
        secret = "whsec_other" if how == "other secret" else "whsec_a"
        signature = "" if how == "none" else sign(secret, self.PAYLOAD, int(time.time()) - age_s)
        payload = self.PAYLOAD.replace("in_1", "in_2") if how == "other body" else self.PAYLOAD
        with pytest.raises(Rejected):
            account.verify_webhook(payload.encode(), signature, ("whsec_a",))


@pytest.mark.skipif(not REAL_KEY.startswith(("sk_test_", "rk_test_")), reason="no Stripe test key")
class TestStripeItself:
    """What can be seen in a sandbox at once; the rest is the checklist of docs/operating/stripe.md."""

    async def test_takes_our_requests_and_refuses_a_repeated_identifier(self) -> None:
        account = StripeAccount(stripe.connect(REAL_KEY))
        now = datetime.now(UTC)
        hour = now.replace(minute=0, second=0, microsecond=0)
        next_month = (hour.replace(day=1, hour=0) + timedelta(days=32)).replace(day=1)
        product = await account.ensure_product("cic_check", "Check")
        meter = await account.ensure_meter("cic_check", "Check")
        price = await account.ensure_price("cic_check", product=product, meter=meter, unit_cents=Decimal("0.0001"))
        customer = await account.ensure_customer(f"check_{uuid4().hex}", "check", now=now)
        subscription = await account.ensure_subscription(customer, (price,), start=hour, next_month=next_month)
        assert subscription.prices == {price}
        identifier = f"check/{uuid4().hex}"
        assert await account.send_meter_event(customer, "cic_check", identifier, 7, hour) is Delivery.ACCEPTED
        await account.cancel_meter_event("cic_check", identifier)


def _listed(double: Double, path: str) -> list[Any]:
    params = {"limit": "100"}
    answer = double.control.get(double.url + path, params=params).raise_for_status()
    return answer.json()["data"]
