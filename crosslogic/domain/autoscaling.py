"""Autoscaling: how many replicas a region should have, which to order and which to drain, and why.

Work is counted in tokens as routing counts it: those to be generated and a tenth of the prompt's. `now` is in Unix
seconds.

The number grows with what needs it most: the work that arrives, the work in flight and queued, the engines' KV caches
and queues, the time to first token, reservations. Work that arrives is served with a reserve that grows with its root
(Halfin and Whitt, "Heavy-traffic limits for queues with many exponential servers", 1981): a small fleet needs a larger
share of spare room for the same wait than a large one.

It grows at once and shrinks slowly: to the most that was needed within a window as long as a node takes to come back.
Whatever cannot be seen is no reason to change anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from crosslogic.domain.deployment import (
    Placement,
    RegionTarget,
    Replica,
    ScalingSettings,
    counts,
    failures_in_a_row,
    pause_left_s,
    serves,
)
from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY

# A GPU that could not be had is not asked for again this long, while another will do.
GPU_PAUSE_S = 600.0
# Where nothing has been measured yet: how long a node takes from its order to its first request.
USUAL_LEAD_TIME_S = 300.0
# A node that was told to drain has begun to by then; if it has not, it is told again.
DRAIN_BEGINS_S = 60.0
# Rates and times to first token are those of the last minute.
RATE_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """The policy's constants. The backtest (`python -m bench.autoscaling`) chose those that it can judge."""

    # Spare nodes in roots of the nodes that the arriving work occupies: to begin with, and the bounds between which it
    # is learnt. A minute of first tokens above their target adds so much, a minute below takes so much away.
    headroom: float = 1.0
    least_headroom: float = 0.5
    most_headroom: float = 6.0
    headroom_up_per_min: float = 1.0
    headroom_down_per_min: float = 0.015
    # A pool counts as full with so much work in flight and queued, in seconds of its capacity; CROSSLOGIC_FULL_LOAD_S.
    full_load_s: float = 30.0
    # Above these shares of what is full more nodes are wanted.
    most_load: float = 0.6
    most_kv_cache_used: float = 0.85
    most_engine_queue: float = 0.2
    # Slow first tokens call for nodes only where work is a cause: below this share of the capacity it is not.
    slow_from_load: float = 0.3
    # At most so many times the serving nodes are asked for at once because of their engines' queues.
    most_growth: float = 1.5
    # The window over which the most that was needed is kept: so many lead times, within bounds.
    window_lead_times: float = 2.0
    shortest_window_s: float = 600.0
    longest_window_s: float = 1800.0
    # After a step down the number does not grow for so long, unless a promise needs it to.
    rise_cooldown_s: float = 30.0
    # Between two looks: at a region whose number may change, and at one that is fixed.
    look_s: float = 10.0
    fixed_look_s: float = 30.0
    # Orders of one look: a large deployment grows in batches, and a look comes in between.
    batch: int = 20

    def window_s(self, lead_time_s: float) -> float:
        """How long what was needed is remembered, where a node takes so long to come."""
        return min(self.longest_window_s, max(self.shortest_window_s, self.window_lead_times * lead_time_s))


DEFAULT_RULES = ScalingRules()


@dataclass(frozen=True, slots=True)
class Demand:
    """What all API processes together saw of one model in one region, just now."""

    tokens_in_flight: float = 0.0
    queued_requests: int = 0
    queued_tokens: float = 0.0
    arrival_tokens_per_s: float = 0.0  # Over the last minute.
    served_tokens_per_s: float = 0.0
    held_requests: int = 0  # They wait for a first node, or went elsewhere because there was none.
    sheds_per_s: float = 0.0
    ttft_ms_p50: float | None = None  # Of streams, over the last minute; None: too few to say.
    ttft_ms_p99: float | None = None

    @property
    def is_idle(self) -> bool:
        """Does nobody ask for anything?"""
        return not (
            self.tokens_in_flight > 0
            or self.queued_requests
            or self.held_requests
            or self.arrival_tokens_per_s > 0
            or self.sheds_per_s > 0
        )


@dataclass(frozen=True, slots=True)
class Need:
    """So many replicas were needed at that time."""

    at: float
    replicas: int


@dataclass(frozen=True, slots=True)
class RegionMemory:
    """What the policy remembers of a region from one look to the next.

    `needs` are those of the window that no later one exceeds, oldest first. `direction` is that of the last change: 1
    up, -1 down, 0 none yet. `capacity_tokens_per_s` is the most that a node there has been seen to do; as many as
    `serving` have served since `serving_since`. `headroom` is what has been learnt of how bursty the traffic is, by
    `seen_at`. `drains` are the nodes that were told to drain at the last change and have perhaps not begun to.
    """

    region: str
    desired: int
    changed_at: float = 0.0
    direction: int = 0
    busy_at: float = 0.0
    needs: tuple[Need, ...] = ()
    capacity_tokens_per_s: float = 0.0
    serving: int = 0
    serving_since: float = 0.0
    headroom: float = 0.0
    seen_at: float = 0.0
    drains: tuple[str, ...] = ()

    def forgetting(self, node_ids: Collection[str]) -> RegionMemory:
        """The same, without having told these nodes to drain."""
        return replace(self, drains=tuple(node_id for node_id in self.drains if node_id not in node_ids))


@dataclass(frozen=True, slots=True)
class Sight:
    """A region as it is now. `replicas` are the deployment's nodes there, newest first, recent ends included.

    `demand` is None while no API process says anything. `spend_left_microdollars_per_h` is what the deployment's cap
    leaves for more machines; None: there is no cap.
    """

    now: float
    replicas: Sequence[Replica]
    demand: Demand | None = None
    reserved_tokens_per_s: int = 0
    lead_time_s: float = USUAL_LEAD_TIME_S
    spend_left_microdollars_per_h: int | None = None
    is_rolling: bool = False


@dataclass(frozen=True, slots=True)
class NodeKind:
    """What to order: an empty GPU is the cheapest that holds the model."""

    gpu: str = ""
    is_spot: bool = True


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """What to do in one region now, and why in one line. Look again in `look_again_s`."""

    region: str
    desired: int
    reason: str
    look_again_s: float
    present: int = 0
    serving: int = 0
    orders: tuple[NodeKind, ...] = ()
    drains: tuple[str, ...] = ()
    needed: int | None = None  # None: it could not be seen.


def decide(
    target: RegionTarget,
    settings: ScalingSettings,
    sight: Sight,
    memory: RegionMemory | None,
    rules: ScalingRules = DEFAULT_RULES,
) -> tuple[RegionPlan, RegionMemory]:
    """Decide for one region; the plan, and what to remember of it.

    replicas_min ≤ desired ≤ replicas_max, always. No order brings the spending above the cap. Inside a cooldown the
    number never turns round by load (but from zero, for whoever waits there). The last serving replica is only drained
    where none is wanted. Pinned nodes count and are never drained (F7).
    """
    told = memory.drains if memory is not None and sight.now - memory.changed_at < DRAIN_BEGINS_S else ()
    present = [replica for replica in sight.replicas if counts(replica) and replica.node_id not in told]
    serving = sum(map(serves, present))
    if memory is None or memory.region != target.region:
        memory = _first_memory(target, len(present), sight)
    memory = _learn_capacity(memory, serving, sight)
    memory = _learn_headroom(memory, settings, serving, sight, rules)
    floor, floor_reason = _floor(target, memory, present, sight)
    if sight.demand is None:
        needed = None
        reason = "no API process says what is asked for: holding"
        memory = replace(memory, needs=_kept(memory.needs, Need(sight.now, memory.desired), rules, sight))
        wanted = memory.desired
    else:
        if not sight.demand.is_idle:
            memory = replace(memory, busy_at=sight.now)
        needed, reason = _needed(settings, sight, sight.demand, memory, serving, rules)
        memory = replace(memory, needs=_kept(memory.needs, Need(sight.now, needed), rules, sight))
        wanted, reason = _paced(memory, needed, reason, sight, rules)
    if floor > wanted:
        wanted, reason = floor, floor_reason
    desired = min(max(wanted, target.replicas_min), target.replicas_max)
    if desired < wanted:
        reason += f"; replicas_max is {target.replicas_max}"
    if sight.is_rolling and desired < memory.desired:
        desired = min(memory.desired, target.replicas_max)
        reason += "; a roll-out is in progress: not fewer"
    if desired != memory.desired:
        direction = 1 if desired > memory.desired else -1
        memory = replace(memory, desired=desired, changed_at=sight.now, direction=direction)
    plan = RegionPlan(
        region=target.region,
        desired=desired,
        reason=reason,
        look_again_s=rules.fixed_look_s if target.replicas_min == target.replicas_max else rules.look_s,
        present=len(present),
        serving=serving,
        needed=needed,
    )
    if desired > len(present):
        return _growing(plan, settings, sight, present, rules), memory
    if desired < len(present) and not sight.is_rolling:
        plan = _shrinking(plan, settings, present)
        if plan.drains:
            memory = replace(memory, drains=(*told, *plan.drains), changed_at=sight.now)
        return plan, memory
    return _worded(plan, ""), memory


def _first_memory(target: RegionTarget, present: int, sight: Sight) -> RegionMemory:
    """What is there is taken to be needed, until a whole window has shown that it is not."""
    desired = min(max(present, target.replicas_min), target.replicas_max)
    busy_at = sight.now if present else -math.inf
    return RegionMemory(target.region, desired, sight.now, 0, max(0.0, busy_at), (Need(sight.now, present),))


def _learn_capacity(memory: RegionMemory, serving: int, sight: Sight) -> RegionMemory:
    """A node can do what it has been seen to do, whatever the measurement at its admission said.

    Only while their number has not changed for longer than rates look back: else one node would be credited with the
    work of others that have gone.
    """
    if serving != memory.serving:
        return replace(memory, serving=serving, serving_since=sight.now)
    if not serving or sight.demand is None or sight.now - memory.serving_since < 2 * RATE_WINDOW_S:
        return memory
    seen = sight.demand.served_tokens_per_s / serving
    # Less than a token a second is no speed, and a divisor that asks for any number of nodes.
    return replace(memory, capacity_tokens_per_s=seen) if seen > max(1.0, memory.capacity_tokens_per_s) else memory


def _learn_headroom(
    memory: RegionMemory, settings: ScalingSettings, serving: int, sight: Sight, rules: ScalingRules
) -> RegionMemory:
    """Where first tokens come late although every node that was wanted serves, the traffic is burstier than thought."""
    headroom = memory.headroom or rules.headroom
    passed_min = min(60.0, max(0.0, sight.now - memory.seen_at)) / 60
    demand, target_ms = sight.demand, settings.ttft_target_ms
    if demand is not None and target_ms and demand.ttft_ms_p99 is not None and serving:
        capacity = _capacity(memory, sight.replicas) * serving
        is_loaded = capacity > 0 and demand.arrival_tokens_per_s >= rules.slow_from_load * capacity
        if demand.ttft_ms_p99 <= target_ms:
            headroom = max(rules.least_headroom, headroom - passed_min * rules.headroom_down_per_min)
        elif is_loaded and serving >= memory.desired:
            headroom = min(rules.most_headroom, headroom + passed_min * rules.headroom_up_per_min)
    return replace(memory, headroom=headroom, seen_at=sight.now)


def _capacity(memory: RegionMemory, replicas: Sequence[Replica]) -> float:
    """What one node does, in tokens a second; 0 where nobody knows."""
    known = [one.capacity_tokens_per_s for one in replicas if serves(one) and one.capacity_tokens_per_s]
    known = known or [one.capacity_tokens_per_s for one in replicas if one.capacity_tokens_per_s]
    return max(sum(known) / len(known) if known else 0.0, memory.capacity_tokens_per_s)


def _floor(target: RegionTarget, memory: RegionMemory, present: Sequence[Replica], sight: Sight) -> tuple[int, str]:
    """What is promised whatever the load: the minimum, a node for who waits for a first one, and all reservations with
    one node lost.
    """
    floor, reason = target.replicas_min, f"replicas_min is {target.replicas_min}"
    if not floor and sight.demand is not None and sight.demand.held_requests:
        floor, reason = 1, f"{sight.demand.held_requests} requests wait for a first node"
    reserved = sight.reserved_tokens_per_s
    if reserved > 0:
        # The measurement, not the most that was seen: what is sold must be there at any mix of requests.
        measured = [one.capacity_tokens_per_s for one in present if one.capacity_tokens_per_s]
        capacity = min(measured) if measured else memory.capacity_tokens_per_s
        backing = _nodes(reserved / capacity) if capacity else 1
        if backing + 1 > floor:
            floor = backing + 1
            reason = f"{reserved} tokens/s are reserved: {backing} to hold them, and one that may be lost"
    return floor, reason


def _needed(
    settings: ScalingSettings,
    sight: Sight,
    demand: Demand,
    memory: RegionMemory,
    serving: int,
    rules: ScalingRules,
) -> tuple[int, str]:
    """How many replicas the load needs, and the signal that needs most."""
    if sight.now - memory.busy_at >= settings.idle_s and demand.is_idle:
        return 0, "nothing is asked for"
    capacity = _capacity(memory, sight.replicas)
    signals: list[tuple[float, str]] = [(1.0, "nothing is asked for now" if demand.is_idle else "little is asked for")]
    work = demand.tokens_in_flight + demand.queued_tokens
    if capacity:
        occupied = demand.arrival_tokens_per_s / capacity
        each = f"a node does {capacity:.0f}"
        signals.append(
            (
                occupied + memory.headroom * math.sqrt(occupied),
                f"{demand.arrival_tokens_per_s:.0f} tokens/s arrive, {each} (headroom {memory.headroom:.1f})",
            )
        )
        full = work / (capacity * rules.full_load_s)
        signals.append((full / rules.most_load, f"{work:.0f} tokens are in flight or queued, {each} tokens/s"))
    elif demand.queued_requests:
        signals.append((serving + 1.0, f"{demand.queued_requests} requests are queued"))
    if serving:
        signals += _engine_signals(sight.replicas, serving, rules)
    replicas, reason = max(signals)
    return _nodes(replicas), reason


def _engine_signals(replicas: Sequence[Replica], serving: int, rules: ScalingRules) -> list[tuple[float, str]]:
    """What the engines of the serving nodes say of themselves."""
    signals: list[tuple[float, str]] = []
    heard = [one for one in replicas if serves(one)]
    caches = [one.kv_cache_used for one in heard if one.kv_cache_used is not None]
    if caches:
        used = sum(caches) / len(caches)
        if used > rules.most_kv_cache_used:
            signals.append((serving * used / rules.most_kv_cache_used, f"KV caches are {used:.0%} full"))
    running = sum(one.running or 0 for one in heard)
    waiting = sum(one.waiting or 0 for one in heard)
    if waiting > rules.most_engine_queue * running:
        growth = min(rules.most_growth, 1 + waiting / max(1, running + waiting))
        signals.append((serving * growth, f"{waiting} requests wait in the engines, {running} run"))
    return signals


def _kept(needs: tuple[Need, ...], newest: Need, rules: ScalingRules, sight: Sight) -> tuple[Need, ...]:
    """The needs of the window that no later one reaches, with the newest: their first is the window's largest."""
    since = sight.now - rules.window_s(sight.lead_time_s)
    larger = [need for need in needs if need.at > since and need.replicas > newest.replicas]
    return (*larger, newest)


def _paced(memory: RegionMemory, needed: int, reason: str, sight: Sight, rules: ScalingRules) -> tuple[int, str]:
    """Up at once, down to the most that the window needed; never round inside a cooldown."""
    desired = memory.desired
    since_s = sight.now - memory.changed_at
    if not needed:
        # Nothing for `idle_s`: that is a window of its own.
        return 0, reason
    if needed > desired:
        if memory.direction < 0 and since_s < rules.rise_cooldown_s:
            return desired, f"{reason}: {needed}, but it shrank {since_s:.0f} s ago"
        return needed, reason
    window_s = rules.window_s(sight.lead_time_s)
    peak = memory.needs[0].replicas
    if peak >= desired:
        return desired, reason if needed == desired else f"{reason}: {needed}, but {peak} within {window_s:.0f} s"
    if memory.direction > 0 and since_s < window_s:
        return desired, f"{reason}: {needed}, but it grew {since_s:.0f} s ago"
    return peak, f"{reason}: at most {peak} within {window_s:.0f} s"


def _growing(
    plan: RegionPlan, settings: ScalingSettings, sight: Sight, present: Sequence[Replica], rules: ScalingRules
) -> RegionPlan:
    """Order what is missing, as far as failures and the cap allow."""
    missing = plan.desired - len(present)
    failures = failures_in_a_row(sight.replicas)
    left_s = pause_left_s(failures)
    if left_s > 0:
        waiting = f"waiting {left_s:.0f} s after {len(failures)} failure(s) in a row"
        return _worded(replace(plan, look_again_s=min(plan.look_again_s, left_s)), waiting)
    wanted, words = missing, f"ordering {missing}"
    if missing > rules.batch:
        wanted, words = rules.batch, f"ordering {rules.batch} of {missing}, {rules.batch} at a time"
        plan = replace(plan, look_again_s=1.0)
    left = sight.spend_left_microdollars_per_h
    if left is not None:
        affordable, price = _affordable(left, sight.replicas)
        if affordable < wanted:
            wanted = affordable
            cost = f"at {price / 1e6:.2f} USD/h each" if price else "of a price that nobody knows yet"
            words = f"ordering {wanted} of {missing}: the cap leaves {max(0, left) / 1e6:.2f} USD/h for nodes {cost}"
    kind_gpu = _gpu(settings.gpus, sight.replicas)
    on_demand = sum(not one.is_spot for one in present)
    orders = tuple(NodeKind(kind_gpu, on_demand + place >= settings.on_demand_base) for place in range(wanted))
    return _worded(replace(plan, orders=orders), words)


def _affordable(left_microdollars_per_h: int, replicas: Sequence[Replica]) -> tuple[int, int]:
    """How many more nodes the cap allows, and the price that was reckoned with: the dearest one seen.

    Where no price is known yet the first node shows it: one, while none is there.
    """
    price = max((one.price_microdollars_per_h for one in replicas), default=0)
    if price:
        return max(0, left_microdollars_per_h // price), price
    is_alone = not any(one.state not in FINAL_STATES for one in replicas)
    return int(is_alone and left_microdollars_per_h > 0), 0


def _gpu(gpus: Sequence[str], replicas: Sequence[Replica]) -> str:
    """The first GPU of the list that has not failed lately; if all have, the one whose failure is the oldest."""
    if not gpus:
        return ""
    failed_for_s = dict.fromkeys(gpus, math.inf)
    for one in failures_in_a_row(replicas):
        if one.gpu in failed_for_s:
            failed_for_s[one.gpu] = min(failed_for_s[one.gpu], one.ended_for_s)
    free = [gpu for gpu in gpus if failed_for_s[gpu] >= GPU_PAUSE_S]
    return free[0] if free else max(gpus, key=lambda gpu: failed_for_s[gpu])


def _shrinking(plan: RegionPlan, settings: ScalingSettings, present: Sequence[Replica]) -> RegionPlan:
    drains = choose_surplus(present, len(present) - plan.desired, plan.desired, settings)
    kept = len(present) - plan.desired - len(drains)
    words = f"draining {len(drains)}" + (f", keeping {kept} more that are pinned or needed to serve" if kept else "")
    return _worded(replace(plan, drains=tuple(one.node_id for one in drains)), words)


def choose_surplus(present: Sequence[Replica], count: int, desired: int, settings: ScalingSettings) -> list[Replica]:
    """Up to `count` nodes whose loss costs least, of those that stand for replicas; never a pinned one.

    Nodes on their way go first, the youngest of them: they serve nobody yet. Of those that serve, so many stay as are
    desired, because what is only on its way may never come; and the last one goes only where none is desired. Among
    them: one that keeps replicas spread (or packed), then the dearest, then the one with the fewest running requests,
    whose drain ends soonest, then the youngest, whose cache is coldest. Machines of the on-demand base stay.
    """
    removable = [one for one in present if not one.is_pinned]
    chosen = sorted((one for one in removable if one.state in ON_THE_WAY), key=lambda one: one.age_s)[:count]
    serving = [one for one in removable if serves(one)]
    spare = min(count - len(chosen), sum(map(serves, present)) - desired)
    on_demand = sum(not one.is_spot for one in present if one not in chosen)
    by_zone = Counter(one.zone for one in present if serves(one))
    while spare > 0:
        free = [one for one in serving if one.is_spot or on_demand > settings.on_demand_base or not desired]
        if not free:
            break
        sign = 1 if settings.placement is Placement.SPREAD else -1
        victim = min(
            free,
            key=lambda one: (
                -sign * by_zone[one.zone],
                -one.price_microdollars_per_h,
                one.running or 0,
                one.age_s,
                one.node_id,
            ),
        )
        chosen.append(victim)
        serving.remove(victim)
        by_zone[victim.zone] -= 1
        on_demand -= not victim.is_spot
        spare -= 1
    return chosen


def spending(replicas: Sequence[Replica]) -> int:
    """What the machines of these nodes cost, in microdollars an hour, while they run: draining ones do, too."""
    return sum(one.price_microdollars_per_h for one in replicas if one.state not in FINAL_STATES)


def _nodes(amount: float) -> int:
    # A sum of fractions must not ask for one more because of its last digit.
    return math.ceil(amount - 1e-9)


def _worded(plan: RegionPlan, action: str) -> RegionPlan:
    words = f"{plan.present} of {plan.desired} replicas present, {plan.serving} serving; {plan.reason}"
    return replace(plan, reason=f"{words}; {action}" if action else words)
