"""Usage, from the request to Postgres: a durable log of its own for each process, and the shipper that empties it.

The log is a directory of append-only segments. A frame is its length and CRC-32 (two little-endian 32-bit words) and
a payload: one letter for the kind and JSON. `I` intent, before a request is forwarded; `P` progress, at least every
second of a stream; `S` the settled record, complete in itself, before the client gets its last byte. A frame is written
into a shared mapping of the file: from then on it is the kernel's, out of reach of a SIGKILL; `fdatasync` follows
off-thread within milliseconds for the machine's own death. Room is reserved before it is written to, so that a full
disk is an error here and not a signal; what is reserved and not used yet reads as zeros, which end a segment.

The shipper moves settled records to Postgres as the bytes that were logged, idempotent by id. Those of its own process
it has from memory; from the file only when Postgres was away for so long that memory was not to hold them. In a dead
process's log an intent without a settled record is recorded as interrupted (A1, A2).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import shutil
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import msgspec

from crosslogic.domain.errors import InvariantViolated, Unavailable
from crosslogic.domain.ids import unix_ms_of
from crosslogic.domain.usage import Intent, Progress, UsageRecord, interrupted

log = logging.getLogger("crosslogic.metering")

SEGMENT_BYTES = 16 * 1024 * 1024
# Beyond this the shipper has been away for so long that taking on more would fill the disk: requests get 503 (A5).
MOST_BYTES = 4 * 1024 * 1024 * 1024
# Room in a segment is reserved and mapped so much at a time; a fuller disk gives what there is.
WINDOW_BYTES = 1024 * 1024
SYNC_INTERVAL_S = 0.01
SYNC_RETRY_S = 0.5
SHIP_INTERVAL_S = 0.1
BATCH_RECORDS = 1000
# Settled records that wait in memory for Postgres, about 15 MB; those beyond it are read from the file later.
MOST_IN_MEMORY = 20_000
PRUNE_INTERVAL_S = 3600.0
REPORT_INTERVAL_S = 5.0
# From a request's id to its intent: its body is read and its hold is placed in between, each by its own deadline.
LONGEST_ADMISSION_S = 120.0
LONGEST_FRAME_BYTES = 1 << 20
# What we write is far shorter; a longer "torn" frame is damage.
LONGEST_TORN_BYTES = 16 * 1024
DAMAGED = "damaged"

_HEADER = struct.Struct("<II")
_HEADER_AND_KIND = struct.Struct("<IIc")
_READ_BYTES = _HEADER.size + LONGEST_FRAME_BYTES
_INTENT, _PROGRESS, _SETTLED = b"I", b"P", b"S"
# The checksum of a payload is that of its body, begun with that of its kind.
_CRC_OF = {kind: zlib.crc32(kind) for kind in (_INTENT, _PROGRESS, _SETTLED)}
_encode = msgspec.json.Encoder().encode
_decode_intent = msgspec.json.Decoder(Intent).decode
_decode_progress = msgspec.json.Decoder(Progress).decode

# Takes the JSON of usage records; idempotent by record id. Raises InvariantViolated when one of them can never be
# stored; anything else passes.
Ingest = Callable[[Sequence[bytes]], Awaitable[None]]
# Takes the name of a log that is in Postgres as a whole.
Forget = Callable[[str], Awaitable[object]]


class _Settled(msgspec.Struct):
    """The id of a settled record; the rest is not looked at."""

    id: UUID


_decode_settled = msgspec.json.Decoder(_Settled).decode


def frames(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole frames at the start of `data`, each with the offset behind it; stops before a torn or broken one."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, checksum = _HEADER.unpack_from(data, offset)
        end = offset + _HEADER.size + length
        if length == 0 or length > LONGEST_FRAME_BYTES or end > len(data):
            return
        payload = data[offset + _HEADER.size : end]
        if zlib.crc32(payload) != checksum:
            return
        yield payload, end
        offset = end


class UsageLog:
    """This process's log. Every append is on disk (in the kernel's hands) when it returns."""

    def __init__(
        self,
        root: Path,
        name: str,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        most_bytes: int = MOST_BYTES,
        most_in_memory: int = MOST_IN_MEMORY,
    ) -> None:
        # Locked before it can be seen: a sibling that looks for dead processes' logs must not take it for one.
        hidden = root / f".{name}"
        hidden.mkdir(parents=True, mode=0o700)
        self._lock = lock_directory(hidden)
        self.directory = hidden.rename(root / name)
        self._segment_bytes = segment_bytes
        self._most_bytes = most_bytes
        self._most_in_memory = most_in_memory
        self.segment = 0
        # How many records had been settled when a segment was closed: once those are in Postgres, only an open intent
        # needs its bytes.
        self.closed_segments: dict[int, int] = {}
        self.open_intents: dict[int, int] = {}
        self.settled = 0
        # Records that Postgres has not got yet, oldest first; behind them, in the file only, come those from
        # `spilled_at` (segment and offset) on.
        self.unshipped: list[bytes] = []
        self.spilled_at: tuple[int, int] | None = None
        self.kept_bytes = 0
        self._size = 0
        self._fd = -1
        # The part of the segment that is written to: mapped from an offset up to the end of what is reserved.
        self._window: mmap.mmap | None = None
        self._window_at = 0
        self._reserved = 0
        # Full segments that are not synced yet; the thread that syncs takes them from the left.
        self._full: deque[int] = deque()
        self._is_dirty = False
        self._is_ending = False
        self._to_sync = threading.Event()
        self._is_unsyncable = False
        self._waiting: list[UsageRecord] = []
        self._roll()

    def segment_path(self, number: int) -> Path:
        """The file of one segment; numbers start at 1."""
        return self.directory / f"segment-{number:08d}.log"

    @property
    def end(self) -> tuple[int, int]:
        """Segment and offset behind the last frame."""
        return self.segment, self._size

    @property
    def lag_records(self) -> int:
        """Settled records that wait in memory for Postgres; those beyond MOST_IN_MEMORY wait in the file besides."""
        return len(self.unshipped)

    def lag_s(self, now: float) -> float:
        """How long ago the oldest of them was admitted, in seconds, as its id tells. `now` is Unix time."""
        if not self.unshipped:
            return 0.0
        return max(0.0, now - unix_ms_of(_decode_settled(self.unshipped[0]).id) / 1000)

    def complete_until_ms(self, now: float) -> int | None:
        """Of requests admitted before this Unix time in ms none runs, and each that ran is in Postgres.

        None while records wait in the file only: nobody knows how old they are. `now` is Unix time, in seconds.
        """
        if self.spilled_at is not None or self._waiting:
            return None
        until = int((now - LONGEST_ADMISSION_S) * 1000)
        open_since = min((id >> 80 for id in self.open_intents), default=until)
        waiting_since = min((unix_ms_of(_decode_settled(payload).id) for payload in self.unshipped), default=until)
        return min(until, open_since, waiting_since)

    @property
    def is_empty(self) -> bool:
        """Nothing runs and nothing waits: all that this log ever held is in Postgres."""
        return not (self.unshipped or self.open_intents or self._waiting) and self.spilled_at is None

    def intend(self, intent: Intent) -> None:
        """Record an admitted request before it is forwarded. Raises Unavailable when the log cannot take it (A5)."""
        if self.kept_bytes > self._most_bytes:
            raise _unavailable("usage_log_full", 30)
        if self._is_unsyncable:
            raise _unavailable("usage_log_failed", 10)
        try:
            self._append(_INTENT, _encode(intent))
        except OSError as error:
            log.error("the usage log cannot be written: %s", error)
            raise _unavailable("usage_log_failed", 10) from error
        # By the integer: hashing a UUID makes a call back into Python.
        self.open_intents[intent.id.int] = self.segment

    def progress(self, progress: Progress) -> None:
        """Record what a stream has relayed. A full disk is no reason to break the stream: logged only."""
        try:
            self._append(_PROGRESS, _encode(progress))
        except OSError as error:
            log.error("progress of %s was not recorded: %s", progress.id, error)

    def settle(self, record: UsageRecord) -> None:
        """Record how a request ended. Raises OSError when the log cannot take it; its intent then stays open."""
        payload = _encode(record)
        self._append(_SETTLED, payload)
        self.open_intents.pop(record.id.int, None)
        self.settled += 1
        if self.spilled_at is None:
            if len(self.unshipped) < self._most_in_memory:
                self.unshipped.append(payload)
            else:
                self.spilled_at = self.segment, self._size - _HEADER_AND_KIND.size - len(payload)

    def settle_when_possible(self, record: UsageRecord) -> None:
        """Record how a request ended whose client has all it will get: what the log cannot take now waits for room.

        Until then its intent stays open, so that a kill leaves it as interrupted.
        """
        try:
            self.settle(record)
        except OSError as error:
            log.error("usage of %s waits for the log to be writable: %s", record.id, error)
            self._waiting.append(record)

    def settle_waiting(self) -> None:
        """Try again what could not be written, for as long as it goes well."""
        try:
            while self._waiting:
                self.settle(self._waiting[0])
                self._waiting.pop(0)
        except OSError:
            pass

    def _append(self, kind: bytes, body: bytes) -> None:
        if self._size >= self._segment_bytes:
            self._roll()
        length = 1 + len(body)
        if length > LONGEST_FRAME_BYTES:
            # Whoever reads it would take it for damage.
            raise InvariantViolated(f"a frame of {length} bytes is too long for the usage log")
        frame = _HEADER_AND_KIND.pack(length, zlib.crc32(body, _CRC_OF[kind]), kind) + body
        start = self._size
        end = start + len(frame)
        if end > self._reserved:
            self._reserve(end)
        assert self._window is not None
        at = self._window_at
        self._window[start - at : end - at] = frame
        self._size = end
        self.kept_bytes += len(frame)
        if not self._is_dirty:
            self._is_dirty = True
            self._to_sync.set()

    def _reserve(self, end: int) -> None:
        """Make room up to `end` at least and map it. Raises OSError when the disk is full; nothing has changed then."""
        page = mmap.ALLOCATIONGRANULARITY
        at = self._size - self._size % page
        try:
            reserved = self._grow(at + max(WINDOW_BYTES, end - at + page))
        except OSError:
            reserved = self._grow(end)
        self._window = mmap.mmap(self._fd, reserved - at, offset=at)
        self._window_at = at

    def _grow(self, size: int) -> int:
        try:
            os.posix_fallocate(self._fd, self._reserved, size - self._reserved)
        except OSError:
            # Some of it may be there.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._reserved)
            raise
        self._reserved = size
        return size

    def _give_back(self) -> None:
        """Let go of what is reserved and was not used."""
        self._window = None
        if self._reserved > self._size:
            os.ftruncate(self._fd, self._size)
            self._reserved = self._size

    def _roll(self) -> None:
        following = self.segment + 1
        descriptor = os.open(self.segment_path(following), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        if self._fd >= 0:
            self._give_back()
            self.closed_segments[self.segment] = self.settled
            self._full.append(self._fd)
        self._fd, self.segment, self._size, self._reserved, self._window = descriptor, following, 0, 0, None

    async def keep_synced(self) -> None:
        """Run for the life of the process: fdatasync in a thread of its own, milliseconds after an unsynced append.

        While that fails no request is admitted (A5): it is tried again, on a new segment, until it goes well.
        """
        thread = threading.Thread(
            target=self._sync_on, args=(asyncio.get_running_loop(),), name="usage-log-sync", daemon=True
        )
        self._is_ending = False
        thread.start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._is_ending = True
            self._to_sync.set()

    def _sync_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread. It wakes the loop only when something is wrong; two hundred times a second would cost a lot."""
        while True:
            self._to_sync.wait()
            if self._is_ending:
                return
            time.sleep(SYNC_INTERVAL_S)
            self._to_sync.clear()
            self._is_dirty = False
            try:
                current = os.dup(self._fd)
                full: list[int] = []
                while self._full:
                    full.append(self._full.popleft())
                _sync_and_close([*full, current])
                if self._is_unsyncable:
                    log.info("the usage log can be synced again")
                self._is_unsyncable = False
            except OSError as error:
                log.error("fdatasync of the usage log failed: %s", error)
                self._is_unsyncable = True
                time.sleep(SYNC_RETRY_S)
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._begin_anew)

    def _begin_anew(self) -> None:
        """After a failed sync the kernel takes the file's pages for written: only a new file tells the truth."""
        with contextlib.suppress(OSError):
            self._roll()
        self._to_sync.set()

    def close(self) -> None:
        """Sync and let go; what was not shipped is taken over by the next process."""
        try:
            with contextlib.suppress(OSError):
                self._give_back()
            _sync_and_close([*self._full, self._fd])
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None


def _unavailable(code: str, retry_after_s: int) -> Unavailable:
    return Unavailable(
        "Usage cannot be recorded at the moment; try again later.", code=code, retry_after_s=retry_after_s
    )


def _sync_and_close(descriptors: Sequence[int]) -> None:
    """Raises the last OSError, after all were closed."""
    failure: OSError | None = None
    for descriptor in descriptors:
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            failure = error
        finally:
            os.close(descriptor)
    if failure is not None:
        raise failure


class Shipper:
    """Moves settled records from this process's log to Postgres."""

    def __init__(self, usage_log: UsageLog, ingest: Ingest) -> None:
        self._log = usage_log
        self._ingest = ingest
        self._damaged = usage_log.directory.parent / DAMAGED
        self._shipped = 0
        self.is_behind = False

    async def run(self) -> None:
        """Ship for the life of the process. Postgres away: the log keeps everything, tried again with backoff."""
        pause_s = SHIP_INTERVAL_S
        while True:
            try:
                moved = await self.ship_once()
                if self.is_behind:
                    log.info("usage is being shipped again")
                self.is_behind, pause_s = False, SHIP_INTERVAL_S
                if moved >= BATCH_RECORDS:
                    continue
            except Exception as error:
                if not self.is_behind:
                    log.warning("usage waits in the log, Postgres does not take it: %r", error)
                self.is_behind, pause_s = True, min(5.0, pause_s * 2)
            await asyncio.sleep(pause_s)

    async def ship_once(self) -> int:
        """One batch of the own log: how many records went to Postgres."""
        self._log.settle_waiting()
        if self._log.unshipped:
            moved = await self._ship_memory()
        elif self._log.spilled_at is not None:
            moved = await self._ship_file(*self._log.spilled_at)
        else:
            moved = 0
        self._retire()
        return moved

    async def _ship_memory(self) -> int:
        batch = self._log.unshipped[:BATCH_RECORDS]
        await _ingest_all(batch, self._ingest, self._damaged)
        del self._log.unshipped[: len(batch)]
        self._shipped += len(batch)
        return len(batch)

    async def _ship_file(self, segment: int, offset: int) -> int:
        path = self._log.segment_path(segment)
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(_READ_BYTES)
        records: list[bytes] = []
        end = 0
        for payload, end in frames(data):  # noqa: B007 - the offset behind the last frame is the result.
            if payload[:1] == _SETTLED:
                records.append(payload[1:])
        await _ingest_all(records, self._ingest, self._damaged)
        self._shipped += len(records)
        if end == 0 and segment < self._log.segment:
            if data.rstrip(b"\0"):
                _keep_damaged(path, offset, self._damaged)
            # Whatever could be read of it is shipped.
            self._shipped = self._log.closed_segments[segment]
            self._log.spilled_at = segment + 1, 0
        elif (segment, offset + end) == self._log.end:
            self._log.spilled_at = None
        else:
            self._log.spilled_at = segment, offset + end
        return len(records)

    def _retire(self) -> None:
        """Delete segments that are shipped and hold no open intent."""
        shipped = [number for number, settled in self._log.closed_segments.items() if settled <= self._shipped]
        if not shipped:
            return
        reading = self._log.spilled_at[0] if self._log.spilled_at else self._log.segment
        held = set(self._log.open_intents.values())
        for number in shipped:
            if number < reading and number not in held:
                path = self._log.segment_path(number)
                self._log.kept_bytes -= path.stat().st_size
                path.unlink()
                del self._log.closed_segments[number]


def lock_directory(directory: Path) -> int | None:
    """Take a log directory's lock: a descriptor to keep open, or None while a living process has it."""
    descriptor = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


async def recover(root: Path, own: str, ingest: Ingest, forget: Forget | None = None) -> int:
    """Ship the logs of processes that are gone; how many records that were. Raises what `ingest` raises.

    `forget` is told the name of each that is in Postgres as a whole, before it is deleted. Bytes that no frame can be
    read from are kept in `damaged/` when they are more than the torn end of the last segment: nothing is lost silently.
    """
    total = 0
    for directory in await asyncio.to_thread(_others, root, own):
        descriptor = lock_directory(directory)
        if descriptor is None:
            continue
        try:
            leftovers = _Leftovers()
            segments = sorted(directory.glob("segment-*.log"))
            for path in segments:
                settled = await asyncio.to_thread(leftovers.read, path, root / DAMAGED, is_last=path is segments[-1])
                total += await _ingest_all(settled, ingest, root / DAMAGED)
            total += await _ingest_all(leftovers.interrupted(), ingest, root / DAMAGED)
            if forget is not None:
                await forget(directory.name)
            await asyncio.to_thread(shutil.rmtree, directory)
        finally:
            os.close(descriptor)
    return total


async def keep_reporting(
    usage_log: UsageLog, report: Callable[[str, datetime], Awaitable[None]], now: Callable[[], datetime]
) -> None:
    """Run for the life of the process: say how far its log is in Postgres, which is what lets hours be sealed."""
    while True:
        try:
            until_ms = usage_log.complete_until_ms(now().timestamp())
            if until_ms is not None:
                await report(usage_log.directory.name, datetime.fromtimestamp(until_ms / 1000, UTC))
        except Exception as error:
            log.warning("how far the usage log is in Postgres could not be told: %r", error)
        await asyncio.sleep(REPORT_INTERVAL_S)


async def keep_recovering(
    root: Path, own: str, ingest: Ingest, forget: Forget | None = None, interval_s: float = 10.0
) -> None:
    """Recover dead processes' logs now and for the life of this process: a sibling may die at any time."""
    pause_s = 0.5
    while True:
        try:
            recovered = await recover(root, own, ingest, forget)
            if recovered:
                log.info("recovered %d usage records of processes that are gone", recovered)
            pause_s = interval_s
        except Exception as error:
            log.warning("usage of dead processes waits in their logs: %r", error)
            pause_s = min(interval_s, pause_s * 2)
        await asyncio.sleep(pause_s)


async def keep_pruning(prune: Callable[[datetime], Awaitable[int]], now: Callable[[], datetime]) -> None:
    """Run for the life of the process: hourly, delete what is kept for some time only."""
    while True:
        try:
            await prune(now())
        except Exception as error:
            log.warning("old decisions were not deleted: %r", error)
        await asyncio.sleep(PRUNE_INTERVAL_S)


async def _ingest_all(records: Sequence[bytes], ingest: Ingest, damaged: Path) -> int:
    """Ship in batches. A record that Postgres will never take is kept for a human and does not hold up the others."""
    for start in range(0, len(records), BATCH_RECORDS):
        batch = records[start : start + BATCH_RECORDS]
        try:
            await ingest(batch)
        except InvariantViolated:
            for record in batch:
                try:
                    await ingest([record])
                except InvariantViolated as error:
                    await asyncio.to_thread(_keep_refused, record, damaged)
                    log.critical("usage record %s is kept in %s: %s", _decode_settled(record).id, damaged, error)
    return len(records)


def _others(root: Path, own: str) -> list[Path]:
    if not root.exists():
        return []
    names = (own, DAMAGED)
    return sorted(
        path for path in root.iterdir() if path.is_dir() and path.name not in names and not path.name.startswith(".")
    )


class _Leftovers:
    """What a dead process's log still owes, read segment by segment: intents without a settled record."""

    def __init__(self) -> None:
        self._intents: dict[UUID, Intent] = {}
        self._progress: dict[UUID, Progress] = {}

    def read(self, path: Path, damaged: Path, *, is_last: bool) -> list[bytes]:
        """The settled records of the next segment."""
        settled: list[bytes] = []
        data = path.read_bytes()
        end = 0
        for payload, end in frames(data):  # noqa: B007 - the offset behind the last frame is the result.
            kind, body = payload[:1], payload[1:]
            if kind == _SETTLED:
                settled.append(body)
                ended = _decode_settled(body).id
                self._intents.pop(ended, None)
                self._progress.pop(ended, None)
            elif kind == _INTENT:
                intent = _decode_intent(body)
                self._intents[intent.id] = intent
            elif kind == _PROGRESS:
                step = _decode_progress(body)
                if step.id in self._intents:
                    self._progress[step.id] = step
        rest = data[end:].rstrip(b"\0")  # What was reserved and not used; JSON never ends in a zero.
        if rest and not (is_last and _is_torn(rest)):
            _keep_damaged(path, end, damaged)
        return settled

    def interrupted(self) -> list[bytes]:
        """The records of requests that nobody settled."""
        return [_encode(interrupted(intent, self._progress.get(intent.id))) for intent in self._intents.values()]


def _is_torn(rest: bytes) -> bool:
    """Is it one frame that a kill cut off, and nothing else?"""
    if len(rest) < _HEADER.size:
        return True
    length, _ = _HEADER.unpack_from(rest)
    return len(rest) - _HEADER.size < length <= LONGEST_TORN_BYTES


def _keep_refused(record: bytes, damaged: Path) -> None:
    """Keep a record for a human, as one line of JSON."""
    damaged.mkdir(exist_ok=True)
    with (damaged / "refused.jsonl").open("ab") as file:
        file.write(record + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _keep_damaged(path: Path, offset: int, damaged: Path) -> None:
    """Keep a copy of a segment for a human."""
    damaged.mkdir(exist_ok=True)
    copy = damaged / f"{path.parent.name}-{path.name}"
    shutil.copy2(path, copy)
    log.error("a segment of the usage log is damaged behind byte %d; it is kept as %s", offset, copy)
