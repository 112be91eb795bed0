"""Records, hours, buckets and the ledger in a real Postgres: nothing counts twice, nothing that is sealed changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from activities.ledger import LedgerActivities
from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.ids import uuid7
from crosslogic.domain.months import BillingMonth
from crosslogic.domain.rating import rate_month
from crosslogic.domain.sealing import GRACE
from crosslogic.domain.usage import Outcome, UsageRecord, Waste, WasteReason
from crosslogic.domain.usage_import import line_of, record_of
from crosslogic.new_ids import new_id
from crosslogic.store.buckets import BucketStore
from crosslogic.store.ledger import LedgerStore
from crosslogic.store.prices import PriceStore
from crosslogic.store.tenancy import TenancyStore
from crosslogic.store.usage import UsageStore
from crosslogic.store.usage_logs import UsageLogStore
from tests.domain import rerating
from tests.store.test_usage import a_record

# Long past, so that the hour of the test's own clock is never among these.
MONTH = BillingMonth(2026, 3)
START = MONTH.starts_at
HOUR = timedelta(hours=1)
MOMENT = timedelta(milliseconds=1)
ACME, GLOBEX = new_id(), new_id()


def record_at(at: datetime, **changes: Any) -> UsageRecord:
    request_id = uuid7(round(at.timestamp() * 1000), new_id().int & (1 << 80) - 1)
    return a_record(id=request_id, org_id=changes.pop("org_id", ACME), **changes)


class Books:
    """All stores of usage over one database, and the activities over those. The clock stands at the month's end."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool
        self.now = MONTH.ends_at + HOUR
        self.usage, self.logs, self.buckets = UsageStore(pool), UsageLogStore(pool), BucketStore(pool)
        self.prices, self.ledger = PriceStore(pool), LedgerStore(pool)
        self.activities = LedgerActivities(
            self.usage,
            self.logs,
            self.buckets,
            self.prices,
            self.ledger,
            longest_request_s=900,
            now=lambda: self.now,
        )

    async def add(self, *records: UsageRecord) -> None:
        await self.usage.add([msgspec.json.encode(record) for record in records])

    async def rate_all(self, orgs_at_once: int = 100) -> int:
        hours = 0
        while (rated := await self.activities.rate_hours(orgs_at_once)).count:
            hours += rated.count
        return hours

    async def dump(self, table: str) -> list[tuple[Any, ...]]:
        rows = await self.pool.fetch(f"SELECT * FROM {table}")
        return sorted((tuple(row) for row in rows), key=str)


@pytest.fixture
def books(pool: asyncpg.Pool) -> Books:
    return Books(pool)


class TestUsageRecords:
    @pytest.mark.parametrize("table", ["usage_records", "usage_waste", "late_usage", "usage_buckets"])
    async def test_facts_are_never_changed_or_deleted(self, books: Books, table: str) -> None:
        waste = (Waste(new_id(), "us-east", WasteReason.FAILED_TRY, 1, 1),)
        await books.add(record_at(START, waste=waste))
        await books.buckets.seal(START + HOUR)
        await books.add(record_at(START))
        column = {"usage_waste": "reason", "late_usage": "billed_hour"}.get(table, "model")
        for statement in (f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}"):
            with pytest.raises(asyncpg.RestrictViolationError, match="never changed or deleted"):
                await books.pool.execute(statement)

    async def test_a_month_without_a_partition_gets_one_when_it_is_written(self, books: Books) -> None:
        far = datetime(2031, 5, 31, 23, 59, 59, 999_000, tzinfo=UTC)
        first, second = record_at(far), record_at(far + MOMENT)
        await asyncio.gather(*(books.add(first, second) for _ in range(3)))
        rows = await books.pool.fetch("SELECT tableoid::regclass::text AS name FROM usage_records ORDER BY id")
        assert [row["name"] for row in rows] == ["usage_records_2031_05", "usage_records_2031_06"]
        with pytest.raises(InvariantViolated, match="failures_are_free"):
            await books.add(record_at(far, outcome=Outcome.FAILED))

    async def test_partitions_are_made_ahead_once(self, books: Books) -> None:
        books.now = datetime(2030, 12, 15, tzinfo=UTC)
        for _ in range(2):
            await books.activities.add_usage_partitions()
        names = {
            row["name"]
            for row in await books.pool.fetch(
                "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'usage_records'::regclass"
            )
        }
        assert {"usage_records_2030_12", "usage_records_2031_01", "usage_records_2031_02"} <= names

    async def test_b2_hours_count_each_record_once_however_often_it_comes(self, books: Books) -> None:
        records = [record_at(START + number * HOUR / 2, prompt_tokens=number) for number in range(6)]
        await asyncio.gather(*(books.add(*records) for _ in range(4)))
        rows = await books.pool.fetch(
            "SELECT hour, sum(requests) AS all, sum(prompt_tokens) AS prompt FROM usage_hours GROUP BY 1 ORDER BY 1"
        )
        assert [tuple(row) for row in rows] == [(START, 2, 1), (START + HOUR, 2, 5), (START + 2 * HOUR, 2, 9)]


class TestSeal:
    async def test_b1_buckets_are_the_sums_of_their_hour_s_records(self, books: Books) -> None:
        reservation = new_id()
        await books.add(
            record_at(START),
            record_at(START + HOUR - MOMENT, environment_id=new_id()),
            record_at(START, model="gemma-7b", completion_tokens=0),
            record_at(START, reservation_id=reservation),
            record_at(START, org_id=GLOBEX),
            record_at(START + HOUR),
        )
        horizon = await books.buckets.seal(START + HOUR)
        assert horizon.sealed_until == START + HOUR
        rows = await books.pool.fetch("SELECT org_id, model, token_class, reservation_id, tokens FROM usage_buckets")
        assert Counter(tuple(row) for row in rows) == Counter(
            [
                (ACME, "llama-3-8b", "prompt", None, 22),
                (ACME, "llama-3-8b", "completion", None, 14),
                (ACME, "gemma-7b", "prompt", None, 11),
                (ACME, "llama-3-8b", "prompt", reservation, 11),
                (ACME, "llama-3-8b", "completion", reservation, 7),
                (GLOBEX, "llama-3-8b", "prompt", None, 11),
                (GLOBEX, "llama-3-8b", "completion", None, 7),
            ]
        )
        assert await books.buckets.compare(START, START + HOUR) == []

    async def test_again_it_changes_nothing(self, books: Books) -> None:
        await books.add(record_at(START))
        first = await books.buckets.seal(START + HOUR)
        before = await books.dump("usage_buckets"), await books.dump("ledger_postings")
        for until in (START + HOUR, START, START + 5 * HOUR):
            assert await books.buckets.seal(until) == first
        assert (await books.dump("usage_buckets"), await books.dump("ledger_postings")) == before

    async def test_a_late_record_goes_into_the_open_hour_and_is_marked(self, books: Books) -> None:
        await books.add(record_at(START))
        await books.buckets.seal(START + HOUR)
        before = await books.dump("usage_buckets")
        late = record_at(START, prompt_tokens=5, completion_tokens=0)
        for _ in range(2):
            await books.add(late)
        now_hour = await books.pool.fetchval("SELECT full_hour(now())")
        assert await books.dump("late_usage") == [(late.id, now_hour)]
        assert await books.dump("usage_buckets") == before
        await books.buckets.seal(now_hour + HOUR)
        added = [row for row in await books.dump("usage_buckets") if row not in before]
        assert [(row[1], row[4], row[7]) for row in added] == [(now_hour, "prompt", 5)]
        assert await books.buckets.compare(START, now_hour + HOUR) == []

    async def test_b2_none_is_lost_or_doubled_when_sealing_and_shipping_race(self, books: Books) -> None:
        async def ship(number: int) -> None:
            for step in range(20):
                await books.add(*(record_at(START + step * HOUR / 4, prompt_tokens=1 + number) for _ in range(5)))

        async def seal() -> None:
            for step in range(1, 8):
                await books.buckets.seal(START + step * HOUR)
                await asyncio.sleep(0)

        await asyncio.gather(*(ship(number) for number in range(4)), seal())
        end = await books.pool.fetchval("SELECT full_hour(now()) + interval '1 hour'")
        await books.buckets.seal(end)
        assert await books.buckets.compare(START, end) == []
        recorded = await books.pool.fetchval("SELECT sum(prompt_tokens) FROM usage_records")
        sealed = await books.pool.fetchval("SELECT sum(tokens) FROM usage_buckets WHERE token_class = 'prompt'")
        assert recorded == sealed == 5 * 20 * (1 + 2 + 3 + 4)

    async def test_the_proof_finds_a_lost_record(self, books: Books) -> None:
        lost = record_at(START)
        await books.add(lost, record_at(START))
        await books.buckets.seal(START + HOUR)
        async with books.pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("DELETE FROM usage_records WHERE id = $1", lost.id)
        for _ in range(2):
            with pytest.raises(InvariantViolated, match="2 sealed sums"):
                await books.activities.prove_hours()

    async def test_each_hour_is_proved_once(self, books: Books) -> None:
        await books.add(record_at(START), record_at(START + 40 * HOUR))
        await books.buckets.seal(START + 50 * HOUR)
        ends = [(await books.activities.prove_hours()).end for _ in range(4)]
        assert ends == [(START + after * HOUR).isoformat() for after in (24, 50, 50, 50)]

    async def test_an_hour_has_the_plan_that_held_in_it(self, books: Books) -> None:
        org, _ = await TenancyStore(books.pool).create_org(new_id(), "acme", plan="enterprise", actor="test")
        await TenancyStore(books.pool).update_org(org.id, {"plan": "serverless"}, actor="test")
        now_hour = await books.pool.fetchval("SELECT full_hour(now())")
        await books.add(*(record_at(now_hour + ago * HOUR, org_id=org.id, completion_tokens=0) for ago in (-1, 0, 1)))
        await books.buckets.seal(now_hour + 2 * HOUR)
        rows = await books.pool.fetch("SELECT plan FROM usage_buckets ORDER BY hour")
        assert [row["plan"] for row in rows] == ["enterprise", "enterprise", "serverless"]

    async def test_an_empty_database_stays_open_until_a_month_closes(self, books: Books) -> None:
        assert (await books.buckets.seal(MONTH.ends_at)).sealed_until.year == 1970
        await books.add(record_at(MONTH.ends_at))
        assert (await books.buckets.seal(MONTH.ends_at)).sealed_until.year == 1970
        assert (await books.buckets.seal(MONTH.ends_at, is_closing=True)).sealed_until == MONTH.ends_at


class TestSealHours:
    async def test_waits_for_the_log_that_is_furthest_behind(self, books: Books) -> None:
        await books.add(record_at(START))
        books.now = START + 9 * HOUR
        await books.logs.report("a", START + 3 * HOUR)
        await books.logs.report("b", START + HOUR - MOMENT)
        sealed = await books.activities.seal_hours()
        assert datetime.fromisoformat(sealed.end).year == 1970
        await books.logs.report("b", START + HOUR)
        await books.logs.report("b", START)  # Never back.
        sealed = await books.activities.seal_hours()
        assert sealed.end == (START + HOUR).isoformat()
        await books.add(record_at(START + 2 * HOUR))
        assert await books.logs.forget("b")
        assert (await books.activities.seal_hours()).end == (START + 3 * HOUR).isoformat()

    async def test_says_which_silent_log_keeps_an_hour_open(self, books: Books) -> None:
        await books.logs.report("gone", START)
        books.now = datetime.now(UTC) + HOUR
        assert "usage log gone" in (await books.activities.seal_hours()).waits_for

    async def test_without_any_log_the_longest_request_has_to_pass(self, books: Books) -> None:
        await books.add(record_at(START))
        for minutes, is_sealed in ((14, False), (15, True)):
            books.now = START + HOUR + timedelta(minutes=minutes)
            sealed = await books.activities.seal_hours()
            assert (sealed.end == (START + HOUR).isoformat()) is is_sealed

    async def test_an_hour_that_has_just_ended_is_left_open(self, books: Books) -> None:
        await books.add(record_at(START))
        await books.logs.report("a", START + 5 * HOUR)
        for now, is_sealed in ((START + HOUR + GRACE - MOMENT, False), (START + HOUR + GRACE, True)):
            books.now = now
            assert ((await books.activities.seal_hours()).end == (START + HOUR).isoformat()) is is_sealed


async def used_month(books: Books) -> None:
    """Two orgs, several models, regions and hours, over the free tokens."""
    for org, most in ((ACME, 9_000), (GLOBEX, 40_000)):
        await books.add(
            *(
                record_at(
                    START + step * 7 * HOUR,
                    org_id=org,
                    model=model,
                    home_region=region,
                    prompt_tokens=most + step,
                    completion_tokens=most // 3,
                )
                for step in range(5)
                for model, region in (("llama-3-70b", "in-mumbai"), ("gemma-7b", "eu-west"))
            )
        )


class TestRateHours:
    async def test_b11_hours_add_up_to_the_month_rated_at_once_and_in_fractions(self, books: Books) -> None:
        await used_month(books)
        await books.buckets.seal(MONTH.ends_at)
        assert await books.rate_all(orgs_at_once=1) == 10
        for org in (ACME, GLOBEX):
            buckets = await books.buckets.month(org, MONTH)
            rated = rate_month(MONTH, buckets, (await books.prices.tariffs([org]))[org])
            sums = await books.pool.fetchrow(
                "SELECT sum(microdollars), max(exact_e10), max(volume_tokens) FROM rated_hours WHERE org_id = $1", org
            )
            assert sums is not None
            assert tuple(sums) == (rated.microdollars, rated.standing.exact_e10, rated.standing.volume_tokens)
            assert rated.microdollars == rerating.microdollars(rerating.usd_of_month(buckets)) > 0
        assert (await books.buckets.horizon()).rated_until == MONTH.ends_at

    async def test_t4_rating_twice_or_by_two_at_once_is_once(self, books: Books) -> None:
        await used_month(books)
        await books.buckets.seal(MONTH.ends_at)
        await asyncio.gather(*(books.rate_all(orgs_at_once=2) for _ in range(3)))
        assert await books.pool.fetchval("SELECT count(*) FROM rated_hours") == 10
        before = await books.dump("ledger_postings")
        assert await books.rate_all() == 0
        assert await books.dump("ledger_postings") == before

    async def test_the_ledger_is_zero_in_sum_and_says_who_owes_what(self, books: Books) -> None:
        waste = (Waste(new_id(), "us-east", WasteReason.FAILED_TRY, 100, 11),)
        await used_month(books)
        await books.add(record_at(START, reservation_id=new_id(), waste=waste))
        await books.buckets.seal(MONTH.ends_at)
        await books.rate_all()
        every = await books.ledger.balances(of_all=True)
        for unit in ("tokens", "e10_usd"):
            assert sum(balance.amount for balance in every if balance.unit == unit) == 0
        found = {(balance.org_id, balance.name): balance.amount for balance in every}
        buckets = await books.buckets.month(ACME, MONTH)
        rated = rate_month(MONTH, buckets, (await books.prices.tariffs([ACME]))[ACME])
        assert found[ACME, "receivable"] == rated.microdollars * 10_000
        assert found[ACME, "free_allowance"] == 25_000
        assert found[ACME, "usage"] == rated.standing.volume_tokens - 25_000
        assert found[ACME, "reservation"] == 18
        assert found[None, "waste"] == 111
        recorded = await books.pool.fetchval("SELECT sum(prompt_tokens + completion_tokens) FROM usage_records")
        assert found[None, "generated"] == -recorded - 111

    async def test_what_does_not_balance_is_refused(self, books: Books) -> None:
        async def post(generated: int) -> None:
            async with books.pool.acquire() as connection, connection.transaction():
                transaction = await connection.fetchval(LedgerStore.OPEN_TRANSACTION, "test", None, START)
                await connection.execute(LedgerStore.POST, transaction, None, "waste", "tokens", 5)
                await connection.execute(LedgerStore.POST, transaction, None, "generated", "tokens", generated)

        with pytest.raises(asyncpg.CheckViolationError, match="does not balance"):
            await post(-4)
        assert await books.dump("ledger_postings") == []
        await post(-5)

    async def test_the_same_records_elsewhere_give_the_same_bytes(self, books: Books) -> None:
        """Exported and taken into an empty database, late ones included (B11)."""
        await used_month(books)
        await books.buckets.seal(START + 8 * HOUR)
        for number in range(3):
            await books.add(record_at(START, prompt_tokens=100_000 + number))
        end = await books.pool.fetchval("SELECT full_hour(now()) + interval '1 hour'")
        await books.buckets.seal(end)
        await books.rate_all()
        tables = ("usage_buckets", "rated_hours", "late_usage", "usage_hours")
        before = [await books.dump(table) for table in tables]
        rows = await books.usage.export(START, end, limit=10_000)
        await books.pool.execute(
            "TRUNCATE usage_records, usage_hours, late_usage, usage_buckets, rated_hours, ledger_postings, "
            "ledger_transactions"
        )
        await books.pool.execute("UPDATE usage_horizon SET rated_until = 'epoch', sealed_until = 'epoch'")
        given = [record_of(line_of(row), end) for row in rows]
        assert await books.usage.take(list(reversed(given))) == len(rows) == 23
        assert await books.usage.take(given) == 0
        await books.buckets.seal(end)
        await books.rate_all()
        assert [await books.dump(table) for table in tables] == before


class TestTake:
    async def test_a_given_hour_that_is_sealed_here_is_late_here(self, books: Books) -> None:
        await books.add(record_at(START))
        await books.buckets.seal(START + 2 * HOUR)
        late = record_at(START)
        assert await books.usage.take([(late, START + HOUR)]) == 1
        ((id, hour),) = await books.dump("late_usage")
        assert id == late.id
        assert hour > START + 2 * HOUR


class TestSumsOfParts:
    @pytest.mark.parametrize(
        ("first", "last"), [(0, 48), (5, 40), (12, 24), (13, 14), (12, 13), (12, 12), (23, 25), (11, 37)]
    )
    async def test_equal_the_records_wherever_a_span_begins_and_ends(self, books: Books, first: int, last: int) -> None:
        """In steps of five minutes over four hours."""
        step = timedelta(minutes=5)
        environment = new_id()
        records = [record_at(START + n * step, environment_id=environment, prompt_tokens=1 << n) for n in range(48)]
        await books.add(*records)
        start, end = START + first * step, START + last * step
        expected = sum(1 << n for n in range(first, last))
        rows = await books.usage.sum_environment(environment, start, end)
        assert sum(row["prompt_tokens"] for row in rows) == expected
        assert sum(row["requests"] for row in rows) == last - first
        (row,) = await books.usage.sum_by(["org"], start, end) or [{"prompt_tokens": 0}]
        assert row["prompt_tokens"] == expected
