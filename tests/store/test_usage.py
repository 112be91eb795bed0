"""Usage records in a real Postgres: once each, whole, and summed by who asks (A2, B2)."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.ids import unix_ms_of, uuid7
from crosslogic.domain.usage import Outcome, TokenSource, UsageRecord
from crosslogic.new_ids import new_id
from crosslogic.store.usage import UsageStore

ENVIRONMENT = new_id()


def _record(**changes: object) -> UsageRecord:
    record = UsageRecord(
        id=new_id(),
        client_request_id="mine",
        org_id=new_id(),
        environment_id=ENVIRONMENT,
        key_id=new_id(),
        home_region="in-mumbai",
        model="llama-3-8b",
        endpoint_kind="chat",
        is_streamed=True,
        served_region="us-east",
        node_id=new_id(),
        prompt_tokens=11,
        completion_tokens=7,
        cached_tokens=3,
        token_source=TokenSource.ENGINE,
        latency_ms=123,
        ttft_ms=45,
        status=200,
        outcome=Outcome.COMPLETED,
        list_price_microdollars=9,
    )
    return replace(record, **changes)  # pyright: ignore[reportArgumentType]


class TestAdd:
    async def test_says_when_a_record_can_never_be_taken(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        good = _record()
        for bad in (_record(prompt_tokens=-1), _record(latency_ms=1 << 40), _record(endpoint_kind="song")):
            with pytest.raises(InvariantViolated):
                await store.add([good, bad])
        assert await pool.fetchval("SELECT count(*) FROM usage_records WHERE id = $1", good.id) == 0

    async def test_keeps_every_field_and_the_admission_time_of_the_id(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        full = _record()
        bare = _record(node_id=None, ttft_ms=None, served_region="", client_request_id="")
        await store.add([full, bare])
        for record in (full, bare):
            row = await pool.fetchrow("SELECT * FROM usage_records WHERE id = $1", record.id)
            assert row is not None
            assert {field.name: row[field.name] for field in fields(record)} == {
                field.name: getattr(record, field.name) for field in fields(record)
            }
            assert row["admitted_at"] == datetime.fromtimestamp(unix_ms_of(record.id) / 1000, UTC)
            assert row["reservation_id"] is None

    async def test_b2_the_same_record_again_changes_nothing(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        record = _record()
        await store.add([record, record])
        await asyncio.gather(*(store.add([replace(record, completion_tokens=99), _record()]) for _ in range(4)))
        rows = await pool.fetch("SELECT completion_tokens FROM usage_records WHERE id = $1", record.id)
        assert [row["completion_tokens"] for row in rows] == [7]
        assert await pool.fetchval("SELECT count(*) FROM usage_records") == 5

    async def test_takes_what_a_client_may_send_as_its_id(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        odd = [_record(client_request_id=text) for text in ("\x00", "é\x7f\x01", "'; --", "x" * 128)]
        await store.add(odd)
        assert await pool.fetchval("SELECT count(*) FROM usage_records") == 4

    async def test_nothing_is_no_work(self, pool: asyncpg.Pool) -> None:
        await UsageStore(pool).add([])


class TestSumEnvironment:
    async def test_sums_one_environment_by_model_over_a_half_open_span(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        noon = datetime(2026, 11, 1, 12, tzinfo=UTC)

        def at(moment: datetime) -> UUID:
            return uuid7(int(moment.timestamp() * 1000), new_id().int & (1 << 80) - 1)

        hour = timedelta(hours=1)
        await store.add(
            [
                _record(id=at(noon)),
                _record(id=at(noon + hour / 2), model="gemma-7b"),
                _record(id=at(noon + hour)),
                _record(id=at(noon - timedelta(milliseconds=1))),
                _record(id=at(noon), environment_id=new_id()),
            ]
        )
        rows = await store.sum_environment(ENVIRONMENT, noon, noon + hour)
        one = {"requests": 1, "prompt_tokens": 11, "completion_tokens": 7, "cached_tokens": 3}
        assert rows == [{"model": "gemma-7b", **one}, {"model": "llama-3-8b", **one}]
