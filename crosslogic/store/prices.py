"""Prices' SQL: books by version, when each holds, and orgs' own prices. Every write leaves its audit row (H11)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected
from crosslogic.domain.pricing import Override, PriceBook, Tariff, Tier, TokenClass
from crosslogic.domain.reservation import check_change
from crosslogic.store.audit import AuditStore


class PriceStore:
    """Price books and overrides. A book is written once; what changes is which one holds."""

    BOOKS = "SELECT name, tiers, free_tokens, capacity_unit_e10 FROM price_books ORDER BY created_at, name"
    PRICES = "SELECT book, model, token_class, price_e10 FROM price_book_prices"
    REGIONS = "SELECT book, region, multiplier_bp FROM price_book_regions"
    STARTS = "SELECT starts_at, book FROM price_book_starts ORDER BY starts_at"
    OVERRIDES = """
        SELECT org_id, model, token_class, starts_at, price_e10 FROM price_overrides WHERE org_id = ANY($1::uuid[])
    """
    INSERT_BOOK = """
        INSERT INTO price_books (name, tiers, free_tokens, capacity_unit_e10) VALUES ($1, $2::text::jsonb, $3, $4)
        ON CONFLICT (name) DO NOTHING
    """
    INSERT_PRICE = "INSERT INTO price_book_prices (book, model, token_class, price_e10) VALUES ($1, $2, $3, $4)"
    INSERT_REGION = "INSERT INTO price_book_regions (book, region, multiplier_bp) VALUES ($1, $2, $3)"
    INSERT_START = """
        INSERT INTO price_book_starts (starts_at, book) VALUES ($1, $2) ON CONFLICT (starts_at) DO NOTHING
    """
    INSERT_OVERRIDE = """
        INSERT INTO price_overrides (org_id, model, token_class, starts_at, price_e10) VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (org_id, model, token_class, starts_at) DO NOTHING
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def books(self) -> dict[str, PriceBook]:
        """Every book by its name, oldest first."""
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            return await self._books(connection)

    async def starts(self) -> list[tuple[datetime, str]]:
        """From which full hour on which book holds, oldest first."""
        return [(row["starts_at"], row["book"]) for row in await self._pool.fetch(self.STARTS)]

    async def tariffs(self, org_ids: Collection[UUID]) -> dict[UUID, Tariff]:
        """Which prices hold when, for each of these orgs."""
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            books = await self._books(connection)
            starts = [(row["starts_at"], books[row["book"]]) for row in await connection.fetch(self.STARTS)]
            own: dict[UUID, list[Override]] = defaultdict(list)
            for row in await connection.fetch(self.OVERRIDES, list(org_ids)):
                own[row["org_id"]].append(
                    Override(row["model"], TokenClass(row["token_class"]), row["starts_at"], row["price_e10"])
                )
        return {org_id: Tariff(starts, own[org_id]) for org_id in org_ids}

    async def _books(self, connection: Any) -> dict[str, PriceBook]:
        prices: dict[str, dict[tuple[str, TokenClass], int]] = defaultdict(dict)
        for row in await connection.fetch(self.PRICES):
            prices[row["book"]][(row["model"], TokenClass(row["token_class"]))] = row["price_e10"]
        multipliers: dict[str, dict[str, int]] = defaultdict(dict)
        for row in await connection.fetch(self.REGIONS):
            multipliers[row["book"]][row["region"]] = row["multiplier_bp"]
        return {
            row["name"]: PriceBook(
                row["name"],
                prices[row["name"]],
                multipliers[row["name"]],
                tuple(Tier(*tier) for tier in json.loads(row["tiers"])),
                row["free_tokens"],
                row["capacity_unit_e10"],
            )
            for row in await connection.fetch(self.BOOKS)
        }

    async def add_book(self, book: PriceBook, *, actor: str) -> bool:
        """Write a new version; False if it is there already, just like this. Raises Rejected 409 for another one."""
        async with self._pool.acquire() as connection, connection.transaction():
            tiers = [[tier.above_tokens, tier.discount_percent] for tier in book.tiers]
            status = await connection.execute(
                self.INSERT_BOOK, book.name, json.dumps(tiers), book.free_tokens, book.capacity_unit_e10
            )
            if status == "INSERT 0 0":
                if (await self._books(connection))[book.name] != book:
                    raise Rejected(
                        f"Price book {book.name} exists and is another one; books never change, take a new name.",
                        status=409,
                        code="price_book_exists",
                        param="name",
                    )
                return False
            await connection.executemany(
                self.INSERT_PRICE, [(book.name, *key, price) for key, price in book.prices_e10.items()]
            )
            await connection.executemany(
                self.INSERT_REGION, [(book.name, region, bp) for region, bp in book.multipliers_bp.items()]
            )
            shown = asdict(book) | {
                "prices_e10": {
                    f"{model}/{token_class}": price for (model, token_class), price in book.prices_e10.items()
                }
            }
            await AuditStore.append(connection, actor=actor, action="price_book.add", subject=book.name, details=shown)
        return True

    async def start_book(self, name: str, starts_at: datetime, now: datetime, *, actor: str) -> None:
        """Let a book hold from a full hour to come on. Raises Rejected 404, 400, and 409 where another begins then."""
        check_change(starts_at, now, "starts_at")
        async with self._pool.acquire() as connection, connection.transaction():
            if name not in await self._books(connection):
                raise Rejected(f"There is no price book {name[:64]!r}; list them.", status=404, code="book_not_found")
            if await connection.execute(self.INSERT_START, starts_at, name) == "INSERT 0 0":
                known = {row["starts_at"]: row["book"] for row in await connection.fetch(self.STARTS)}
                if known[starts_at] != name:
                    raise Rejected(
                        f"Price book {known[starts_at]} begins then; choose another hour.",
                        status=409,
                        code="book_starts_then",
                        param="starts_at",
                    )
                return
            await AuditStore.append(
                connection,
                actor=actor,
                action="price_book.start",
                subject=name,
                details={"starts_at": starts_at.isoformat()},
            )

    async def override(self, org_id: UUID, override: Override, now: datetime, *, actor: str) -> None:
        """Give an org a price of its own from a full hour to come on, or (None) the book's again.

        Raises Rejected 400 for a price that some book could not rate exactly, 409 where another one begins then.
        """
        check_change(override.starts_at, now, "starts_at")
        what = f"{override.model} ({override.token_class})"
        async with self._pool.acquire() as connection, connection.transaction():
            if override.price_e10 is not None:
                starts = [row["book"] for row in await connection.fetch(self.STARTS)]
                for name, book in (await self._books(connection)).items():
                    if name in starts:
                        book.check(override.price_e10, what)
            status = await connection.execute(
                self.INSERT_OVERRIDE,
                org_id,
                override.model,
                override.token_class,
                override.starts_at,
                override.price_e10,
            )
            if status == "INSERT 0 0":
                raise Rejected(
                    f"A price of {what} begins then already; choose another hour.",
                    status=409,
                    code="price_starts_then",
                    param="starts_at",
                )
            await AuditStore.append(
                connection,
                actor=actor,
                action="price.override",
                subject=ids.ORG.show(org_id),
                details=asdict(override) | {"starts_at": override.starts_at.isoformat()},
            )
