"""Admission in virtual time: scripted pools, counted tokens, no timings."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast
from uuid import UUID

import pytest

from api.inference.admission import Admission, Asked, Place
from api.inference.router import RouteTable
from api.inference.upstream import ClientGone
from crosslogic.domain.catalog import Catalog, Deployment
from crosslogic.domain.deployment import RegionTarget
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.regions import RegionMap, RegionPlan
from tests.api.inference.virtual_time import run

MODEL = "llama-3-8b"
HOME, NEXT, LAST = "in-mumbai", "ap-southeast", "eu-west"
ACME, GLOBEX, INITECH = UUID(int=1), UUID(int=2), UUID(int=3)
FULL_LOAD_S = 10.0


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a clock that jumps."""

    @functools.wraps(test)
    def call(*arguments: Any, **named: Any) -> None:
        run(test(*arguments, **named))

    return call


class ScriptedPool:
    """A pool that a test moves."""

    def __init__(self, capacity_tokens: int, nodes: int = 1) -> None:
        self.capacity_tokens = capacity_tokens
        self.nodes: list[object] = [object() for _ in range(nodes)]
        self.out: list[object] = []
        self.tokens_in_flight = 0
        self.lost_at: float | None = None
        self.on_room: Callable[[], None] | None = None

    @property
    def routable_count(self) -> int:
        return len(self.nodes) + len(self.out)

    def take(self, tokens: int) -> None:
        self.tokens_in_flight += tokens

    def give_back(self, tokens: int) -> None:
        self.tokens_in_flight -= tokens
        if self.on_room is not None:
            self.on_room()


class World:
    """Pools, the table they are in, and admission before it."""

    def __init__(self, *, queue_s: float = 5, queue_most: int = 1_000, hold_s: float = 20, processes: int = 1) -> None:
        self.pools: dict[str, ScriptedPool] = {}
        self.on_the_way: set[str] = set()
        self._changed = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.admission = Admission(
            cast(RouteTable, self),
            queue_s=queue_s,
            queue_most=queue_most,
            hold_s=hold_s,
            full_load_s=FULL_LOAD_S,
            processes=lambda: processes,
        )
        self.gone: asyncio.Future[None] = self.loop.create_future()

    # What admission asks

    def pool(self, model: str, region: str) -> ScriptedPool | None:
        assert model == MODEL
        return self.pools.get(region)

    def is_any_on_the_way(self, model: str, regions: Sequence[str]) -> bool:
        return any(region in self.on_the_way for region in regions)

    def is_any_routable(self, model: str, regions: Sequence[str]) -> bool:
        return any(self.pools[region].routable_count for region in regions if region in self.pools)

    async def next_change(self) -> None:
        await self._changed.wait()

    # What a test does

    def add(self, region: str = HOME, capacity_tokens: int = 1_000) -> ScriptedPool:
        pool = self.pools[region] = ScriptedPool(capacity_tokens)
        self.change()
        return pool

    def change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def lose(self, region: str = HOME) -> None:
        self.pools[region].nodes.clear()
        self.pools[region].lost_at = self.loop.time()
        self.change()

    def come_back(self, region: str = HOME) -> None:
        self.pools[region].nodes.append(object())
        self.pools[region].lost_at = None
        self.change()

    def set_catalog(self, *, units: int = 0, promised: Sequence[str] = ()) -> None:
        deployment = Deployment("llama", MODEL, "least-load", tuple(RegionTarget(one, 1, 1) for one in promised))
        catalog = Catalog.of([], RegionMap.of([]), [deployment])
        object.__setattr__(catalog, "reserved_units", {(MODEL, HOME): units})
        self.admission.catalog = catalog

    def ask(
        self,
        tokens: int = 100,
        *,
        org: UUID = ACME,
        is_reserved: bool = False,
        is_strict: bool = False,
        deadline_s: float = 900,
    ) -> Asked:
        plan = RegionPlan(HOME, (HOME,) if is_strict else (HOME, NEXT, LAST))
        return Asked(org, MODEL, plan, tokens, is_reserved, self.loop.time() + deadline_s)

    def start(self, place: Place) -> Place:
        """Its tokens go to a node."""
        pool = place.pool
        assert isinstance(pool, ScriptedPool)
        pool.take(place.asked.tokens)
        place.taken()
        return place

    def end(self, place: Place) -> None:
        """The node gives them back."""
        pool = place.pool
        assert isinstance(pool, ScriptedPool)
        pool.give_back(place.asked.tokens)
        place.leave()

    def enter_now(self, tokens: int = 100, **more: Any) -> Place | None:
        place = self.admission.enter_now(self.ask(tokens, **more))
        return None if place is None else self.start(place)

    def fill(self, tokens: int = 1_000, **more: Any) -> list[Place]:
        """Requests of a hundred tokens that are in flight."""
        places = [self.enter_now(100, **more) for _ in range(tokens // 100)]
        assert None not in places
        return [place for place in places if place is not None]

    async def enter(self, tokens: int = 100, **more: Any) -> Place:
        return self.start(await self.admission.enter(self.ask(tokens, **more), self.gone))

    def later(self, awaited: Coroutine[Any, Any, Place]) -> asyncio.Task[Place]:
        return self.loop.create_task(awaited)

    def at_rest(self) -> bool:
        """Nothing is counted any more."""
        gates = self.admission._gates.values()  # pyright: ignore[reportPrivateUsage]
        return not any(
            gate.entering or gate.reserved_tokens or gate.waiting or (gate.pool is not None and gate.pool.on_room)
            for gate in gates
        )


async def settle(seconds: float = 0.0) -> None:
    """Let everything that is due happen."""
    await asyncio.sleep(seconds)
    for _ in range(5):
        await asyncio.sleep(0)


async def refusal(awaited: Awaitable[Place]) -> Rejected:
    with pytest.raises(Rejected) as caught:
        await awaited
    return caught.value


class TestRoom:
    @in_virtual_time
    async def test_a_pool_is_filled_up_to_its_capacity(self) -> None:
        world = World()
        pool = world.add()
        assert world.enter_now(999) is not None
        assert world.enter_now(2) is None
        assert world.enter_now(1) is not None
        assert pool.tokens_in_flight == 1_000

    @in_virtual_time
    async def test_what_was_admitted_counts_before_a_node_has_it(self) -> None:
        world = World()
        world.add()
        place = world.admission.enter_now(world.ask(600))
        assert place is not None
        assert world.admission.enter_now(world.ask(600)) is None
        place.leave()
        place.leave()
        assert world.admission.enter_now(world.ask(600)) is not None

    @in_virtual_time
    async def test_where_no_bound_is_known_there_is_room(self) -> None:
        world = World()
        world.add(capacity_tokens=0)
        world.set_catalog(units=50)
        assert all(world.enter_now(10_000) for _ in range(10))

    @in_virtual_time
    async def test_a_request_larger_than_all_there_is_has_it_alone(self) -> None:
        world = World()
        world.add()
        world.set_catalog(units=50)
        place = world.enter_now(5_000)
        assert place is not None
        assert world.enter_now(1) is None
        world.end(place)
        assert world.enter_now(1) is not None
        assert world.enter_now(5_000) is None

    @in_virtual_time
    async def test_each_of_several_processes_uses_its_part(self) -> None:
        world = World(processes=4)
        world.add()
        world.set_catalog(units=20)
        assert len(world.fill(200)) == 2
        assert world.enter_now(100) is None
        assert world.enter_now(50, is_reserved=True) is not None
        assert world.enter_now(50, is_reserved=True) is None

    @in_virtual_time
    async def test_a_place_costs_nothing_once_it_is_left(self) -> None:
        world = World()
        pool = world.add()
        world.set_catalog(units=10)
        for place in [*world.fill(900), *world.fill(100, is_reserved=True)]:
            world.end(place)
        assert pool.tokens_in_flight == 0
        assert world.at_rest()


class TestReserved:
    """PRD/requirements.md, "Reserved capacity": before serverless, and admitted even while that is being shed."""

    @in_virtual_time
    async def test_serverless_leaves_free_what_is_held(self) -> None:
        world = World()
        world.add()
        world.set_catalog(units=30)
        world.fill(700)
        assert world.enter_now(1) is None
        world.fill(300, is_reserved=True)

    @in_virtual_time
    async def test_what_is_held_is_left_free_once_and_not_twice(self) -> None:
        world = World()
        world.add()
        world.set_catalog(units=30)
        world.fill(300, is_reserved=True)
        world.fill(700)
        assert world.enter_now(1) is None

    @in_virtual_time
    async def test_it_may_use_all_there_is(self) -> None:
        world = World()
        world.add()
        world.set_catalog(units=30)
        world.fill(1_000, is_reserved=True)
        assert world.enter_now(1) is None

    @in_virtual_time
    async def test_where_all_is_held_serverless_is_shed_at_once(self) -> None:
        world = World()
        world.add()
        world.set_catalog(units=200)
        before = world.loop.time()
        refused = await refusal(world.enter(1))
        assert (refused.status, refused.code) == (429, "overloaded")
        assert world.loop.time() == before

    @in_virtual_time
    async def test_what_is_reserved_anew_is_kept_from_then_on(self) -> None:
        world = World()
        world.add()
        place = world.fill(1_000)[0]
        world.set_catalog(units=10)
        world.end(place)
        assert world.enter_now(100) is None
        assert world.enter_now(100, is_reserved=True) is not None

    @in_virtual_time
    async def test_it_goes_before_all_that_wait(self) -> None:
        world = World()
        world.add()
        places = world.fill(1_000)
        order: list[str] = []

        async def come(name: str, **more: Any) -> Place:
            place = await world.enter(**more)
            order.append(name)
            return place

        waiting = [world.later(come("serverless")), world.later(come("reserved", is_reserved=True))]
        await settle()
        world.end(places.pop())
        await settle()
        assert order == ["reserved"]
        world.end(places.pop())
        await asyncio.gather(*waiting)
        assert order == ["reserved", "serverless"]

    @in_virtual_time
    async def test_it_does_not_wait_behind_those_that_wait(self) -> None:
        world = World()
        world.add()
        world.set_catalog(units=10)
        world.fill(900)
        waiting = world.later(world.enter())
        await settle()
        assert world.enter_now(100) is None
        assert world.enter_now(100, is_reserved=True) is not None
        waiting.cancel()
        await settle()

    @in_virtual_time
    async def test_it_is_never_shed_while_there_is_a_node(self) -> None:
        world = World(queue_most=0)
        pool = world.add()
        world.fill(1_000, is_reserved=True)
        before = world.loop.time()
        place = await world.enter(100, is_reserved=True)
        assert world.loop.time() == before + 5
        assert pool.tokens_in_flight == 1_100
        world.end(place)


class TestQueue:
    @in_virtual_time
    async def test_who_waits_enters_as_soon_as_there_is_room(self) -> None:
        world = World()
        pool = world.add()
        places = world.fill(1_000)
        waiting = world.later(world.enter(200))
        await settle(1)
        world.end(places.pop())
        await settle()
        assert not waiting.done()
        world.end(places.pop())
        await settle()
        assert waiting.done()
        assert pool.tokens_in_flight == 1_000
        assert pool.on_room is None

    @in_virtual_time
    async def test_nobody_overtakes_those_who_wait(self) -> None:
        world = World()
        world.add()
        places = world.fill(1_000)
        waiting = world.later(world.enter(200))
        await settle()
        world.end(places.pop())
        assert world.enter_now(100) is None
        world.end(places.pop())
        await waiting

    @in_virtual_time
    async def test_it_is_fair_between_orgs_by_tokens(self) -> None:
        world = World(queue_s=600)
        world.add()
        places = world.fill(1_000)
        order: list[UUID] = []

        async def come(org: UUID, tokens: int) -> None:
            place = await world.enter(tokens, org=org)
            order.append(org)
            world.end(place)

        waiting = [world.loop.create_task(come(ACME, 200)) for _ in range(20)]
        waiting += [world.loop.create_task(come(GLOBEX, 100)) for _ in range(10)]
        await settle()
        for place in places:
            world.end(place)
        await asyncio.gather(*waiting)
        assert Counter(order[:15]) == {ACME: 5, GLOBEX: 10}
        assert world.at_rest()

    @in_virtual_time
    async def test_a_wait_that_must_be_too_long_is_refused_at_once(self) -> None:
        world = World()
        world.add()
        world.fill(1_000)
        # A full pool of ten seconds' work gives back 100 tokens a second.
        waiting = [world.later(world.enter(100)) for _ in range(5)]
        await settle()
        before = world.loop.time()
        refused = await refusal(world.enter(100))
        assert world.loop.time() == before
        assert (refused.status, refused.code, refused.retry_after_s) == (429, "overloaded", 6)
        for one in waiting:
            one.cancel()
        await settle()

    @in_virtual_time
    async def test_retry_after_follows_what_really_leaves(self) -> None:
        world = World(queue_s=30)
        world.add()
        places = world.fill(1_000)
        waiting = [world.later(world.enter(100)) for _ in range(30)]
        for _ in range(9):
            await settle(1)
            for _ in range(4):
                if places:
                    world.end(places.pop())
                elif (done := next((one for one in waiting if one.done()), None)) is not None:
                    waiting.remove(done)
                    world.end(done.result())
        # 400 a second were seen, not the 100 that were measured; the 1 000 in flight leave first, but for what is free.
        refused = await refusal(world.enter(20_000))
        assert refused.retry_after_s is not None
        assert 3 <= refused.retry_after_s <= 15
        for one in waiting:
            one.cancel()
        await settle()

    @in_virtual_time
    async def test_who_has_waited_too_long_is_told_when_to_come_again(self) -> None:
        world = World()
        world.add()
        world.fill(1_000)
        before = world.loop.time()
        refused = await refusal(world.enter(400))
        assert world.loop.time() == before + 5
        assert (refused.status, refused.code) == (429, "overloaded")
        # Nothing has left in five seconds: what was believed a sixth as much, 400 tokens take 24 s.
        assert refused.retry_after_s == 24
        assert world.at_rest()

    @in_virtual_time
    async def test_its_length_is_bounded_and_the_longest_backlog_makes_room(self) -> None:
        world = World(queue_most=3)
        world.add(capacity_tokens=100_000)
        places = [world.enter_now(100_000)]
        greedy = [world.later(world.enter(100)) for _ in range(3)]
        await settle()
        modest = world.later(world.enter(100, org=GLOBEX))
        await settle()
        assert [one.done() for one in greedy] == [False, False, True]
        assert (await refusal(greedy[2])).code == "overloaded"
        assert (await refusal(world.enter(100))).code == "overloaded"
        assert world.admission.waiting == 3
        assert places[0] is not None
        world.end(places[0])
        await asyncio.gather(*greedy[:2], modest)

    @in_virtual_time
    async def test_a_deadline_that_comes_first_counts(self) -> None:
        world = World()
        world.add()
        world.fill(1_000)
        before = world.loop.time()
        await refusal(world.enter(100, deadline_s=2))
        assert world.loop.time() == before + 2

    @in_virtual_time
    async def test_a_client_that_hangs_up_leaves_at_once(self) -> None:
        """H1."""
        world = World()
        world.add()
        world.fill(1_000)
        waiting = world.later(world.enter())
        await settle(1)
        world.gone.set_result(None)
        await asyncio.sleep(0)
        assert world.admission.waiting == 0
        with pytest.raises(ClientGone):
            await waiting
        with pytest.raises(ClientGone):
            await world.enter()

    @in_virtual_time
    async def test_a_place_for_somebody_who_is_cancelled_is_given_back(self) -> None:
        world = World()
        world.add()
        places = world.fill(1_000)
        first, second = world.later(world.enter()), world.later(world.enter())
        await settle()
        world.end(places.pop())
        # Its place is found in this turn and its end comes before it can take it.
        await asyncio.sleep(0)
        first.cancel()
        await settle()
        assert first.cancelled()
        assert second.done()

    @in_virtual_time
    async def test_new_nodes_are_used_by_those_who_wait(self) -> None:
        world = World(queue_s=60)
        pool = world.add()
        world.fill(1_000)
        first, second = world.later(world.enter(600)), world.later(world.enter(600))
        await settle(1)
        pool.capacity_tokens = 1_600
        assert pool.on_room is not None
        pool.on_room()
        await settle()
        assert (first.done(), second.done()) == (True, False)
        # Also if the pool says nothing of it.
        pool.capacity_tokens = 2_200
        await settle(0.2)
        assert second.done()


class TestNoNode:
    @in_virtual_time
    async def test_one_on_the_way_is_waited_for(self) -> None:
        world = World()
        world.on_the_way.add(HOME)
        waiting = world.later(world.enter())
        await settle(19)
        assert not waiting.done()
        world.add()
        assert (await waiting).region == HOME

    @in_virtual_time
    async def test_a_promised_one_is_waited_for(self) -> None:
        world = World()
        world.set_catalog(promised=[HOME])
        waiting = world.later(world.enter())
        await settle(19)
        assert not waiting.done()
        world.add()
        assert (await waiting).region == HOME

    @in_virtual_time
    async def test_without_either_it_is_a_503_at_once(self) -> None:
        world = World()
        before = world.loop.time()
        with pytest.raises(Unavailable, match="No node serves") as caught:
            await world.enter()
        assert (caught.value.code, caught.value.retry_after_s) == ("model_unavailable", 60)
        assert world.loop.time() == before

    @in_virtual_time
    async def test_one_that_is_late_is_a_503(self) -> None:
        world = World()
        world.on_the_way.add(NEXT)
        before = world.loop.time()
        with pytest.raises(Unavailable):
            await world.enter()
        assert world.loop.time() == before + 20

    @in_virtual_time
    async def test_a_client_that_hangs_up_is_not_waited_for(self) -> None:
        world = World()
        world.on_the_way.add(HOME)
        waiting = world.later(world.enter())
        await settle(1)
        world.gone.set_result(None)
        with pytest.raises(ClientGone):
            await waiting

    @in_virtual_time
    async def test_who_was_on_hold_can_still_queue(self) -> None:
        world = World()
        world.on_the_way.add(HOME)
        waiting = [world.later(world.enter(600)) for _ in range(2)]
        await settle(15)
        world.add()
        await settle(4)
        assert [one.done() for one in waiting] == [True, False]
        world.end(waiting[0].result())
        await waiting[1]


class TestRegions:
    @in_virtual_time
    async def test_a_home_that_never_served_the_model_is_no_loss(self) -> None:
        world = World()
        world.add(LAST)
        assert {place.region for place in world.fill(900)} == {LAST}

    @in_virtual_time
    async def test_there_its_requests_queue_as_at_home(self) -> None:
        world = World()
        pool = world.add(NEXT)
        world.set_catalog(units=0)
        place = world.fill(1_000)[0]
        waiting = world.later(world.enter())
        await settle()
        world.end(place)
        assert (await waiting).region == NEXT
        assert pool.on_room is None

    @in_virtual_time
    async def test_of_a_lost_home_a_fifth_spills_in_the_first_minute(self) -> None:
        world = World(queue_s=0.5)
        world.add()
        world.add(NEXT, 1_000_000)
        assert world.enter_now() is not None
        world.lose()
        spilled = 0
        for _ in range(500):
            await asyncio.sleep(0.1)
            place = world.enter_now()
            spilled += place is not None
        assert spilled == 100

    @in_virtual_time
    async def test_ten_a_minute_may_always_go(self) -> None:
        world = World()
        world.add()
        world.add(NEXT)
        world.lose()
        assert [world.enter_now() is not None for _ in range(12)] == [True] * 10 + [False] * 2

    @in_virtual_time
    async def test_a_request_is_counted_once_however_often_it_asks(self) -> None:
        world = World()
        world.add()
        world.add(NEXT, 100_000)
        world.lose()
        world.fill(1_000)
        waiting: list[asyncio.Task[Place]] = []
        for _ in range(40):
            asked = world.ask()
            assert world.admission.enter_now(asked) is None
            waiting.append(world.later(world.admission.enter(asked, world.gone)))
        await settle(1)
        # Fifty have come: the ten that went are a fifth.
        assert world.admission.spilled == 10
        assert world.admission.waiting == 40
        world.gone.set_result(None)
        await asyncio.wait(waiting)

    @in_virtual_time
    async def test_the_rest_queues_briefly_and_gets_a_503(self) -> None:
        world = World()
        world.add()
        world.add(NEXT)
        world.lose()
        world.fill(1_000)
        before = world.loop.time()
        with pytest.raises(Unavailable) as caught:
            await world.enter()
        assert world.loop.time() == before + 5
        assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (503, "region_lost", 55)
        assert world.at_rest()

    @in_virtual_time
    async def test_after_the_minute_the_next_regions_load_decides(self) -> None:
        world = World()
        world.add()
        world.add(NEXT)
        world.lose()
        await settle(61)
        spilled = 0
        while world.enter_now() is not None:
            spilled += 1
        assert spilled == 8

    @in_virtual_time
    async def test_what_the_next_region_holds_for_others_is_not_touched(self) -> None:
        world = World()
        world.add()
        world.add(NEXT)
        catalog = Catalog.of([], RegionMap.of([]), [])
        object.__setattr__(catalog, "reserved_units", {(MODEL, NEXT): 90, (MODEL, HOME): 90})
        world.admission.catalog = catalog
        world.lose()
        assert world.enter_now(100, is_reserved=True) is not None
        assert world.enter_now(100, is_reserved=True) is None

    @in_virtual_time
    async def test_those_in_the_queue_go_when_they_may(self) -> None:
        world = World(queue_s=30)
        world.add()
        world.add(NEXT)
        world.lose()
        await settle(50)
        world.fill(700)
        places = world.fill(300)
        waiting = world.later(world.enter())
        await settle(11)
        assert not waiting.done()
        for place in places:
            world.end(place)
        assert (await waiting).region == NEXT

    @in_virtual_time
    async def test_home_is_home_again_at_once(self) -> None:
        world = World(queue_s=30)
        world.add()
        world.add(NEXT)
        world.lose()
        world.fill(1_000)
        waiting = world.later(world.enter())
        await settle(1)
        world.come_back()
        assert (await waiting).region == HOME
        place = world.enter_now()
        assert place is not None
        assert place.region == HOME

    @in_virtual_time
    async def test_a_second_loss_counts_anew(self) -> None:
        world = World()
        world.add()
        world.add(NEXT, 10_000)
        world.lose()
        world.fill(1_000)
        assert world.enter_now() is None
        world.come_back()
        await settle(1)
        world.lose()
        assert world.enter_now() is not None

    @in_virtual_time
    async def test_those_who_queued_at_home_are_told_of_its_loss(self) -> None:
        world = World(queue_s=30)
        world.add()
        world.fill(1_000)
        strict, free = world.later(world.enter(is_strict=True)), world.later(world.enter())
        await settle(1)
        world.add(NEXT)
        world.lose()
        assert (await free).region == NEXT
        with pytest.raises(Unavailable) as caught:
            await strict
        assert caught.value.code == "model_unavailable"

    @in_virtual_time
    async def test_a_full_home_is_relieved_by_a_region_that_has_plenty(self) -> None:
        world = World()
        world.add()
        world.add(NEXT)
        world.fill(1_000)
        assert [place.region for place in world.fill(600)] == [NEXT] * 6
        assert world.enter_now() is None

    @in_virtual_time
    async def test_a_strict_request_never_leaves(self) -> None:
        world = World()
        world.add()
        world.add(NEXT)
        places = world.fill(1_000)
        waiting = world.later(world.enter(is_strict=True))
        await settle(1)
        assert not waiting.done()
        world.end(places.pop())
        assert (await waiting).region == HOME
        world.lose()
        with pytest.raises(Unavailable) as caught:
            await world.enter(is_strict=True)
        assert caught.value.code == "model_unavailable"


class TestNextRegion:
    @in_virtual_time
    async def test_stays_while_there_is_an_untried_node(self) -> None:
        world = World()
        pool = world.add()
        pool.nodes.append(object())
        place = world.enter_now()
        assert place is not None
        assert world.admission.next_region(place, pool.nodes[:1]) is place
        pool.out, pool.nodes = pool.nodes[1:], pool.nodes[:1]
        assert world.admission.next_region(place, pool.nodes) is place

    @in_virtual_time
    async def test_then_takes_the_first_region_in_order_that_has_one(self) -> None:
        world = World()
        pool = world.add()
        world.add(LAST)
        asked = world.ask()
        place = world.admission.enter_now(asked)
        assert place is not None
        other = world.admission.next_region(place, pool.nodes)
        assert other is not None
        assert other.region == LAST
        assert pool.tokens_in_flight == 0
        other.leave()
        assert world.at_rest()

    @in_virtual_time
    async def test_goes_nowhere_without_room_or_where_all_were_tried(self) -> None:
        world = World()
        home, other = world.add(), world.add(NEXT)
        place = world.enter_now()
        assert place is not None
        assert world.admission.next_region(place, [*home.nodes, *other.nodes]) is None
        other.tokens_in_flight = 950
        assert world.admission.next_region(place, home.nodes) is None
        other.tokens_in_flight = 700
        assert world.admission.next_region(place, home.nodes) is None
        other.tokens_in_flight = 500
        assert world.admission.next_region(place, home.nodes) is not None

    @in_virtual_time
    async def test_a_lost_home_is_left_for_a_region_with_room_only(self) -> None:
        world = World()
        world.add()
        other = world.add(NEXT)
        place = world.enter_now()
        assert place is not None
        world.lose()
        other.tokens_in_flight = 901
        assert world.admission.next_region(place, []) is None
        other.tokens_in_flight = 900
        assert world.admission.next_region(place, []) is not None
        assert world.admission.spilled == 1

    @in_virtual_time
    async def test_leaving_a_lost_home_counts_as_spill(self) -> None:
        world = World()
        pool = world.add()
        world.add(NEXT, 100_000)
        places = world.fill(1_000)
        tried = list(pool.nodes)
        place = places.pop()
        world.lose()
        for _ in range(10):
            assert world.enter_now() is not None
        assert world.admission.next_region(place, tried) is None


class Engine:
    """A node with a fixed service rate: so many slots, and its own queue behind them."""

    def __init__(self, slots: int, tokens_per_s: float) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._tokens_per_s = tokens_per_s

    async def serve(self, tokens: int) -> None:
        async with self._slots:
            await asyncio.sleep(tokens / self._tokens_per_s)


class Load:
    """Constant offered load of several tenants on one node, for some virtual time."""

    SLOTS, SLOT_TOKENS_PER_S, TOKENS, FOR_S = 20, 100.0, 100, 60.0

    def __init__(self, world: World) -> None:
        self.world = world
        # One second's work in flight keeps every slot busy and none waiting.
        world.admission.full_load_s = 1.0
        capacity = int(self.SLOTS * self.SLOT_TOKENS_PER_S)
        world.add(capacity_tokens=capacity)
        world.add(NEXT, 1)
        self.engine = Engine(self.SLOTS, self.SLOT_TOKENS_PER_S)
        self.until = world.loop.time() + self.FOR_S
        self.latencies: dict[UUID, list[float]] = {}
        self.served: Counter[UUID] = Counter()
        self.shed: list[Rejected] = []
        self._running: set[asyncio.Task[None]] = set()

    async def tenant(self, org: UUID, requests_per_s: float, *, is_reserved: bool = False) -> None:
        latencies = self.latencies[org] = []
        number = 0
        while self.world.loop.time() < self.until:
            # Not in step with the others, and the same every time.
            await asyncio.sleep((0.5 + (number * 7 % 11) / 10) / requests_per_s)
            number += 1
            task = asyncio.create_task(self._request(org, is_reserved, latencies))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _request(self, org: UUID, is_reserved: bool, latencies: list[float]) -> None:
        world, came_at = self.world, self.world.loop.time()
        asked = world.ask(self.TOKENS, org=org, is_reserved=is_reserved, is_strict=True)
        try:
            place = world.admission.enter_now(asked) or await world.admission.enter(asked, world.gone)
        except Rejected as refused:
            self.shed.append(refused)
            return
        world.start(place)
        await self.engine.serve(self.TOKENS)
        world.end(place)
        latencies.append(world.loop.time() - came_at)
        if world.loop.time() < self.until:
            self.served[org] += self.TOKENS

    async def rest(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        assert self.world.at_rest()


CAPACITY_PER_S = Load.SLOTS * Load.SLOT_TOKENS_PER_S / Load.TOKENS


def offered(times: float, units: int = 400) -> Load:
    """A reserved tenant at its contract, a greedy one and a modest one; together `times` what the node can serve."""

    async def play() -> Load:
        world = World(queue_s=2)
        load = Load(world)
        world.set_catalog(units=units)
        # With the tenant's jitter that is its contract: at its densest just what the reservation holds is in flight.
        reserved = units / Load.TOKENS * 0.8
        modest = CAPACITY_PER_S * 0.2
        greedy = max(0.1, CAPACITY_PER_S * times - reserved - modest)
        await asyncio.gather(
            load.tenant(ACME, reserved, is_reserved=True), load.tenant(GLOBEX, greedy), load.tenant(INITECH, modest)
        )
        await load.rest()
        return load

    return run(play())


def p99(latencies: list[float]) -> float:
    return sorted(latencies)[int(len(latencies) * 0.99)]


class TestOverload:
    def test_goodput_holds_at_three_times_the_load(self) -> None:
        """H3."""
        goodput = {times: sum(offered(times).served.values()) for times in (0.5, 1.0, 3.0)}
        assert goodput[3.0] >= 0.8 * max(goodput.values())

    def test_who_is_admitted_is_served_in_time_and_who_is_not_is_told_when(self) -> None:
        """H3."""
        load = offered(3.0)
        service_s = Load.TOKENS / Load.SLOT_TOKENS_PER_S
        assert max(p99(latencies) for latencies in load.latencies.values()) <= 2 + 2 * service_s
        assert len(load.shed) > 1_000
        assert {refused.code for refused in load.shed} == {"overloaded"}
        assert min(refused.retry_after_s or 0 for refused in load.shed) >= 1

    def test_a_reserved_tenant_sees_no_difference(self) -> None:
        """Reserved capacity is there at any load: every request is served at once."""
        light, heavy = offered(0.5), offered(3.0)
        service_s = Load.TOKENS / Load.SLOT_TOKENS_PER_S
        for load in (light, heavy):
            assert max(load.latencies[ACME]) == pytest.approx(service_s)
        assert len(light.latencies[ACME]) == len(heavy.latencies[ACME])

    def test_a_modest_tenant_is_not_pushed_aside_by_a_greedy_one(self) -> None:
        load = offered(3.0)
        modest = CAPACITY_PER_S * 0.2 * Load.TOKENS * Load.FOR_S
        assert load.served[INITECH] >= 0.9 * modest
        assert load.served[GLOBEX] > load.served[INITECH]
