"""The book of limits that all API processes share: in Valkey, one script call for all decisions of a turn."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from itertools import islice
from typing import Any, Final, Protocol, cast

import hiredis
import msgspec

from crosslogic.domain.errors import InvariantViolated, Unavailable
from crosslogic.domain.limits import (
    CONCURRENCY,
    DAY,
    HOLD_MS,
    METERS,
    MINUTE,
    MINUTE_TOKENS,
    Allowance,
    Amounts,
    Book,
    Hold,
    LayerLimits,
    Limited,
    Month,
    Refusal,
    Reserved,
    Standing,
    Sum,
    add_to,
    buckets_at,
    no_amounts,
    refuse,
)
from crosslogic.hot.pipeline import PipelinedRedis, Script, pack_but_last, pack_last, translated

log = logging.getLogger(__name__)

_SCRIPT: Final = Script(files("crosslogic.hot").joinpath("limits.lua").read_text(encoding="utf-8"))
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode

# The steps of one call, as limits.lua numbers them.
_PLACE, _SETTLE, _RELEASE, _ADOPT, _ADD = 1, 2, 3, 4, 5

# Amounts beyond this are beyond Lua's exact integers (2⁵³); nothing real comes near.
_MOST: Final = 1 << 52
# How long Valkey keeps what nobody touches: somewhat longer than it can count, or than a request can run.
_MINUTE_TTL_MS: Final = 2 * MINUTE.bucket_ms * MINUTE.buckets
_DAY_TTL_MS: Final = DAY.bucket_ms * (DAY.buckets + 2)
_MONTH_TTL_MS: Final = 32 * 86_400_000
# By meter.
_TTL_MS: Final = (_MINUTE_TTL_MS, _MINUTE_TTL_MS, _DAY_TTL_MS, _MONTH_TTL_MS, _DAY_TTL_MS)
# Steps that go into one call, so that no call keeps Valkey busy for long.
_MOST_STEPS: Final = 100
# Sequences of subjects kept ready, one for each principal that is active.
_MOST_PREPARED: Final = 20_000
# Subjects whose last known amounts are kept.
_MOST_SEEN: Final = 100_000

# A sign of life, and how long after its last one a process counts as one that takes its share of what is left.
FIRST_BEAT_S: Final = 1.0
BEAT_INTERVAL_S: Final = 5.0
_LIVING_MS: Final = 15_000
# A rebuild that gives no sign for so long is left to another process.
_LOCK_MS: Final = 10_000
# What ended so long ago is in Postgres. Later endings are kept, for a rebuild must count each exactly once.
_SHIPPED_AFTER_MS: Final = 30_000
# How far the clocks of processes may be apart for a rebuild to be exact.
_CLOCKS_APART_MS: Final = 1_000
# How long a rebuild waits for the lists of those that took part before.
_LISTS_PATIENCE_S: Final = 1.0
_LOOK_INTERVAL_S: Final = 0.02
_SUBJECTS_AT_ONCE: Final = 200
_PAUSE_S: Final = 0.5


class ReadSums(Protocol):
    """Reads from Postgres what counts."""

    def __call__(self, now_ms: int, before_ms: int, without: Sequence[str]) -> Awaitable[Iterable[Sum]]:
        """What is in the windows of `now_ms`, for every subject and meter that is limited.

        Of requests admitted before `before_ms`, and without those that have these hold ids.
        """
        ...


async def no_sums(now_ms: int, before_ms: int, without: Sequence[str]) -> Iterable[Sum]:
    """Where nothing was ever used."""
    return ()


# Takes the decision on a hold, or the error that stands in its place.
OnDecided = Callable[[Hold | Refusal | InvariantViolated], None]

# An ending: when, the hold's id, when it was placed, its subjects, tokens, spend, and its reservation if it was
# reserved. Many are kept, so it is a tuple, which costs the garbage collector least.
_End = tuple[int, str, int, Sequence[Limited], int, int, Reserved | None]


class LimitBook:
    """Places, settles and releases holds; every decision is one atomic step over all layers, or none of it.

    What is asked in one turn of the event loop leaves in one call, in order, so that an ending comes before whatever is
    placed later. Assumes a single Valkey primary, not a cluster: the keys of one call belong to several subjects, so
    they do not share a slot. A failover may lose the last instants: settling what it no longer knows has no effect.

    While Valkey cannot be reached, or does not know this process, the process decides alone: from what it last knew of
    a subject, and no more than its share of what was left (docs/limits.md has the bound). `join` ends that: it adds
    what was admitted alone, or has the counters rebuilt from Postgres where Valkey lost them.
    """

    def __init__(self, pipeline: PipelinedRedis, prefix: str, process: str, read_sums: ReadSums = no_sums) -> None:
        self._pipeline = pipeline
        self._prefix = f"{prefix}limits:"
        self._marker = f"{prefix}limits:generation"
        self._process = process
        self._read_sums = read_sums
        self._loop = asyncio.get_running_loop()
        # Of Valkey: which generation of counters we take part in, by which joining, and among how many.
        self._generation: str | None = None
        self._session = 0
        self._sharers = 1
        self._begun = b""
        # The book of this process alone; None while it is not needed.
        self._alone: Book | None = Book()
        self._is_alone = True
        # Set while this process decides alone.
        self.parted = asyncio.Event()
        self.parted.set()
        # This turn's steps, and who waits for the placings among them.
        self._steps: list[Sequence[Any]] = []
        self._asked: list[tuple[OnDecided, Hold]] = []
        self._now_ms = 0
        self._month = Month.at(0)
        self._prepared: dict[int, tuple[Sequence[Limited], Sequence[Limited], msgspec.Raw]] = {}
        self._seen: dict[bytes, bytes] = {}
        self._open: dict[str, Hold] = {}
        # Endings of the last half minute, of whole requests; kept longer while a rebuild counts on them.
        self._ended: deque[_End] = deque()
        self._listed_in: str | None = None
        # What Valkey has yet to hear: steps whose outcome is unknown, and what ended that was placed alone.
        self._owed: list[Sequence[Any]] = []
        self._unknown: dict[str, tuple[int, Amounts]] = {}
        self._added = 0

    @property
    def is_alone(self) -> bool:
        """Whether decisions are this process's own at the moment."""
        return self._is_alone

    @property
    def open_holds(self) -> int:
        """How many of this process's requests hold something."""
        return len(self._open)

    @property
    def sharers(self) -> int:
        """How many processes took part when this one last looked."""
        return self._sharers

    async def place(
        self,
        hold_id: str,
        subjects: Sequence[Limited],
        tokens: int,
        spend_microdollars: int,
        now_ms: int,
        reservation: Reserved | None = None,
    ) -> Hold | Refusal:
        """Hold an estimate at every layer, or at none and say why. Ids are never used twice.

        A hold lives as long as its process shows life. Layers without any limit cost nothing. Pass a principal's
        `subjects` as one object that never changes: its form on the wire is kept.
        """
        future: asyncio.Future[Hold | Refusal] = self._loop.create_future()
        on_decided = partial(self._tell, future)
        self.ask(hold_id, subjects, tokens, spend_microdollars, now_ms, reservation, on_decided)
        try:
            return await future
        except asyncio.CancelledError:
            # It was sent, or will be in a moment, and steps stay in order: take it back behind it.
            if self._open.pop(hold_id, None) is not None and self._alone is not None:
                self._alone.release(hold_id)
            self._add_step((_RELEASE, hold_id))
            raise

    def _tell(self, future: asyncio.Future[Hold | Refusal], decision: Hold | Refusal | InvariantViolated) -> None:
        if future.done():
            # Whoever waited has gone.
            if isinstance(decision, Hold):
                self.release(decision.id)
        elif isinstance(decision, InvariantViolated):
            future.set_exception(decision)
        else:
            future.set_result(decision)

    def ask(
        self,
        hold_id: str,
        subjects: Sequence[Limited],
        tokens: int,
        spend_microdollars: int,
        now_ms: int,
        reservation: Reserved | None,
        on_decided: OnDecided,
    ) -> None:
        """Place a hold and have `on_decided` called with the decision, perhaps at once. It must not raise."""
        known = self._prepared.get(id(subjects))
        if known is None or known[0] is not subjects:
            known = self._prepare(subjects)
        limited, wire = known[1], known[2]
        tokens = 1 if tokens < 1 else tokens if tokens < _MOST else _MOST
        spend = 1 if spend_microdollars < 1 else spend_microdollars if spend_microdollars < _MOST else _MOST
        hold = Hold(hold_id, limited, tokens, spend, now_ms, reservation)
        if not limited and reservation is None:
            on_decided(hold)
            return
        if self._is_alone:
            on_decided(self._place_alone(hold))
            return
        if reservation is None:
            step: Sequence[Any] = (_PLACE, hold_id, tokens, spend, wire, False, 0)
        else:
            step = (_PLACE, hold_id, tokens, spend, wire, reservation.name, min(reservation.tokens_per_min, _MOST))
        self._now_ms = now_ms
        self._add_step(step)
        self._asked.append((on_decided, hold))

    def settle(self, hold_id: str, tokens: int, spend_microdollars: int, now_ms: int) -> None:
        """End a hold: its tokens and spend become what was really used, in the minute, day and month it was placed in.

        Settling or releasing what has ended is without effect. Never waits and never raises: what does not reach Valkey
        is owed.
        """
        hold = self._open.pop(hold_id, None)
        if hold is None:
            return
        tokens = tokens if tokens < _MOST else _MOST
        spend = spend_microdollars if spend_microdollars < _MOST else _MOST
        reservation = hold.reservation if hold.is_reserved else None
        end = (now_ms, hold_id, hold.at_ms, hold.limited, tokens, spend, reservation)
        ended = self._ended
        ended.append(end)
        while self._listed_in is None and ended[0][0] < now_ms - _SHIPPED_AFTER_MS:
            ended.popleft()
        if self._alone is not None:
            self._alone.settle(hold_id, tokens, spend)
            if hold.is_alone:
                _count(self._unknown, end)
                return
        self._add_step((_SETTLE, hold_id, tokens, spend))

    def release(self, hold_id: str) -> None:
        """End a hold as if it had never been: for requests that we refuse or fail before a node took them.

        Not even the request counts against requests/min, so that our own troubles cost a client nothing.
        """
        hold = self._open.pop(hold_id, None)
        if hold is None:
            return
        if self._alone is not None:
            self._alone.release(hold_id)
            if hold.is_alone:
                return
        self._add_step((_RELEASE, hold_id))

    async def run(self, now_ms: Callable[[], int]) -> None:
        """Run for the life of the process: join, show life, and join anew whenever Valkey was away."""
        said = ""
        while True:
            await self._pipeline.wait_connected()
            try:
                await self.join(now_ms())
                said = ""
                # Others may have joined at the same time: look again soon.
                pause_s = FIRST_BEAT_S
                while not self._is_alone:
                    try:
                        async with asyncio.timeout(pause_s):
                            await self.parted.wait()
                    except TimeoutError:
                        await self.beat(now_ms())
                        pause_s = BEAT_INTERVAL_S
            except Unavailable as error:
                self._part(error)
            except Exception as error:
                if repr(error) != said:
                    log.exception("limits stay with this process alone, for it cannot join the others")
                said = repr(error)
            await asyncio.sleep(_PAUSE_S * random.uniform(0.1, 1.0))

    async def beat(self, now_ms: int) -> None:
        """Show life, count those that do, and give back what the dead held. Raises Unavailable while Valkey is away."""
        is_more = 1
        while is_more:
            given = (now_ms - _LIVING_MS, now_ms - HOLD_MS)
            sharers, is_more = cast("list[int]", await self._call("beat", self._generation or "", now_ms, given))
            if sharers == 0:
                error = Unavailable("Valkey no longer knows this process.")
                self._part(error)
                raise error
            self._sharers = sharers
        while len(self._seen) > _MOST_SEEN:
            del self._seen[next(iter(self._seen))]

    async def leave(self, now_ms: int) -> None:
        """Take part no longer, so that nobody shares with this process: for its end. Raises Unavailable."""
        if not self._is_alone:
            # What has ended just now goes first.
            self._send()
            await self._call("leave", self._generation or "", now_ms, ())

    async def join(self, now_ms: int) -> None:
        """Take part in the decisions in Valkey; what happened alone is added there. Raises Unavailable.

        Raises what reading the sums raises, where Valkey lost its counters.
        """
        self._session += 1
        marker = await self._pipeline.execute("GET", self._marker)
        generation = marker.decode() if marker else await self._rebuild(now_ms)
        if self._listed_in is not None and not (
            self._listed_in == generation
            and await self._pipeline.execute("SISMEMBER", f"{self._prefix}{generation}:heeded", self._process)
        ):
            # The list came too late, or was for a rebuild that was given up.
            self._listed_in = None
        sharers = cast(
            int, await self._call("join", generation, now_ms, (generation, now_ms - _LIVING_MS), (self._marker,))
        )
        if sharers == 0:
            raise Unavailable("Valkey lost its counters again.")
        self._sharers = sharers
        self._move(generation, now_ms)
        # Replies come in order: behind this one all that was moved is known to have arrived.
        await self._pipeline.execute("PING")
        if not self._is_alone:
            self._alone = None
            log.info("limits are decided in Valkey, by %d process(es)", sharers)

    def _move(self, generation: str, now_ms: int) -> None:
        """Hand over what Valkey has yet to hear, and decide there from here on; one step, so that nothing is missed."""
        is_listed = self._listed_in == generation
        if is_listed or self._generation not in (None, generation):
            # The counters are Postgres's sums, without the requests that this process listed: those it counts itself.
            # Where its list came too late: what cannot be in the sums, for it was too new or ended too late.
            began_ms = 0 if is_listed else int(generation.partition(".")[0])
            owed: list[Sequence[Any]] = []
            unknown: dict[str, tuple[int, Amounts]] = {}
            for end in self._ended:
                if end[0] >= began_ms or end[2] >= began_ms - _CLOCKS_APART_MS:
                    _count(unknown, end)
            self._seen.clear()
        else:
            owed = [step for step in self._owed if step[0] != _ADOPT or step[1] not in self._open]
            unknown = self._unknown
        self._generation, self._listed_in = generation, None
        self._owed, self._unknown = [], {}
        self._begun = pack_but_last("EVALSHA", _SCRIPT.sha, 0, *self._who("run", generation))
        self._is_alone = False
        self.parted.clear()
        self._now_ms = now_ms
        for step in owed:
            self._add_step(step)
        for some in _chunks(unknown.items()):
            self._added += 1
            self._add_step((_ADD, self._added, [(name, ttl_ms, *amounts) for name, (ttl_ms, amounts) in some]))
        for hold in self._open.values():
            hold.is_alone = False
            minute, _, day, month = hold.buckets()
            reservation = hold.reservation.name if hold.is_reserved and hold.reservation else False
            wire = _wire(hold.limited)
            self._add_step((_ADOPT, hold.id, minute, day, month, hold.tokens, hold.spend, reservation, wire))
        self._send()

    async def _rebuild(self, now_ms: int) -> str:
        """Have the counters rebuilt from Postgres, by this process or another; the generation that counts then.

        Every process lists the requests that may or may not have reached Postgres. The sums leave those out, and all
        that were admitted since the rebuild began; their process adds them when it joins. So each is counted once.
        """
        lock = self._prefix + "rebuild"
        building = f"{now_ms}.{self._process}.{self._session}"
        holder = await self._pipeline.execute("SET", lock, building, "NX", "GET", "PX", _LOCK_MS)
        if holder is not None and holder.split(b".")[1] == self._process.encode():
            # An attempt of this process that failed.
            await self._pipeline.execute("SET", lock, building, "PX", _LOCK_MS)
            holder = None
        if holder is not None:
            building = holder.decode()
        else:
            marker = await self._pipeline.execute("GET", self._marker)
            if marker:
                # It was rebuilt just before.
                await self._pipeline.execute("DEL", lock)
                return marker.decode()
        while self._ended and self._ended[0][0] < now_ms - _SHIPPED_AFTER_MS:
            self._ended.popleft()
        self._listed_in = building
        mine = _pack([*self._open, *[end[1] for end in self._ended]])
        await self._pipeline.execute("HSET", f"{self._prefix}{building}:listed", self._process, mine)
        await self._pipeline.execute("PEXPIRE", f"{self._prefix}{building}:listed", 6 * _LOCK_MS)
        if holder is None:
            try:
                await self._lead(building, lock, now_ms)
            except BaseException:
                # Another may try at once.
                with suppress(Unavailable):
                    await self._call("quit", building, now_ms, (building,), (lock,))
                raise
        else:
            await self._follow(building, lock)
        return building

    async def _follow(self, building: str, lock: str) -> None:
        while await self._pipeline.execute("GET", self._marker) != building.encode():
            if await self._pipeline.execute("GET", lock) != building.encode():
                if await self._pipeline.execute("GET", self._marker) == building.encode():
                    break
                raise Unavailable("The process that rebuilt the counters has given up.")
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def _lead(self, building: str, lock: str, now_ms: int) -> None:
        listed, heeded = f"{self._prefix}{building}:listed", f"{self._prefix}{building}:heeded"
        if self._generation is not None:
            until = self._loop.time() + _LISTS_PATIENCE_S
            while self._loop.time() < until:
                if await self._pipeline.execute("HLEN", listed) >= self._sharers:
                    break
                await asyncio.sleep(_LOOK_INTERVAL_S)
        found: list[bytes] = await self._pipeline.execute("HGETALL", listed)
        await self._pipeline.execute("SADD", heeded, *found[::2])
        await self._pipeline.execute("PEXPIRE", heeded, 6 * _LOCK_MS)
        without = [hold_id for ids in found[1::2] for hold_id in cast("list[str]", _unpack(ids))]
        reading = asyncio.ensure_future(self._read_sums(now_ms, now_ms - _CLOCKS_APART_MS, without))
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=_LOCK_MS / 3000)
                await self._fill(building, lock, now_ms, ())
        finally:
            reading.cancel()
        sums: dict[str, tuple[int, Amounts]] = {}
        for name, meter, bucket, amount in reading.result():
            ttl_ms, amounts = sums.get(name) or (0, no_amounts())
            add_to(amounts[meter], bucket, amount)
            sums[name] = max(ttl_ms, _TTL_MS[meter]), amounts
        for some in _chunks(sums.items()):
            await self._fill(building, lock, now_ms, [(name, ttl, *amounts) for name, (ttl, amounts) in some])
        if not await self._call("open", building, now_ms, (building,), (lock, self._marker)):
            raise Unavailable("Another process rebuilds the counters.")
        level = logging.INFO if self._generation is None else logging.WARNING
        log.log(level, "the counters of limits were rebuilt from Postgres: %d subject(s)", len(sums))

    async def _fill(self, building: str, lock: str, now_ms: int, subjects: Sequence[Any]) -> None:
        if not await self._call("fill", building, now_ms, (building, _LOCK_MS, subjects), (lock,)):
            raise Unavailable("Another process rebuilds the counters.")

    def _who(self, what: str, generation: str) -> tuple[str, str, str, int]:
        return what, f"{self._prefix}{generation}:", self._process, self._session

    async def _call(
        self, what: str, generation: str, now_ms: int, given: Sequence[Any], keys: Sequence[str] = ()
    ) -> Any:
        month = Month.at(now_ms)
        packed = _pack((now_ms, month.number, month.ends_ms, *given))
        return await self._pipeline.evaluate(_SCRIPT, keys, (*self._who(what, generation), packed))

    # In one turn

    def _add_step(self, step: Sequence[Any]) -> None:
        """Queue a step for this turn's call; alone it is owed."""
        if self._is_alone:
            self._owed.append(step)
            return
        if not self._steps:
            self._loop.call_soon(self._send)
        elif len(self._steps) >= _MOST_STEPS:
            self._send()
            self._loop.call_soon(self._send)
        self._steps.append(step)

    def _send(self) -> None:
        steps, asked = self._steps, self._asked
        if not steps:
            return
        self._steps, self._asked = [], []
        now_ms = self._now_ms
        if not self._month.starts_ms <= now_ms < self._month.ends_ms:
            self._month = Month.at(now_ms)
        packed = _pack((now_ms, self._month.number, self._month.ends_ms, *steps))
        try:
            self._pipeline.post(pack_last(self._begun, packed), partial(self._read, packed, steps, asked, now_ms))
        except Unavailable as error:
            self._lose(steps, asked, error)

    def _read(
        self,
        packed: bytes,
        steps: Sequence[Sequence[Any]],
        asked: Sequence[tuple[OnDecided, Hold]],
        now_ms: int,
        reply: Any,
    ) -> None:
        """Take the reply to one call, or the exception in its place."""
        if type(reply) is list and reply[0] == 1:
            parts = cast("list[Any]", reply)
            answers: list[list[int]] = parts[1]
            looked_at: list[bytes] = parts[2]
            pairs = iter(looked_at)
            self._seen.update(zip(pairs, pairs, strict=True))
            for (on_decided, hold), answer in zip(asked, answers, strict=True):
                if answer[0]:
                    hold.at_ms = now_ms
                    on_decided(self._placed(hold, answer))
                else:
                    on_decided(_refused(hold, answer))
        elif isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
            begun = pack_but_last("EVAL", _SCRIPT.source, 0, *self._who("run", self._generation or ""))
            try:
                self._pipeline.post(pack_last(begun, packed), partial(self._read, packed, steps, asked, now_ms))
            except Unavailable as error:
                self._lose(steps, asked, error)
        else:
            trouble: Any = translated(reply) if isinstance(reply, hiredis.ReplyError) else cast(Any, reply)
            if isinstance(trouble, InvariantViolated):
                log.error("%d steps of limits were refused: %s", len(steps), trouble)
                for on_decided, _ in asked:
                    on_decided(trouble)
            else:
                lost = (
                    trouble if isinstance(trouble, Unavailable) else Unavailable("Valkey no longer knows this process.")
                )
                self._lose(steps, asked, lost)

    def _placed(self, hold: Hold, answer: list[int]) -> Hold:
        hold.standing = _standing(answer, 1)
        if answer[7]:
            hold.is_reserved = True
        if len(answer) > 8:
            hold.would_refuse = tuple(
                (hold.limited[number - 1][0].layer, METERS[meter - 1])
                for number, meter in zip(answer[8::2], answer[9::2], strict=True)
            )
        self._open[hold.id] = hold
        return hold

    def _lose(
        self,
        steps: Sequence[Sequence[Any]],
        asked: Sequence[tuple[OnDecided, Hold]],
        error: Unavailable,
    ) -> None:
        """Nobody knows whether these steps were made: owe them, take placings back, and decide those alone."""
        self._part(error)
        for step in steps:
            self._owed.append((_RELEASE, step[1]) if step[0] == _PLACE else step)
        for on_decided, hold in asked:
            on_decided(self._place_alone(hold))

    def _prepare(self, subjects: Sequence[Limited]) -> tuple[Sequence[Limited], Sequence[Limited], msgspec.Raw]:
        """The subjects, those that have limits, and those as limits.lua reads them; made once for a sequence."""
        limited = tuple(pair for pair in subjects if pair[1].is_limited)
        if len(self._prepared) >= _MOST_PREPARED:
            self._prepared.clear()
        # The sequence is kept as well, so that no other can have its id.
        known = self._prepared[id(subjects)] = (subjects, limited, _wire(limited))
        return known

    # Alone

    def _part(self, error: Unavailable) -> None:
        """Decide alone from here on."""
        if self._is_alone:
            return
        self._is_alone = True
        self.parted.set()
        log.warning("limits are decided by this process alone until Valkey is back: %s", error)
        if self._alone is None:
            self._alone = Book(self._sharers)
            for hold in self._open.values():
                self._know_subjects(self._alone, hold)
                self._alone.adopt(hold)

    def _place_alone(self, hold: Hold) -> Hold | Refusal:
        assert self._alone is not None
        self._know_subjects(self._alone, hold)
        answer = self._alone.place(hold.id, hold.limited, hold.tokens, hold.spend, hold.at_ms, hold.reservation)
        if isinstance(answer, Hold):
            answer.is_alone = True
            self._open[answer.id] = answer
        return answer

    def _know_subjects(self, book: Book, hold: Hold) -> None:
        """Let the book begin with what Valkey last said of a hold's subjects."""
        names = [subject.name for subject, _ in hold.limited]
        if hold.reservation is not None:
            names.append(hold.reservation.name)
        for name in names:
            if not book.knows(name):
                packed = self._seen.get(name.encode())
                known = _unpack(packed)[:CONCURRENCY] if packed else no_amounts()
                # Lua packs an empty map as an empty list.
                book.know(name, cast(Amounts, tuple(dict[int, int](amounts or ()) for amounts in known)))


def _count(into: dict[str, tuple[int, Amounts]], end: _End) -> None:
    """Add what a request used to the amounts of its subjects."""
    _, _, at_ms, limited, tokens, spend, reservation = end
    buckets = buckets_at(at_ms)
    used = (1, tokens, tokens, spend) if reservation is None else (1, 0, 0, 0)
    for subject, limits in limited:
        _, amounts = into.setdefault(subject.name, (_ttl_ms(limits), no_amounts()))
        for meter, limit in enumerate(limits.in_order()[:CONCURRENCY]):
            if limit is not None and used[meter]:
                add_to(amounts[meter], buckets[meter], used[meter])
    if reservation is not None:
        _, amounts = into.setdefault(reservation.name, (_MINUTE_TTL_MS, no_amounts()))
        add_to(amounts[MINUTE_TOKENS], buckets[MINUTE_TOKENS], tokens)


def _wire(limited: Sequence[Limited]) -> msgspec.Raw:
    """Subjects as limits.lua reads them: packed in a text, which Lua keeps as it is in the holds' records."""
    packed = _pack(
        [
            (
                subject.name,
                _ttl_ms(limits),
                *(-1 if limit is None else limit for limit in limits.in_order()),
                sum(1 << meter for meter, name in enumerate(METERS) if name in limits.dry_run),
            )
            for subject, limits in limited
        ]
    )
    # As a text of MessagePack; bytes are a type that Lua's reader does not know.
    return msgspec.Raw(b"\xdb" + len(packed).to_bytes(4, "big") + packed)


def _ttl_ms(limits: LayerLimits) -> int:
    """How long the amounts held against these limits are kept."""
    return max(ttl_ms for limit, ttl_ms in zip(limits.in_order(), _TTL_MS, strict=True) if limit is not None)


def _refused(hold: Hold, answer: Sequence[int]) -> Refusal:
    _, number, meter, limit, used, asked, wait_ms = answer[:7]
    return refuse(
        hold.limited[number - 1][0].layer,
        meter - 1,
        limit=limit,
        used=used,
        asked=asked,
        wait_ms=None if wait_ms < 0 else wait_ms,
        standing=_standing(answer, 7),
    )


def _standing(answer: Sequence[int], first: int) -> Standing:
    requests = tokens = None
    if answer[first] >= 0:
        requests = Allowance(answer[first], answer[first + 1], answer[first + 2])
    if answer[first + 3] >= 0:
        tokens = Allowance(answer[first + 3], answer[first + 4], answer[first + 5])
    return Standing(requests, tokens)


def _chunks(
    items: Iterable[tuple[str, tuple[int, Amounts]]],
) -> Iterator[tuple[tuple[str, tuple[int, Amounts]], ...]]:
    rest = iter(items)
    while some := tuple(islice(rest, _SUBJECTS_AT_ONCE)):
        yield some
