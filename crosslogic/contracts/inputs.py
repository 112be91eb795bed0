"""Which workflow takes which input, with an example of each: the one list behind strict decoding, docs and tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from crosslogic.contracts import names
from crosslogic.contracts.authority import CertificateRotationInput
from crosslogic.contracts.deployment import DeploymentScalingInput
from crosslogic.contracts.ledger import UsageSealingInput
from crosslogic.contracts.node import FleetHealthInput, NodeLifecycleInput, NodeProvisioningInput
from crosslogic.contracts.rollout import DeploymentRolloutInput
from crosslogic.contracts.strict import WrongShape, read
from crosslogic.contracts.sweep import FleetSweepInput


@dataclass(frozen=True)
class WorkflowInput:
    """One workflow type's input: its dataclass, and JSON that an operator can copy."""

    workflow: str
    type: type[Any]
    example: dict[str, Any]

    @property
    def example_json(self) -> str:
        """The example on one line."""
        return json.dumps(self.example)


WORKFLOW_INPUTS: dict[str, WorkflowInput] = {
    known.workflow: known
    for known in (
        WorkflowInput(
            names.NODE_PROVISIONING, NodeProvisioningInput, {"model": "llama-7b", "region": "in-mumbai", "spot": True}
        ),
        WorkflowInput(
            names.NODE_LIFECYCLE,
            NodeLifecycleInput,
            {
                "spec": {
                    "node_id": "node_01k5h2v9q3f4tbz7x8m6n0c1de",
                    "model": "llama-7b",
                    "region": "in-mumbai",
                    "endpoint": "https://gpu-7.example.com:8443",
                },
                "is_admitted": False,
            },
        ),
        WorkflowInput(names.FLEET_HEALTH, FleetHealthInput, {"region": "in-mumbai"}),
        WorkflowInput(names.DEPLOYMENT_SCALING, DeploymentScalingInput, {"deployment": "llama-7b"}),
        WorkflowInput(names.CERTIFICATE_ROTATION, CertificateRotationInput, {"new_authority": False}),
        WorkflowInput(names.DEPLOYMENT_ROLLOUT, DeploymentRolloutInput, {"deployment": "llama-7b", "revision": 2}),
        WorkflowInput(names.FLEET_SWEEP, FleetSweepInput, {"provider": "", "dry_run": True}),
        WorkflowInput(names.USAGE_SEALING, UsageSealingInput, {"orgs_at_once": 200}),
    )
}
INPUT_TYPES = {known.type: known for known in WORKFLOW_INPUTS.values()}


@dataclass(frozen=True)
class Refused:
    """In place of an input that could not be read: why, in words for whoever sent it."""

    reason: str


def read_input(cls: type[Any], value: object) -> Any:
    """The input of a workflow from decoded JSON, or `Refused`. Nothing unknown, missing or wrongly typed passes."""
    try:
        return read(cls, value)
    except WrongShape as error:
        return Refused(str(error))


def explain(workflow: str, reason: str) -> str:
    """What is wrong with an input, and what to send instead."""
    known = WORKFLOW_INPUTS[workflow]
    return f"{workflow} cannot start: {reason}. Send one JSON object, for example: {known.example_json}"
