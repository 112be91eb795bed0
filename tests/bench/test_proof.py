"""The proof finds whatever is missing, on a real Postgres and a real Valkey."""

from __future__ import annotations

import asyncio
import copy
import os
import time
from typing import Any

import asyncpg
import msgspec
import pytest

from bench.engine import ANSWER_TOKENS, PROMPT_TOKENS
from bench.load import Run
from bench.proof import Sent, compare, prove
from bench.seed import Seeded, seed
from crosslogic.dev.valkey import Valkey
from crosslogic.domain.ids import encode
from crosslogic.domain.keys import hash_secret
from crosslogic.domain.limits import Hold, LayerLimits, Subject
from crosslogic.domain.usage import Outcome, TokenSource, UsageRecord
from crosslogic.hot.limits import LimitBook
from crosslogic.hot.pipeline import PipelinedRedis
from crosslogic.new_ids import new_id
from crosslogic.store.tenancy import TenancyStore
from crosslogic.store.usage import UsageStore

TOKENS = PROMPT_TOKENS + ANSWER_TOKENS
GOOD: dict[str, Any] = {
    "sent": {"answered": 3, "failed": 0, "completion_tokens": 3 * ANSWER_TOKENS},
    "sums": {
        "records": 3,
        "ids": 3,
        "completed": 3,
        "prompt_tokens": 3 * PROMPT_TOKENS,
        "completion_tokens": 3 * ANSWER_TOKENS,
        "microdollars": 12,
        "nodes": 2,
    },
    "day": {"global": 3 * TOKENS, "key": 3 * TOKENS},
    "spend": 12,
    "holds": 0,
}


class TestCompare:
    def test_equal_counts_leave_no_problem(self) -> None:
        proof = compare(Sent(**GOOD["sent"]), GOOD["sums"], GOOD["day"], GOOD["spend"], GOOD["holds"])
        assert proof.problems == ()
        assert (proof.answered, proof.records, proof.tokens) == (3, 3, 3 * TOKENS)

    @pytest.mark.parametrize("path", [(part, name) for part in ("sent", "sums", "day") for name in GOOD[part]])
    def test_one_too_many_anywhere_is_a_problem(self, path: tuple[str, str]) -> None:
        part, name = path
        found = copy.deepcopy(GOOD)
        found[part][name] += 1
        proof = compare(Sent(**found["sent"]), found["sums"], found["day"], found["spend"], found["holds"])
        assert bool(proof.problems) == (path != ("sums", "nodes"))

    def test_spend_and_holds_count_too(self) -> None:
        sent = Sent(**GOOD["sent"])
        assert compare(sent, GOOD["sums"], GOOD["day"], 11, 0).problems
        assert compare(sent, GOOD["sums"], GOOD["day"], 12, 1).problems


class TestProve:
    @pytest.fixture
    async def seeded(self, database: str) -> Seeded:
        return await seed(database, {"llama-3-8b": ["http://127.0.0.1:9"]})

    async def test_holds_for_what_was_recorded_and_counted(self, database: str, valkey: Valkey, seeded: Seeded) -> None:
        pool = await asyncpg.create_pool(database, min_size=1, max_size=2)
        pipeline = PipelinedRedis(valkey.url)
        running = asyncio.create_task(pipeline.run())
        prefix = f"proof{os.urandom(4).hex()}:"
        book = LimitBook(pipeline, prefix, encode(new_id()))
        deciding = asyncio.create_task(book.run(lambda: time.time_ns() // 1_000_000))
        try:
            await pipeline.wait_connected()
            while book.is_alone:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            principal = (await TenancyStore(pool).find_principals([hash_secret(seeded.secret)])).popitem()[1]
            assert [row.layer for row in principal.limits] == list(seeded.subjects)
            limited = [(Subject(row.layer, encode(row.subject_id)), LayerLimits.of(row)) for row in principal.limits]
            assert all(None not in limits.in_order()[:3] for _, limits in limited)
            sent = Sent()
            records = [a_record(seeded) for _ in range(3)]
            for record in records:
                now_ms = time.time_ns() // 1_000_000
                assert isinstance(await book.place(encode(record.id), limited, 500, 40, now_ms), Hold)
                book.settle(encode(record.id), TOKENS, record.list_price_microdollars, now_ms)
                await UsageStore(pool).add([msgspec.json.encode(record)])
                sent.add(Run(answered=1, completion_tokens=ANSWER_TOKENS))
            proof = await prove(database, valkey.url, seeded, sent, prefix)
            assert proof.problems == ()
            assert set(proof.counted_tokens.values()) == {3 * TOKENS}

            async with pool.acquire() as connection, connection.transaction():
                # Facts are never deleted: their trigger has to look away.
                await connection.execute("SET LOCAL session_replication_role = replica")
                await connection.execute("DELETE FROM usage_records WHERE id = $1", records[0].id)
            sent.answered -= 1
            sent.completion_tokens -= ANSWER_TOKENS
            lost = await prove(database, valkey.url, seeded, sent, prefix)
            assert [problem.partition(":")[0] for problem in lost.problems] == [
                *(f"tokens/day that layer {layer} counted and recorded" for layer in seeded.subjects),
                "spend that layer org counted and recorded",
            ]
        finally:
            deciding.cancel()
            running.cancel()
            await pool.close()


def a_record(seeded: Seeded) -> UsageRecord:
    """A request that was answered."""
    return UsageRecord(
        id=new_id(),
        client_request_id="",
        org_id=seeded.org_id,
        environment_id=seeded.environment_id,
        key_id=seeded.key_id,
        home_region="us-east",
        model="llama-3-8b",
        endpoint_kind="chat",
        is_streamed=False,
        served_region="us-east",
        node_id=new_id(),
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=ANSWER_TOKENS,
        cached_tokens=0,
        token_source=TokenSource.ENGINE,
        latency_ms=1,
        ttft_ms=None,
        status=200,
        outcome=Outcome.COMPLETED,
        list_price_microdollars=4,
    )
