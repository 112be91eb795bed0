"""A deployment: the promise to serve one model in given regions with so many replicas."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY, NodeState

# After a node of a deployment failed in a region, wait this long before ordering another there; doubled for each
# failure in a row. Long enough that a broken image does not rent machines in a loop, short enough for a spot dip.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


class Placement(StrEnum):
    """Where a region's replicas stand."""

    SPREAD = "spread"  # Over zones, so that one zone's loss is not all of them.
    PACKED = "packed"  # Close together.


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """What a deployment says of its own growth; it holds in each of its regions."""

    placement: Placement = Placement.SPREAD
    on_demand_base: int = 0  # So many replicas of a region are not spot machines.
    ttft_target_ms: int | None = None  # The time to first token that 99 % of streams keep; None: no target.
    # For all regions and all machines that run, in whatever state; None: no cap.
    spend_cap_microdollars_per_h: int | None = None
    idle_s: int = 600  # Without a request for so long, a region whose replicas_min is 0 is scaled to zero.
    gpus: tuple[str, ...] = ()  # Best first; a GPU that cannot be had gives way to the next. Empty: the cheapest.


DEFAULT_SCALING = ScalingSettings()


@dataclass(frozen=True, slots=True)
class RegionTarget:
    """How many replicas a region must have."""

    region: str
    replicas_min: int
    replicas_max: int


@dataclass(frozen=True, slots=True)
class Replica:
    """A node as its deployment sees it. `ended_for_s` counts from its final state, `age_s` from its order.

    `running` is what its engine said last: requests that are being generated; None when it has not been heard.
    """

    node_id: str
    region: str
    state: NodeState
    is_tombstoned: bool = False
    ended_for_s: float = 0.0
    is_pinned: bool = False
    is_spot: bool = False
    gpu: str = ""
    zone: str = ""
    capacity_tokens_per_s: int = 0  # 0: unknown.
    price_microdollars_per_h: int = 0  # 0: unknown.
    age_s: float = 0.0
    running: int | None = None
    waiting: int | None = None
    kv_cache_used: float | None = None  # 0 to 1.


def counts(replica: Replica) -> bool:
    """Does this node stand for a replica: serving or on its way, and not on its way out?"""
    return not replica.is_tombstoned and replica.state not in FINAL_STATES and replica.state is not NodeState.DRAINING


def serves(replica: Replica) -> bool:
    """May requests be started there?"""
    return replica.state is NodeState.READY and not replica.is_tombstoned


def failed(replica: Replica) -> bool:
    """Did this node never come to serve, or break? One that is being undone before it served counts already."""
    return replica.state is NodeState.FAILED or (replica.is_tombstoned and replica.state in ON_THE_WAY)


def failures_in_a_row(replicas: Sequence[Replica]) -> list[Replica]:
    """A region's newest nodes that failed, up to the first that did not. `replicas` are newest first, ends included."""
    gone = [replica for replica in replicas if not counts(replica)]
    return list(itertools.takewhile(failed, gone))


def pause_left_s(failures: Sequence[Replica]) -> float:
    """How long the next order waits after these failures in a row: twice as long after each. 0 after none."""
    if not failures:
        return 0.0
    pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(len(failures) - 1, 16))
    return max(0.0, pause_s - failures[0].ended_for_s)
