"""`billing setup` against the double and a real Postgres."""

from __future__ import annotations

import subprocess
import sys

import asyncpg
import pytest

from crosslogic.bootstrap import ROOT
from crosslogic.cli import stripe_setup
from crosslogic.domain import meters
from crosslogic.domain.errors import Rejected
from crosslogic.sealing import seal, unseal
from crosslogic.settings import Settings, child_environment
from crosslogic.store.stripe import StripeStore
from tests.conftest import make_settings
from tests.stripe_double import KEY, Double

URL = "http://127.0.0.1:1/stripe/webhooks"


def settings_for(double: Double, database: str) -> Settings:
    return make_settings(database_url=database, stripe_api_key=KEY, stripe_url=double.url, stripe_webhook_url=URL)


class TestSetup:
    async def test_makes_everything_once(self, double: Double, database: str, pool: asyncpg.Pool) -> None:
        settings = settings_for(double, database)
        made = await stripe_setup.run(settings)
        # Five models that complete and one that embeds, in four regions; the meter that bills; product and endpoints.
        assert len(made) == (5 * 2 + 1) * 4 + 1 + 1 + 2
        after = double.calls()[-1]["seq"]
        assert await stripe_setup.run(settings) == []
        assert double.writes(after) == []
        prices = {price.lookup_key: price for price in double.client.v1.prices.list({"limit": 100}).auto_paging_iter()}
        assert len(prices) == (5 * 2 + 1) * 4 + 1
        assert prices.pop(meters.RATED).unit_amount_decimal == meters.RATED_UNIT_CENTS
        assert {price.unit_amount for price in prices.values()} == {0}

    async def test_goes_on_where_a_killed_one_stopped(self, double: Double, database: str, pool: asyncpg.Pool) -> None:
        settings = settings_for(double, database)
        await stripe_setup.run(settings)
        await pool.execute("DELETE FROM stripe_objects WHERE kind <> 'meter' OR key LIKE '%prompt'")
        after = double.calls()[-1]["seq"]
        await stripe_setup.run(settings)
        assert len(double.client.v1.billing.meters.list({"limit": 100}).data) == (5 * 2 + 1) * 4 + 1
        assert {path for path in double.writes(after) if "webhook" not in path and "destinations" not in path} == set()
        assert len(double.client.v1.webhook_endpoints.list().data) == 1

    async def test_renewed_webhooks_have_new_secrets_and_another_account_is_refused(
        self, double: Double, database: str, pool: asyncpg.Pool
    ) -> None:
        settings = settings_for(double, database)
        await stripe_setup.run(settings)
        before = (await StripeStore(pool).objects("webhook"))[URL]
        await stripe_setup.run(settings, renew_webhooks=True)
        after = (await StripeStore(pool).objects("webhook"))[URL]
        assert before.stripe_id != after.stripe_id
        assert [one.id for one in double.client.v1.webhook_endpoints.list().data] == [after.stripe_id]
        # What is stored does not show the secret.
        assert b"whsec" not in (after.sealed_secret or b"")
        double.start_over()
        with pytest.raises(Rejected, match="another Stripe account"):
            await stripe_setup.run(settings)

    def test_the_command_says_what_to_do_without_a_key(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "crosslogic.cli", "billing", "setup"],
            cwd=ROOT,
            env=child_environment(CROSSLOGIC_MODE="dev"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert "CROSSLOGIC_STRIPE_API_KEY" in done.stderr

    def test_the_command_prints_what_it_made(self, double: Double, database: str) -> None:
        environment = child_environment(
            CROSSLOGIC_MODE="dev",
            CROSSLOGIC_DATABASE_URL=database,
            CROSSLOGIC_STRIPE_URL=double.url,
            CROSSLOGIC_STRIPE_API_KEY=KEY,
        )
        command = [sys.executable, "-m", "crosslogic.cli", "billing", "setup"]
        first, second = (
            subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
            for _ in range(2)
        )
        assert f"made meter and price {meters.RATED}" in first.stdout, first.stderr
        assert second.stdout == "everything is there\n"


class TestSeal:
    def test_only_the_same_secret_and_purpose_open_it(self) -> None:
        sealed = seal("root", "a", "whsec_1")
        assert unseal("root", "a", sealed) == "whsec_1"
        for root, purpose in (("other", "a"), ("root", "b")):
            with pytest.raises(Rejected, match="renew-webhooks"):
                unseal(root, purpose, sealed)
