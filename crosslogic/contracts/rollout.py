"""Inputs and results of a roll-out and of its activities. Fields are only ever added, with defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosslogic.domain.revision import GoldenPrompt
from crosslogic.domain.rollout import RegionFloor, RevisionFigures, RolloutNode, RolloutPolicy


@dataclass(frozen=True)
class RolloutProgress:
    """Where a roll-out is; crosses continue-as-new. `step` numbers its writes of the traffic."""

    from_revision: int
    step: int
    goals: list[RegionFloor]
    traffic_bp: int = 0
    proven_bp: int = 0
    is_committed: bool = False
    is_promoted: bool = False
    is_impatient: bool = False  # The wait that it is in, or the next, is not to be waited for.
    is_paused: bool = False
    is_cancelled: bool = False
    shifted_at: float = 0.0  # Unix seconds.
    failures: int = 0
    ordered: list[str] = field(default_factory=list[str])  # Nodes that have neither come up nor failed yet.
    retiring: dict[str, float] = field(default_factory=dict[str, float])  # Told to drain, and when (Unix seconds).
    baseline: RevisionFigures | None = None  # The old revision's, from when it last had enough requests.
    moved_at: float = 0.0  # When something was last done, in Unix seconds.
    order_after: float = 0.0  # Not before this instant, because nodes have failed.
    return_reason: str = ""  # Not empty: on the way back, and why.
    is_failure: bool = False  # It returns because something failed, not because somebody asked.
    is_restoring: bool = True


@dataclass(frozen=True)
class DeploymentRolloutInput:
    """Replace the revision that a deployment serves. Only `deployment` and `revision` are needed.

    Each share of `steps_bp` (basis points of traffic) is watched for `bake_s` and until it had `min_requests` requests,
    but not longer than `longest_bake_s`. The other bounds are those of `RolloutPolicy`.
    """

    deployment: str
    revision: int
    steps_bp: list[int] = field(default_factory=lambda: [500, 2_500, 5_000, 10_000])
    hold_at_bp: int = 0
    bake_s: int = 300
    longest_bake_s: int = 1800
    min_requests: int = 20
    max_latency_ratio: float = 1.5
    max_error_rate: float = 0.02
    max_surge_nodes: int = 0
    max_surge_percent: int = 25
    max_surge_microdollars_per_h: int = 0
    max_failed_nodes: int = 3  # So many new nodes that do not come up end it.
    step_timeout_s: int = 7200  # Without any progress for so long it returns.
    golden: list[GoldenPrompt] = field(default_factory=list[GoldenPrompt])  # Besides those of the revision itself.
    orphan_of: str = ""  # The workflow that began it and is gone: take over from it and return.
    progress: RolloutProgress | None = None  # Set by the workflow itself.

    @property
    def policy(self) -> RolloutPolicy:
        """What the plan goes by."""
        return RolloutPolicy(
            steps_bp=self.steps_bp,
            hold_at_bp=self.hold_at_bp,
            max_surge_nodes=self.max_surge_nodes,
            max_surge_percent=self.max_surge_percent,
            max_surge_microdollars_per_h=self.max_surge_microdollars_per_h,
            max_latency_ratio=self.max_latency_ratio,
            max_error_rate=self.max_error_rate,
            min_requests=self.min_requests,
        )


@dataclass(frozen=True)
class DeploymentRolloutResult:
    """How it ended: `state` is `completed` or `returned`, `serving` the revision that serves now."""

    deployment: str
    revision: int
    state: str
    serving: int
    reason: str


@dataclass(frozen=True)
class RolloutOrder:
    """What is rolled out, and the workflow that does it."""

    input: DeploymentRolloutInput
    workflow_id: str


@dataclass(frozen=True)
class RolloutStart:
    """A roll-out that holds its deployment."""

    model: str
    progress: RolloutProgress


@dataclass(frozen=True)
class RolloutScope:
    """What to survey: the deployment with the goals of the roll-out, and the nodes that it waits for."""

    deployment: str
    goals: list[RegionFloor]
    ordered: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class RolloutSurvey:
    """The deployment now: floors, nodes that have not ended, and which of those ordered have come up or failed."""

    floors: list[RegionFloor]
    nodes: list[RolloutNode]
    came_up: list[str] = field(default_factory=list[str])
    failed: list[str] = field(default_factory=list[str])
    failure: str = ""


@dataclass(frozen=True)
class NodeVerification:
    """A node to ask golden prompts, besides those of its revision."""

    node_id: str
    golden: list[GoldenPrompt] = field(default_factory=list[GoldenPrompt])


@dataclass(frozen=True)
class NodeVerdict:
    """Whether a node answers as its revision must."""

    is_good: bool
    reason: str


@dataclass(frozen=True)
class TrafficShift:
    """A share for the revision, and the one that serves; `step` tells a late write from the newest."""

    deployment: str
    revision: int
    workflow_id: str
    step: int
    traffic_bp: int
    serving: int


@dataclass(frozen=True)
class RevisionComparison:
    """Which revisions to compare, by what they did from `since` (Unix seconds) on."""

    deployment: str
    old_revision: int
    new_revision: int
    since: float


@dataclass(frozen=True)
class RevisionsCompared:
    """What was found of each."""

    old: RevisionFigures
    new: RevisionFigures


@dataclass(frozen=True)
class RolloutEnd:
    """How a roll-out ends, for the audit log."""

    workflow_id: str
    result: DeploymentRolloutResult
