"""Names that cross Temporal: task queues, workflow types, ids, messages and search attributes, each in one place."""

from __future__ import annotations

FLEET_TASK_QUEUE = "fleet"

NODE_PROVISIONING = "NodeProvisioning"
NODE_LIFECYCLE = "NodeLifecycle"
FLEET_HEALTH = "FleetHealth"
DEPLOYMENT_SCALING = "DeploymentScaling"
CERTIFICATE_ROTATION = "CertificateRotation"
DEPLOYMENT_ROLLOUT = "DeploymentRollout"
FLEET_SWEEP = "FleetSweep"
USAGE_SEALING = "UsageSealing"

# Signals. Each is a nudge: the workflow re-reads the world.
DRAIN = "drain"
LOOK_AGAIN = "look_again"
# The cloud will take the node's machine; the text says which and when, such as "aws: terminate in 120 s".
SPOT_NOTICE = "spot_notice"
ABORT = "abort"
PAUSE = "pause"
RESUME = "resume"
PROMOTE = "promote"
# Signals that may carry a text, shown as the reason of what follows. All others carry nothing.
SIGNALS_WITH_A_REASON = frozenset({DRAIN, SPOT_NOTICE, ABORT})

# Queries.
STATE = "state"
PROGRESS = "progress"

# Search attributes (all Keyword), registered by the set-up command before any workflow runs.
SEARCH_ATTRIBUTES = ("CrossLogicRegion", "CrossLogicModel", "CrossLogicDeployment", "CrossLogicNode", "CrossLogicState")


def node_workflow_id(node_id: str) -> str:
    """The id of a node's `NodeLifecycle`: at most one runs per node (F5)."""
    return f"node/{node_id}"


def provisioning_workflow_id(node_id: str) -> str:
    """The id of the `NodeProvisioning` that we start ourselves; an operator's may have any id."""
    return f"provision/{node_id}"


def deployment_workflow_id(deployment: str) -> str:
    """The id of a deployment's `DeploymentScaling`."""
    return f"deployment/{deployment}"


def rollout_workflow_id(deployment: str, revision: int) -> str:
    """The id of the `DeploymentRollout` that we start ourselves; an operator's may have any id."""
    return f"rollout/{deployment}/{revision}"


def sweep_workflow_id(name: str) -> str:
    """The id of a `FleetSweep` that an operator starts; the schedule's and anybody's own may have any id."""
    return f"sweep/{name}"


def fleet_health_workflow_id(region: str) -> str:
    """The id of a region's `FleetHealth`."""
    return f"fleet-health/{region}"
