"""Sweeping the clouds: what is there, what of it was never intended or is long over, and ending that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from temporalio import activity

from activities.cloud import CONFIRMATIONS, POLL_INTERVAL_S, Cloud, is_gone
from crosslogic.contracts.node import Machine
from crosslogic.contracts.sweep import FleetSweepInput, FleetSweepResult, Inventory, SweepFinding
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.sweep import (
    PREFIX,
    TO_BE_ENDED,
    Judgement,
    Standing,
    bears_our_mark,
    is_missing,
    judge_machine,
)

if TYPE_CHECKING:
    from crosslogic.store.nodes import NodeStore
    from crosslogic.store.sweeps import SweepStore

log = logging.getLogger(__name__)

SPARED = "spared"
ENDED = "ended"
GONE = "gone by itself"


class SweepActivities:
    """Compares clouds with the registry. A machine is ended only after its row was read once more."""

    def __init__(
        self,
        clouds: Mapping[str, Cloud],
        nodes: NodeStore,
        sweeps: SweepStore,
        *,
        node_secret: str,
        poll_interval_s: float = POLL_INTERVAL_S,
    ) -> None:
        self._clouds = clouds
        self._nodes = nodes
        self._sweeps = sweeps
        self._node_secret = node_secret
        self._poll_interval_s = poll_interval_s

    @activity.defn
    async def take_inventory(self, asked: FleetSweepInput) -> Inventory:
        """Compare what the clouds list with the registry. Raises Rejected for a cloud that is not connected."""
        if asked.provider and asked.provider not in self._clouds:
            known = ", ".join(sorted(self._clouds)) or "none"
            raise Rejected(
                f"There is no cloud {asked.provider[:64]!r} to sweep; connected: {known}. Leave provider out for all.",
                code="unknown_provider",
                param="provider",
            )
        taken = Inventory()
        for provider in sorted(self._clouds):
            if asked.provider not in ("", provider):
                continue
            try:
                # The list first, then the rows: an intent is written before its machine is ordered, so that a machine
                # which is listed has its row by now.
                listed = await self._clouds[provider].list_all(PREFIX)
            except (Unavailable, Rejected) as error:
                log.warning("cloud %s cannot be swept now: %s", provider, error.message)
                taken = replace(taken, unasked=[*taken.unasked, provider])
                continue
            taken = await self._compare(provider, listed, taken)
        return taken

    async def _compare(self, provider: str, listed: list[Machine], taken: Inventory) -> Inventory:
        present = [machine for machine in listed if not is_gone(machine)]
        rows = await self._nodes.find_by_cluster([machine.cluster for machine in present])
        now = datetime.now(UTC)
        standings: list[Standing] = []
        findings: list[SweepFinding] = []
        for machine in present:
            row = rows.get(machine.cluster)
            judged = judge_machine(row, bears_our_mark(machine.cluster, self._node_secret), now)
            standings.append(judged.standing)
            if judged.standing not in (Standing.OWNED, Standing.ENDING):
                findings.append(_finding(provider, machine.cluster, judged, row.node_id if row else ""))
        names = {machine.cluster for machine in present}
        for row in await self._nodes.list_alive():
            if row.provider == provider and row.cluster not in names and is_missing(row, now):
                judged = Judgement(
                    Standing.MISSING, f"the node is {row.state}, and the cloud does not list its machine"
                )
                findings.append(_finding(provider, row.cluster, judged, row.node_id))
        return Inventory(
            taken.machines + len(present),
            taken.owned + standings.count(Standing.OWNED),
            taken.ending + standings.count(Standing.ENDING),
            [*taken.findings, *findings],
            taken.unasked,
        )

    @activity.defn
    async def end_orphan(self, found: SweepFinding) -> str:
        """Read the row once more, end the machine and return when the cloud has confirmed it: what was done.

        One that turns out to be wanted, or to be gone already, is left as it is.
        """
        cloud = self._clouds.get(found.provider)
        if cloud is None:
            raise Unavailable(f"This worker has no cloud {found.provider!r}.")
        if is_gone(await cloud.find(found.cluster)):
            return GONE
        row = (await self._nodes.find_by_cluster([found.cluster])).get(found.cluster)
        judged = judge_machine(row, bears_our_mark(found.cluster, self._node_secret), datetime.now(UTC))
        if judged.standing not in TO_BE_ENDED:
            return f"{SPARED}: {judged.reason}"
        log.warning("ending the machine %s of cloud %s: %s", found.cluster, found.provider, judged.reason)
        confirmed = 0
        while confirmed < CONFIRMATIONS:
            if not confirmed:
                await cloud.end(found.cluster)
            confirmed = confirmed + 1 if is_gone(await cloud.find(found.cluster)) else 0
            if confirmed < CONFIRMATIONS:
                await asyncio.sleep(self._poll_interval_s)
        return ENDED

    @activity.defn
    async def record_sweep(self, swept: FleetSweepResult) -> FleetSweepResult:
        """Write the sweep down, once however often this is tried; it comes back with `created` filled in."""
        return await self._sweeps.record(swept)


def _finding(provider: str, cluster: str, judged: Judgement, node_id: str) -> SweepFinding:
    return SweepFinding(provider, cluster, judged.standing, judged.reason, node_id)
