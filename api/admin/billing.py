"""Billing: what a month costs and would cost, price books, credits, and the ledger's balances."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field, StrictInt

from api.admin.catalog import resolve_model
from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import Body, Instant
from api.admin.tenancy import ModelName, OrgPath, find_org
from crosslogic.domain import ids
from crosslogic.domain.credits import Credit, CreditKind
from crosslogic.domain.errors import Rejected
from crosslogic.domain.months import BillingMonth
from crosslogic.domain.pricing import Override, PriceBook, Tariff, Tier, TokenClass
from crosslogic.domain.reservation import next_hour
from crosslogic.domain.statement import Statement, state_month
from crosslogic.new_ids import new_id

router = APIRouter(route_class=AdminRoute)

MonthPath = Annotated[str, Path(max_length=32, examples=["2026-11"])]
BookName = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
E10 = Annotated[int, Field(strict=True, ge=0, le=10**15, description="10⁻¹⁰ USD.")]


class LineOut(BaseModel):
    """A model's tokens of one class in one home region and tier."""

    model: str
    region: str
    token_class: TokenClass
    discount_percent: int = Field(description="Of the volume tier.")
    tokens: int
    free_tokens: int = Field(description="Of these tokens.")
    list_e10: int = Field(description="At list price, in 10⁻¹⁰ USD.")
    exact_e10: int = Field(description="Charged, in 10⁻¹⁰ USD, before rounding.")
    microdollars: int = Field(description="The line's share of the rounded total, by largest remainder.")


class FeeOut(BaseModel):
    """A reservation's flat price."""

    reservation_id: str
    model: str
    region: str
    capacity_units: int
    hours: int
    microdollars: int


class CreditLineOut(BaseModel):
    """What the month takes from a credit: negative."""

    credit_id: str
    cents: int


class StatementOut(BaseModel):
    """An org's month, before tax."""

    org: str
    org_id: str
    month: str
    is_final: bool = Field(description="The month is over and sealed: it will not change.")
    price_book: str = Field(description="Whose volume tiers and free tokens hold.")
    lines: list[LineOut]
    tokens: int
    exact_e10: int
    usage_microdollars: int = Field(description="The lines' sum, rounded half up once.")
    fees: list[FeeOut]
    fee_microdollars: int
    credits: list[CreditLineOut]
    credit_cents: int
    due_cents: int = Field(description="Usage and fees as cents, less credits.")


class TierModel(Body):
    """Tokens of a month behind the first `above_tokens` cost `discount_percent` less."""

    above_tokens: int = Field(strict=True, ge=1, le=10**15)
    discount_percent: int = Field(strict=True, ge=0, le=100)


class PriceModel(Body):
    """One token's price."""

    model: ModelName
    token_class: TokenClass
    price_e10: E10


class PriceBookModel(Body):
    """A version of our prices. It never changes."""

    name: BookName
    prices: list[PriceModel] = Field(max_length=2000)
    multipliers_bp: dict[str, StrictInt] = Field(max_length=200, description="By region, in basis points.")
    tiers: list[TierModel] = Field(default_factory=list[TierModel], max_length=20)
    free_tokens: int = Field(default=0, strict=True, ge=0, le=10**12)
    capacity_unit_e10: int = Field(strict=True, ge=0, le=10**15, description="A capacity unit's month, in 10⁻¹⁰ USD.")


class PriceBookStartOut(BaseModel):
    """From which full hour on a book holds."""

    starts_at: datetime
    price_book: str


class PriceBooksOut(BaseModel):
    """Every book, and from when on which holds."""

    data: list[PriceBookModel]
    starts: list[PriceBookStartOut]


class PriceBookStart(Body):
    """From when on it shall hold."""

    starts_at: Instant | None = Field(default=None, description="A full hour (UTC) to come. Left out: the next one.")


class OverrideIn(Body):
    """An enterprise org's own price of one token."""

    model: ModelName
    token_class: TokenClass
    price_e10: E10 | None = Field(description="Null: the price book's again.")
    starts_at: Instant | None = Field(default=None, description="A full hour (UTC) to come. Left out: the next one.")


class OverrideOut(BaseModel):
    """As it was written."""

    org_id: str
    model: str
    token_class: TokenClass
    price_e10: int | None
    starts_at: datetime


class CreditIn(Body):
    """A credit, once for each reason."""

    kind: CreditKind
    cents: int = Field(strict=True, ge=1, le=10**9)
    reason: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        description="What it is for; the same reason is granted once.", examples=["launch-2026"]
    )
    expires_at: Instant | None = Field(default=None, description="It pays usage of hours that end by then.")


class CreditOut(BaseModel):
    """What is left of a credit."""

    id: str
    kind: CreditKind
    cents: int
    granted_at: datetime
    expires_at: datetime | None


class CreditsOut(BaseModel):
    """An org's credits; closed months have been taken off."""

    data: list[CreditOut]
    cents: int = Field(description="What is left of all.")


class BalanceOut(BaseModel):
    """An account of the ledger."""

    org_id: str | None = Field(description="Null: ours.")
    account: str
    unit: str = Field(description="`tokens`, or `e10_usd`: 10⁻¹⁰ USD.")
    amount: int


class LedgerOut(BaseModel):
    """Balances, and how far usage is sealed and rated."""

    sealed_until: datetime
    rated_until: datetime
    data: list[BalanceOut]


@router.get("/billing/{org}/{month}")
async def preview_month(
    org: OrgPath,
    month: MonthPath,
    admin: Admin,
    price_book: Annotated[
        str | None, Query(max_length=63, description="What would it cost by this book, had it held all month?")
    ] = None,
) -> StatementOut:
    """What a month costs: sealed hours, and open ones as they stand now. Nothing is written."""
    billed = BillingMonth.parse(month)
    found = await find_org(admin, org)
    tariff = (await admin.prices.tariffs([found.id]))[found.id]
    if price_book is not None:
        book = (await admin.prices.books()).get(price_book)
        if book is None:
            raise Rejected(
                f"There is no price book {price_book!r}. List them with: billing price-books",
                status=404,
                code="price_book_not_found",
                param="price_book",
            )
        tariff = Tariff.always(book, tariff.overrides)
    horizon = await admin.buckets.horizon()
    statement = state_month(
        billed,
        await admin.buckets.month(found.id, billed, with_open=True),
        tariff,
        await admin.reservations.of_month(found.id, billed),
        await admin.credits.left(found.id, billed.ends_at, str(billed)),
    )
    return _show(
        statement,
        org=found.name,
        org_id=ids.ORG.show(found.id),
        is_final=horizon.sealed_until >= billed.ends_at,
        price_book=tariff.month_book(billed).name,
    )


def _show(statement: Statement, *, org: str, org_id: str, is_final: bool, price_book: str) -> StatementOut:
    rated = statement.rated
    return StatementOut(
        org=org,
        org_id=org_id,
        month=str(rated.month),
        is_final=is_final,
        price_book=price_book,
        lines=[LineOut.model_validate(line, from_attributes=True) for line in rated.lines],
        tokens=rated.standing.volume_tokens,
        exact_e10=rated.standing.exact_e10,
        usage_microdollars=statement.usage_microdollars,
        fees=[
            FeeOut(
                reservation_id=ids.RESERVATION.show(fee.reservation_id),
                model=fee.model,
                region=fee.region,
                capacity_units=fee.capacity_units,
                hours=fee.hours,
                microdollars=fee.microdollars,
            )
            for fee in statement.fees
        ],
        fee_microdollars=statement.fee_microdollars,
        credits=[CreditLineOut(credit_id=ids.CREDIT.show(one.credit_id), cents=-one.cents) for one in statement.draws],
        credit_cents=-statement.credit_cents,
        due_cents=statement.due_cents,
    )


@router.get("/price-books")
async def list_price_books(admin: Admin) -> PriceBooksOut:
    """Every price book, and from when on which holds."""
    books = await admin.prices.books()
    starts = await admin.prices.starts()
    return PriceBooksOut(
        data=[_show_book(book) for book in books.values()],
        starts=[PriceBookStartOut(starts_at=starts_at, price_book=name) for starts_at, name in starts],
    )


@router.post("/price-books", status_code=201, responses={200: {"description": "It was there already, just like this."}})
async def add_price_book(body: PriceBookModel, admin: Admin, response: Response) -> PriceBookModel:
    """Add a version; it answers what-if questions until it starts. Refused if some price could not be rated exactly."""
    catalog = await admin.catalog.load()
    book = PriceBook(
        body.name,
        {(resolve_model(catalog, one.model).name, one.token_class): one.price_e10 for one in body.prices},
        {catalog.regions.resolve(region): bp for region, bp in body.multipliers_bp.items()},
        tuple(Tier(tier.above_tokens, tier.discount_percent) for tier in body.tiers),
        body.free_tokens,
        body.capacity_unit_e10,
    )
    if not await admin.prices.add_book(book, actor=ACTOR):
        response.status_code = 200
    return _show_book(book)


@router.post("/price-books/{name}/start")
async def start_price_book(
    name: Annotated[str, Path(max_length=63)], body: PriceBookStart, admin: Admin
) -> PriceBookStartOut:
    """Let a price book hold from a full hour to come on. Tiers and free tokens change with the month after."""
    now = datetime.now(UTC)
    starts_at = body.starts_at or next_hour(now)
    await admin.prices.start_book(name, starts_at, now, actor=ACTOR)
    return PriceBookStartOut(starts_at=starts_at, price_book=name)


@router.post("/orgs/{org}/prices", status_code=201)
async def override_price(org: OrgPath, body: OverrideIn, admin: Admin) -> OverrideOut:
    """Give an org a price of its own. It holds while the org's plan is enterprise."""
    now = datetime.now(UTC)
    found = await find_org(admin, org)
    model = resolve_model(await admin.catalog.load(), body.model).name
    override = Override(model, body.token_class, body.starts_at or next_hour(now), body.price_e10)
    await admin.prices.override(found.id, override, now, actor=ACTOR)
    return OverrideOut(
        org_id=ids.ORG.show(found.id),
        model=model,
        token_class=override.token_class,
        price_e10=override.price_e10,
        starts_at=override.starts_at,
    )


@router.post(
    "/orgs/{org}/credits", status_code=201, responses={200: {"description": "This reason was granted already."}}
)
async def grant_credit(org: OrgPath, body: CreditIn, admin: Admin, response: Response) -> CreditsOut:
    """Grant a credit in whole cents, once for each reason."""
    found = await find_org(admin, org)
    now = datetime.now(UTC)
    if body.expires_at is not None and body.expires_at <= now:
        raise Rejected("expires_at must be in the future.", code="in_the_past", param="expires_at")
    credit = Credit(new_id(), body.kind, body.cents, now, body.expires_at)
    if not await admin.credits.grant(found.id, credit, f"{body.kind}/{body.reason}", actor=ACTOR):
        response.status_code = 200
    return await list_credits(org, admin)


@router.get("/orgs/{org}/credits")
async def list_credits(org: OrgPath, admin: Admin) -> CreditsOut:
    """An org's wallet: what is left of each credit."""
    found = await find_org(admin, org)
    left = await admin.credits.left(found.id, datetime.max.replace(tzinfo=UTC), "9999-99")
    data = [
        CreditOut(
            id=ids.CREDIT.show(one.id),
            kind=one.kind,
            cents=one.cents,
            granted_at=one.granted_at,
            expires_at=one.expires_at,
        )
        for one in left
    ]
    return CreditsOut(data=data, cents=sum(one.cents for one in data))


@router.get("/ledger")
async def list_balances(
    admin: Admin,
    org: Annotated[str | None, Query(max_length=64, description="This org's accounts. Left out: our own.")] = None,
) -> LedgerOut:
    """Balances of the ledger; over all accounts of a unit they sum to zero."""
    org_id = None if org is None else (await find_org(admin, org, param="org")).id
    horizon = await admin.buckets.horizon()
    return LedgerOut(
        sealed_until=horizon.sealed_until,
        rated_until=horizon.rated_until,
        data=[
            BalanceOut(
                org_id=None if one.org_id is None else ids.ORG.show(one.org_id),
                account=one.name,
                unit=one.unit,
                amount=one.amount,
            )
            for one in await admin.ledger.balances(org_id)
        ],
    )


def _show_book(book: PriceBook) -> PriceBookModel:
    return PriceBookModel(
        name=book.name,
        prices=[
            PriceModel(model=model, token_class=token_class, price_e10=price)
            for (model, token_class), price in sorted(book.prices_e10.items())
        ],
        multipliers_bp=dict(sorted(book.multipliers_bp.items())),
        tiers=[
            TierModel(above_tokens=tier.above_tokens, discount_percent=tier.discount_percent) for tier in book.tiers
        ],
        free_tokens=book.free_tokens,
        capacity_unit_e10=book.capacity_unit_e10,
    )
