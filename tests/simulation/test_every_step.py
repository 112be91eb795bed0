"""One node's life, from its order to the end of its drain, with each fault at each step: enumerated, not drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from crosslogic.contracts import names
from crosslogic.domain.node import NodeState
from tests.simulation.made_up_cloud import Fate
from tests.simulation.network import Call, Fault
from tests.simulation.processes import Registry
from tests.simulation.scenario import Profile, Scenario
from tests.simulation.server import NotFound, Run
from tests.simulation.world import Violation, World, registry, run_in_virtual_time

QUIET = Profile(False, False, False, False, False, False, False)
SEED = 4
# What the standing workflows and the entities' keeper ask all the time, whatever becomes of the node.
BACKGROUND = frozenset({"list_alive", "read_all", "describe", "start_workflow", "create_schedule", "list_all", "load"})
SERVES_AT_S = 20.0
HOW = ("drain", "cancel", "terminate")


class OneNode:
    """Orders a node, lets it serve a request, drains it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.scenario = Scenario(world, QUIET)
        world.unscheduled.add(names.FLEET_SWEEP)
        world.cloud.draw_fate = lambda: Fate(1.5, 2.5)
        self.steps: list[Call] = []
        self.tasks: list[tuple[str, int]] = []

    def plan_fault(self, step: int, fault: Fault) -> None:
        """Let a fault happen to the so-manieth call that is about the node."""

        def plan(call: Call) -> Fault | None:
            if call.operation in BACKGROUND or (not self.world.nodes.rows and call.operation == "check_health"):
                return None
            self.steps.append(call)
            return fault if len(self.steps) - 1 == step else None

        self.world.network.plan = plan

    def plan_meddling(self, task: int, how: str) -> None:
        """Let somebody drain, cancel or terminate the node's workflow right after its so-manieth task."""

        def look(run: Run) -> None:
            if run.type not in (names.NODE_PROVISIONING, names.NODE_LIFECYCLE):
                return
            self.tasks.append((run.workflow_id, len(run.recorded)))
            if len(self.tasks) - 1 == task and not run.is_closed:
                self.world.loop.call_later(0.0005, self._meddle, run, how)

        self.world.server.on_task = look

    def _meddle(self, run: Run, how: str) -> None:
        try:
            self.scenario.meddle_with(run, how)
        except NotFound:
            self.world.tell("(its workflow does not run any more)")

    async def live(self) -> OneNode:
        """All of it, to the node's end. Raises Violation."""
        world, scenario = self.world, self.scenario
        world.spawn(world.supervise())
        try:
            self.workflow_id = scenario.provision(
                region="in-mumbai", drain_timeout_s=10, model="llama-7b",
                launch_timeout_s=60, boot_timeout_s=60, load_timeout_s=60,
            )  # fmt: skip
            await self._until(SERVES_AT_S)
            for row in list(world.nodes.rows.values()):
                machine = world.cloud.machines.get(row.cluster)
                if row.state is NodeState.READY and machine is not None:
                    machine.busy_until.append(world.loop.time() + 7.0)
            # As an operator's retry: until the node is on its way out.
            while any(
                not row.is_tombstoned and row.state is not NodeState.DRAINING for row in world.nodes.rows.values()
            ):
                for row in list(world.nodes.rows.values()):
                    for workflow_id in {row.workflow_id, self.workflow_id}:
                        if workflow_id in world.server.runs:
                            world.server.signal(workflow_id, names.DRAIN, ["maintenance"])
                await self._until(world.loop.time() + 20.0)
                if world.loop.time() > 900.0:
                    world.broke("T7: the node does not drain")
                    world.check()
            await scenario.rest()
            if world.cloud.alive:
                world.broke(f"T7: {sorted(world.cloud.alive)} live on")
                world.check()
        except Violation as error:
            raise Violation(f"{error}\n\n{world.story()}") from None
        finally:
            await world.end()
        return self

    async def _until(self, at: float) -> None:
        while self.world.loop.time() < at:
            await asyncio.sleep(1.0)
            self.world.check()


@pytest.fixture(scope="module")
def known() -> Registry:
    return registry()


def one_life(known: Registry, prepare: Callable[[OneNode], None]) -> OneNode:
    async def main() -> Any:
        node = OneNode(World(SEED, known))
        prepare(node)
        return await node.live()

    return run_in_virtual_time(main)


def undisturbed(known: Registry) -> OneNode:
    def watch(node: OneNode) -> None:
        node.plan_fault(-1, Fault.REFUSED)
        node.plan_meddling(-1, "drain")

    return one_life(known, watch)


class TestOneNode:
    def test_lives_and_drains(self, known: Registry) -> None:
        node = undisturbed(known)
        (row,) = node.world.nodes.rows.values()
        assert row.state is NodeState.TERMINATED
        operations = {call.operation for call in node.steps}
        assert {"intend", "advance", "ensure", "generate", "publish", "tombstone", "end", "find"} <= operations
        assert len(node.tasks) > 10

    @pytest.mark.simulation
    @pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
    def test_survives_every_fault_at_every_call(self, known: Registry, fault: Fault) -> None:
        """F1, F3 to F6, T4, T6, T7 under a, b, c, g, h at each step of provisioning and drain."""
        steps = undisturbed(known).steps
        reached = 0
        for step in range(len(steps)):
            if fault is Fault.LATE and steps[step].operation == "ensure":
                continue  # That is what the sweep is for.
            node = one_life(known, partial(_fault, step=step, fault=fault))
            reached += len(node.steps) > step
        assert reached > 40

    @pytest.mark.simulation
    @pytest.mark.parametrize("how", HOW)
    def test_ends_well_whenever_somebody_ends_it(self, known: Registry, how: str) -> None:
        """T7: cancel, terminate or drain at any event ends with F1."""
        for task in range(len(undisturbed(known).tasks)):
            one_life(known, partial(_meddling, task=task, how=how))

    @pytest.mark.simulation
    @pytest.mark.parametrize("how", HOW)
    def test_ends_well_when_its_process_is_killed_meanwhile(self, known: Registry, how: str) -> None:
        """T7 with a: the process that runs the workflow dies in the moment in which it is told to end."""
        for task in range(len(undisturbed(known).tasks)):
            one_life(known, partial(_meddling_and_kill, task=task, how=how))


def _fault(node: OneNode, step: int, fault: Fault) -> None:
    node.plan_fault(step, fault)


def _meddling(node: OneNode, task: int, how: str) -> None:
    node.plan_meddling(task, how)


def _meddling_and_kill(node: OneNode, task: int, how: str) -> None:
    node.plan_meddling(task, how)
    meddle = node.world.server.on_task

    def meddle_and_kill(run: Run) -> None:
        meddle(run)
        if len(node.tasks) - 1 == task:
            for process in node.world.processes:
                if process is run.owner:
                    node.world.loop.call_later(0.001, process.kill)

    node.world.server.on_task = meddle_and_kill
