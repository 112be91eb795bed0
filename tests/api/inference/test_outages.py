"""Postgres or Valkey away while the API serves: clients notice nothing, and usage arrives afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import psutil
import pytest

from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port
from crosslogic.dev.valkey import Valkey
from crosslogic.domain import ids, keys
from crosslogic.hot.pipeline import PipelinedRedis
from crosslogic.store.migrations import migrate
from tests.api.inference.conftest import Fleet, serving
from tests.conftest import Server
from tests.engines import Engine


def _signal(server: Server, number: int) -> None:
    """To the server and its children."""
    started = server._process  # pyright: ignore[reportPrivateUsage]
    assert started is not None
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(started.pid)
        for process in (parent, *parent.children(recursive=True)):
            process.send_signal(number)


@pytest.fixture
async def own_postgres(tmp_path: Path) -> AsyncIterator[tuple[Postgres, Server]]:
    """A Postgres that may be hurt."""
    part = Postgres(tmp_path / "pg" / "postgres", free_port(), secrets.token_hex(8))
    (tmp_path / "pg").mkdir()
    server = Server(part, tmp_path / "postgres.log")
    await asyncio.to_thread(server.start)
    await migrate(part.url_of("postgres"))
    yield part, server
    _signal(server, signal.SIGCONT)
    _signal(server, signal.SIGKILL)
    await asyncio.to_thread(server.stop)
    part.forget()


@pytest.fixture
async def own_valkey(tmp_path: Path) -> AsyncIterator[tuple[Valkey, Server]]:
    """A Valkey that may be hurt."""
    part = Valkey(tmp_path / "valkey", free_port(), secrets.token_hex(8))
    server = Server(part, tmp_path / "valkey.log")
    await asyncio.to_thread(server.start)
    yield part, server
    await asyncio.to_thread(server.stop)


class TestPostgres:
    @pytest.mark.parametrize("how", ["frozen", "killed"])
    async def test_known_keys_are_served_and_usage_arrives_when_it_is_back(
        self, own_postgres: tuple[Postgres, Server], settings_of: Any, engine: Engine, how: str
    ) -> None:
        postgres, server = own_postgres
        url = postgres.url_of("postgres")
        fleet = Fleet(await asyncpg.connect(url))
        await fleet.seed()
        await fleet.add_node(engine)
        async with serving(settings_of(database_url=url), fleet) as api:
            assert (await api.chat()).status_code == 200
            await fleet.records(1)
            if how == "frozen":
                _signal(server, signal.SIGSTOP)
            else:
                await asyncio.to_thread(server.kill)
            for _ in range(5):
                began = time.monotonic()
                assert (await api.chat(stream=True)).status_code == 200
                assert time.monotonic() - began < 1
            assert (await api.http.get("/readyz")).status_code == 200
            stranger = keys.mint("dev", os.urandom(keys.RANDOM_BYTES))
            began = time.monotonic()
            answer = await api.chat(key=stranger)
            assert answer.status_code == 503
            assert time.monotonic() - began < 4
            assert int(answer.headers["retry-after"]) >= 1
            if how == "frozen":
                _signal(server, signal.SIGCONT)
            else:
                await asyncio.to_thread(server.start)
                fleet.sql = await asyncpg.connect(url)
            records = await fleet.records(6, within_s=15)
            assert {row["outcome"] for row in records} == {"completed"}
            await fleet.sql.execute("UPDATE keys SET state = 'revoked'")

            async def is_refused() -> bool:
                return (await api.chat()).status_code == 401

            await api.until(is_refused, 3)
        await fleet.sql.close()

    async def test_the_api_starts_without_it_and_is_ready_when_it_comes(
        self, own_postgres: tuple[Postgres, Server], settings_of: Any, engine: Engine
    ) -> None:
        postgres, server = own_postgres
        url = postgres.url_of("postgres")
        fleet = Fleet(await asyncpg.connect(url))
        await fleet.seed()
        await fleet.add_node(engine)
        await fleet.sql.close()
        await asyncio.to_thread(server.kill)
        starting = serving(settings_of(database_url=url), fleet)
        opening = asyncio.create_task(starting.__aenter__())
        await asyncio.sleep(1)
        assert not opening.done()
        await asyncio.to_thread(server.start)
        api = await opening
        assert (await api.chat()).status_code == 200
        await starting.__aexit__(None, None, None)


class TestValkey:
    async def test_requests_go_on_without_it_and_limits_hold(
        self, own_valkey: tuple[Valkey, Server], settings_of: Any, fleet: Fleet, engine: Engine
    ) -> None:
        valkey, server = own_valkey
        await fleet.add_node(engine)
        async with serving(settings_of(redis_url=valkey.url), fleet) as api:
            await fleet.limit("key", fleet.key_id, requests_per_min=4)
            await asyncio.sleep(0.5)
            assert (await api.chat()).status_code == 200
            await asyncio.to_thread(server.kill)
            statuses: list[int] = []
            for _ in range(6):
                began = time.monotonic()
                statuses.append((await api.chat()).status_code)
                assert time.monotonic() - began < 1
            # This process counts alone, from what it last knew: as many as the limit, and no more.
            assert statuses == [200] * 3 + [429] * 3
            node = await fleet.add_node("http://127.0.0.1:9")

            async def is_known() -> bool:
                return node in [entry.entry.node_id for entry in api.app.inference._table.nodes]

            assert await api.until(is_known, 2)
            await asyncio.to_thread(server.start)
            await fleet.records(4)

    async def test_a4_a_flushed_one_counts_again_what_was_used(
        self, own_valkey: tuple[Valkey, Server], settings_of: Any, fleet: Fleet, engine: Engine, tmp_path: Path
    ) -> None:
        valkey, _ = own_valkey
        prefix = {"redis_url": valkey.url, "redis_prefix": "flushed:"}
        await fleet.add_node(engine)
        await fleet.limit("key", fleet.key_id, requests_per_min=8, tokens_per_day=100_000)
        async with serving(settings_of(**prefix), fleet) as first:
            for _ in range(3):
                assert (await first.chat()).status_code == 200
            await fleet.records(3)
            flushing = PipelinedRedis(valkey.url)
            running = asyncio.create_task(flushing.run())
            await flushing.wait_connected()
            await flushing.execute("FLUSHALL")
            # Whoever asks meanwhile, and whoever starts now, knows what was used before.
            assert (await first.chat()).headers["x-ratelimit-remaining-requests"] == "4"
            await fleet.records(4)
            used = await fleet.sql.fetchval("SELECT sum(prompt_tokens + completion_tokens) FROM usage_records")

            async def is_counted() -> bool:
                amounts = [
                    msgspec.msgpack.decode(await flushing.execute("GET", key))
                    for key in await flushing.execute("KEYS", f"*:key:{ids.encode(fleet.key_id)}")
                ]
                return [[sum(dict[int, int](each or ()).values()) for each in found[:3]] for found in amounts] == [
                    [4, 0, used]
                ]

            await first.until(is_counted, 10)
            async with serving(settings_of(**prefix, state_dir=tmp_path / "second"), fleet) as second:
                statuses = [(await second.chat()).status_code for _ in range(5)]
            assert statuses == [200] * 4 + [429]
            running.cancel()
            await asyncio.wait([running])

    async def test_a_frozen_one_delays_a_request_by_its_deadline_at_most(
        self, own_valkey: tuple[Valkey, Server], settings_of: Any, fleet: Fleet, engine: Engine
    ) -> None:
        valkey, server = own_valkey
        await fleet.limit("key", fleet.key_id, requests_per_min=100)
        await fleet.add_node(engine)
        async with serving(settings_of(redis_url=valkey.url), fleet) as api:
            assert (await api.chat()).status_code == 200
            _signal(server, signal.SIGSTOP)
            try:
                took: list[float] = []
                for _ in range(3):
                    began = time.monotonic()
                    assert (await api.chat()).status_code == 200
                    took.append(time.monotonic() - began)
            finally:
                _signal(server, signal.SIGCONT)
            assert max(took) < 1.2
            assert min(took) < 0.3
