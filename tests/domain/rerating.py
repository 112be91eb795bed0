"""The price of a month, worked out a second time from PRD/requirements.md and PRD/billing.md, in fractions of a dollar.

It shares nothing with crosslogic.domain.rating but the buckets that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from crosslogic.domain.rating import Bucket

# USD per 1M tokens, and multipliers, as the product's price list has them.
INPUT = {
    "llama-3-8b": "0.05",
    "llama-3-70b": "0.60",
    "mistral-7b": "0.04",
    "qwen-2.5-7b": "0.04",
    "gemma-7b": "0.03",
    "bge-base-en": "0.01",
}
OUTPUT = {name: usd for name, usd in INPUT.items() if name != "bge-base-en"}
MULTIPLIER = {"in-mumbai": "0.7", "us-east": "1.0", "eu-west": "1.1", "ap-southeast": "0.9"}

MILLION = 1_000_000
FREE = 25_000


def weighed(tokens: int) -> Fraction:
    """How many full-price tokens the first so many tokens of a month cost as much as, were none free."""
    ten, hundred, billion = 10 * MILLION, 100 * MILLION, 1000 * MILLION
    return (
        Fraction(min(tokens, ten))
        + Fraction(9, 10) * max(0, min(tokens, hundred) - ten)
        + Fraction(8, 10) * max(0, min(tokens, billion) - hundred)
        + Fraction(7, 10) * max(0, tokens - billion)
    )


def usd_of_month(buckets: Iterable[Bucket]) -> Fraction:
    """What an org's buckets of one month cost, unrounded."""
    usd, used = Fraction(0), 0
    order = sorted(buckets, key=lambda b: (b.hour, b.model, b.region, str(b.token_class.value)))
    for bucket in order:
        if bucket.reservation_id is not None:
            continue
        per_million = (INPUT if bucket.token_class.value == "prompt" else OUTPUT)[bucket.model]
        until = used + bucket.tokens
        full_price = weighed(until) - weighed(used)
        if bucket.plan != "enterprise":
            full_price -= max(0, min(until, FREE) - min(used, FREE))
        usd += full_price * Fraction(per_million) / MILLION * Fraction(MULTIPLIER[bucket.region])
        used = until
    return usd


def microdollars(usd: Fraction) -> int:
    """Rounded to the nearest, halves up."""
    scaled = usd * MILLION
    whole = scaled.numerator // scaled.denominator
    return whole + (scaled - whole >= Fraction(1, 2))
