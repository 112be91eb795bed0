"""What tokens and capacity cost: versioned price books, which of them holds when, and an org's own prices.

A price is an integer of 10⁻¹⁰ USD a token, a multiplier an integer of basis points (10 000 = 1.0×). A book is only
accepted if every price it can ask (unit price × multiplier × what a tier leaves) is such an integer too, so that rating
never rounds. Books and an org's own prices begin at full hours; volume tiers and free tokens are those of the book that
holds when the month begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from crosslogic.domain.errors import Rejected
from crosslogic.domain.months import BillingMonth

WHOLE_BP = 10_000
WHOLE_PERCENT = 100


class TokenClass(StrEnum):
    """What a token was for. Cached tokens are prompt tokens; embeddings have no completion."""

    COMPLETION = "completion"
    PROMPT = "prompt"


@dataclass(frozen=True, slots=True)
class Tier:
    """Of a month's tokens, those behind the first `above_tokens` cost `discount_percent` less."""

    above_tokens: int
    discount_percent: int


NO_TIER = Tier(0, 0)


@dataclass(frozen=True, slots=True)
class PriceBook:
    """One version of our prices. Raises Rejected for a book that cannot be rated exactly.

    `prices_e10` by model and token class, `multipliers_bp` by region; tiers in ascending order. A capacity unit costs
    `capacity_unit_e10` for a whole month.
    """

    name: str
    prices_e10: Mapping[tuple[str, TokenClass], int]
    multipliers_bp: Mapping[str, int]
    tiers: Sequence[Tier] = ()
    free_tokens: int = 0
    capacity_unit_e10: int = 0

    def __post_init__(self) -> None:
        if self.free_tokens < 0 or self.capacity_unit_e10 < 0:
            raise _invalid(self.name, "free tokens and the price of a capacity unit cannot be negative")
        if any(price < 0 for price in self.prices_e10.values()) or any(bp <= 0 for bp in self.multipliers_bp.values()):
            raise _invalid(self.name, "prices cannot be negative, multipliers must be positive")
        above = [NO_TIER.above_tokens, *(tier.above_tokens for tier in self.tiers)]
        if above != sorted(set(above)) or any(not 0 <= tier.discount_percent <= 100 for tier in self.tiers):
            raise _invalid(self.name, "volume tiers must ascend from above 0 tokens, with discounts of 0 to 100 %")
        for (model, token_class), price_e10 in self.prices_e10.items():
            self.check(price_e10, f"{model} ({token_class})")

    @property
    def steps(self) -> tuple[Tier, ...]:
        """The tiers, full price first."""
        return (NO_TIER, *self.tiers)

    def check(self, price_e10: int, what: str) -> None:
        """Raise Rejected unless this unit price is exact in every region and tier."""
        for region, multiplier_bp in self.multipliers_bp.items():
            for tier in self.steps:
                try:
                    charged_e10(price_e10, multiplier_bp, tier.discount_percent)
                except ValueError as error:
                    raise _invalid(
                        self.name, f"{what} in {region} at −{tier.discount_percent} % is no whole number of 10⁻¹⁰ USD"
                    ) from error

    def price_e10(self, model: str, token_class: TokenClass) -> int:
        """List price of one token. Raises Rejected where the book has none."""
        price = self.prices_e10.get((model, token_class))
        if price is None:
            raise Rejected(
                f"Price book {self.name} has no price for {token_class} tokens of {model}; add a book that has one.",
                code="price_missing",
            )
        return price

    def multiplier_bp(self, region: str) -> int:
        """A home region's multiplier. Raises Rejected where the book has none."""
        multiplier = self.multipliers_bp.get(region)
        if multiplier is None:
            raise Rejected(
                f"Price book {self.name} has no multiplier for {region}; add a book that has one.", code="price_missing"
            )
        return multiplier


def charged_e10(price_e10: int, multiplier_bp: int, discount_percent: int) -> int:
    """One token's price in a region and a tier, in 10⁻¹⁰ USD. Raises ValueError where that is no whole number."""
    charged, rest = divmod(price_e10 * multiplier_bp * (WHOLE_PERCENT - discount_percent), WHOLE_BP * WHOLE_PERCENT)
    if rest:
        raise ValueError(f"{price_e10} × {multiplier_bp} bp − {discount_percent} % is not exact")
    return charged


@dataclass(frozen=True, slots=True)
class Override:
    """An enterprise org's own price of one token from a full hour on; None: the book's again."""

    model: str
    token_class: TokenClass
    starts_at: datetime
    price_e10: int | None


@dataclass(frozen=True, slots=True)
class Tariff:
    """Which prices hold when, for one org: books by the full hour from which each holds, and the org's own prices."""

    books: Sequence[tuple[datetime, PriceBook]]
    overrides: Sequence[Override] = ()
    _own: Mapping[tuple[str, TokenClass], Sequence[Override]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        own: dict[tuple[str, TokenClass], list[Override]] = {}
        for override in sorted(self.overrides, key=lambda override: override.starts_at):
            own.setdefault((override.model, override.token_class), []).append(override)
        object.__setattr__(self, "books", tuple(sorted(self.books, key=lambda dated: dated[0])))
        object.__setattr__(self, "_own", own)

    @classmethod
    def always(cls, book: PriceBook, overrides: Sequence[Override] = ()) -> Tariff:
        """One book for ever: for what-if questions."""
        return cls(((datetime.min.replace(tzinfo=UTC), book),), overrides)

    def book(self, at: datetime) -> PriceBook:
        """The book that holds at an instant. Raises Rejected before the first."""
        found = None
        for starts_at, book in self.books:
            if starts_at > at:
                break
            found = book
        if found is None:
            raise Rejected(f"No price book holds at {at.isoformat()}.", code="price_missing")
        return found

    def month_book(self, month: BillingMonth) -> PriceBook:
        """The book whose tiers and free tokens hold for a month."""
        return self.book(month.starts_at)

    def own_price_e10(self, at: datetime, model: str, token_class: TokenClass) -> int | None:
        """The org's own price at an instant; None where the book's holds."""
        price = None
        for override in self._own.get((model, token_class), ()):
            if override.starts_at > at:
                break
            price = override.price_e10
        return price


def _invalid(name: str, why: str) -> Rejected:
    return Rejected(f"Price book {name}: {why}.", code="invalid_price_book", param="price_book")
