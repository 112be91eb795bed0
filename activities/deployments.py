"""What a deployment's workflow asks and orders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import activity

from activities.nodes import NodeActivities
from crosslogic.contracts.deployment import DeploymentSurvey, ReplicaOrder
from crosslogic.contracts.node import NodeOrder, NodeProvisioningInput, NodeSpec
from crosslogic.domain.deployment import LONGEST_PAUSE_S

if TYPE_CHECKING:
    from crosslogic.store.catalog import CatalogStore
    from crosslogic.store.nodes import NodeStore

# Ends older than this say nothing about a region any more.
RECENT_S = 4 * LONGEST_PAUSE_S


class DeploymentActivities:
    """Reads deployments and writes down the nodes that they order."""

    def __init__(self, nodes: NodeStore, catalog: CatalogStore, writer: NodeActivities) -> None:
        self._nodes = nodes
        self._catalog = catalog
        self._writer = writer

    @activity.defn
    async def survey_deployment(self, name: str) -> DeploymentSurvey:
        """The deployment's targets and nodes, as Postgres has them now."""
        deployment = (await self._catalog.load()).deployments.get(name)
        if deployment is None:
            return DeploymentSurvey(exists=False)
        replicas = await self._nodes.list_replicas(name, RECENT_S)
        return DeploymentSurvey(
            True, deployment.model, list(deployment.regions), replicas, deployment.rollout_revision or 0
        )

    @activity.defn
    async def order_replica(self, order: ReplicaOrder) -> NodeSpec:
        """Write the new node's row, so that the next survey counts it before its workflow runs."""
        wanted = NodeProvisioningInput(order.model, order.region, order.deployment)
        node = NodeOrder(wanted, order.node_id, order.workflow_id, False, order.revision, order.is_held)
        spec = await self._writer.resolve_node_spec(node)
        await self._writer.intend_node(spec)
        return spec
