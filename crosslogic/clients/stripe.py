"""Stripe: the only module that imports its library. Requests carry our own idempotency keys and are retried by it."""

from __future__ import annotations

import stripe

from crosslogic.domain.errors import Rejected, Unavailable

MOST_RETRIES = 3
TIMEOUT_S = 20


def connect(api_key: str, *, base_url: str | None = None) -> stripe.StripeClient:
    """A client for one account. `base_url` points it elsewhere than at Stripe."""
    return stripe.StripeClient(
        api_key,
        max_network_retries=MOST_RETRIES,
        base_addresses={"api": base_url} if base_url else {},
        http_client=stripe.HTTPXClient(timeout=TIMEOUT_S, allow_sync_methods=True),
    )


def check_account(client: stripe.StripeClient) -> str:
    """One line about the account behind the key: live or test, and the API version that we speak.

    Raises Rejected when Stripe refuses the key, Unavailable when it does not answer.
    """
    try:
        balance = client.v1.balance.retrieve()
    except stripe.AuthenticationError as error:
        raise Rejected("Stripe refuses CROSSLOGIC_STRIPE_API_KEY; copy the secret key again.", status=401) from error
    except stripe.PermissionError as error:
        raise Rejected(
            "CROSSLOGIC_STRIPE_API_KEY may not read the balance; give the restricted key that permission.", status=403
        ) from error
    except stripe.StripeError as error:
        raise Unavailable("Stripe does not answer; nothing was changed.", retry_after_s=60) from error
    return f"Stripe account in {'live' if balance.livemode else 'test'} mode, API {stripe.api_version}"
