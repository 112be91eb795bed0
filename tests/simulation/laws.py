"""What must always hold (continuously), and what must hold once the faults are over (at rest)."""

from __future__ import annotations

import asyncio
from collections import Counter

from crosslogic.contracts import names
from crosslogic.contracts.node import JOINED
from crosslogic.domain.deployment import Replica, counts
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import ON_THE_WAY, TRANSITIONS, Node, NodeState
from crosslogic.domain.sweep import bears_our_mark
from tests.simulation import clock
from tests.simulation.made_up_cloud import MadeUpMachine
from tests.simulation.memory_catalog import REGIONS
from tests.simulation.world import World

# F3.
LONGEST_AFTERLIFE_S = 600.0
# The law of drains is about whole seconds of an operator's patience, not about the milliseconds of a call.
DRAIN_MARGIN_S = 1.0
# These run for ever. Whatever else runs for longer than this is stuck.
STANDING = (names.FLEET_HEALTH, names.DEPLOYMENT_SCALING)
LONGEST_LIFE_S = 600.0


class Laws:
    """Looks on while a world lives, and breaks it when a law is broken."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._drains_at: dict[str, float] = {}
        # Nodes that need not be waited for when they drain: cancelled, or not answering.
        self.is_hasty: set[str] = set()
        self.had_engine_faults = False
        self.most_replicas: dict[tuple[str, str], int] = {}
        world.on_node.append(self._look_at_row)
        world.cloud.on_create = self._look_at_birth
        world.cloud.on_end = self._look_at_end
        world.spawn(self._watch())

    def _look_at_row(self, before: Node | None, after: Node) -> None:
        if before is None:
            self._look_at_order(after)
            return
        if before.state is not after.state:
            if after.state not in TRANSITIONS[before.state].values():
                self._world.broke(f"F4: {after.node_id} went from {before.state} to {after.state}")
            if after.generation <= before.generation:
                self._world.broke(f"F4: {after.node_id} changed its state and kept generation {after.generation}")
            if after.state is NodeState.DRAINING:
                self._drains_at[after.node_id] = self._world.loop.time()
        if after.generation < before.generation:
            self._world.broke(f"F4: {after.node_id} went back to generation {after.generation}")
        if before.tombstoned_at is not None and after.tombstoned_at != before.tombstoned_at:
            self._world.broke(f"F4: the tombstone of {after.node_id} was taken back")
        is_forward = after.state is not before.state and after.state in (*ON_THE_WAY, NodeState.READY)
        if before.is_tombstoned and is_forward:
            self._world.broke(f"F4: {after.node_id} came to {after.state} behind its tombstone")

    def _look_at_order(self, node: Node) -> None:
        if node.deployment is None or node.is_pinned or node.is_tombstoned:
            return
        replicas = Counter(
            (row.deployment, row.region)
            for row in self._world.nodes.rows.values()
            if not row.is_pinned and counts(Replica(row.node_id, row.region, row.state, row.is_tombstoned))
        )
        place = (node.deployment, node.region)
        if replicas[place] > self.most_replicas.get(place, 0):
            self._world.broke(
                f"F7: deployment {node.deployment} has {replicas[place]} replicas in {node.region}, "
                f"{self.most_replicas.get(place, 0)} are the most"
            )

    def _row_of(self, cluster: str) -> Node | None:
        return next((row for row in self._world.nodes.rows.values() if row.cluster == cluster), None)

    def _look_at_birth(self, cluster: str) -> None:
        self._world.tell(f"{cluster[-6:]} machine ordered")
        if self._row_of(cluster) is None:
            self._world.broke(f"F3: the machine {cluster} was ordered before its node was written down")

    def _look_at_end(self, machine: MadeUpMachine) -> None:
        now = self._world.loop.time()
        self._world.tell(f"{machine.cluster[-6:]} machine ended by us")
        row = self._row_of(machine.cluster)
        if row is None:
            if not bears_our_mark(machine.cluster, self._world.node_secret):
                self._world.broke(f"F1: {machine.cluster} is another installation's, and was ended by us")
            return
        if not row.is_tombstoned:
            self._world.broke(f"F1: the machine of {row.node_id} was ended, and nobody had said that it may be")
        if row.state is not NodeState.DRAINING or row.node_id in self.is_hasty or self.had_engine_faults:
            return
        running = sum(until > now for until in machine.busy_until)
        waited_s = now - self._drains_at[row.node_id]
        if running and waited_s < row.drain_timeout_s - DRAIN_MARGIN_S:
            self._world.broke(
                f"F6: {row.node_id} was ended with {running} requests running, {waited_s:.1f} s after its drain began, "
                f"with {row.drain_timeout_s} s to drain"
            )

    async def _watch(self) -> None:
        while True:
            now = clock.now()
            for cluster in sorted(self._world.cloud.alive):
                row = self._row_of(cluster)
                if row is None or row.tombstoned_at is None:
                    continue
                outlived_s = (now - row.tombstoned_at).total_seconds()
                if outlived_s > LONGEST_AFTERLIFE_S:
                    self._world.broke(
                        f"F3: the machine of {row.node_id} has outlived its tombstone by {outlived_s:.0f} s"
                    )
            await asyncio.sleep(20.0)

    def at_rest(self) -> list[str]:
        """What does not hold yet; once the faults are over it must soon be nothing."""
        world = self._world
        broken: list[str] = []
        alive = [row for row in world.nodes.rows.values() if row.ended_at is None]
        for row in alive:
            lifecycle = names.node_workflow_id(row.node_id)
            if row.state is not NodeState.READY or row.is_tombstoned:
                broken.append(f"T6: {row.node_id} is still {row.state} ({row.reason}), after {_age_s(row):.0f} s")
            elif row.workflow_id != lifecycle or lifecycle not in world.server.runs:
                broken.append(f"F5: nobody looks after {row.node_id}, which names {row.workflow_id}")
        rented = {row.cluster for row in alive if row.provider != JOINED}
        ours = {cluster for cluster in world.cloud.alive if cluster not in world.cloud.foreign}
        for cluster in sorted(ours ^ rented):
            what = "a machine that no row claims" if cluster in world.cloud.alive else "a row without its machine"
            broken.append(f"F1: {cluster} is {what}")
        for node_id in sorted(set(world.board.entries) ^ {row.node_id for row in alive}):
            broken.append(f"F1: {node_id} is {'' if node_id in world.board.entries else 'not '}on the route board")
        for row in alive:
            entry = world.board.entries.get(row.node_id)
            if entry is not None and entry != row.route_entry:
                broken.append(
                    f"F1: the route board has generation {entry.generation} of {row.node_id}, not {row.generation}"
                )
        broken += [
            f"T6: {run.workflow_id} still runs"
            for run in world.server.runs.values()
            if self._is_stuck(run.type, run.workflow_id)
        ]
        standing = [names.fleet_health_workflow_id(region.name) for region in REGIONS]
        standing += [names.deployment_workflow_id(name) for name in world.catalog.deployments]
        broken += [
            f"F5: {workflow_id} does not run" for workflow_id in standing if workflow_id not in world.server.runs
        ]
        for deployment in world.catalog.deployments.values():
            for target in deployment.regions:
                count = sum(row.deployment == deployment.name and row.region == target.region for row in alive)
                if count < target.replicas_min:
                    broken.append(f"F7: {deployment.name} has {count} of {target.replicas_min} in {target.region}")
        return broken

    def _is_stuck(self, type: str, workflow_id: str) -> bool:
        if type == names.NODE_LIFECYCLE:
            row = self._world.nodes.rows.get(NODE.parse(workflow_id.removeprefix("node/")))
            return row is None or row.ended_at is not None
        age_s = self._world.loop.time() - self._world.server.runs[workflow_id].started_at
        return type not in STANDING and age_s > LONGEST_LIFE_S


def _age_s(row: Node) -> float:
    return (clock.now() - row.changed_at).total_seconds()
