"""The durable log: nothing that was settled is lost or counted twice, and nothing damaged disappears (A1, A2, A5)."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.inference.metering import Shipper, UsageLog, frames, recover
from crosslogic.domain.errors import InvariantViolated, Unavailable
from crosslogic.domain.usage import Intent, Outcome, Progress, TokenSource, UsageRecord
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
    """What SIGKILL leaves: the files, and no lock."""
    log.close()
    return log.directory


def _copy_of(directory: Path) -> Path:
    return Path(shutil.copytree(directory, directory.with_name(f".copy-{directory.name}")))


def _segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*.log"))


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

    async def test_a5_a_write_that_fails_is_503_and_leaves_no_torn_frame(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = UsageLog(tmp_path, "a")
        log.intend(_intent())
        size = _segments(log.directory)[0].stat().st_size
        real = os.write

        def half(descriptor: int, data: bytes) -> int:
            return real(descriptor, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(Unavailable):
            log.intend(_intent())
        monkeypatch.undo()
        assert _segments(log.directory)[0].stat().st_size == size
        settled = _intent()
        log.settle(_record(settled))
        ledger = Ledger()
        assert await Shipper(log, ledger.add).ship_once() == 1
        assert set(ledger.records) == {settled.id}

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


class TestShipper:
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
        assert log.kept_bytes == sum(path.stat().st_size for path in _segments(log.directory))
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
        for tokens in (3, 8):
            log.progress(Progress(streaming.id, NODE, "us-east", tokens))
        directory = _die(log)
        assert await recover(tmp_path, "b", ledger.add) == 3
        assert not directory.exists()
        assert ledger.records[settled.id].outcome is Outcome.COMPLETED
        told = ledger.records[streaming.id]
        assert (told.outcome, told.prompt_tokens, told.completion_tokens) == (Outcome.INTERRUPTED, 12, 8)
        assert (told.served_region, told.node_id, told.token_source) == ("us-east", NODE, TokenSource.CHUNKS)
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
        path = _segments(log.directory)[0]
        _die(log)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - cut)
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
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        _die(log)
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
