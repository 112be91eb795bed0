from __future__ import annotations

import pytest

from crosslogic.clients import stripe
from crosslogic.domain.errors import Rejected, Unavailable


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
