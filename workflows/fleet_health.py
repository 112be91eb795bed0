"""Entity, one per region: watches all its nodes at once, and nudges a node's workflow only on a change."""

from __future__ import annotations

import asyncio

from temporalio import workflow

from activities.probes import ProbeActivities
from crosslogic.contracts.names import FLEET_HEALTH, node_workflow_id
from crosslogic.contracts.node import FleetHealthInput, RegionWatch
from crosslogic.domain.health import Verdict
from workflows.steps import Story, check_cancelled, endless, is_history_long, make_findable, nudge

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
        story.tell("polling every node's engine")
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
                story.tell(f"{len(present)} nodes polled, nothing changed")
            await asyncio.gather(
                *(
                    nudge(node_workflow_id(reading.node_id))
                    for reading in report.changed
                    if reading.verdict != Verdict.HEALTHY
                )
            )
        workflow.continue_as_new(FleetHealthInput(input.region, verdicts))
