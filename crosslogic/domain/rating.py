"""Rating: from sealed buckets and prices to money, by exact integers and always to the same result.

Buckets are taken hour by hour, in an hour by model, region and token class (names in code point order). Each token has
a place in its org's month, and its place decides what it costs: the first free tokens nothing, those behind a tier's
threshold less. Amounts are exact in 10⁻¹⁰ USD. What is charged is the exact amount *of the month so far*, rounded half
up to microdollars; an hour's charge is the difference to the hour before, so that the hours always add up to the month.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import UUID

from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.months import BillingMonth
from crosslogic.domain.pricing import NO_TIER, WHOLE_BP, PriceBook, Tariff, Tier, TokenClass, charged_e10
from crosslogic.domain.reservation import HOUR, Reservation

E10_PER_MICRODOLLAR = 10_000
MICRODOLLARS_PER_CENT = 10_000

# Who gets the month's free tokens. What a reserved org uses beyond its reservation are serverless tokens.
_WITH_FREE_TOKENS = frozenset({"serverless", "reserved"})


@dataclass(frozen=True, slots=True)
class Bucket:
    """One org's tokens of one class, model, home region and hour. With a reservation they are paid for flat."""

    hour: datetime
    model: str
    region: str
    token_class: TokenClass
    plan: str
    tokens: int
    reservation_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a month is rated: tokens that count as volume, and their exact price, in 10⁻¹⁰ USD."""

    volume_tokens: int = 0
    exact_e10: int = 0

    @property
    def microdollars(self) -> int:
        """What the month so far costs."""
        return half_up(self.exact_e10, E10_PER_MICRODOLLAR)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one bucket that cost the same. `list_e10` is what they would cost at full price."""

    hour: datetime
    model: str
    region: str
    token_class: TokenClass
    tokens: int
    is_free: bool
    discount_percent: int
    list_e10: int
    exact_e10: int


@dataclass(frozen=True, slots=True)
class RatedHour:
    """What an hour costs, and how the month stands behind it."""

    hour: datetime
    pieces: tuple[Piece, ...]
    before: Standing
    after: Standing

    @property
    def microdollars(self) -> int:
        """The hour's charge."""
        return self.after.microdollars - self.before.microdollars

    @property
    def list_e10(self) -> int:
        """The hour at list price."""
        return sum(piece.list_e10 for piece in self.pieces)

    @property
    def free_tokens(self) -> int:
        """How many of its tokens were free."""
        return sum(piece.tokens for piece in self.pieces if piece.is_free)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of our statement: a model's tokens of one class in one region and tier."""

    model: str
    region: str
    token_class: TokenClass
    discount_percent: int
    tokens: int
    free_tokens: int
    list_e10: int
    exact_e10: int
    microdollars: int


@dataclass(frozen=True, slots=True)
class RatedMonth:
    """A month, rated from its first hour on."""

    month: BillingMonth
    hours: tuple[RatedHour, ...]

    @property
    def standing(self) -> Standing:
        """How the month stands in the end."""
        return self.hours[-1].after if self.hours else Standing()

    @property
    def microdollars(self) -> int:
        """What it costs, before credits, tax and flat fees: what a spend cap is held against."""
        return self.standing.microdollars

    def spent_before(self, at: datetime) -> int:
        """Microdollars of the hours that ended by an instant."""
        spent = 0
        for rated in self.hours:
            if rated.hour + HOUR > at:
                break
            spent = rated.after.microdollars
        return spent

    @property
    def lines(self) -> tuple[Line, ...]:
        """The statement; its amounts share the total by largest remainder."""
        sums: dict[tuple[str, str, TokenClass, int], tuple[int, int, int, int]] = {}
        for rated in self.hours:
            for piece in rated.pieces:
                key = (piece.model, piece.region, piece.token_class, piece.discount_percent)
                tokens, free, list_e10, exact_e10 = sums.get(key, (0, 0, 0, 0))
                sums[key] = (
                    tokens + piece.tokens,
                    free + piece.tokens * piece.is_free,
                    list_e10 + piece.list_e10,
                    exact_e10 + piece.exact_e10,
                )
        ordered = sorted(sums.items())
        shares = share(self.microdollars, [exact_e10 for _, (*_, exact_e10) in ordered], E10_PER_MICRODOLLAR)
        return tuple(Line(*key, *sums, shared) for (key, sums), shared in zip(ordered, shares, strict=True))


def rate_month(month: BillingMonth, buckets: Iterable[Bucket], tariff: Tariff) -> RatedMonth:
    """Rate all of an org's buckets of a month, in whatever order they come. Raises Rejected for a missing price."""
    hours: list[RatedHour] = []
    standing = Standing()
    for hour, given in groupby(sorted(buckets, key=_order), key=lambda bucket: bucket.hour):
        rated = rate_hour(month, standing, hour, given, tariff)
        hours.append(rated)
        standing = rated.after
    return RatedMonth(month, tuple(hours))


def rate_hour(
    month: BillingMonth, before: Standing, hour: datetime, buckets: Iterable[Bucket], tariff: Tariff
) -> RatedHour:
    """Rate all of an org's buckets of one hour, given how its month stood before. Raises Rejected.

    `before` must hold every earlier hour of the month, and no later one.
    """
    if not month.starts_at <= hour < month.ends_at:
        raise InvariantViolated(f"the hour {hour.isoformat()} is not in {month}")
    terms, book = tariff.month_book(month), tariff.book(hour)
    pieces: list[Piece] = []
    volume, exact = before.volume_tokens, before.exact_e10
    for bucket in sorted(buckets, key=_order):
        if bucket.tokens < 0 or bucket.hour != hour:
            raise InvariantViolated(f"a bucket of {bucket.hour.isoformat()} with {bucket.tokens} tokens")
        if bucket.reservation_id is None and bucket.tokens:
            for piece in _pieces(bucket, volume, terms, book, tariff):
                pieces.append(piece)
                volume += piece.tokens
                exact += piece.exact_e10
    return RatedHour(hour, tuple(pieces), before, Standing(volume, exact))


def _pieces(bucket: Bucket, volume: int, terms: PriceBook, book: PriceBook, tariff: Tariff) -> Iterable[Piece]:
    """Cut a bucket where the price of its tokens changes."""
    price_e10 = None
    if bucket.plan == "enterprise":
        price_e10 = tariff.own_price_e10(bucket.hour, bucket.model, bucket.token_class)
    if price_e10 is None:
        price_e10 = book.price_e10(bucket.model, bucket.token_class)
    multiplier_bp = book.multiplier_bp(bucket.region)
    free_until = terms.free_tokens if bucket.plan in _WITH_FREE_TOKENS else 0
    left = bucket.tokens
    while left:
        tier, until = _tier(terms.steps, volume)
        is_free = volume < free_until
        ends = [end for end in (until, free_until if is_free else None) if end is not None]
        tokens = min([left, *(end - volume for end in ends)])
        full_e10 = _charged(price_e10, multiplier_bp, NO_TIER, bucket)
        unit_e10 = 0 if is_free else _charged(price_e10, multiplier_bp, tier, bucket)
        yield Piece(
            bucket.hour,
            bucket.model,
            bucket.region,
            bucket.token_class,
            tokens,
            is_free,
            tier.discount_percent,
            tokens * full_e10,
            tokens * unit_e10,
        )
        volume += tokens
        left -= tokens


def _charged(price_e10: int, multiplier_bp: int, tier: Tier, bucket: Bucket) -> int:
    try:
        return charged_e10(price_e10, multiplier_bp, tier.discount_percent)
    except ValueError as error:
        # Tiers come from the month's book and prices from the hour's; each alone is exact.
        raise Rejected(
            f"{bucket.model} in {bucket.region} at −{tier.discount_percent} % is no whole number of 10⁻¹⁰ USD since "
            f"{bucket.hour.isoformat()}; add a price book that can be rated with this month's tiers.",
            code="invalid_price_book",
        ) from error


def _tier(steps: Sequence[Tier], volume: int) -> tuple[Tier, int | None]:
    """The tier of the next token behind `volume`, and the volume at which the next tier begins (None: never)."""
    for tier, following in zip(steps, [*steps[1:], None], strict=True):
        if following is None or volume < following.above_tokens:
            return tier, None if following is None else following.above_tokens
    raise AssertionError("the last tier has no end")


def _order(bucket: Bucket) -> tuple[Any, ...]:
    reservation = bucket.reservation_id
    return bucket.hour, bucket.model, bucket.region, bucket.token_class, bucket.plan, str(reservation or "")


@dataclass(frozen=True, slots=True)
class Fee:
    """A reservation's flat price for a month: `hours` of it, rounded with the org's other fees."""

    reservation_id: UUID
    model: str
    region: str
    capacity_units: int
    hours: int
    microdollars: int


def flat_fees(month: BillingMonth, reservations: Iterable[Reservation], tariff: Tariff) -> tuple[Fee, ...]:
    """What an org's reservations cost in a month: each hour a reservation holds is one part of a whole month's price.

    The sum is rounded half up once and shared by largest remainder.
    """
    held: list[tuple[Reservation, int, int]] = []
    for reservation in sorted(reservations, key=lambda reservation: reservation.id):
        hours = exact = 0
        hour = max(month.starts_at, reservation.starts_at)
        end = month.ends_at if reservation.ends_at is None else min(month.ends_at, reservation.ends_at)
        while hour < end:
            book = tariff.book(hour)
            exact += reservation.capacity_units * book.capacity_unit_e10 * book.multiplier_bp(reservation.region)
            hours += 1
            hour += HOUR
        if hours:
            held.append((reservation, hours, exact))
    whole = month.hours * WHOLE_BP * E10_PER_MICRODOLLAR
    exacts = [exact for _, _, exact in held]
    return tuple(
        Fee(one.id, one.model, one.region, one.capacity_units, hours, microdollars)
        for (one, hours, _), microdollars in zip(held, share(half_up(sum(exacts), whole), exacts, whole), strict=True)
    )


def half_up(amount: int, unit: int) -> int:
    """`amount / unit` rounded to the nearest integer, halves up. Neither may be negative."""
    return (2 * amount + unit) // (2 * unit)


def share(total: int, parts: Sequence[int], unit: int) -> list[int]:
    """Split `total`, the sum of `parts` in whole `unit`s, rounded, by largest remainder; the first wins a tie."""
    shares = [part // unit for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda place: (-(parts[place] % unit), place))
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    if sum(shares) != total:
        raise InvariantViolated(f"{total} cannot be shared among {len(parts)} lines")
    return shares
