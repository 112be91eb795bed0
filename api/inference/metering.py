"""Usage, from the request to Postgres: a durable log of its own for each process, and the shipper that empties it.

The log is a directory of append-only segments. A frame is its length and CRC-32 (two little-endian 32-bit words) and
a payload: one letter for the kind and JSON. `I` intent, before a request is forwarded; `P` progress, at least every
second of a stream; `S` the settled record, complete in itself, before the client gets its last byte. One `write` per
frame puts it out of reach of a SIGKILL; `fdatasync` follows off-thread within milliseconds for the machine's own death.

The shipper reads the log, its own process's and those of dead processes, in one way: settled records go to Postgres,
idempotent by id; in a dead process's log an intent without a settled record is recorded as interrupted (A1, A2).
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID

import msgspec

from crosslogic.domain.errors import InvariantViolated, Unavailable
from crosslogic.domain.usage import Intent, Progress, UsageRecord, interrupted

log = logging.getLogger("crosslogic.metering")

SEGMENT_BYTES = 16 * 1024 * 1024
# Beyond this the shipper has been away for so long that taking on more would fill the disk: requests get 503 (A5).
MOST_BYTES = 4 * 1024 * 1024 * 1024
SYNC_INTERVAL_S = 0.005
SHIP_INTERVAL_S = 0.1
BATCH_RECORDS = 1000
LONGEST_FRAME_BYTES = 1 << 20
# What we write is far shorter; a longer "torn" frame is damage.
LONGEST_TORN_BYTES = 4096
DAMAGED = "damaged"

_HEADER = struct.Struct("<II")
_encode = msgspec.json.Encoder().encode
_decode_intent = msgspec.json.Decoder(Intent).decode
_decode_progress = msgspec.json.Decoder(Progress).decode
_decode_record = msgspec.json.Decoder(UsageRecord).decode

# Idempotent by record id. Raises InvariantViolated for a record that can never be stored; anything else passes.
Ingest = Callable[[Sequence[UsageRecord]], Awaitable[None]]


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
        self, root: Path, name: str, *, segment_bytes: int = SEGMENT_BYTES, most_bytes: int = MOST_BYTES
    ) -> None:
        # Locked before it can be seen: a sibling that looks for dead processes' logs must not take it for one.
        hidden = root / f".{name}"
        hidden.mkdir(parents=True, mode=0o700)
        self._lock = lock_directory(hidden)
        self.directory = hidden.rename(root / name)
        self._segment_bytes = segment_bytes
        self._most_bytes = most_bytes
        self.segment = 0
        self.closed_segments: set[int] = set()
        self.open_intents: dict[UUID, int] = {}
        self.kept_bytes = 0
        self._size = 0
        self._fd = -1
        self._is_dirty = asyncio.Event()
        self._roll()

    def segment_path(self, number: int) -> Path:
        """The file of one segment; numbers start at 1."""
        return self.directory / f"segment-{number:08d}.log"

    def intend(self, intent: Intent) -> None:
        """Record an admitted request before it is forwarded. Raises Unavailable when the log cannot take it (A5)."""
        if self.kept_bytes > self._most_bytes:
            raise Unavailable(
                "Usage cannot be recorded at the moment; try again later.", code="usage_log_full", retry_after_s=30
            )
        try:
            self._append(b"I" + _encode(intent))
        except OSError as error:
            log.error("the usage log cannot be written: %s", error)
            raise Unavailable(
                "Usage cannot be recorded at the moment; try again later.", code="usage_log_failed", retry_after_s=10
            ) from error
        self.open_intents[intent.id] = self.segment

    def progress(self, progress: Progress) -> None:
        """Record what a stream has relayed. A full disk is no reason to break the stream: logged only."""
        try:
            self._append(b"P" + _encode(progress))
        except OSError as error:
            log.error("progress of %s was not recorded: %s", progress.id, error)

    def settle(self, record: UsageRecord) -> None:
        """Record how a request ended. Raises OSError when the log cannot take it; its intent then stays open."""
        self._append(b"S" + _encode(record))
        self.open_intents.pop(record.id, None)

    def _append(self, payload: bytes) -> None:
        if self._size >= self._segment_bytes:
            self._roll()
        frame = _HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        written = os.write(self._fd, frame)
        if written != len(frame):
            # A torn frame in the middle would hide what follows it: cut it off again, or leave this segment.
            try:
                os.ftruncate(self._fd, self._size)
            except OSError:
                self._size = self._segment_bytes
            raise OSError(f"only {written} of {len(frame)} bytes could be written")
        self._size += written
        self.kept_bytes += written
        self._is_dirty.set()

    def _roll(self) -> None:
        following = self.segment + 1
        descriptor = os.open(self.segment_path(following), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
        full, self._fd = self._fd, descriptor
        if full >= 0:
            self.closed_segments.add(self.segment)
            try:
                os.fdatasync(full)
            except OSError as error:
                log.error("fdatasync of the usage log failed: %s", error)
            finally:
                os.close(full)
        self.segment, self._size = following, 0

    async def keep_synced(self) -> None:
        """Run for the life of the process: fdatasync off-thread, a few milliseconds after the first unsynced append."""
        while True:
            await self._is_dirty.wait()
            await asyncio.sleep(SYNC_INTERVAL_S)
            self._is_dirty.clear()
            descriptor = -1
            try:
                descriptor = os.dup(self._fd)
                await asyncio.to_thread(os.fdatasync, descriptor)
            except OSError as error:
                log.error("fdatasync of the usage log failed: %s", error)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def close(self) -> None:
        """Sync and let go; what was not shipped is taken over by the next process."""
        os.fdatasync(self._fd)
        os.close(self._fd)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Shipper:
    """Moves settled records from this process's log to Postgres."""

    def __init__(self, usage_log: UsageLog, ingest: Ingest) -> None:
        self._log = usage_log
        self._ingest = ingest
        self._segment = 1
        self._offset = 0
        self.shipped = 0
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
        path = self._log.segment_path(self._segment)
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(BATCH_RECORDS * 1024)
        records: list[UsageRecord] = []
        end = 0
        for payload, end in frames(data):  # noqa: B007 - the offset behind the last frame is the result.
            if payload[:1] == b"S":
                records.append(_decode_record(payload[1:]))
        await _ingest_all(records, self._ingest, self._log.directory.parent / DAMAGED)
        self._offset += end
        self.shipped += len(records)
        if end == 0 and self._segment < self._log.segment:
            if self._offset < path.stat().st_size:
                _keep_damaged(path, self._offset, self._log.directory.parent / DAMAGED)
            self._segment += 1
            self._offset = 0
        self._retire()
        return len(records)

    def _retire(self) -> None:
        """Delete segments that are shipped and hold no open intent."""
        held = set(self._log.open_intents.values())
        for number in sorted(self._log.closed_segments - held):
            if number < self._segment:
                path = self._log.segment_path(number)
                self._log.kept_bytes -= path.stat().st_size
                path.unlink()
                self._log.closed_segments.discard(number)


def lock_directory(directory: Path) -> int | None:
    """Take a log directory's lock: a descriptor to keep open, or None while a living process has it."""
    descriptor = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


async def recover(root: Path, own: str, ingest: Ingest) -> int:
    """Ship the logs of processes that are gone; how many records that were. Raises what `ingest` raises.

    A log is deleted once all of it is in Postgres. Bytes that no frame can be read from are kept in `damaged/` when
    they are more than the torn end of the last segment: nothing is lost silently.
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
            await asyncio.to_thread(shutil.rmtree, directory)
        finally:
            os.close(descriptor)
    return total


async def keep_recovering(root: Path, own: str, ingest: Ingest, interval_s: float = 10.0) -> None:
    """Recover dead processes' logs now and for the life of this process: a sibling may die at any time."""
    pause_s = 0.5
    while True:
        try:
            recovered = await recover(root, own, ingest)
            if recovered:
                log.info("recovered %d usage records of processes that are gone", recovered)
            pause_s = interval_s
        except Exception as error:
            log.warning("usage of dead processes waits in their logs: %r", error)
            pause_s = min(interval_s, pause_s * 2)
        await asyncio.sleep(pause_s)


async def _ingest_all(records: Sequence[UsageRecord], ingest: Ingest, damaged: Path) -> int:
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
                    log.critical("usage record %s is kept in %s: %s", record.id, damaged, error)
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

    def read(self, path: Path, damaged: Path, *, is_last: bool) -> list[UsageRecord]:
        """The settled records of the next segment."""
        settled: list[UsageRecord] = []
        data = path.read_bytes()
        end = 0
        for payload, end in frames(data):  # noqa: B007 - the offset behind the last frame is the result.
            kind, body = payload[:1], payload[1:]
            if kind == b"S":
                record = _decode_record(body)
                settled.append(record)
                self._intents.pop(record.id, None)
                self._progress.pop(record.id, None)
            elif kind == b"I":
                intent = _decode_intent(body)
                self._intents[intent.id] = intent
            elif kind == b"P":
                step = _decode_progress(body)
                if step.id in self._intents:
                    self._progress[step.id] = step
        if end < len(data) and not (is_last and _is_torn(data[end:])):
            _keep_damaged(path, end, damaged)
        return settled

    def interrupted(self) -> list[UsageRecord]:
        """The records of requests that nobody settled."""
        return [interrupted(intent, self._progress.get(intent.id)) for intent in self._intents.values()]


def _is_torn(rest: bytes) -> bool:
    """Is it one frame that a kill cut off, and nothing else?"""
    if len(rest) < _HEADER.size:
        return True
    length, _ = _HEADER.unpack_from(rest)
    return len(rest) - _HEADER.size < length <= LONGEST_TORN_BYTES


def _keep_refused(record: UsageRecord, damaged: Path) -> None:
    """Keep a record for a human, as one line of JSON."""
    damaged.mkdir(exist_ok=True)
    with (damaged / "refused.jsonl").open("ab") as file:
        file.write(_encode(record) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _keep_damaged(path: Path, offset: int, damaged: Path) -> None:
    """Keep a copy of a segment for a human."""
    damaged.mkdir(exist_ok=True)
    copy = damaged / f"{path.parent.name}-{path.name}"
    shutil.copy2(path, copy)
    log.error("a segment of the usage log is damaged behind byte %d; it is kept as %s", offset, copy)
