from __future__ import annotations

import asyncio
import hashlib
import json

import asyncpg
import pytest
import pytest_asyncio

from crosslogic.store.audit import AuditStore

RECORDS = 12


@pytest_asyncio.fixture
async def store(pool: asyncpg.Pool) -> AuditStore:
    store = AuditStore(pool)
    for number in range(RECORDS):
        await store.record(
            actor="ann", action="key.create", subject=f"key_{number}", details={"name": f"ключ {number}", "at": number}
        )
    return store


class TestVerify:
    async def test_an_empty_log_is_intact(self, pool: asyncpg.Pool) -> None:
        verdict = await AuditStore(pool).verify()
        assert (verdict.records, verdict.head, verdict.problem) == (0, bytes(32), "")

    async def test_an_untouched_log_is_intact(self, store: AuditStore) -> None:
        for batch in (1, 5, RECORDS, 1000):
            verdict = await store.verify(batch=batch)
            assert (verdict.records, verdict.broken_seq, verdict.problem) == (RECORDS, None, "")

    @pytest.mark.parametrize(
        "change",
        [
            "actor = 'bob'",
            "action = 'key.revoke'",
            "subject = 'key_99'",
            "at = at + interval '1 microsecond'",
            """details = details || '{"role": "admin"}'""",
            "details = '{}'",
        ],
    )
    async def test_names_the_record_that_was_altered(self, store: AuditStore, pool: asyncpg.Pool, change: str) -> None:
        """H11: the table's owner altered one row with plain SQL."""
        await pool.execute("CREATE TABLE kept AS TABLE audit_log")
        for seq in (1, 7, RECORDS):
            await pool.execute(f"UPDATE audit_log SET {change} WHERE seq = {seq}")
            verdict = await store.verify(batch=5)
            assert (verdict.records, verdict.broken_seq) == (seq - 1, seq)
            assert verdict.problem == f"record {seq} was altered after it was written"
            await pool.execute("TRUNCATE audit_log")
            await pool.execute("INSERT INTO audit_log TABLE kept")
            assert (await store.verify()).problem == ""

    @pytest.mark.parametrize("seq", [1, 7])
    async def test_names_the_record_that_was_removed(self, store: AuditStore, pool: asyncpg.Pool, seq: int) -> None:
        await pool.execute("DELETE FROM audit_log WHERE seq = $1", seq)
        verdict = await store.verify(batch=5)
        assert (verdict.broken_seq, verdict.problem) == (seq, f"record {seq} is missing")

    async def test_an_altered_record_with_a_hash_of_its_own_breaks_the_next(
        self, store: AuditStore, pool: asyncpg.Pool
    ) -> None:
        row = await pool.fetchrow("SELECT * FROM audit_log WHERE seq = 5")
        assert row is not None
        forged = {
            "seq": 5,
            "at": row["at"].isoformat(timespec="microseconds"),
            "actor": "bob",
            "action": row["action"],
            "subject": row["subject"],
            "details": json.loads(row["details"]),
        }
        text = json.dumps(forged, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(row["previous_hash"] + text.encode()).digest()
        await pool.execute("UPDATE audit_log SET actor = 'bob', hash = $1 WHERE seq = 5", digest)
        verdict = await store.verify()
        assert (verdict.broken_seq, verdict.problem) == (6, "record 6 does not follow record 5")

    async def test_removed_ends_show_against_an_earlier_head(self, store: AuditStore, pool: asyncpg.Pool) -> None:
        head = (await store.verify()).head
        await store.record(actor="ann", action="a", subject="b", details={})
        assert (await store.verify(head)).problem == ""
        await pool.execute("DELETE FROM audit_log WHERE seq >= $1", RECORDS)
        assert (await store.verify()).problem == "", "the chain alone cannot know"
        verdict = await store.verify(head)
        assert verdict.broken_seq == RECORDS
        assert "removed" in verdict.problem


class TestAppend:
    async def test_racing_writers_make_one_chain(self, store: AuditStore) -> None:
        await asyncio.gather(
            *(store.record(actor="ann", action="a", subject=str(number), details={}) for number in range(40))
        )
        verdict = await store.verify()
        assert (verdict.records, verdict.problem) == (RECORDS + 40, "")

    async def test_what_is_rolled_back_leaves_no_gap(self, store: AuditStore, pool: asyncpg.Pool) -> None:
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await AuditStore.append(connection, actor="ann", action="a", subject="b", details={})
            await transaction.rollback()
        await store.record(actor="ann", action="c", subject="d", details={})
        assert (await store.verify()).records == RECORDS + 1


class TestList:
    async def test_newest_first_in_pages_and_by_subject(self, store: AuditStore) -> None:
        first = await store.list_entries(limit=5)
        assert [entry.seq for entry in first] == [12, 11, 10, 9, 8]
        assert [entry.seq for entry in await store.list_entries(before_seq=8, limit=3)] == [7, 6, 5]
        found = await store.list_entries(subject="key_3")
        assert [(entry.seq, entry.details) for entry in found] == [(4, {"name": "ключ 3", "at": 3})]
