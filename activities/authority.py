"""Effects on our certificate authorities, and on agents that should have renewed their certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import activity

from crosslogic.contracts.authority import AuthorityReport, CertificateReport, CertificateRotationInput
from crosslogic.domain.certificates import OVERDUE_AT
from crosslogic.domain.ids import NODE

if TYPE_CHECKING:
    from crosslogic.store.agents import AgentStore
    from crosslogic.trust import Trust


class AuthorityActivities:
    """What the rotation does. Each is idempotent: a successor that exists already is not made again (T4)."""

    def __init__(self, trust: Trust, agents: AgentStore) -> None:
        self._trust = trust
        self._agents = agents

    @activity.defn
    async def rotate_authority(self, rotation: CertificateRotationInput) -> AuthorityReport:
        """Make a successor when the newest authority ages, or when told to. It issues two days later."""
        trusted = await self._trust.rotate(is_forced=rotation.new_authority)
        return AuthorityReport(
            [
                f"authority {one.id}: issues from {one.issues_from:%Y-%m-%d}, trusted until {one.expires_at:%Y-%m-%d}"
                for one in trusted
            ]
        )

    @activity.defn
    async def tell_overdue_agents(self) -> CertificateReport:
        """Tell every agent that should have renewed by itself to do it now; forget what expired long ago."""
        told = await self._agents.ask_overdue(OVERDUE_AT)
        expired = await self._agents.list_expired()
        await self._agents.prune()
        return CertificateReport([NODE.show(one) for one in told], [NODE.show(one) for one in expired])
