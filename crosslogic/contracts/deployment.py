"""Inputs and results of a deployment's workflow and of its activities. Fields are only ever added, with defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosslogic.domain.autoscaling import RegionMemory, RegionPlan
from crosslogic.domain.deployment import DEFAULT_SCALING, RegionTarget, Replica, ScalingSettings


@dataclass(frozen=True)
class DeploymentScalingInput:
    """The keeper of one deployment's promise. `memories` cross continue-as-new; leave them out."""

    deployment: str
    memories: list[RegionMemory] = field(default_factory=list[RegionMemory])


@dataclass(frozen=True)
class DeploymentSurvey:
    """A deployment as Postgres has it: its targets, and its nodes newest first, recent ends included.

    While it `is_rolling`, a roll-out replaces its nodes, and none is drained for being too many.
    """

    exists: bool
    model: str = ""
    targets: list[RegionTarget] = field(default_factory=list[RegionTarget])
    replicas: list[Replica] = field(default_factory=list[Replica])
    settings: ScalingSettings = DEFAULT_SCALING
    is_rolling: bool = False


@dataclass(frozen=True)
class PlanRequest:
    """Decide for a deployment now, with what was remembered of its regions the last time."""

    deployment: str
    memories: list[RegionMemory] = field(default_factory=list[RegionMemory])


@dataclass(frozen=True)
class DeploymentPlan:
    """What to do in each region, and what to remember."""

    exists: bool
    model: str = ""
    plans: list[RegionPlan] = field(default_factory=list[RegionPlan])
    memories: list[RegionMemory] = field(default_factory=list[RegionMemory])


@dataclass(frozen=True)
class ReplicaOrder:
    """One more node for a deployment; its row is written before its workflow starts, so that it counts at once."""

    deployment: str
    model: str
    region: str
    node_id: str
    workflow_id: str
    gpu: str = ""  # Empty: the cheapest that holds the model.
    spot: bool = True
    revision: int = 0  # 0: the one that serves.
    is_held: bool = False


@dataclass(frozen=True)
class ReplicaDrain:
    """One node too many. `workflow_id` is who is responsible for it, to be told."""

    node_id: str
    workflow_id: str = ""
