"""The durable log: nothing that was settled is lost or counted twice, and nothing damaged disappears (A1, A2, A5)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import mmap
import multiprocessing
import os
import random
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.inference import metering
from api.inference.metering import Shipper, UsageLog, frames, recover
from crosslogic.domain.errors import InvariantViolated, Unavailable
from crosslogic.domain.ids import uuid7
from crosslogic.domain.usage import Intent, Outcome, Progress, TokenSource, UsageRecord, Waste, WasteReason
from crosslogic.new_ids import new_id

ORG, ENVIRONMENT, KEY, NODE = (UUID(int=number) for number in range(1, 5))


def _intent(number: int = 0) -> Intent:
    return Intent(
        id=new_id(),
        client_request_id=f"c{number}",
        org_id=ORG,
        environment_id=ENVIRONMENT,
        key_id=KEY,
        home_region="in-mumbai",
        model="llama-3-8b",
        endpoint_kind="chat",
        is_streamed=True,
        estimated_prompt_tokens=12,
        input_price_e10=500,
        output_price_e10=500,
        multiplier_bp=7000,
    )


def _record(intent: Intent, tokens: int = 7) -> UsageRecord:
    return UsageRecord(
        id=intent.id,
        client_request_id=intent.client_request_id,
        org_id=ORG,
        environment_id=ENVIRONMENT,
        key_id=KEY,
        home_region="in-mumbai",
        model="llama-3-8b",
        endpoint_kind="chat",
        is_streamed=True,
        served_region="in-mumbai",
        node_id=NODE,
        prompt_tokens=11,
        completion_tokens=tokens,
        cached_tokens=0,
        token_source=TokenSource.ENGINE,
        latency_ms=5,
        ttft_ms=1,
        status=200,
        outcome=Outcome.COMPLETED,
        list_price_microdollars=1,
    )


_read = msgspec.json.Decoder(UsageRecord).decode


class Ledger:
    """Where records go: idempotent by id, and away when told so."""

    def __init__(self) -> None:
        self.records: dict[UUID, UsageRecord] = {}
        self.calls = 0
        self.deliveries = 0
        self.is_away = False

    async def add(self, payloads: Sequence[bytes]) -> None:
        # As with a real database, others have their turn in between.
        await asyncio.sleep(0)
        if self.is_away:
            raise ConnectionError("away")
        self.calls += 1
        for payload in payloads:
            record = _read(payload)
            self.deliveries += 1
            self.records.setdefault(record.id, record)


def _die(log: UsageLog) -> Path:
    """What SIGKILL leaves: the files with all that was reserved in them, and no lock."""
    sizes = {path: path.stat().st_size for path in _segments(log.directory)}
    log.close()
    for path, size in sizes.items():
        os.truncate(path, size)
    return log.directory


def _fill(log: UsageLog) -> tuple[int, Unavailable]:
    """How many intents still fit, and what is said then."""
    for fitting in itertools.count():
        try:
            log.intend(_intent())
        except Unavailable as error:
            return fitting, error
    raise AssertionError


def _used(directory: Path) -> int:
    """Bytes of the segments that are in use."""
    return sum(len(path.read_bytes().rstrip(b"\0")) for path in _segments(directory))


def _copy_of(directory: Path) -> Path:
    return Path(shutil.copytree(directory, directory.with_name(f".copy-{directory.name}")))


def _segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*.log"))


async def _until(look: Callable[[], bool]) -> None:
    for _ in range(1000):
        if look():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not within 5 s")


async def _until_shipped(log: UsageLog, shipper: Shipper) -> None:
    for _ in range(4 * log.segment + 20):
        await shipper.ship_once()
    assert log.unshipped == []
    assert log.spilled_at is None


def _frame(payload: bytes) -> bytes:
    return struct.pack("<II", len(payload), zlib.crc32(payload)) + payload


class TestFrames:
    @given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.data())
    def test_reads_whole_frames_and_stops_at_a_torn_or_changed_one(
        self, payloads: list[bytes], data: st.DataObject
    ) -> None:
        whole = b"".join(map(_frame, payloads))
        assert [payload for payload, _ in frames(whole)] == payloads
        ends = [end for _, end in frames(whole)]
        cut = data.draw(st.integers(0, len(whole)))
        assert [end for _, end in frames(whole[:cut])] == [end for end in ends if end <= cut]
        if whole:
            at = data.draw(st.integers(0, len(whole) - 1))
            changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            assert [end for _, end in frames(changed)] == [end for end in ends if end <= at]


class TestUsageLog:
    async def test_what_is_appended_is_in_the_file_at_once(self, tmp_path: Path) -> None:
        log = UsageLog(tmp_path, "a")
        intent = _intent()
        log.intend(intent)
        log.settle(_record(intent))
        kinds = [payload[:1] for payload, _ in frames(_segments(log.directory)[0].read_bytes())]
        assert kinds == [b"I", b"S"]
        assert log.open_intents == {}

    async def test_a5_refuses_before_the_disk_is_full(self, tmp_path: Path) -> None:
        log = UsageLog(tmp_path, "a", most_bytes=600)
        log.intend(_intent())
        log.intend(_intent())
        assert log.kept_bytes > 600
        with pytest.raises(Unavailable) as caught:
            log.intend(_intent())
        assert caught.value.code == "usage_log_full"

    async def test_a5_a_disk_without_room_is_503_and_what_fits_is_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = UsageLog(tmp_path, "a")
        real, room = os.posix_fallocate, mmap.PAGESIZE

        def full(descriptor: int, offset: int, size: int) -> None:
            if offset + size > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", full)
        taken, refusal = _fill(log)
        assert refusal.code == "usage_log_failed"
        assert room - log.end[1] < 2 * log.end[1] / taken
        assert _segments(log.directory)[0].stat().st_size == log.end[1]
        monkeypatch.undo()
        settled = _intent()
        log.settle(_record(settled))
        ledger = Ledger()
        assert await Shipper(log, ledger.add).ship_once() == 1
        assert set(ledger.records) == {settled.id}
        _die(log)
        assert await recover(tmp_path, "b", ledger.add) == taken + 1

    async def test_what_is_reserved_and_not_used_is_given_back(self, tmp_path: Path) -> None:
        log = UsageLog(tmp_path, "a", segment_bytes=1000)
        for _ in range(5):
            log.intend(_intent())
        *closed, current = _segments(log.directory)
        assert closed
        for path in closed:
            data = path.read_bytes()
            assert list(frames(data))[-1][1] == len(data)
        assert current.stat().st_size > log.end[1]
        log.close()
        assert current.stat().st_size == log.end[1]

    async def test_a_roll_that_fails_does_not_fail_for_ever(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = UsageLog(tmp_path, "a", segment_bytes=100)
        log.intend(_intent())

        def broken(descriptor: int) -> None:
            raise OSError("I/O error")

        monkeypatch.setattr(os, "fdatasync", broken)
        log.intend(_intent())
        log.intend(_intent())
        assert log.segment == 3

    async def test_keeps_syncing_after_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log = UsageLog(tmp_path, "a")
        failed = asyncio.Event()
        loop = asyncio.get_running_loop()
        real = os.dup

        def broken(descriptor: int) -> int:
            loop.call_soon_threadsafe(failed.set)
            raise OSError("too many open files")

        monkeypatch.setattr(os, "dup", broken)
        task = asyncio.create_task(log.keep_synced())
        log.intend(_intent())
        await asyncio.wait_for(failed.wait(), 2)
        monkeypatch.setattr(os, "dup", real)
        await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()

    async def test_a5_what_cannot_be_settled_waits_for_room_and_stays_an_open_intent(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        shipper = Shipper(log, ledger.add)
        intents = [_intent(number) for number in range(3)]
        for intent in intents:
            log.intend(intent)

        def full(descriptor: int, offset: int, size: int) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        others, _ = _fill(log)
        with pytest.raises(OSError, match="no space"):
            log.settle(_record(intents[0]))
        for intent in intents[:2]:
            log.settle_when_possible(_record(intent))
        assert await shipper.ship_once() == 0
        assert len(log.open_intents) == 3 + others
        monkeypatch.undo()
        assert await shipper.ship_once() == 2
        assert set(ledger.records) == {intent.id for intent in intents[:2]}
        assert intents[2].id.int in log.open_intents
        assert len(log.open_intents) == 1 + others
        assert await shipper.ship_once() == 0
        assert ledger.deliveries == 2

    async def test_a5_admits_nothing_while_it_cannot_be_synced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        first = _intent()
        tried = asyncio.Event()
        loop = asyncio.get_running_loop()

        def broken(descriptor: int) -> None:
            loop.call_soon_threadsafe(tried.set)
            raise OSError("I/O error")

        monkeypatch.setattr(os, "fdatasync", broken)
        monkeypatch.setattr(metering, "SYNC_RETRY_S", 0.01)
        task = asyncio.create_task(log.keep_synced())
        log.intend(first)
        await asyncio.wait_for(tried.wait(), 5)
        await _until(lambda: log.segment > 2)
        with pytest.raises(Unavailable) as caught:
            log.intend(_intent())
        assert caught.value.code == "usage_log_failed"
        # What was admitted before ends as it should.
        log.settle(_record(first))
        monkeypatch.undo()

        def admits() -> bool:
            with contextlib.suppress(Unavailable):
                log.intend(_intent())
                return True
            return False

        await _until(admits)
        task.cancel()
        assert await Shipper(log, ledger.add).ship_once() == 1

    async def test_a_frame_that_no_reader_would_believe_is_not_written(self, tmp_path: Path) -> None:
        log = UsageLog(tmp_path, "a")
        record = _record(_intent())
        record.decision = "x" * (1 << 20)
        with pytest.raises(InvariantViolated):
            log.settle(record)
        assert log.kept_bytes == 0


class TestShipper:
    async def test_reads_no_file_while_memory_holds_what_is_settled(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        record = _record(_intent())
        log.settle(record)
        _segments(log.directory)[0].write_bytes(b"")
        assert await Shipper(log, ledger.add).ship_once() == 1
        assert ledger.records == {record.id: record}

    async def test_what_memory_is_not_to_hold_comes_from_the_file_once(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a", segment_bytes=2000, most_in_memory=3), Ledger()
        shipper = Shipper(log, ledger.add)
        ledger.is_away = True
        intents = [_intent(number) for number in range(20)]
        for intent in intents:
            log.intend(intent)
            log.settle(_record(intent))
        with pytest.raises(ConnectionError):
            await shipper.ship_once()
        assert len(log.unshipped) == 3
        ledger.is_away = False
        await _until_shipped(log, shipper)
        assert ledger.deliveries == 20
        assert set(ledger.records) == {intent.id for intent in intents}
        assert len(_segments(log.directory)) == 1
        # And then from memory again.
        log.settle(_record(_intent()))
        assert log.spilled_at is None
        assert await shipper.ship_once() == 1

    async def test_a1_ships_what_the_first_version_has_logged(self, tmp_path: Path) -> None:
        """Its records say `counted`, and nothing of tries, waste or decisions."""
        ledger = Ledger()
        log = UsageLog(tmp_path, "a")
        directory = _die(log)
        intents = [_intent(number) for number in range(2)]
        settled, streaming = (
            {**msgspec.to_builtins(intent), "id": str(intent.id), "reservation_id": None} for intent in intents
        )
        del streaming["reservation_id"]
        record = {**msgspec.to_builtins(_record(intents[0])), "token_source": "counted"}
        for name in ("reservation_id", "tries", "continuations", "waste", "decision"):
            del record[name]
        progress = {"id": streaming["id"], "node_id": str(NODE), "served_region": "us-east", "completion_tokens": 4}
        kinds = (b"I", settled), (b"I", streaming), (b"P", progress), (b"S", record)
        (directory / "segment-00000001.log").write_bytes(
            b"".join(_frame(kind + msgspec.json.encode(body)) for kind, body in kinds)
        )
        assert await recover(tmp_path, "b", ledger.add) == 2
        assert ledger.records[intents[0].id].token_source is TokenSource.COUNTED
        told = ledger.records[intents[1].id]
        assert (told.completion_tokens, told.prompt_tokens, told.token_source) == (4, 12, TokenSource.CHUNKS)

    async def test_ships_what_was_settled_once(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        shipper = Shipper(log, ledger.add)
        intents = [_intent(number) for number in range(5)]
        for intent in intents:
            log.intend(intent)
        for intent in intents[:3]:
            log.settle(_record(intent))
        assert await shipper.ship_once() == 3
        assert await shipper.ship_once() == 0
        assert ledger.calls == 1
        assert set(ledger.records) == {intent.id for intent in intents[:3]}

    async def test_keeps_everything_while_postgres_is_away(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        shipper = Shipper(log, ledger.add)
        log.settle(_record(_intent()))
        ledger.is_away = True
        for _ in range(3):
            with pytest.raises(ConnectionError):
                await shipper.ship_once()
        ledger.is_away = False
        log.settle(_record(_intent()))
        assert await shipper.ship_once() == 2

    async def test_deletes_segments_that_are_shipped_and_hold_nothing_open(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a", segment_bytes=2000), Ledger()
        shipper = Shipper(log, ledger.add)
        waiting = _intent()
        log.intend(waiting)
        for number in range(20):
            intent = _intent(number)
            log.intend(intent)
            log.settle(_record(intent))
        for _ in range(2 * log.segment):
            await shipper.ship_once()
        assert len(ledger.records) == 20
        names = [path.name for path in _segments(log.directory)]
        assert names == ["segment-00000001.log", f"segment-{log.segment:08d}.log"]
        assert log.kept_bytes == _used(log.directory)
        log.settle(_record(waiting))
        for _ in range(3):
            await shipper.ship_once()
        assert len(ledger.records) == 21
        assert len(_segments(log.directory)) == 1

    async def test_a_damaged_segment_is_kept_and_the_rest_is_shipped(self, tmp_path: Path) -> None:
        # Nothing is kept in memory, so that all is read from the file.
        log, ledger = UsageLog(tmp_path, "a", segment_bytes=1500, most_in_memory=0), Ledger()
        for number in range(8):
            log.settle(_record(_intent(number)))
        first = _segments(log.directory)[0]
        data = bytearray(first.read_bytes())
        data[len(data) // 2] ^= 1
        first.write_bytes(data)
        shipper = Shipper(log, ledger.add)
        for _ in range(3 * log.segment):
            await shipper.ship_once()
        assert 5 <= len(ledger.records) < 8
        (kept,) = (tmp_path / "damaged").iterdir()
        assert kept.read_bytes() == bytes(data)
        # The process dies, its log is recovered and deleted: the damaged part is still there.
        _die(log)
        await recover(tmp_path, "b", ledger.add)
        assert not log.directory.exists()
        assert kept.exists()


class _Life:
    """A process's log under a random life, beside what must come of it."""

    def __init__(self, root: Path, in_memory: int) -> None:
        self.root = root
        self.ledger = Ledger()
        self.log = UsageLog(root, "a", segment_bytes=1200, most_in_memory=in_memory)
        self.shipper = Shipper(self.log, self.ledger.add)
        self.open: list[Intent] = []
        self.settled: list[UUID] = []

    async def do(self, what: str) -> None:
        if what == "intend":
            self.open.append(_intent())
            self.log.intend(self.open[-1])
        elif what == "settle" and self.open:
            intent = self.open.pop(len(self.open) // 2)
            self.log.settle(_record(intent))
            self.settled.append(intent.id)
        elif what == "progress" and self.open:
            self.log.progress(Progress(self.open[0].id, NODE, "us-east", 3))
        elif what in ("away", "back"):
            self.ledger.is_away = what == "away"
        elif what == "ship":
            with contextlib.suppress(ConnectionError):
                await self.shipper.ship_once()
        elif what == "ship and settle at once":
            shipping = asyncio.create_task(self.shipper.ship_once())
            await asyncio.sleep(0)
            for _ in range(3):
                await self.do("intend")
                await self.do("settle")
            await asyncio.gather(shipping, return_exceptions=True)


WAYS = ("intend", "intend", "settle", "settle", "progress", "away", "back", "ship", "ship", "ship and settle at once")


class TestLife:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(ways=st.lists(st.sampled_from(WAYS), max_size=60), in_memory=st.integers(0, 4), times=st.integers(1, 3))
    def test_a1_a2_whatever_happens_each_request_is_recorded_once(
        self, tmp_path_factory: pytest.TempPathFactory, ways: list[str], in_memory: int, times: int
    ) -> None:
        """At any moment the process may die, and its log may be drained several times: that equals once."""

        async def live() -> None:
            root = tmp_path_factory.mktemp("life")
            life = _Life(root, in_memory)
            for way in ways:
                await life.do(way)
            assert life.log.kept_bytes == _used(life.log.directory)
            assert set(life.ledger.records) <= set(life.settled)
            assert life.ledger.deliveries == len(life.ledger.records), "shipped twice without need"
            directory = _die(life.log)
            # The process is dead at this moment; its log is drained, once or more.
            copy = _copy_of(directory)
            dead = Ledger()
            dead.records.update(life.ledger.records)
            for _ in range(times):
                directory = directory if directory.exists() else Path(shutil.copytree(copy, directory))
                await recover(root, "b", dead.add)
            expected = dict.fromkeys(life.settled, Outcome.COMPLETED)
            expected |= {intent.id: Outcome.INTERRUPTED for intent in life.open}
            assert {id: record.outcome for id, record in dead.records.items()} == expected
            assert not (root / "damaged").exists()
            shutil.rmtree(root)

        asyncio.run(live())

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(ways=st.lists(st.sampled_from(WAYS), max_size=60), in_memory=st.integers(0, 4))
    def test_at_rest_everything_is_shipped_and_only_open_intents_hold_files(
        self, tmp_path_factory: pytest.TempPathFactory, ways: list[str], in_memory: int
    ) -> None:
        async def live() -> None:
            root = tmp_path_factory.mktemp("rest")
            life = _Life(root, in_memory)
            for way in (*ways, "back"):
                await life.do(way)
            await _until_shipped(life.log, life.shipper)
            assert sorted(life.ledger.records) == sorted(life.settled)
            assert life.ledger.deliveries == len(life.settled)
            needed = {life.log.segment, *life.log.open_intents.values()}
            assert [path.name for path in _segments(life.log.directory)] == [
                f"segment-{number:08d}.log" for number in sorted(needed)
            ]
            _die(life.log)
            shutil.rmtree(root)

        asyncio.run(live())


def _work(root: Path, acknowledged: Connection) -> None:
    """A process that takes requests for as long as it lives; an id is sent once the client may have its last byte."""
    log = UsageLog(root, "killed", segment_bytes=20_000)
    waiting = [_intent()]
    log.intend(waiting[0])
    while True:
        waiting.append(_intent())
        log.intend(waiting[-1])
        intent = waiting.pop(0)
        log.progress(Progress(intent.id, NODE, "us-east", 3))
        log.settle(_record(intent))
        acknowledged.send_bytes(intent.id.bytes)


class TestKilled:
    async def test_a1_sigkill_at_any_moment_loses_nothing_that_was_acknowledged(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        chance = random.Random(20261124)
        total = 0
        for number in range(30):
            root, ledger = tmp_path / str(number), Ledger()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(root, sender))
            process.start()
            sender.close()
            acknowledged = {UUID(bytes=receiver.recv_bytes())}
            until = time.monotonic() + chance.random() * 0.03
            while time.monotonic() < until:
                acknowledged.add(UUID(bytes=receiver.recv_bytes()))
            process.kill()
            with contextlib.suppress(EOFError):
                while True:
                    acknowledged.add(UUID(bytes=receiver.recv_bytes()))
            process.join()
            await recover(root, "own", ledger.add)
            completed = {id for id, record in ledger.records.items() if record.outcome is Outcome.COMPLETED}
            assert acknowledged <= completed
            # At most the one that was being acknowledged, and those that were under way.
            assert len(completed) <= len(acknowledged) + 1
            assert len(ledger.records) <= len(completed) + 2
            assert ledger.deliveries == len(ledger.records)
            assert not (root / "damaged").exists()
            total += len(acknowledged)
        assert total > 1000


class TestKeepPruning:
    async def test_goes_on_after_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metering, "PRUNE_INTERVAL_S", 0.001)
        moment = datetime(2026, 11, 24, tzinfo=UTC)
        asked: list[datetime] = []

        async def prune(now: datetime) -> int:
            asked.append(now)
            if len(asked) == 1:
                raise ConnectionError("away")
            return 0

        task = asyncio.create_task(metering.keep_pruning(prune, lambda: moment))
        await _until(lambda: len(asked) > 2)
        task.cancel()
        assert set(asked) == {moment}


class TestRefusedRecords:
    async def test_one_that_postgres_never_takes_is_kept_and_holds_up_no_other(self, tmp_path: Path) -> None:
        ledger = Ledger()
        log = UsageLog(tmp_path, "own")
        records = [_record(_intent(number)) for number in range(3)]
        for record in records:
            log.settle(record)

        async def add(batch: Sequence[bytes]) -> None:
            if records[1] in map(_read, batch):
                raise InvariantViolated("a number out of range")
            await ledger.add(batch)

        assert await Shipper(log, add).ship_once() == 3
        assert set(ledger.records) == {records[0].id, records[2].id}
        kept = (tmp_path / "damaged" / "refused.jsonl").read_text().splitlines()
        assert len(kept) == 1
        assert str(records[1].id) in kept[0]
        log.close()


class TestRecover:
    async def test_a1_settled_is_shipped_and_the_rest_is_charged_as_last_recorded(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        settled, streaming, silent = _intent(), _intent(), _intent()
        for intent in (settled, streaming, silent):
            log.intend(intent)
        log.settle(_record(settled))
        wasted = Waste(NODE, "in-mumbai", WasteReason.FAILED_TRY, 12, 5)
        for tokens in (3, 8):
            log.progress(Progress(streaming.id, NODE, "us-east", tokens, tries=2, continuations=1, waste=(wasted,)))
        directory = _die(log)
        assert await recover(tmp_path, "b", ledger.add) == 3
        assert not directory.exists()
        assert ledger.records[settled.id].outcome is Outcome.COMPLETED
        told = ledger.records[streaming.id]
        assert (told.outcome, told.prompt_tokens, told.completion_tokens) == (Outcome.INTERRUPTED, 12, 8)
        assert (told.served_region, told.node_id, told.token_source) == ("us-east", NODE, TokenSource.CHUNKS)
        assert (told.tries, told.continuations, told.waste) == (2, 1, (wasted,))
        nothing = ledger.records[silent.id]
        assert (nothing.outcome, nothing.prompt_tokens, nothing.completion_tokens) == (Outcome.INTERRUPTED, 0, 0)

    async def test_a2_again_changes_nothing(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        intent = _intent()
        log.intend(intent)
        log.settle(_record(intent))
        await Shipper(log, ledger.add).ship_once()
        before = dict(ledger.records)
        copy = _copy_of(_die(log))
        await recover(tmp_path, "b", ledger.add)
        copy.rename(log.directory)
        assert await recover(tmp_path, "b", ledger.add) == 1
        assert ledger.records == before

    async def test_a_living_processs_log_is_left_alone(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        log.intend(_intent())
        assert await recover(tmp_path, "b", ledger.add) == 0
        assert log.directory.exists()
        assert ledger.records == {}

    async def test_a_log_is_locked_before_anyone_can_see_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sibling that recovers at any moment of another's start finds nothing to take."""
        real = os.open
        others: list[str] = []

        def watched(path: Any, *arguments: Any) -> int:
            others.extend(entry.name for entry in tmp_path.iterdir() if not entry.name.startswith("."))
            return real(path, *arguments)

        monkeypatch.setattr(os, "open", watched)
        log = UsageLog(tmp_path, "a", segment_bytes=10)
        # Seen only for its first segment, which is opened under the lock.
        assert others == ["a"]
        assert log.segment == 1

    async def test_nothing_is_deleted_while_postgres_is_away(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        log.intend(_intent())
        directory = _die(log)
        ledger.is_away = True
        with pytest.raises(ConnectionError):
            await recover(tmp_path, "b", ledger.add)
        assert directory.exists()
        ledger.is_away = False
        assert await recover(tmp_path, "b", ledger.add) == 1

    @pytest.mark.parametrize("cut", [1, 7, 9, 60])
    async def test_a_torn_tail_loses_only_itself(self, tmp_path: Path, cut: int) -> None:
        log, ledger = UsageLog(tmp_path, "a"), Ledger()
        first, second = _intent(), _intent()
        for intent in (first, second):
            log.intend(intent)
            log.settle(_record(intent))
        path, end = _segments(log.directory)[0], log.end[1]
        _die(log)
        size = path.stat().st_size
        os.truncate(path, end - cut)
        os.truncate(path, size)
        assert await recover(tmp_path, "b", ledger.add) == 2
        assert ledger.records[first.id].outcome is Outcome.COMPLETED
        assert ledger.records[second.id].outcome is Outcome.INTERRUPTED
        assert not (tmp_path / "damaged").exists()

    @pytest.mark.parametrize("is_last", [True, False])
    async def test_a_damaged_middle_is_kept_wherever_it_is(self, tmp_path: Path, is_last: bool) -> None:
        log, ledger = UsageLog(tmp_path, "a", segment_bytes=100_000 if is_last else 1500), Ledger()
        for number in range(8):
            log.settle(_record(_intent(number)))
        path = _segments(log.directory)[0]
        _die(log)
        data = bytearray(path.read_bytes())
        data[len(data.rstrip(b"\0")) // 2] ^= 1
        path.write_bytes(data)
        await recover(tmp_path, "b", ledger.add)
        assert 0 < len(ledger.records) < 8
        (kept,) = (tmp_path / "damaged").iterdir()
        assert kept.read_bytes() == bytes(data)

    async def test_a_large_log_is_read_in_parts(self, tmp_path: Path) -> None:
        log, ledger = UsageLog(tmp_path, "a", segment_bytes=3000), Ledger()
        crossing = _intent()
        log.intend(crossing)
        for number in range(30):
            log.settle(_record(_intent(number)))
        log.settle(_record(crossing))
        segments = len(_segments(log.directory))
        _die(log)
        assert await recover(tmp_path, "b", ledger.add) == 31
        assert ledger.calls == segments
        assert ledger.records[crossing.id].outcome is Outcome.COMPLETED


class TestCompleteUntil:
    def test_is_held_back_by_what_runs_and_by_what_waits(self, tmp_path: Path) -> None:
        log = UsageLog(tmp_path, "own")
        now = time.time()
        idle = int((now - metering.LONGEST_ADMISSION_S) * 1000)
        assert log.complete_until_ms(now) == idle
        # Settled in another order than admitted, as long streams are.
        old, young = (
            replace(_intent(), id=uuid7(idle - age_ms, new_id().int & (1 << 80) - 1)) for age_ms in (5_000, 1_000)
        )
        log.intend(old)
        log.intend(young)
        assert log.complete_until_ms(now) == idle - 5_000
        log.settle(_record(young))
        log.settle(_record(old))
        assert log.complete_until_ms(now) == idle - 5_000
        assert not log.is_empty
        log.unshipped.clear()
        assert log.complete_until_ms(now) == idle
        assert log.is_empty
        log.close()

    def test_nobody_knows_while_records_wait_in_the_file_only(self, tmp_path: Path) -> None:
        log = UsageLog(tmp_path, "own", most_in_memory=0)
        intent = _intent()
        log.intend(intent)
        log.settle(_record(intent))
        assert log.complete_until_ms(time.time()) is None
        assert not log.is_empty
        log.close()


class TestForget:
    async def test_a_dead_process_s_log_is_forgotten_once_all_of_it_is_taken(self, tmp_path: Path) -> None:
        dead = UsageLog(tmp_path, "dead")
        dead.intend(_intent())
        dead.close()
        done: list[str] = []

        async def refuse(records: Sequence[bytes]) -> None:
            raise ConnectionError

        async def take(records: Sequence[bytes]) -> None:
            done.append(f"{len(records)} record")

        async def forget(name: str) -> None:
            done.append(name)

        with pytest.raises(ConnectionError):
            await recover(tmp_path, "own", refuse, forget)
        assert done == []
        await recover(tmp_path, "own", take, forget)
        assert done == ["1 record", "dead"]
        assert not (tmp_path / "dead").exists()
