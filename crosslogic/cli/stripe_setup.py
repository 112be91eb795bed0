"""`billing setup`: makes at Stripe what billing needs there. Like `setup`, it needs the settings only."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from crosslogic.clients.stripe import StripeAccount
    from crosslogic.domain.catalog import Catalog
    from crosslogic.settings import Settings
    from crosslogic.store.stripe import StripeStore

# What changes how an org stands; everything else of Stripe's events is nothing to us.
EVENTS = (
    *("invoice.created", "invoice.finalized", "invoice.paid", "invoice.payment_failed", "invoice.updated"),
    *("invoice.voided", "invoice.marked_uncollectible", "invoice.deleted"),
    *("customer.subscription.created", "customer.subscription.updated", "customer.subscription.deleted"),
    *("charge.dispute.created", "charge.dispute.updated", "charge.dispute.closed"),
)
THIN_EVENTS = ("v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found")
DESTINATION = "CrossLogic meter errors"


def setup(
    renew_webhooks: Annotated[
        bool, typer.Option(help="Make the endpoints anew, with new signing secrets, and delete the old ones.")
    ] = False,
) -> None:
    """Make the product, the meters, their prices and the webhook endpoints at Stripe, as far as they are missing.

    Where Stripe and Postgres are is taken from the CROSSLOGIC_… settings. Running it again changes nothing.
    """
    import asyncio

    from crosslogic.domain.errors import CrossLogicError
    from crosslogic.settings import settings

    code = 0
    try:
        made = asyncio.run(run(settings(), renew_webhooks=renew_webhooks))
        print("\n".join(f"made {line}" for line in made) or "everything is there")
    except CrossLogicError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def run(settings: Settings, *, renew_webhooks: bool = False) -> list[str]:
    """Make what is missing, and say what that was. Raises Rejected without a key, Unavailable without Stripe."""
    from crosslogic.clients import stripe
    from crosslogic.domain.errors import Rejected
    from crosslogic.store import database
    from crosslogic.store.catalog import CatalogStore
    from crosslogic.store.stripe import StripeStore

    if settings.stripe_api_key is None:
        raise Rejected("Billing is off: set CROSSLOGIC_STRIPE_API_KEY to a secret key of your Stripe account.")
    pool = await database.connect(settings)
    try:
        client = stripe.connect(settings.stripe_api_key.get_secret_value(), base_url=settings.stripe_url or None)
        account, store = stripe.StripeAccount(client), StripeStore(pool)
        made = await set_up_prices(account, store, await CatalogStore(pool).load())
        return made + await set_up_webhooks(account, store, settings, renew=renew_webhooks)
    finally:
        await pool.close()


async def set_up_prices(account: StripeAccount, store: StripeStore, catalog: Catalog) -> list[str]:
    """The product, the meter that bills and the meters of tokens, each with its price. What was made, in words.

    Raises Rejected when Postgres knows the meters of another Stripe account.
    """
    from decimal import Decimal

    from crosslogic.domain import meters
    from crosslogic.domain.errors import Rejected

    made: list[str] = []
    products = await store.objects("product")
    if meters.PRODUCT not in products:
        await store.keep_object("product", meters.PRODUCT, await account.ensure_product(meters.PRODUCT, "Inference"))
        made.append(f"product {meters.PRODUCT}")
    known_meters, known_prices = await store.objects("meter"), await store.objects("price")
    models = [(model.name, model.kind != "embedding") for model in catalog.models.values()]
    evidence = meters.token_meters(models, catalog.regions.regions)
    there, prices = await account.list_meters(), await account.list_prices(meters.PRODUCT)
    for name in (meters.RATED, *evidence):
        known = known_meters.get(name)
        if known and there.get(name) != known.stripe_id:
            raise Rejected(
                f"Meter {name} is not the one that Postgres remembers: CROSSLOGIC_STRIPE_API_KEY belongs to another "
                "Stripe account than before. Go back to that account, or start with a new database.",
                status=409,
                code="another_stripe_account",
            )
        if known and name in known_prices:
            continue
        meter = await account.ensure_meter(name, name.replace("_", " "), there)
        await store.keep_object("meter", name, meter)
        price = await account.ensure_price(
            name,
            product=meters.PRODUCT,
            meter=meter,
            unit_cents=meters.RATED_UNIT_CENTS if name == meters.RATED else Decimal(0),
            known=prices,
        )
        await store.keep_object("price", name, price)
        made.append(f"meter and price {name}")
    return made


async def set_up_webhooks(
    account: StripeAccount, store: StripeStore, settings: Settings, *, renew: bool = False
) -> list[str]:
    """The endpoint for snapshots and the destination for thin events at CROSSLOGIC_STRIPE_WEBHOOK_URL; none if empty.

    Their signing secrets are told once, so an endpoint of which we have no secret is deleted and made anew.
    """
    from crosslogic.sealing import STRIPE_WEBHOOKS, seal

    url = settings.stripe_webhook_url
    if not url or settings.node_secret is None:
        return []
    made: list[str] = []
    for kind in ("webhook", "destination"):
        is_webhook = kind == "webhook"
        known = (await store.objects(kind)).get(url)
        there = await account.find_webhook(url) if is_webhook else await account.find_destination(DESTINATION)
        if known and known.stripe_id == there and not renew:
            continue
        if there:
            await account.delete_endpoint(there)
        # After each deletion a key of its own: the last one would repeat what is deleted.
        key = f"{kind}/{url}/{there or (known.stripe_id if known else 'first')}"
        endpoint = (
            await account.create_webhook(url, EVENTS, key=key)
            if is_webhook
            else await account.create_destination(DESTINATION, url, THIN_EVENTS, key=key)
        )
        sealed = seal(settings.node_secret.get_secret_value(), STRIPE_WEBHOOKS, endpoint.secret)
        await store.keep_object(kind, url, endpoint.id, sealed)
        made.append(f"{'webhook endpoint' if is_webhook else 'event destination'} {url}")
    return made
