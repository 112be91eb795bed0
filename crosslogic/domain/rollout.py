"""A roll-out's next step: surge, verify, shift traffic, retire; or the way back to the old revision.

Every function is pure and looks at the world as it is now, so that a roll-out goes on from wherever it was left. What
must hold at any moment (F8): a region's serving nodes are never retired below its floor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from crosslogic.domain.errors import Rejected
from crosslogic.domain.node import ON_THE_WAY, NodeState

# All traffic, in basis points.
WHOLE_BP = 10_000
# Nodes ordered or retired between two looks at the world.
BATCH = 20


@dataclass(frozen=True, slots=True)
class RolloutPolicy:
    """How fast, how much at once, and what is good enough.

    `steps_bp`: the new revision's shares of traffic, in basis points, growing to 10 000. `hold_at_bp`: no further than
    this until somebody promotes it; 0: no hold. A region has at most `max_surge_nodes` nodes more than it needs (0:
    `max_surge_percent` of them, at least one), and all together cost at most `max_surge_microdollars_per_h` more (0: no
    bound; nodes whose price is unknown cost nothing).
    """

    steps_bp: Sequence[int] = (500, 2_500, 5_000, WHOLE_BP)
    hold_at_bp: int = 0
    max_surge_nodes: int = 0
    max_surge_percent: int = 25
    max_surge_microdollars_per_h: int = 0
    max_latency_ratio: float = 1.5
    max_error_rate: float = 0.02
    min_requests: int = 20

    def check(self) -> None:
        """Raise Rejected for a policy that leads nowhere."""
        steps = list(self.steps_bp)
        if not steps or steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] != WHOLE_BP or len(steps) > 100:
            raise Rejected(
                "steps_bp are growing shares in basis points, at most 100 of them, that end with 10000.",
                code="invalid_policy",
                param="steps_bp",
            )
        bounds = (
            ("hold_at_bp", 0, WHOLE_BP),
            ("max_surge_nodes", 0, 1000),
            ("max_surge_percent", 0, 100),
            ("max_surge_microdollars_per_h", 0, 10**12),
            ("max_latency_ratio", 1, 1000),
            ("max_error_rate", 0, 1),
            ("min_requests", 1, 1_000_000),
        )
        for name, least, most in bounds:
            if not least <= getattr(self, name) <= most:
                raise Rejected(f"{name} must be from {least} to {most}.", code="invalid_policy", param=name)


@dataclass(frozen=True, slots=True)
class RegionFloor:
    """What a region needs: `replicas` nodes of the revision that wins, and never less than its floor on the way.

    `replicas` leaves out nodes that joined; `replicas_min` counts them. The reservations (tokens/s) must be backed with
    the largest node lost.
    """

    region: str
    replicas: int
    replicas_min: int = 0
    reserved_tokens_per_s: int = 0


@dataclass(frozen=True, slots=True)
class RolloutNode:
    """A node of the deployment as a roll-out sees it: one that has a machine or will have one.

    `is_held`: ready, but no request may be started there before it is verified. `is_leaving`: told to drain.
    """

    node_id: str
    region: str
    revision: int
    state: NodeState
    workflow_id: str = ""
    is_held: bool = False
    is_leaving: bool = False
    is_joined: bool = False
    capacity_tokens_per_s: int = 0
    price_microdollars_per_h: int = 0

    @property
    def serves(self) -> bool:
        """Is it part of the serving capacity?"""
        return self.state is NodeState.READY and not self.is_held and not self.is_leaving


class Act(StrEnum):
    """What to do next."""

    ORDER = "order"  # `count` nodes of `revision` in `region`.
    VERIFY = "verify"  # Those nodes, then let them serve.
    SHIFT = "shift"  # `traffic_bp` to the new revision.
    PROVE = "prove"  # Watch the share in force, and compare.
    COMMIT = "commit"  # The new revision is the serving one.
    RETIRE = "retire"  # Drain those nodes.
    HOLD = "hold"  # Until somebody promotes or aborts it.
    WAIT = "wait"  # Until the world has changed.
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Action:
    """One step and its reason in plain words."""

    act: Act
    reason: str
    region: str = ""
    revision: int = 0
    count: int = 0
    node_ids: list[str] = field(default_factory=list[str])
    traffic_bp: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a roll-out is: the share in force, the largest that has proven itself, and whether it was committed."""

    old_revision: int
    new_revision: int
    traffic_bp: int = 0
    proven_bp: int = 0
    is_committed: bool = False
    is_promoted: bool = False


def next_action(
    policy: RolloutPolicy, regions: Sequence[RegionFloor], nodes: Sequence[RolloutNode], standing: Standing
) -> Action:
    """The next step towards the new revision."""
    new = [node for node in nodes if node.revision == standing.new_revision]
    unproven = [node.node_id for node in new if node.state is NodeState.READY and node.is_held and not node.is_leaving]
    if unproven:
        return Action(Act.VERIFY, "asking the new nodes the golden prompts", node_ids=unproven)
    if standing.traffic_bp > standing.proven_bp:
        return Action(Act.PROVE, f"comparing the revisions at {percent(standing.traffic_bp)}")
    most = WHOLE_BP if standing.is_promoted or not policy.hold_at_bp else policy.hold_at_bp
    goal = min(most, next((step for step in policy.steps_bp if step > standing.proven_bp), WHOLE_BP))
    possible = min(goal, _carried_bp(regions, new))
    if possible > standing.traffic_bp:
        return Action(Act.SHIFT, f"{percent(possible)} of traffic to the new revision", traffic_bp=possible)
    waits: list[str] = []
    for region in regions:
        need = -(-goal * region.replicas // WHOLE_BP)
        have = _count(new, region.region)
        if have < need:
            room = _room(policy, regions, nodes, region)
            if room > 0:
                count = min(need - have, room, BATCH)
                reason = f"{count} new node(s) for {region.region}, which has {have} of {need}"
                return Action(Act.ORDER, reason, region.region, standing.new_revision, count)
            kept = region.replicas - _replaced(region.replicas, standing.proven_bp)
            retired = _retirable(region, nodes, _losers(nodes, standing, region), kept, region.replicas)
            if retired:
                return Action(Act.RETIRE, f"making room in {region.region}", node_ids=retired)
            if _is_settled(nodes, region) and _floor_room(policy, regions, nodes, region, have) > 0:
                return _for_floor(region, standing.new_revision)
            waits.append(f"{region.region} has no room for another node yet")
    if waits or any(node.state in ON_THE_WAY and not node.is_leaving for node in new):
        return Action(Act.WAIT, "; ".join(waits) or "the new nodes are on their way")
    if policy.hold_at_bp and not standing.is_promoted:
        return Action(Act.HOLD, f"held at {percent(standing.traffic_bp)}: send the signal promote, or abort")
    if not standing.is_committed:
        return Action(Act.COMMIT, f"revision {standing.new_revision} serves from now on")
    return _finish(policy, regions, nodes, standing)


def _finish(
    policy: RolloutPolicy, regions: Sequence[RegionFloor], nodes: Sequence[RolloutNode], standing: Standing
) -> Action:
    """Retire what is left of the old revision, as far as the floor allows."""
    old = [node for node in nodes if node.revision != standing.new_revision and not node.is_joined]
    if not old:
        return Action(Act.DONE, f"all nodes are of revision {standing.new_revision}")
    for region in regions:
        retired = _retirable(region, nodes, _losers(nodes, standing, region), 0, region.replicas)
        retired += [
            node.node_id
            for node in old
            if node.region == region.region and node.state in ON_THE_WAY and not node.is_leaving
        ]
        if retired:
            return Action(Act.RETIRE, f"{region.region} serves with new nodes", node_ids=retired[:BATCH])
    known = {region.region for region in regions}
    strays = [node.node_id for node in old if node.region not in known and not node.is_leaving]
    if strays:
        return Action(Act.RETIRE, "they are where the deployment promises nothing", node_ids=strays[:BATCH])
    for region in regions:
        have = _count((node for node in nodes if node.revision == standing.new_revision), region.region)
        is_left = any(node.region == region.region for node in old)
        if is_left and _is_settled(nodes, region) and _floor_room(policy, regions, nodes, region, have) > 0:
            return _for_floor(region, standing.new_revision)
    return Action(Act.WAIT, "the old nodes drain, or wait until the floor allows it")


def return_action(
    policy: RolloutPolicy,
    regions: Sequence[RegionFloor],
    nodes: Sequence[RolloutNode],
    standing: Standing,
    *,
    is_restoring: bool = True,
) -> Action:
    """The next step back to the old revision. Not `is_restoring`: its nodes cannot be had, so the floor must do."""
    if standing.traffic_bp or standing.is_committed:
        return Action(Act.SHIFT, f"no more traffic to revision {standing.new_revision} than others leave over")
    new = [node for node in nodes if node.revision == standing.new_revision and not node.is_joined]
    useless = [node.node_id for node in new if not node.serves and not node.is_leaving]
    if useless:
        return Action(Act.RETIRE, "they never served", node_ids=useless[:BATCH])
    old = [node for node in nodes if node.revision != standing.new_revision]
    is_whole = True
    for region in regions:
        joined = sum(node.is_joined and node.serves for node in nodes if node.region == region.region)
        need = region.replicas if is_restoring else max(0, region.replicas_min - joined)
        losers = [node for node in new if node.region == region.region and node.serves]
        retired = _retirable(region, nodes, losers, 0, need)
        if retired:
            return Action(Act.RETIRE, f"{region.region} serves with old nodes", node_ids=retired)
        have = _count(old, region.region)
        serving = sum(node.serves and not node.is_joined for node in old if node.region == region.region)
        is_whole = is_whole and serving >= need
        if have < need and (room := _room(policy, regions, nodes, region)) > 0:
            count = min(need - have, room, BATCH)
            reason = f"{count} old node(s) for {region.region}, which has {have} of {need}"
            return Action(Act.ORDER, reason, region.region, standing.old_revision, count)
        if losers and _is_settled(nodes, region) and _floor_room(policy, regions, nodes, region, have) > 0:
            return _for_floor(region, standing.old_revision)
    known = {region.region for region in regions}
    strays = [node.node_id for node in new if node.region not in known and not node.is_leaving]
    if strays:
        return Action(Act.RETIRE, "they are where the deployment promises nothing", node_ids=strays[:BATCH])
    if is_whole and not new:
        return Action(Act.DONE, f"revision {standing.old_revision} serves as before")
    return Action(Act.WAIT, "nodes of the old revision come, those of the new one drain")


def holds_floor(region: RegionFloor, serving: Iterable[RolloutNode]) -> bool:
    """Would these serving nodes of the region be enough (F8)?"""
    capacities = [node.capacity_tokens_per_s for node in serving]
    if len(capacities) < region.replicas_min:
        return False
    return not region.reserved_tokens_per_s or sum(capacities) - max(capacities, default=0) >= (
        region.reserved_tokens_per_s
    )


def _losers(nodes: Sequence[RolloutNode], standing: Standing, region: RegionFloor) -> list[RolloutNode]:
    """The region's serving nodes that a new one takes the place of."""
    return [
        node
        for node in nodes
        if node.region == region.region
        and node.serves
        and node.revision != standing.new_revision
        and not node.is_joined
    ]


def _retirable(
    region: RegionFloor, nodes: Sequence[RolloutNode], losers: Sequence[RolloutNode], kept: int, least: int
) -> list[str]:
    """Those of the losing nodes that may go now: `kept` of them stay, and `least` nodes (but those joined) serve."""
    serving = [node for node in nodes if node.region == region.region and node.serves]
    retired: list[str] = []
    # The weakest first: what stays is worth more.
    for node in sorted(losers, key=lambda node: (node.capacity_tokens_per_s, node.node_id)):
        if len(losers) - len(retired) <= kept or len(retired) == BATCH:
            break
        rest = [other for other in serving if other is not node]
        if sum(not other.is_joined for other in rest) < least or not holds_floor(region, rest):
            break
        serving = rest
        retired.append(node.node_id)
    return retired


def _count(nodes: Iterable[RolloutNode], region: str) -> int:
    """Nodes of the region that serve or will."""
    return sum(node.region == region and not node.is_leaving and not node.is_joined for node in nodes)


def _carried_bp(regions: Sequence[RegionFloor], new: Sequence[RolloutNode]) -> int:
    """The share that the new nodes can carry: where they are fewest decides."""
    shares = [
        WHOLE_BP * sum(node.serves for node in new if node.region == region.region) // region.replicas
        for region in regions
        if region.replicas
    ]
    return min(WHOLE_BP, *shares) if shares else 0


def _replaced(replicas: int, proven_bp: int) -> int:
    """How many of so many replicas a share has replaced: the most whose `_carried_bp` is not above it."""
    return min(replicas, ((proven_bp + 1) * replicas - 1) // WHOLE_BP)


def _is_settled(nodes: Sequence[RolloutNode], region: RegionFloor) -> bool:
    """Has whatever was ordered or told to drain there come or gone?"""
    return all(node.serves for node in nodes if node.region == region.region)


def _for_floor(region: RegionFloor, revision: int) -> Action:
    """One node more: there are as many as before, and the floor still wants those that are to go."""
    reason = (
        f"one more for {region.region}, whose reservations need it: its new nodes are slower than those they replace"
    )
    return Action(Act.ORDER, reason, region.region, revision, 1)


def _room(
    policy: RolloutPolicy, regions: Sequence[RegionFloor], nodes: Sequence[RolloutNode], region: RegionFloor
) -> int:
    """How many more machines the region may have now; those that are leaving still count."""
    surge = policy.max_surge_nodes or max(1, -(-region.replicas * policy.max_surge_percent // 100))
    return min(surge - _excess(nodes, region), _affordable(policy, regions, nodes))


def _floor_room(
    policy: RolloutPolicy,
    regions: Sequence[RegionFloor],
    nodes: Sequence[RolloutNode],
    region: RegionFloor,
    winners: int,
) -> int:
    """The same where the floor wants more: no surge binds it then, but twice as many are enough for anything."""
    if not region.reserved_tokens_per_s:
        return 0
    return min(2 * region.replicas + 1 - winners, _affordable(policy, regions, nodes))


def _affordable(policy: RolloutPolicy, regions: Sequence[RegionFloor], nodes: Sequence[RolloutNode]) -> int:
    """How many more machines the policy's spend allows."""
    price = max((node.price_microdollars_per_h for node in nodes), default=0)
    if not policy.max_surge_microdollars_per_h or not price:
        return 1_000
    spent = sum(max(0, _excess(nodes, region)) for region in regions)
    return policy.max_surge_microdollars_per_h // price - spent


def _excess(nodes: Sequence[RolloutNode], region: RegionFloor) -> int:
    """By how much the region's machines are more than its replicas; below 0 where some are missing."""
    return sum(node.region == region.region and not node.is_joined for node in nodes) - region.replicas


def percent(share_bp: int) -> str:
    """Basis points as people read them."""
    return f"{share_bp / 100:g} %"


@dataclass(frozen=True, slots=True)
class RevisionFigures:
    """What a revision's requests were like since a share came into force. Medians; 0 where nothing was measured."""

    requests: int = 0
    errors: int = 0
    ms_per_token_p50: float = 0.0
    ttft_ms_p50: float = 0.0


class GateVerdict(StrEnum):
    """What a comparison says."""

    PASSED = "passed"
    FAILED = "failed"
    TOO_FEW = "too_few"  # Requests to tell anything.


# A first token that comes so much later is no news, whatever the ratio.
TTFT_SLACK_MS = 100.0
MS_PER_TOKEN_SLACK = 2.0


def judge_gate(policy: RolloutPolicy, old: RevisionFigures, new: RevisionFigures) -> tuple[GateVerdict, str]:
    """May the new revision's share grow? With the reason in plain words.

    Errors are compared with what the old revision has too, so that the world's trouble is not blamed on the new one.
    """
    if new.requests + new.errors < policy.min_requests:
        return GateVerdict.TOO_FEW, f"{new.requests + new.errors} of {policy.min_requests} requests so far"
    rate, usual = _error_rate(new), _error_rate(old)
    if rate > max(policy.max_error_rate, usual * policy.max_latency_ratio):
        return GateVerdict.FAILED, f"{rate:.1%} of the new revision's requests failed, {usual:.1%} of the old one's"
    for what, slow, usual_ms, slack_ms in (
        ("first token", new.ttft_ms_p50, old.ttft_ms_p50, TTFT_SLACK_MS),
        ("each token", new.ms_per_token_p50, old.ms_per_token_p50, MS_PER_TOKEN_SLACK),
    ):
        if usual_ms and slow > max(usual_ms * policy.max_latency_ratio, usual_ms + slack_ms):
            return GateVerdict.FAILED, f"{what} takes {slow:.0f} ms, with the old revision {usual_ms:.0f} ms"
    return GateVerdict.PASSED, f"{new.requests} requests, {rate:.1%} failed, as fast as the old revision"


def _error_rate(figures: RevisionFigures) -> float:
    asked = figures.requests + figures.errors
    return figures.errors / asked if asked else 0.0
