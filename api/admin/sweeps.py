"""Sweeps of the clouds: what each found and did, and one now."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from api.admin.context import ACTOR, Admin, AdminRoute
from api.admin.schemas import After, Body, Limit, Page, after_uuid, page
from crosslogic.contracts import names
from crosslogic.contracts.sweep import FleetSweepInput
from crosslogic.domain import ids
from crosslogic.new_ids import new_id

router = APIRouter(route_class=AdminRoute)


class FindingOut(BaseModel):
    """A machine, or a node without its machine, that was not as intended."""

    provider: str
    cluster: str = Field(description="The machine's name in its cloud.")
    standing: str = Field(
        description="`orphan`: its node is over. `unintended`: bears our mark, and no node ever claimed it. "
        "`foreign`: another installation's, left alone. `missing`: a node's, and the cloud does not list it."
    )
    node_id: str | None
    reason: str
    outcome: str = Field(description="What was done about it; empty after a dry run.")


class SweepOut(BaseModel):
    """One sweep: machines = owned + ending + orphans + unintended + foreign."""

    id: str = Field(examples=["sweep_01k5…"])
    started_at: datetime
    ended_at: datetime
    provider: str = Field(description="Empty: every cloud that was connected.")
    is_dry_run: bool
    machines: int = Field(description="Machines of our prefix that the clouds list.")
    created: int = Field(description="Nodes written down since the sweep before.")
    owned: int = Field(description="Machines of living nodes.")
    ending: int = Field(description="Machines whose nodes' workflows are ending them.")
    destroyed: int = Field(description="Machines that this sweep has ended.")
    foreign: int = Field(description="Machines of other installations.")
    missing: int = Field(description="Nodes whose machine the cloud does not list.")
    unexplained: int = Field(description="Machines that bear our mark and were never intended. Must be 0.")
    unasked: list[str] = Field(description="Clouds that did not answer.")
    findings: list[FindingOut]


class SweepIn(Body):
    """What to sweep."""

    provider: str = Field(default="", max_length=64, description="Empty: every cloud that is connected.")
    dry_run: bool = Field(default=False, strict=True, description="Only look and report.")
    end_all_unintended: bool = Field(
        default=False, strict=True, description="End unintended machines however many there are."
    )


class SweepStartedOut(BaseModel):
    """A sweep that is on its way."""

    workflow_id: str = Field(examples=["sweep/01k5…"])


@router.get("/sweeps")
async def list_sweeps(
    admin: Admin,
    with_findings: Annotated[bool, Query(description="Only sweeps that found something.")] = False,
    limit: Limit = 50,
    after: After = None,
) -> Page[SweepOut]:
    """Sweeps, newest first. Those that found nothing are kept for 30 days."""
    rows = await admin.sweeps.list_page(
        with_findings_only=with_findings, before=after_uuid(ids.SWEEP, after), limit=limit + 1
    )
    return page(rows, limit, _show, lambda sweep: sweep.id)


@router.post("/sweeps", status_code=202)
async def start_sweep(body: SweepIn, admin: Admin) -> SweepStartedOut:
    """Sweep now, through the workflow `FleetSweep`."""
    workflow_id = names.sweep_workflow_id(ids.encode(new_id()))
    await admin.workflows.temporal()
    await admin.audit.record(actor=ACTOR, action="sweep.start", subject=workflow_id, details=body.model_dump())
    await admin.workflows.start(
        names.FLEET_SWEEP,
        FleetSweepInput(body.provider, body.dry_run, end_all_unintended=body.end_all_unintended),
        workflow_id=workflow_id,
        task_queue=admin.settings.fleet_task_queue,
    )
    return SweepStartedOut(workflow_id=workflow_id)


def _show(row: dict[str, Any]) -> SweepOut:
    findings = [
        FindingOut.model_validate(
            found | {"node_id": None if found["node_id"] is None else ids.NODE.show(found["node_id"])}
        )
        for found in row["findings"]
    ]
    shown = row | {"id": ids.SWEEP.show(row["id"]), "foreign": row["foreign_machines"], "findings": findings}
    return SweepOut.model_validate(shown)
