"""Requests among revisions: each gets its share, a canary costs nobody an answer, what is held gets nothing (F8)."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from api.inference.router import Node
from api.inference.upstream import FailureKind
from crosslogic.domain.node import NodeState
from crosslogic.domain.scheduling import Split, is_drawn
from tests.api.inference.test_router import RULES, World, entry_of

STRATEGIES = ("least-load", "round-robin", "latency-weighted", "cost-weighted", "prefix-affinity")


def world_of(split: Split | None, strategy: str = "least-load", *revisions: int) -> World:
    """Ready nodes of these revisions, long since there."""
    world = World()
    world.table.set_strategies({"d": strategy})
    if split is not None:
        world.table.set_splits({"d": split})
    entries = [entry_of(number, revision=revision) for number, revision in enumerate(revisions or (1, 1, 2, 2))]
    world.table.replace(entries)
    world.clock.now += RULES.slow_start_s + 1
    return world


def spread(world: World, count: int = 4000) -> Counter[int]:
    """The revisions that so many requests went to."""
    dice = random.Random(7)
    pool = world.table.pool("m", "r")
    assert pool is not None
    chosen: Counter[int] = Counter()
    for _ in range(count):
        choice = world.table.choose(pool, random_bits=dice.getrandbits(32))
        assert choice is not None
        chosen[choice.node.entry.revision] += 1
    return chosen


def of(world: World, revision: int) -> list[Node]:
    return [node for node in world.table.nodes if node.entry.revision == revision]


class TestShare:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    async def test_is_kept_with_every_strategy(self, strategy: str) -> None:
        chosen = spread(world_of(Split(1, 2, 500), strategy))
        assert 0.04 < chosen[2] / chosen.total() < 0.06

    @pytest.mark.parametrize(("share_bp", "revisions"), [(0, {1}), (10_000, {2})])
    async def test_is_kept_at_its_ends(self, share_bp: int, revisions: set[int]) -> None:
        assert set(spread(world_of(Split(1, 2, share_bp)))) == revisions

    async def test_changes_at_once(self) -> None:
        world = world_of(Split(1, 2, 0))
        world.table.set_splits({"d": Split(1, 2, 5000)})
        assert 0.45 < spread(world)[2] / 4000 < 0.55

    async def test_without_a_rollout_all_nodes_are_alike(self) -> None:
        world = world_of(Split(1), "least-load", 1, 1, 1)
        pool = world.table.pool("m", "r")
        assert pool is not None
        assert pool.groups is None
        assert spread(world) == Counter({1: 4000})

    def test_draws_exactly(self) -> None:
        drawn = sum(is_drawn(top << 12, 500) for top in range(0, 1 << 20, 16))
        assert drawn / (1 << 16) == pytest.approx(0.05, abs=1e-4)


class TestCanary:
    async def test_that_fails_costs_nobody_an_answer(self) -> None:
        """F8: all of the drawn revision is left out, so the other one answers."""
        world = world_of(Split(1, 2, 10_000))
        for node in of(world, 2):
            node.failed(FailureKind.CONNECT, world.clock.now)
        assert set(spread(world, 100)) == {1}

    async def test_that_is_full_passes_requests_on(self) -> None:
        world = world_of(Split(1, 2, 10_000))
        for node in of(world, 2):
            node.take(int(RULES.full_load_s / node.seconds_per_token) + 1)
        assert set(spread(world, 100)) == {1}
        for node in of(world, 1):
            node.take(int(RULES.full_load_s / node.seconds_per_token) + 1)
        # All are full: whoever was drawn queues it.
        assert set(spread(world, 100)) == {2}

    async def test_that_is_held_gets_nothing_even_when_all_others_are_gone(self) -> None:
        world = World()
        world.table.set_splits({"d": Split(1, 2, 10_000)})
        world.table.replace([entry_of(0, revision=2, is_held=True)])
        pool = world.table.pool("m", "r")
        assert pool is not None
        assert world.table.choose(pool) is None
        world.table.apply(entry_of(0, revision=2, generation=2))
        assert world.table.choose(pool) is not None

    async def test_without_a_share_is_not_put_on_trial(self) -> None:
        world = world_of(Split(1, 2, 0))
        for node in of(world, 2):
            node.failed(FailureKind.CONNECT, world.clock.now)
        world.clock.now += 10
        assert set(spread(world, 100)) == {1}


class TestOtherRevisions:
    async def test_serve_when_nothing_else_does(self) -> None:
        """A node that joined by hand and was there before the roll-out."""
        world = world_of(Split(2), "least-load", 1, 2)
        assert set(spread(world, 100)) == {2}
        (serving,) = of(world, 2)
        world.table.apply(entry_of(1, revision=2, generation=2, state=NodeState.DRAINING))
        assert not serving.is_member
        assert set(spread(world, 100)) == {1}
