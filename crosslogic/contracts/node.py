"""Inputs and results of the node workflows and of their activities. Fields are only ever added, with defaults."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NodeProvisioningInput:
    """What to start. Only `model` and `region` are needed; the rest has defaults fit for an operator's first try."""

    model: str
    region: str
    deployment: str = ""  # Empty: the deployment that promises this model in this region, if there is one.
    provider: str = ""  # Empty: the configured default ("local" in dev mode, else "skypilot").
    gpu: str = ""  # Empty: the cheapest that holds the model.
    spot: bool = True
    node_id: str = ""  # Empty: a new one. Set by DeploymentScaling, which counts it from the first moment.
    launch_timeout_s: int = 900
    boot_timeout_s: int = 600
    load_timeout_s: int = 1800
    drain_timeout_s: int = 120


@dataclass(frozen=True)
class NodeProvisioningResult:
    """What became of it. `state` is `ready`, `failed` or `terminated` (drained before it served)."""

    node_id: str
    state: str
    model: str
    region: str
    reason: str


@dataclass(frozen=True)
class NodeSpec:
    """A provisioning input with every choice made: names resolved, defaults filled, the cluster named."""

    node_id: str
    model: str
    region: str
    deployment: str
    provider: str
    gpu: str
    spot: bool
    cluster: str
    is_pinned: bool
    workflow_id: str
    drain_timeout_s: int = 120
    endpoint: str = ""  # Only for a node that exists already (joined): there is no cloud behind it.
    kind: str = "chat"  # The model's kind in the catalog: how its engine must be started.


@dataclass(frozen=True)
class NodeLifecycleInput:
    """One node's entity workflow. `spec.endpoint` set means joined: health and drains, but no machine to end."""

    spec: NodeSpec
    is_admitted: bool = True  # False: the node is joined; the workflow admits it first.
    is_draining: bool = False  # Crosses continue-as-new.
    drain_reason: str = ""


@dataclass(frozen=True)
class NodeLifecycleResult:
    """How a node ended."""

    node_id: str
    state: str
    reason: str


@dataclass(frozen=True)
class Machine:
    """A cloud's answer about one machine. `status` is a `MachineStatus` value; `endpoint` is empty until it has one."""

    cluster: str
    status: str
    endpoint: str = ""
    reason: str = ""


@dataclass(frozen=True)
class NodeReading:
    """What one look at a node found: the verdict of `crosslogic.domain.health.judge` with its reason."""

    node_id: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class RegionWatch:
    """Input of the activity that watches one region's nodes. `verdicts` is what the workflow knows already."""

    region: str
    verdicts: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class FleetHealthInput:
    """The watcher of one region's nodes."""

    region: str
    verdicts: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class DeploymentScalingInput:
    """The keeper of one deployment's promise."""

    deployment: str
