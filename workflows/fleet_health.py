"""Entity, one per region: watches all its nodes at once, and nudges a node's workflow only on a change."""

from __future__ import annotations

import asyncio

from temporalio import workflow

from activities.probes import ProbeActivities
from crosslogic.contracts.names import DRAIN, FLEET_HEALTH, node_workflow_id
from crosslogic.contracts.node import FleetHealthInput, NodeReading, RegionWatch
from crosslogic.domain.health import IN_SERVICE, Verdict
from workflows.steps import Story, check_cancelled, endless, is_history_long, make_findable, nudge, tell

# A watch returns after 5 min without news; one that has not returned by now hangs.
WATCH_TIMEOUT_S = 600.0


@workflow.defn(name=FLEET_HEALTH)
class FleetHealth:
    """Watch one region's nodes for ever.

    The worker keeps one running for each region, under the id `fleet-health/<region>`:

    ```json
    {"region": "in-mumbai"}
    ```
    """

    @workflow.run
    async def run(self, input: FleetHealthInput) -> None:
        """Run until cancelled."""
        story = Story(f"Watching the nodes of {input.region}")
        make_findable(region=input.region)
        verdicts = dict(input.verdicts)
        story.tell("polling every node's engine; reading what agents and requests say")
        while not is_history_long():
            check_cancelled()
            report = await workflow.execute_activity_method(
                ProbeActivities.watch_region,
                RegionWatch(input.region, verdicts),
                **endless(WATCH_TIMEOUT_S),
                summary="Poll all nodes until something changes",
            )
            verdicts |= {reading.node_id: reading.verdict for reading in report.changed}
            present = set(report.present)
            verdicts = {
                node_id: verdict
                for node_id, verdict in verdicts.items()
                if node_id in present and verdict != Verdict.HEALTHY
            }
            for reading in report.changed:
                story.tell(f"`{reading.node_id}` is {reading.verdict}: {reading.reason}")
            if not report.changed:
                story.tell(f"{len(present)} nodes watched, nothing changed")
            await asyncio.gather(
                *(_act(reading) for reading in report.changed if Verdict(reading.verdict) not in IN_SERVICE)
            )
        workflow.continue_as_new(FleetHealthInput(input.region, verdicts))


async def _act(reading: NodeReading) -> bool:
    """Have the node's workflow look for itself; False when there is none.

    An ill node drains: only the watch has seen what its illness took to be seen.
    """
    workflow_id = node_workflow_id(reading.node_id)
    if reading.verdict == Verdict.ILL:
        return await tell(workflow_id, DRAIN, reading.reason)
    return await nudge(workflow_id)
