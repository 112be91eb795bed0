"""What the API says of demand, and how a request fares where nodes come only when they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from crosslogic.domain.autoscaling import Demand
from crosslogic.hot import connection
from crosslogic.hot.demand import DemandBoard
from crosslogic.new_ids import new_id
from tests.api.inference.conftest import Api, Fleet, MakeApi
from tests.engines import Engine

PLACE = ("llama-3-8b", "in-mumbai")


async def promise(fleet: Fleet, least: int, most: int) -> None:
    await fleet.sql.execute("INSERT INTO deployments (name, model) VALUES ('llama-7b', 'llama-3-8b')")
    await fleet.sql.execute(
        "INSERT INTO deployment_regions (deployment, region, replicas_min, replicas_max) VALUES "
        "('llama-7b', 'in-mumbai', $1, $2)",
        least,
        most,
    )


class Board:
    """The board as the worker reads it."""

    def __init__(self, api: Api) -> None:
        self._redis = connection.connect(api.settings)
        self._board = DemandBoard(self._redis, api.settings.redis_prefix)
        self._api = api

    async def until(self, look: Callable[[Demand], bool], within_s: float = 5.0) -> Demand:
        async def seen() -> Demand | None:
            demand = (await self._board.read() or {}).get(PLACE)
            return demand if demand is not None and look(demand) else None

        return await self._api.until(seen, within_s)

    async def close(self) -> None:
        await self._redis.aclose()


class TestScaledToZero:
    @pytest.mark.parametrize("is_streamed", [False, True])
    async def test_a_request_is_held_seen_and_answered_when_a_node_comes(
        self, make_api: MakeApi, fleet: Fleet, engine: Engine, is_streamed: bool
    ) -> None:
        await promise(fleet, 0, 1)
        api = await make_api(hold_timeout_s=15)
        board = Board(api)
        asking = asyncio.create_task(api.chat(stream=is_streamed))
        await board.until(lambda demand: demand.held_requests == 1)
        assert not asking.done()
        await fleet.add_node(engine)
        answer = await asking
        assert answer.status_code == 200
        assert answer.headers["x-crosslogic-region"] == "in-mumbai"
        await board.until(lambda demand: demand.held_requests == 0)
        await board.close()

    async def test_one_that_goes_elsewhere_meanwhile_is_seen_too(
        self, make_api: MakeApi, fleet: Fleet, engine: Engine
    ) -> None:
        """The region was scaled to zero: it is not lost, so nothing is kept from going to the next."""
        await promise(fleet, 0, 1)
        home = await fleet.add_node(engine)
        await fleet.add_node(engine, region="ap-southeast")
        api = await make_api()
        board = Board(api)
        assert (await api.chat()).headers["x-crosslogic-region"] == "in-mumbai"
        await fleet.set_state(home, "terminated")

        async def is_gone() -> bool:
            return (await api.chat()).headers["x-crosslogic-region"] == "ap-southeast"

        await api.until(is_gone)
        answers = await asyncio.gather(*(api.chat() for _ in range(30)))
        assert {answer.headers["x-crosslogic-region"] for answer in answers} == {"ap-southeast"}
        await board.until(lambda demand: demand.held_requests > 0)
        await board.close()

    async def test_a_client_that_cannot_wait_is_told_when_a_node_will_serve(
        self, make_api: MakeApi, fleet: Fleet
    ) -> None:
        await promise(fleet, 0, 1)
        for _ in range(5):
            node_id = new_id()
            for phase, seconds in (("provision", 100.0), ("boot", 20.0), ("load", 30.0)):
                await fleet.sql.execute(
                    "INSERT INTO node_phases VALUES ($1, $2, $3, 'aws', 'L4', 'llama-3-8b', 'in-mumbai')",
                    node_id,
                    phase,
                    seconds,
                )
        api = await make_api(hold_timeout_s=0.2)
        answer = await api.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        assert answer.headers["retry-after"] == "150"
        await fleet.sql.execute(
            "INSERT INTO nodes (id, model, region, provider, cluster, state, workflow_id, created_at) VALUES "
            "($1, 'llama-3-8b', 'in-mumbai', 'aws', 'c', 'launching', 'w', now() - interval '60 seconds')",
            new_id(),
        )

        async def sooner() -> bool:
            return 80 <= int((await api.chat()).headers["retry-after"]) <= 90

        await api.until(sooner, 8)
        await fleet.sql.execute("DELETE FROM node_phases")


class TestDemand:
    async def test_says_what_is_in_flight_served_and_how_fast(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        board = Board(api)
        for answer in await asyncio.gather(*(api.chat(stream=True) for _ in range(25))):
            assert answer.status_code == 200
        seen = await board.until(lambda demand: demand.served_tokens_per_s > 0 and demand.ttft_ms_p99 is not None)
        assert seen.arrival_tokens_per_s == pytest.approx(seen.served_tokens_per_s)
        assert seen.tokens_in_flight == 0
        assert seen.ttft_ms_p50 is not None
        assert seen.ttft_ms_p99 is not None
        assert seen.ttft_ms_p50 <= seen.ttft_ms_p99
        await board.close()


class TestDecisions:
    async def test_are_shown_to_prometheus(self, make_api: MakeApi, fleet: Fleet) -> None:
        await fleet.sql.execute("DELETE FROM scaling_decisions")
        await fleet.sql.execute(
            "INSERT INTO scaling_decisions (deployment, region, desired, needed, present, serving, ordered, drained, "
            "reason) VALUES ('llama-7b', 'in-mumbai', 3, 2, 1, 1, 2, 0, 'because')"
        )
        api = await make_api()

        async def page() -> str:
            text = (await api.http.get("/metrics")).text
            return text if "crosslogic_replicas_desired{" in text else ""

        text = await api.until(page)
        assert 'crosslogic_replicas_desired{deployment="llama-7b",region="in-mumbai"} 3.0' in text
        assert 'crosslogic_replicas_needed{deployment="llama-7b",region="in-mumbai"} 2.0' in text
        await fleet.sql.execute("DELETE FROM scaling_decisions")
