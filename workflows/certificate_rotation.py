"""Daily: our certificate authorities get successors in time, and no node's certificate runs out unnoticed."""

from __future__ import annotations

from temporalio import workflow

from activities.authority import AuthorityActivities
from crosslogic.contracts.authority import CertificateRotationInput, CertificateRotationResult
from crosslogic.contracts.names import CERTIFICATE_ROTATION
from workflows.steps import QUICK, Story


@workflow.defn(name=CERTIFICATE_ROTATION)
class CertificateRotation:
    """Look after certificates once: the schedule `certificate-rotation` starts one a day, and you may start more.

    Agents renew by themselves; this is for the authorities above them, and for agents that did not. With
    `new_authority` a successor is made at once, for example because a key may have leaked:

    ```json
    {"new_authority": false}
    ```
    """

    @workflow.run
    async def run(self, input: CertificateRotationInput) -> CertificateRotationResult:
        """Run to the end; the result names every node that needs a person."""
        story = Story("Rotating certificates")
        story.tell("looking at the authorities")
        authorities = await workflow.execute_activity_method(
            AuthorityActivities.rotate_authority, input, **QUICK, summary="Make a successor if one is due"
        )
        story.tell("; ".join(authorities.trusted))
        nodes = await workflow.execute_activity_method(
            AuthorityActivities.tell_overdue_agents, **QUICK, summary="Tell agents that have not renewed"
        )
        story.tell(f"{len(nodes.told)} agents told to renew, {len(nodes.expired)} without a valid certificate")
        return CertificateRotationResult(authorities.trusted, nodes.told, nodes.expired)
