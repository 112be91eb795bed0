"""Inputs and results of a deployment's workflow and of its activities. Fields are only ever added, with defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosslogic.domain.deployment import RegionTarget, Replica


@dataclass(frozen=True)
class DeploymentScalingInput:
    """The keeper of one deployment's promise."""

    deployment: str


@dataclass(frozen=True)
class DeploymentSurvey:
    """A deployment as Postgres has it: its targets, and its nodes newest first, recent ends included."""

    exists: bool
    model: str = ""
    targets: list[RegionTarget] = field(default_factory=list[RegionTarget])
    replicas: list[Replica] = field(default_factory=list[Replica])
    rollout_revision: int = 0  # 0: no roll-out is on. While one is, nothing is scaled in.


@dataclass(frozen=True)
class ReplicaOrder:
    """One more node for a deployment; its row is written before its workflow starts, so that it counts at once."""

    deployment: str
    model: str
    region: str
    node_id: str
    workflow_id: str
    revision: int = 0  # 0: the one that serves.
    is_held: bool = False
