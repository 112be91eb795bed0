"""Inputs and results of the node workflows and of their activities. Fields are only ever added, with defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosslogic.domain.placement import Place
from crosslogic.domain.revision import DEFAULT_SPEC, RevisionSpec

# The provider of a node that exists already: there is no cloud behind it.
JOINED = "joined"


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
    gpus: list[str] = field(default_factory=list[str])  # Further choices beside `gpu`: NAME or NAME:COUNT, or `cpu`.
    clouds: list[str] = field(default_factory=list[str])  # Empty: all that are connected. Otherwise `aws`, `gcp`, …
    zone: str = ""  # Empty: any. Otherwise the cloud's name of one.
    engine: str = ""  # Empty: the configured one. Otherwise `vllm`, `sglang`, `llamacpp` or `custom`.


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
    """A provisioning input with every choice made: names resolved, defaults filled, the cluster named.

    The defaults are those of a node that is joined: the operator knows its id, model, region and endpoint, and
    `NodeLifecycle` finds out the rest.
    """

    node_id: str
    model: str
    region: str
    deployment: str = ""
    provider: str = JOINED
    gpu: str = ""
    spot: bool = False
    cluster: str = ""
    is_pinned: bool = True
    workflow_id: str = ""
    drain_timeout_s: int = 120
    endpoint: str = ""  # Only for a node that exists already (joined): there is no cloud behind it.
    kind: str = "chat"  # The model's kind in the catalog: how its engine must be started.
    gpus: list[str] = field(default_factory=list[str])  # What may hold the model, in the order of the wish.
    clouds: list[str] = field(default_factory=list[str])
    zone: str = ""
    engine: str = ""
    places: list[Place] = field(default_factory=list[Place])  # Where to try, best first; chosen when it is launched.
    revision: int = 1
    serves: RevisionSpec = DEFAULT_SPEC  # What the machine must run: that revision's engine and weights.
    is_held: bool = False  # A roll-out verifies it before any request may start there.


@dataclass(frozen=True)
class NodeLifecycleInput:
    """One node's entity workflow. `spec.endpoint` set means joined: health and drains, but no machine to end."""

    spec: NodeSpec
    is_admitted: bool = True  # False: the node is joined; the workflow admits it first.
    is_draining: bool = False  # Drain it at once; crosses continue-as-new.
    drain_reason: str = ""
    is_orphan: bool = False  # The workflow that was bringing it up is gone: undo the node, whatever there is of it.


@dataclass(frozen=True)
class NodeOrder:
    """What `resolve_node_spec` turns into a `NodeSpec`: an operator's or a deployment's order, with the id it has."""

    order: NodeProvisioningInput
    node_id: str
    workflow_id: str
    is_pinned: bool = True
    revision: int = 0  # 0: the one that serves.
    is_held: bool = False


@dataclass(frozen=True)
class NodeAdmission:
    """A node that has generated: its measured speed in tokens/s."""

    spec: NodeSpec
    capacity_tokens_per_s: int


@dataclass(frozen=True)
class NodeChange:
    """Why something is done to a node, in plain words that its row and the Temporal UI show."""

    spec: NodeSpec
    reason: str


@dataclass(frozen=True)
class NodeEnding:
    """How a node ended: `state` is `terminated`, `failed` or `lost`."""

    spec: NodeSpec
    state: str
    reason: str


@dataclass(frozen=True)
class NodeLook:
    """One look at a node. The workflow remembers for how long and for how many looks it has been silent."""

    spec: NodeSpec
    silent_for_s: float = 0.0
    failed_polls: int = 0
    failed_generations: int = 0  # Polls in a row that were answered and yet generated nothing.


@dataclass(frozen=True)
class NodeInterruption:
    """A spot machine that its cloud took (`had_notice` false) or said that it would take."""

    spec: NodeSpec
    had_notice: bool


@dataclass(frozen=True)
class NodeLifecycleResult:
    """How a node ended."""

    node_id: str
    state: str
    reason: str


@dataclass(frozen=True)
class Machine:
    """A cloud's answer about one machine. `status` is a `MachineStatus` value; `endpoint` is empty until it has one.

    `failure` is the code of a `Rejected`: the machine will never serve, whatever its status; it may still cost money.
    """

    cluster: str
    status: str
    endpoint: str = ""
    reason: str = ""
    failure: str = ""
    is_order_lost: bool = False  # The cloud has broken the order off, and carries it out only if it is given again.
    has_endpoints: bool = True  # False: this cloud knows no addresses; the node's agent says where it is.
    place: Place | None = None  # Where it runs and what it costs there, once the cloud says.


@dataclass(frozen=True)
class NodeReading:
    """What one look at a node found: the verdict of `crosslogic.domain.health.judge` with its reason."""

    node_id: str
    verdict: str
    reason: str
    look_again_s: float = 0.0  # When a suspect should be looked at again.
    is_mute: bool = False  # It answered and generated nothing, so the poll failed in another way than by silence.


@dataclass(frozen=True)
class RegionWatch:
    """Input of the activity that watches one region's nodes. `verdicts` is what the workflow knows already.

    A node that is not in `verdicts` counts as healthy.
    """

    region: str
    verdicts: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class RegionReport:
    """What a watch saw: the verdicts that changed, and the nodes that are there (to forget the others)."""

    changed: list[NodeReading] = field(default_factory=list[NodeReading])
    present: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class FleetHealthInput:
    """The watcher of one region's nodes."""

    region: str
    verdicts: dict[str, str] = field(default_factory=dict[str, str])
