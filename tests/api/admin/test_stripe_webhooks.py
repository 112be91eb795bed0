"""Stripe's notices: any order, any number, and nothing unsigned leads anywhere (B10)."""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from api.admin import stripe_webhooks
from crosslogic.cli.stripe_setup import set_up_webhooks
from crosslogic.clients.stripe import StripeAccount
from crosslogic.dev.stripe_double.webhooks import sign
from crosslogic.sealing import STRIPE_WEBHOOKS, unseal
from crosslogic.settings import Settings
from crosslogic.store.stripe import StripeStore
from tests.api.admin.server import TOKEN, serving
from tests.conftest import make_settings
from tests.stripe_double import KEY, START, Double

HOUR = START.replace(minute=0)
JULY = datetime(2026, 7, 1, tzinfo=UTC)
URL = "http://127.0.0.1:1/stripe/webhooks"  # Nobody listens: the tests deliver.


class Notices:
    """The API, and deliveries to it as Stripe would make them."""

    def __init__(self, api: str, secrets: dict[str, str], double: Double) -> None:
        self._client = httpx.Client(base_url=api, trust_env=False, timeout=30)
        self._secrets = secrets
        self._double = double

    def post(self, payload: str, signature: str) -> httpx.Response:
        return self._client.post("/stripe/webhooks", content=payload, headers={"stripe-signature": signature})

    def deliver(self, event: dict[str, Any], *, kind: str = "webhook", age_s: int = 0) -> httpx.Response:
        payload = json.dumps(event, default=str)
        return self.post(payload, sign(self._secrets[kind], payload, int(time.time()) - age_s))

    def events(self) -> list[dict[str, Any]]:
        """Everything that has happened, oldest first."""
        listed = self._double.client.v1.events.list({"limit": 100}).auto_paging_iter()
        return [event.to_dict() for event in listed][::-1]


@pytest.fixture
def settings(double: Double, database: str) -> Settings:
    return make_settings(
        database_url=database,
        admin_token=TOKEN,
        stripe_api_key=KEY,
        stripe_url=double.url,
        stripe_webhook_url=URL,
        temporal_address="127.0.0.1:1",
    )


@pytest.fixture
def api(settings: Settings) -> Iterator[str]:
    with serving(settings, stripe_webhooks.router) as url:
        yield url


@pytest.fixture
def account(double: Double) -> StripeAccount:
    return double.account()


@pytest.fixture
def store(pool: asyncpg.Pool) -> StripeStore:
    return StripeStore(pool)


@pytest_asyncio.fixture
async def notices(
    api: str, double: Double, account: StripeAccount, store: StripeStore, settings: Settings
) -> AsyncIterator[Notices]:
    await set_up_webhooks(account, store, settings)
    assert settings.node_secret is not None
    root = settings.node_secret.get_secret_value()
    secrets: dict[str, str] = {}
    for kind in ("webhook", "destination"):
        sealed = (await store.objects(kind))[URL].sealed_secret
        assert sealed is not None
        secrets[kind] = unseal(root, STRIPE_WEBHOOKS, sealed)
    yield Notices(api, secrets, double)


async def make_debtor(double: Double, account: StripeAccount) -> tuple[str, str]:
    """A customer whose invoice could not be paid, and that invoice."""
    customer = await account.ensure_customer("org_1", "acme", now=START)
    product = await account.ensure_product("cic_usage", "Inference")
    meter = await account.ensure_meter("cic_rated", "Rated")
    price = await account.ensure_price("cic_rated", product=product, meter=meter, unit_cents=Decimal("0.0001"))
    subscription = await account.ensure_subscription(customer, (price,), start=HOUR, next_month=JULY)
    await account.send_meter_event(customer, "cic_rated", "a", 5_000_000, HOUR)
    double.let_pay(customer, "fail")
    double.set_time(JULY)
    double.advance(3600)
    invoice = await account.find_invoice(customer, subscription.id, JULY)
    assert invoice is not None
    return customer, invoice.id


async def states(pool: asyncpg.Pool) -> list[tuple[Any, ...]]:
    """What is known, without when and by which reading it came to be known."""
    rows = await pool.fetch("SELECT kind, stripe_id, customer, status, details::text FROM stripe_states ORDER BY 1, 2")
    return [tuple(row) for row in rows]


class TestReceive:
    async def test_any_order_and_number_of_notices_leads_to_the_same_state(
        self, double: Double, account: StripeAccount, notices: Notices, store: StripeStore, pool: asyncpg.Pool
    ) -> None:
        """B10: every order, with every notice up to three times, some of them refused half-way."""
        customer, invoice = await make_debtor(double, account)
        double.let_pay(customer, "succeed")
        double.advance(3 * 86_400)
        double.dispute(invoice=invoice)
        events = notices.events()
        assert len(events) > 8
        reached: list[list[tuple[Any, ...]]] = []
        for seed in range(6):
            await pool.execute("TRUNCATE stripe_events, stripe_states")
            randomness = random.Random(seed)
            deliveries = [event for event in events for _ in range(randomness.randint(1, 3))]
            randomness.shuffle(deliveries)
            for event in deliveries:
                assert notices.deliver(event).status_code == 200
            reached.append(await states(pool))
        assert reached == [reached[0]] * 6
        assert {(row[0], row[3]) for row in reached[0]} == {
            ("invoice", "paid"),
            ("subscription", "active"),
            ("dispute", "needs_response"),
        }
        assert (await store.standing(customer)).open_disputes

    async def test_a_failed_payment_speaks_against_an_org_until_it_has_paid(
        self, double: Double, account: StripeAccount, notices: Notices, store: StripeStore
    ) -> None:
        customer, invoice = await make_debtor(double, account)
        for event in notices.events():
            notices.deliver(event)
        standing = await store.standing(customer)
        assert (standing.unpaid_invoices, len(standing.overdue_subscriptions)) == ((invoice,), 1)
        double.let_pay(customer, "succeed")
        double.advance(3 * 86_400)
        for event in notices.events():
            notices.deliver(event)
        assert (await store.standing(customer)).is_good

    async def test_a_dispute_stands_until_it_is_won_or_lost_for_good(
        self, double: Double, account: StripeAccount, notices: Notices, store: StripeStore
    ) -> None:
        customer, invoice = await make_debtor(double, account)
        double.let_pay(customer, "succeed")
        double.advance(3 * 86_400)
        dispute = double.dispute(invoice=invoice)["id"]
        double.dispute(dispute=dispute, status="won")
        for event in notices.events()[::-1]:
            notices.deliver(event)
        assert (await store.standing(customer)).is_good

    @pytest.mark.parametrize("how", ["stale", "unsigned", "forged"])
    async def test_without_a_fresh_signature_nothing_is_written(
        self, double: Double, notices: Notices, pool: asyncpg.Pool, how: str
    ) -> None:
        event = {"id": "evt_1", "type": "invoice.paid", "data": {"object": {"object": "invoice", "id": "in_1"}}}
        payload = json.dumps(event)
        after = double.calls()[-1]["seq"]
        answers = {
            "stale": lambda: notices.deliver(event, age_s=301),
            "unsigned": lambda: notices.post(payload, ""),
            "forged": lambda: notices.post(payload, sign("whsec_guessed", payload, int(time.time()))),
        }
        assert answers[how]().status_code == 400
        assert await pool.fetchval("SELECT count(*) FROM stripe_events") == 0
        assert double.calls(after) == []

    async def test_what_could_not_be_read_is_read_at_the_next_delivery(
        self, double: Double, account: StripeAccount, notices: Notices, store: StripeStore, pool: asyncpg.Pool
    ) -> None:
        customer, _ = await make_debtor(double, account)
        event = next(one for one in notices.events() if one["type"] == "invoice.payment_failed")
        double.fail("GET /v1/invoices/{id}", *["unavailable"] * 2)
        assert notices.deliver(event).status_code == 503
        assert await states(pool) == []
        assert notices.deliver(event).json() == {"status": "handled"}
        assert notices.deliver(event).json() == {"status": "known"}
        assert (await store.standing(customer)).unpaid_invoices

    def test_without_a_key_there_is_nothing_here(self, database: str) -> None:
        with serving(make_settings(database_url=database, admin_token=TOKEN), stripe_webhooks.router) as url:
            answer = httpx.post(f"{url}/stripe/webhooks", trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "billing_off")

    async def test_meter_events_that_were_thrown_away_are_kept(
        self, double: Double, account: StripeAccount, notices: Notices, store: StripeStore
    ) -> None:
        meter = await account.ensure_meter("cic_rated", "Rated")
        await account.send_meter_event("cus_gone", "cic_rated", "bucket/1", 5, HOUR)
        thin = _thin_events(double)
        assert notices.deliver(thin[0], kind="destination").status_code == 200
        notices.deliver(thin[0], kind="destination")
        (kept,) = await store.meter_errors(datetime(2020, 1, 1, tzinfo=UTC))
        assert (kept["idempotency_key"], kept["code"], kept["meter"]) == (
            "bucket/1",
            "meter_event_customer_not_found",
            meter,
        )


class TestKeepState:
    async def test_a_reading_that_began_earlier_never_replaces_a_later_one(
        self, store: StripeStore, pool: asyncpg.Pool
    ) -> None:
        early, late = await store.next_reading(), await store.next_reading()
        await store.keep_state("invoice", "in_1", "cus_1", "paid", {}, late)
        await store.keep_state("invoice", "in_1", "cus_1", "open", {"attempts": 1}, early)
        assert (await states(pool))[0][3] == "paid"


def _thin_events(double: Double) -> list[dict[str, Any]]:
    """As they would be delivered: without their data."""
    listed = double.control.get("/thin-events").raise_for_status().json()["events"]
    return [{name: value for name, value in event.items() if name != "data"} for event in listed]
