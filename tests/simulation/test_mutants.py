"""Mistakes that were made on purpose: each is found within so many seeds, or the simulator is worth nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest

import worker
from activities import sweeps as sweep_activities
from activities.cloud import CloudActivities
from activities.nodes import NodeActivities
from activities.probes import ProbeActivities
from crosslogic.contracts.node import NodeChange, NodeEnding, NodeSpec
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.node import Node, NodeEvent
from tests.simulation import clock
from tests.simulation.processes import Registry
from tests.simulation.scenario import Profile, live
from tests.simulation.world import Violation, registry, run_in_virtual_time
from workflows import node_provisioning

Patches = Callable[[], contextlib.AbstractContextManager[None]]


class BlindNodes:
    """A registry that shows nobody a tombstone."""

    def __init__(self, nodes: Any) -> None:
        self._nodes = nodes

    async def get(self, node_id: UUID) -> Node:
        return replace(await self._nodes.get(node_id), tombstoned_at=None)

    async def advance(self, node_id: UUID, event: NodeEvent, reason: str, **columns: Any) -> Node:
        try:
            return await self._nodes.advance(node_id, event, reason, **columns)
        except Rejected:
            return await self.get(node_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nodes, name)


@contextlib.contextmanager
def no_tombstone_check_in_launch() -> Generator[None]:
    """launch_machine orders whether or not the node was undone meanwhile."""

    def blind(clouds: Any, nodes: Any, **options: Any) -> CloudActivities:
        blinded: Any = BlindNodes(nodes)
        return CloudActivities(clouds, blinded, **options)

    with patch.object(worker, "CloudActivities", blind):
        yield


@contextlib.contextmanager
def tombstone_after_the_undo() -> Generator[None]:
    """The tombstone is written once the machine has been ended, not before."""
    write, end = NodeActivities.tombstone_node, NodeActivities.end_node

    async def later(self: NodeActivities, change: NodeChange) -> None:
        pass

    async def end_and_write(self: NodeActivities, ending: NodeEnding) -> None:
        await write(self, NodeChange(ending.spec, ending.reason))
        await end(self, ending)

    with as_activity(NodeActivities, "tombstone_node", later), as_activity(NodeActivities, "end_node", end_and_write):
        yield


@contextlib.contextmanager
def compensation_by_name_only() -> Generator[None]:
    """What is undone is found by its name alone: there are no tombstones."""

    async def never(self: NodeActivities, change: NodeChange) -> None:
        pass

    with as_activity(NodeActivities, "tombstone_node", never):
        yield


@contextlib.contextmanager
def unshielded_launch() -> Generator[None]:
    """A launch that is under way is abandoned when the node is to stop."""

    class Unshielded:
        @staticmethod
        def shield(launch: Any) -> Any:
            return launch

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

    with patch.object(node_provisioning, "asyncio", Unshielded()):
        yield


@contextlib.contextmanager
def drain_without_wait() -> Generator[None]:
    """A draining node is ended at once."""

    async def at_once(self: ProbeActivities, spec: NodeSpec) -> str:
        return "nobody looked"

    with as_activity(ProbeActivities, "await_drained", at_once):
        yield


@contextlib.contextmanager
def end_without_confirmation() -> Generator[None]:
    """The machine's end is ordered, and nobody asks whether it came."""

    async def order(self: CloudActivities, spec: NodeSpec) -> None:
        with contextlib.suppress(Unavailable):
            await self._cloud(spec.provider).end(spec.cluster)  # pyright: ignore[reportPrivateUsage]

    with as_activity(CloudActivities, "end_machine", order):
        yield


@contextlib.contextmanager
def sweep_without_a_row() -> Generator[None]:
    """The sweep believes a reading of the registry that is older than the cloud's list, and does not read it again."""
    find = BlindNodes.__getattr__

    class LateNodes(BlindNodes):
        """Answers with the rows of 40 s ago."""

        def __init__(self, nodes: Any) -> None:
            super().__init__(nodes)
            self._seen: list[tuple[float, set[str]]] = []

        async def find_by_cluster(self, clouds: Sequence[str]) -> dict[str, Node]:
            now = asyncio.get_running_loop().time()
            rows: dict[str, Node] = await find(self, "find_by_cluster")(clouds)
            return {cluster: row for cluster, row in rows.items() if now - _age(row) > 40.0}

    def late(clouds: Any, nodes: Any, *arguments: Any, **options: Any) -> sweep_activities.SweepActivities:
        stale: Any = LateNodes(nodes)
        return sweep_activities.SweepActivities(clouds, stale, *arguments, **options)

    with patch.object(worker, "SweepActivities", late):
        yield


@contextlib.contextmanager
def sweep_of_everything() -> Generator[None]:
    """The sweep takes every machine with our prefix for ours."""

    def always(cluster: str, node_secret: str) -> bool:
        return True

    with patch.object(sweep_activities, "bears_our_mark", always):
        yield


def _age(row: Node) -> float:
    return (row.created_at - clock.EPOCH).total_seconds()


@contextlib.contextmanager
def as_activity(holder: type[Any], name: str, method: Callable[..., Any]) -> Generator[None]:
    """Put a method in an activity's place, under the activity's name and with its types."""
    original = getattr(holder, name)
    method.__name__ = name
    setattr(method, "__temporal_activity_definition", original.__temporal_activity_definition)
    with patch.object(holder, name, method):
        yield


@dataclass(frozen=True)
class Mutant:
    """A mistake, the troubles in which it shows, and the number of the law that it breaks."""

    patches: Patches
    profile: Profile
    laws: tuple[str, ...]
    seeds: int = 300

    @property
    def name(self) -> str:
        return getattr(self.patches, "__name__", "")


#                      processes servers network cloud engines sweeps people
ROUGH = Profile(True, True, True, True, False, False, True)
CALM = Profile(False, False, False, False, False, False, True)
SWEPT = Profile(True, False, True, True, False, True, True)

MUTANTS = (
    Mutant(no_tombstone_check_in_launch, ROUGH, ("F1", "F3")),
    Mutant(tombstone_after_the_undo, ROUGH, ("F1", "F3")),
    Mutant(compensation_by_name_only, ROUGH, ("F1", "F3")),
    Mutant(unshielded_launch, ROUGH, ("F1", "F3")),
    Mutant(drain_without_wait, CALM, ("F6",)),
    Mutant(end_without_confirmation, ROUGH, ("F1", "F3")),
    Mutant(sweep_without_a_row, SWEPT, ("F1",)),
    Mutant(sweep_of_everything, SWEPT, ("F1",)),
)


def hunt(mutant: Mutant, known: Registry) -> tuple[int, str]:
    """The first seed that catches it, and the law that was broken. Raises AssertionError when none does."""
    with mutant.patches():
        for seed in range(mutant.seeds):
            try:
                run_in_virtual_time(partial(live, seed, known, profile=mutant.profile, is_eager=True))
            except Violation as error:
                return seed, str(error).splitlines()[0]
    raise AssertionError(f"{mutant.name} lived through {mutant.seeds} seeds: the simulator would not notice it")


@pytest.mark.simulation
class TestMutants:
    @pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
    def test_are_found(self, mutant: Mutant) -> None:
        seed, law = hunt(mutant, registry())
        assert law.startswith(mutant.laws), f"seed {seed} found another mistake: {law}"

    @pytest.mark.parametrize("profile", [ROUGH, CALM, SWEPT])
    def test_are_what_is_wrong(self, profile: Profile) -> None:
        """Without a mistake the same seeds find nothing."""
        known = registry()
        for seed in range(20):
            run_in_virtual_time(partial(live, seed, known, profile=profile, is_eager=True))
