"""Is every machine one that we intended? Proves it, and ends what is not."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from activities.sweeps import ENDED, SPARED, SweepActivities
from crosslogic.contracts.names import FLEET_SWEEP, node_workflow_id
from crosslogic.contracts.sweep import FleetSweepInput, FleetSweepResult, Inventory, SweepFinding
from crosslogic.domain.ids import SWEEP
from crosslogic.domain.sweep import TO_BE_ENDED, Standing, most_unintended
from workflows.steps import (
    QUICK,
    Story,
    check_cancelled,
    explain,
    is_cancel_requested,
    lasting,
    nudge,
    refusal,
    unstoppable,
)

INVENTORY_TIMEOUT_S = 120.0
# An orphan that does not end within this is the next sweep's.
END_TIMEOUT_S = 90.0
# Findings that are acted upon in one sweep; more of them at once are a sign that something else is wrong.
MOST_ENDED = 50
# Findings that the result and its record carry.
MOST_FINDINGS = 500


@workflow.defn(name=FLEET_SWEEP)
class FleetSweep:
    """Compare every cloud's machines with the registry, twice, and end what was never intended or is long over.

    A schedule starts it every two minutes. To look without touching anything:

    ```json
    {"provider": "", "dry_run": true}
    ```

    Machines of another installation are reported and left alone; a node whose machine is missing has its workflow told
    to look. Cancelling stops it after what is under way, and what was done is written down; the next sweep begins anew.
    """

    def __init__(self) -> None:
        self._is_cancelled = False
        self._story = Story("Sweeping the clouds")

    def _cancel(self) -> None:
        self._is_cancelled = True

    @workflow.run
    async def run(self, input: FleetSweepInput) -> FleetSweepResult:
        """Sweep once. Raises ApplicationError when no cloud could be asked."""
        sweep_id = SWEEP.show(workflow.uuid7())
        first = await self._look(input)
        confirmed, last = await self._confirm(input, first)
        findings = confirmed
        if not input.dry_run:
            most = len(confirmed) if input.end_all_unintended else most_unintended(last.machines)
            findings = await unstoppable(self._act(confirmed, most), self._cancel)
        standings = Counter(found.standing for found in confirmed)
        swept = FleetSweepResult(
            sweep_id=sweep_id,
            provider=input.provider,
            dry_run=input.dry_run,
            machines=last.machines,
            created=0,
            owned=last.owned,
            ending=last.ending,
            destroyed=sum(found.outcome == ENDED for found in findings),
            foreign=standings[Standing.FOREIGN],
            missing=standings[Standing.MISSING],
            unexplained=sum(
                found.standing == Standing.UNINTENDED and not found.outcome.startswith(SPARED) for found in findings
            ),
            unasked=last.unasked,
            findings=findings[:MOST_FINDINGS],
        )
        swept = await unstoppable(self._record(swept), self._cancel)
        self._story.tell(
            f"{swept.machines} machines: {swept.owned} owned, {swept.ending} ending, {swept.destroyed} destroyed, "
            f"{swept.foreign} foreign, {swept.unexplained} unexplained; {swept.missing} nodes without their machine"
        )
        if self._is_cancelled or is_cancel_requested():
            raise asyncio.CancelledError("the sweep was cancelled")
        return swept

    async def _look(self, input: FleetSweepInput) -> Inventory:
        self._story.tell(f"comparing the machines of {input.provider or 'every cloud'} with the registry")
        try:
            taken = await workflow.execute_activity_method(
                SweepActivities.take_inventory,
                input,
                **lasting(INVENTORY_TIMEOUT_S),
                summary="List machines, compare them with the registry",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            raise refusal(f"Nothing was swept: {explain(error)}", "SweepFailed") from error
        check_cancelled()
        if taken.unasked:
            self._story.tell(f"not answering: {', '.join(taken.unasked)}")
        return taken

    async def _confirm(self, input: FleetSweepInput, first: Inventory) -> tuple[list[SweepFinding], Inventory]:
        """The findings that a second look agrees on, and that look. One look never suffices: lists lag."""
        if not first.findings:
            return [], first
        self._story.tell(f"{len(first.findings)} to look at again")
        await asyncio.sleep(max(0.0, input.look_again_s))
        check_cancelled()
        second = await self._look(input)
        before = {(found.provider, found.cluster): found.standing for found in first.findings}
        agreed = [found for found in second.findings if before.get((found.provider, found.cluster)) == found.standing]
        return agreed, second

    async def _act(self, findings: list[SweepFinding], most: int) -> list[SweepFinding]:
        """End what is to be ended, of unintended machines `most`; the findings with their outcomes."""
        done: list[SweepFinding] = []
        taken: Counter[str] = Counter()
        for found in findings:
            taken[found.standing] += 1
            if self._is_cancelled or is_cancel_requested():
                outcome = "left: the sweep was cancelled"
            elif found.standing == Standing.MISSING:
                is_told = await nudge(node_workflow_id(found.node_id))
                outcome = "its workflow was told to look" if is_told else "it has no lifecycle to be told"
            elif found.standing not in TO_BE_ENDED:
                outcome = "left alone"
            elif taken[Standing.UNINTENDED] > most and found.standing == Standing.UNINTENDED:
                outcome = "left: too many at once; is this the right database? If so, sweep with end_all_unintended"
            elif taken[Standing.UNINTENDED] + taken[Standing.ORPHAN] > MOST_ENDED:
                outcome = "left to the next sweep"
            else:
                outcome = await self._end(found)
            done.append(replace(found, outcome=outcome))
        return done

    async def _record(self, swept: FleetSweepResult) -> FleetSweepResult:
        return await workflow.execute_activity_method(
            SweepActivities.record_sweep, swept, **QUICK, summary="Write the sweep down"
        )

    async def _end(self, found: SweepFinding) -> str:
        self._story.tell(f"ending `{found.cluster}`: {found.reason}")
        try:
            outcome = await workflow.execute_activity_method(
                SweepActivities.end_orphan,
                found,
                **lasting(END_TIMEOUT_S),
                summary=f"End {found.cluster}, confirm it is gone",
            )
        except ActivityError as error:
            outcome = f"not ended: {explain(error)}"
        self._story.tell(f"`{found.cluster}`: {outcome}")
        return outcome
