"""What autoscaling costs and keeps: `python -m bench.autoscaling` replays Azure's trace against several policies.

Ours is the product's own decision (`crosslogic.domain.autoscaling`), called as the workflow calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bench.fleet_model import (
    DAY_S,
    Machine,
    Node,
    Seen,
    Step,
    Workload,
    work_by_bin,
)
from crosslogic.domain.autoscaling import DEFAULT_RULES, Demand, RegionMemory, ScalingRules, Sight, decide
from crosslogic.domain.deployment import RegionTarget, Replica, ScalingSettings
from crosslogic.domain.node import NodeState

SLO_S = 5.0
REPLICAS_MIN, REPLICAS_MAX = 1, 40
# What a node does of such a mix, in tokens of work: what its admission would measure, if it could.
MIX_PROMPT, MIX_GENERATED = 2048, 28


class Ours:
    """The product's policy."""

    is_instant = False

    def __init__(
        self,
        machine: Machine,
        name: str = "ours",
        rules: ScalingRules = DEFAULT_RULES,
        forecast: Callable[[Sequence[tuple[float, float]], float], float] | None = None,
    ) -> None:
        self.name = name
        self.tick_s = rules.look_s
        self._rules = rules
        self._memory: RegionMemory | None = None
        self._capacity = round(capacity(machine))
        self._forecast = forecast
        self._rates: list[tuple[float, float]] = []

    def step(self, seen: Seen) -> Step:
        """Decide as the workflow does."""
        lead_s = sum(seen.lead_s) / len(seen.lead_s) if seen.lead_s else 300.0
        rate = seen.arrival_tokens_per_s
        if self._forecast is not None:
            self._rates.append((seen.now, rate))
            rate = max(rate, self._forecast(self._rates, lead_s))
        by_id = {f"node_{node.number:06}": node for node in seen.nodes}
        plan, self._memory = decide(
            RegionTarget("here", REPLICAS_MIN, REPLICAS_MAX),
            ScalingSettings(ttft_target_ms=round(SLO_S * 1000)),
            Sight(
                now=seen.now,
                replicas=[self._replica(name, node, seen.now) for name, node in reversed(by_id.items())],
                demand=Demand(
                    tokens_in_flight=seen.tokens_in_flight,
                    queued_requests=seen.queued_requests,
                    queued_tokens=seen.queued_tokens,
                    arrival_tokens_per_s=rate,
                    served_tokens_per_s=seen.served_tokens_per_s,
                    ttft_ms_p50=None if seen.ttft_s_p50 is None else seen.ttft_s_p50 * 1000,
                    ttft_ms_p99=None if seen.ttft_s_p99 is None else seen.ttft_s_p99 * 1000,
                ),
                lead_time_s=lead_s,
            ),
            self._memory,
            self._rules,
        )
        return Step(len(plan.orders), [by_id[name] for name in plan.drains])

    def _replica(self, name: str, node: Node, now: float) -> Replica:
        return Replica(
            name,
            "here",
            NodeState.READY if node.is_ready else NodeState.BOOTING,
            is_spot=True,
            capacity_tokens_per_s=self._capacity if node.is_ready else 0,
            age_s=now - node.ordered_at,
        )


class QpsThreshold:
    """Requests a second per replica, with delays: what SkyServe does by default (0.14.1, `sky/serve/autoscalers.py`).

    QPS over 60 s, a look every 20 s, up after the target has been above for 300 s, down after 1 200 s below.
    """

    tick_s = 20.0
    is_instant = False

    def __init__(self, qps_per_replica: float, up_delay_s: float = 300.0, down_delay_s: float = 1200.0) -> None:
        self.name = f"{qps_per_replica:g} requests/s per replica"
        self._qps = qps_per_replica
        self._up, self._down = int(up_delay_s / self.tick_s), int(down_delay_s / self.tick_s)
        self._above = self._below = 0
        self._target = REPLICAS_MIN

    def step(self, seen: Seen) -> Step:
        """Count how long the target has been above or below."""
        wanted = min(REPLICAS_MAX, max(REPLICAS_MIN, math.ceil(seen.requests_per_s / self._qps)))
        if wanted > self._target:
            self._above, self._below = self._above + 1, 0
            if self._above >= self._up:
                self._above, self._target = 0, wanted
        elif wanted < self._target:
            self._above, self._below = 0, self._below + 1
            if self._below >= self._down:
                self._below, self._target = 0, wanted
        else:
            self._above = self._below = 0
        return towards(self._target, seen)


class Fixed:
    """Always so many, replaced when they die."""

    tick_s = 10.0
    is_instant = False

    def __init__(self, nodes: int) -> None:
        self.name = f"{nodes} nodes, fixed"
        self._nodes = nodes

    def step(self, seen: Seen) -> Step:
        """Order what has died."""
        return towards(self._nodes, seen)


class Clairvoyant:
    """Knows each minute's work beforehand; its nodes come and go at once, cost nothing in between and never die."""

    tick_s = 60.0
    is_instant = True

    def __init__(self, workload: Workload, machine: Machine, utilization: float) -> None:
        self.name = f"clairvoyant, {utilization:.0%} busy"
        self._work_s = list(work_by_bin(workload, machine, self.tick_s))
        self._utilization = utilization

    def step(self, seen: Seen) -> Step:
        """As many as the minute to come will keep busy to that share."""
        place = min(len(self._work_s) - 1, int(seen.now / self.tick_s))
        return towards(max(1, math.ceil(self._work_s[place] / self.tick_s / self._utilization)), seen)


def towards(target: int, seen: Seen) -> Step:
    """Order what is missing, or drain what is not ready yet and then the youngest."""
    surplus = len(seen.nodes) - target
    if surplus <= 0:
        return Step(order=-surplus)
    return Step(drain=sorted(seen.nodes, key=lambda node: (node.is_ready, -node.ordered_at))[:surplus])


def capacity(machine: Machine) -> float:
    """Tokens of work a second that a node does of the trace's mix."""
    work = MIX_PROMPT / 10 + MIX_GENERATED
    return work / (MIX_PROMPT / machine.prompt_tokens_per_s + MIX_GENERATED / machine.tokens_per_s)


def by_trend(rates: Sequence[tuple[float, float]], ahead_s: float, back_s: float = 600.0) -> float:
    """The rate so far ahead by a straight line through those of the last ten minutes (least squares)."""
    now = rates[-1][0]
    recent = [(at - now, rate) for at, rate in rates[-math.ceil(back_s / 10) :]]
    if len(recent) < 12:
        return 0.0
    mean_at = sum(at for at, _ in recent) / len(recent)
    mean = sum(rate for _, rate in recent) / len(recent)
    spread = sum((at - mean_at) ** 2 for at, _ in recent)
    slope = sum((at - mean_at) * (rate - mean) for at, rate in recent) / spread
    return mean + slope * (ahead_s - mean_at)


def by_yesterday(rates: Sequence[tuple[float, float]], ahead_s: float) -> float:
    """The rate at the same time yesterday, a node's lead time ahead (the mean of ten minutes)."""
    at = rates[-1][0] + ahead_s - DAY_S
    place = round(at / 10)
    if place < 30:
        return 0.0
    around = [rate for _, rate in rates[place - 30 : place + 30]]
    return sum(around) / len(around) if around else 0.0
