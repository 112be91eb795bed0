"""What Stripe's meters are called: one that bills, and one for each kind of token as evidence."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

PRODUCT = "crosslogic_inference"

# Counts rated microdollars, and is what bills.
RATED = "crosslogic_rated_microdollars"

# 10⁻⁶ USD in cents.
RATED_UNIT_CENTS = Decimal("0.0001")

# Cached tokens cost as prompt and are counted there.
TOKEN_CLASSES = ("prompt", "completion")

_MOST_NAME = 100  # characters of an event name; source: the API reference of billing.meter_events


def tokens_meter(model: str, region: str, token_class: str) -> str:
    """The event name of a meter of tokens. Raises ValueError for a name that Stripe would not take."""
    name = f"crosslogic_tokens_{model}_{region}_{token_class}"
    if len(name) > _MOST_NAME:
        raise ValueError(f"a meter's name has at most {_MOST_NAME} characters: {name}")
    return name


def token_meters(models: Iterable[tuple[str, bool]], regions: Iterable[str]) -> list[str]:
    """Every meter of tokens for these models, each with whether it completes, in these regions."""
    places = list(regions)
    return [
        tokens_meter(model, region, token_class)
        for model, does_complete in models
        for region in places
        for token_class in TOKEN_CLASSES
        if does_complete or token_class == "prompt"
    ]
