"""A deployment: the promise to serve one model in given regions with so many replicas."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY, NodeState

# After a node of a deployment failed in a region, wait this long before ordering another there; doubled for each
# failure in a row. Long enough that a broken image does not rent machines in a loop, short enough for a spot dip.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True, slots=True)
class RegionTarget:
    """How many replicas a region must have."""

    region: str
    replicas_min: int
    replicas_max: int


@dataclass(frozen=True, slots=True)
class Replica:
    """A node as its deployment sees it. `ended_for_s` counts from its final state."""

    node_id: str
    region: str
    state: NodeState
    is_tombstoned: bool = False
    ended_for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """What to do in one region now: order `missing` nodes, or look again in `look_again_s`."""

    region: str
    missing: int
    look_again_s: float
    reason: str


def counts(replica: Replica) -> bool:
    """Does this node stand for a replica: serving or on its way, and not on its way out?"""
    return not replica.is_tombstoned and replica.state not in FINAL_STATES and replica.state is not NodeState.DRAINING


def failed(replica: Replica) -> bool:
    """Did this node never come to serve, or break? One that is being undone before it served counts already."""
    return replica.state is NodeState.FAILED or (replica.is_tombstoned and replica.state in ON_THE_WAY)


def plan_region(target: RegionTarget, replicas: Sequence[Replica], idle_s: float = 30.0) -> RegionPlan:
    """Decide for one region. `replicas` are the region's nodes, newest first, recent ends included.

    Failures in a row are the newest nodes that failed, up to the first that did not; they delay the next order, twice
    as long each time. A node that was lost or terminated is replaced at once.
    """
    present = sum(counts(replica) for replica in replicas)
    missing = max(0, target.replicas_min - present)
    words = f"{present} of {target.replicas_min} replicas present"
    if not missing:
        return RegionPlan(target.region, 0, idle_s, words)
    gone = [replica for replica in replicas if not counts(replica)]
    failures = list(itertools.takewhile(failed, gone))
    if failures:
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(len(failures) - 1, 16))
        left_s = pause_s - failures[0].ended_for_s
        if left_s > 0:
            return RegionPlan(
                target.region, 0, left_s, f"{words}; waiting {left_s:.0f} s after {len(failures)} failure(s) in a row"
            )
    return RegionPlan(target.region, missing, idle_s, f"{words}; ordering {missing}")
