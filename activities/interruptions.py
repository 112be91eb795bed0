"""Remembering what clouds take back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import activity

from crosslogic.contracts.node import NodeInterruption
from crosslogic.domain.ids import NODE

if TYPE_CHECKING:
    from crosslogic.store.preemptions import PreemptionStore


class InterruptionActivities:
    """What placement learns from: it must be written before a replacement is placed."""

    def __init__(self, preemptions: PreemptionStore) -> None:
        self._preemptions = preemptions

    @activity.defn
    async def remember_interruption(self, interruption: NodeInterruption) -> None:
        """Write down that the cloud took a spot machine, once per node. A later notice adds itself."""
        await self._preemptions.record(NODE.parse(interruption.spec.node_id), had_notice=interruption.had_notice)
