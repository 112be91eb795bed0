"""Usage records in a real Postgres: once each, whole, and summed by who asks (A2, B2)."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import msgspec
import pytest

from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.ids import unix_ms_of, uuid7
from crosslogic.domain.usage import Outcome, TokenSource, UsageRecord, Waste, WasteReason
from crosslogic.new_ids import new_id
from crosslogic.store import usage
from crosslogic.store.usage import UsageStore

ENVIRONMENT = new_id()
WASTE = Waste(new_id(), "us-east", WasteReason.FAILED_TRY, 11, 5)
_json = msgspec.json.encode


def _id_at(moment: datetime) -> UUID:
    return uuid7(int(moment.timestamp() * 1000), new_id().int & (1 << 80) - 1)


def a_record(**changes: object) -> UsageRecord:
    """A record of a completed request: 11 prompt tokens and 7 of completion."""
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
        good = a_record(waste=(WASTE,), decision={"why": "least load"})
        text = bytearray(_json(a_record(client_request_id="mine")))
        text[text.index(b"mine")] = 0xFF
        for bad in (
            _json(a_record(prompt_tokens=-1)),
            _json(a_record(latency_ms=1 << 40)),
            _json(a_record(endpoint_kind="song")),
            _json(a_record(waste=(replace(WASTE, completion_tokens=-1),))),
            _json(good)[:-1],
            bytes(text),
        ):
            with pytest.raises(InvariantViolated):
                await store.add([_json(good), bad])
        for table in ("usage_records", "usage_waste", "request_decisions"):
            assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 0

    @pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CUT])
    async def test_a3_takes_no_charge_for_our_failures(self, pool: asyncpg.Pool, outcome: Outcome) -> None:
        store = UsageStore(pool)
        free = a_record(outcome=outcome, prompt_tokens=0, completion_tokens=0, list_price_microdollars=0)
        await store.add([_json(free)])
        for name in ("prompt_tokens", "completion_tokens", "list_price_microdollars"):
            with pytest.raises(InvariantViolated, match="failures_are_free"):
                await store.add([_json(replace(free, id=new_id(), **{name: 1}))])

    async def test_keeps_every_field_and_the_admission_time_of_the_id(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        full = a_record(reservation_id=new_id(), tries=3, continuations=2)
        bare = a_record(node_id=None, ttft_ms=None, served_region="", client_request_id="")
        await store.add([_json(full), _json(bare)])
        for record in (full, bare):
            row = await pool.fetchrow("SELECT * FROM usage_records WHERE id = $1", record.id)
            assert row is not None
            columns = [field.name for field in fields(record) if field.name not in ("waste", "decision")]
            assert {name: row[name] for name in columns} == {name: getattr(record, name) for name in columns}
            assert row["admitted_at"] == datetime.fromtimestamp(unix_ms_of(record.id) / 1000, UTC)
        assert await pool.fetchval("SELECT count(*) FROM usage_waste") == 0
        assert await pool.fetchval("SELECT count(*) FROM request_decisions") == 0

    @pytest.mark.parametrize("source", TokenSource)
    async def test_takes_every_token_source(self, pool: asyncpg.Pool, source: TokenSource) -> None:
        await UsageStore(pool).add([_json(a_record(token_source=source))])
        assert await pool.fetchval("SELECT token_source FROM usage_records") == source.value

    @pytest.mark.parametrize("reason", WasteReason)
    async def test_takes_every_reason_of_waste(self, pool: asyncpg.Pool, reason: WasteReason) -> None:
        await UsageStore(pool).add([_json(a_record(waste=(replace(WASTE, reason=reason),)))])
        assert await pool.fetchval("SELECT reason FROM usage_waste") == reason.value

    async def test_a1_takes_a_record_that_knows_nothing_of_later_fields(self, pool: asyncpg.Pool) -> None:
        document = msgspec.to_builtins(a_record())
        for name in ("reservation_id", "tries", "continuations", "waste", "decision"):
            del document[name]
        await UsageStore(pool).add([msgspec.json.encode({**document, "token_source": "counted"})])
        row = await pool.fetchrow("SELECT tries, continuations, token_source, reservation_id FROM usage_records")
        assert row is not None
        assert tuple(row) == (0, 0, "counted", None)

    async def test_a3_waste_and_decision_come_with_the_record_once(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        waste = (WASTE, replace(WASTE, reason=WasteReason.NOT_RELAYED, prompt_tokens=0, completion_tokens=4))
        record = a_record(waste=waste, decision={"tries": ["node_1", "node_2"], "limits": {"key": 0.5}})
        for _ in range(3):
            await store.add([_json(record), _json(a_record())])
        rows = await pool.fetch("SELECT * FROM usage_waste ORDER BY attempt")
        assert [tuple(row) for row in rows] == [
            (record.id, number, w.node_id, w.region, record.model, w.reason.value, w.prompt_tokens, w.completion_tokens)
            for number, w in enumerate(waste, 1)
        ]
        ((id, decision),) = await pool.fetch("SELECT * FROM request_decisions")
        assert (id, msgspec.json.decode(decision)) == (record.id, record.decision)

    async def test_b2_the_same_record_again_changes_nothing(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        record = a_record()
        await store.add([_json(record), _json(record)])
        later = _json(replace(record, completion_tokens=99, waste=(WASTE,), decision={"is": "later"}))
        await asyncio.gather(*(store.add([later, _json(a_record())]) for _ in range(4)))
        rows = await pool.fetch("SELECT completion_tokens FROM usage_records WHERE id = $1", record.id)
        assert [row["completion_tokens"] for row in rows] == [7]
        assert await pool.fetchval("SELECT count(*) FROM usage_records") == 5
        assert await pool.fetchval("SELECT count(*) FROM usage_waste") == 0
        assert await pool.fetchval("SELECT count(*) FROM request_decisions") == 0

    async def test_b2_of_two_records_in_one_batch_the_first_counts_with_its_waste(self, pool: asyncpg.Pool) -> None:
        record = a_record(waste=(WASTE,), decision={"is": "first"})
        second = replace(record, completion_tokens=99, waste=(WASTE, WASTE), decision={"is": "second"})
        others = [_json(a_record()) for _ in range(20)]
        await UsageStore(pool).add([*others, _json(record), _json(second), _json(second)])
        row = await pool.fetchrow(
            "SELECT completion_tokens, (SELECT count(*) FROM usage_waste), "
            "(SELECT decision->>'is' FROM request_decisions) FROM usage_records WHERE id = $1",
            record.id,
        )
        assert row is not None
        assert tuple(row) == (7, 1, "first")

    async def test_takes_what_a_client_may_send_as_its_id(self, pool: asyncpg.Pool) -> None:
        texts = ["a\x00b", "é\x7f\x01", "'; --", "x" * 128, "\\u0000", '"}]', "\U0001f600"]
        records = [a_record(client_request_id=text, decision={"as \x00 sent": [text]}) for text in texts]
        await UsageStore(pool).add([_json(record) for record in records])
        rows = await pool.fetch(
            "SELECT client_request_id, decision FROM usage_records JOIN request_decisions USING (id) ORDER BY id"
        )
        expected = {record.id: text.replace("\x00", "") for record, text in zip(records, texts, strict=True)}
        assert [row["client_request_id"] for row in rows] == [expected[id] for id in sorted(expected)]
        assert [msgspec.json.decode(row["decision"]) for row in rows] == [
            {"as  sent": [expected[id]]} for id in sorted(expected)
        ]

    async def test_nothing_is_no_work(self, pool: asyncpg.Pool) -> None:
        await UsageStore(pool).add([])


class TestPruneDecisions:
    async def test_deletes_those_of_more_than_a_week_ago_in_small_batches(
        self, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(usage, "PRUNED_AT_ONCE", 3)
        store = UsageStore(pool)
        now = datetime(2026, 11, 20, 12, tzinfo=UTC)
        week = timedelta(days=7)
        old = [a_record(id=_id_at(now - week - timedelta(milliseconds=ms + 1)), decision={}) for ms in range(7)]
        young = [a_record(id=_id_at(now - week + timedelta(milliseconds=ms)), decision={}) for ms in range(2)]
        await store.add([_json(record) for record in (*old, *young)])
        assert await store.prune_decisions(now) == 7
        assert await store.prune_decisions(now) == 0
        rows = await pool.fetch("SELECT id FROM request_decisions ORDER BY id")
        assert [row["id"] for row in rows] == [record.id for record in young]
        assert await pool.fetchval("SELECT count(*) FROM usage_records") == 9


class TestSumEnvironment:
    async def test_sums_one_environment_by_model_over_a_half_open_span(self, pool: asyncpg.Pool) -> None:
        store = UsageStore(pool)
        noon = datetime(2026, 11, 1, 12, tzinfo=UTC)

        hour = timedelta(hours=1)
        records = [
            a_record(id=_id_at(noon)),
            a_record(id=_id_at(noon + hour / 2), model="gemma-7b"),
            a_record(id=_id_at(noon + hour)),
            a_record(id=_id_at(noon - timedelta(milliseconds=1))),
            a_record(id=_id_at(noon), environment_id=new_id()),
        ]
        await store.add([_json(record) for record in records])
        rows = await store.sum_environment(ENVIRONMENT, noon, noon + hour)
        one = {"requests": 1, "prompt_tokens": 11, "completion_tokens": 7, "cached_tokens": 3}
        assert rows == [{"model": "gemma-7b", **one}, {"model": "llama-3-8b", **one}]
