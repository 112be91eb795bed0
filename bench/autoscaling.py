"""What autoscaling costs and keeps: `python -m bench.autoscaling` replays Azure's trace against several policies.

Ours is the product's own decision (`crosslogic.domain.autoscaling`), called as the workflow calls it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.fleet_model import (
    DAY_S,
    HOUR_S,
    Machine,
    Node,
    Result,
    Scaler,
    Seen,
    Step,
    Workload,
    read_trace,
    simulate,
    stretch,
    work_by_bin,
)
from crosslogic.domain.autoscaling import DEFAULT_RULES, Demand, RegionMemory, ScalingRules, Sight, decide
from crosslogic.domain.deployment import RegionTarget, Replica, ScalingSettings
from crosslogic.domain.node import NodeState

SLO_S = 5.0
# At an equal or better 99th percentile ours may cost so much of what the QPS threshold costs.
MOST_OF_QPS_COST = 0.7
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


QPS_TARGETS = (0.4, 0.3, 0.2, 0.15, 0.12, 0.1, 0.09, 0.08)
FLEETS = (20, 24, 28, 32)
UTILIZATIONS = (0.5, 0.4, 0.35, 0.3, 0.25)
FORECASTS = {"ours, with a trend": by_trend, "ours, with yesterday": by_yesterday}


@dataclass(frozen=True)
class Row:
    """One policy's figures."""

    group: str
    name: str
    ttft_s_p50: float
    ttft_s_p99: float
    attained: float
    usd: float
    orders: int
    deaths: int
    ready: list[tuple[float, int]]


@cache
def workload_of(days: float, seed: int) -> Workload:
    """The same requests for every policy."""
    return stretch(read_trace(), days, seed)


def run(group: str, setting: float | str, days: float, seed: int) -> Row:
    """Simulate one policy."""
    machine, workload = Machine(), workload_of(days, seed)
    scalers: dict[str, Callable[[], Scaler]] = {
        "ours": lambda: Ours(machine),
        "forecast": lambda: Ours(machine, str(setting), forecast=FORECASTS[str(setting)]),
        "qps": lambda: QpsThreshold(float(setting)),
        "fixed": lambda: Fixed(int(setting)),
        "clairvoyant": lambda: Clairvoyant(workload, machine, float(setting)),
    }
    result: Result = simulate(workload, scalers[group](), machine, seed)
    return Row(
        group,
        result.name,
        result.ttft_s_at(0.5),
        result.ttft_s_at(0.99),
        result.attained(SLO_S),
        result.usd,
        result.orders,
        result.deaths,
        result.ready,
    )


def cheapest(rows: Iterable[Row], group: str, ttft_s_p99: float) -> Row | None:
    """The cheapest setting of a policy whose 99th percentile is not worse than this; None if there is none."""
    good = [row for row in rows if row.group == group and row.ttft_s_p99 <= ttft_s_p99]
    return min(good, key=lambda row: row.usd, default=None)


def table(rows: Sequence[Row], ours: Row) -> str:
    """The figures in Markdown, cheapest first."""
    lines = [
        "| policy | USD | of ours | first token p50 | p99 | within 5 s | nodes ordered | lost |",
        "|---|" + "---:|" * 7,
    ]
    lines += [
        f"| {'**' + row.name + '**' if row is ours else row.name} | {row.usd:.0f} | {row.usd / ours.usd:.0%} | "
        f"{row.ttft_s_p50:.2f} s | {row.ttft_s_p99:.2f} s | {row.attained:.1%} | {row.orders} | {row.deaths} |"
        for row in sorted(rows, key=lambda row: row.usd)
    ]
    return "\n".join(lines)


def verdict(rows: Sequence[Row], ours: Row) -> str:
    """Ours against the cheapest setting of each other policy that keeps the same tail."""
    lines: list[str] = []
    for group, words in (("qps", "QPS threshold"), ("fixed", "fixed fleet"), ("clairvoyant", "clairvoyant")):
        rival = cheapest(rows, group, ours.ttft_s_p99)
        if rival is None:
            lines.append(f"{words}: no setting keeps a p99 of {ours.ttft_s_p99:.2f} s")
        else:
            lines.append(
                f"{words} ({rival.name}, p99 {rival.ttft_s_p99:.2f} s): {rival.usd:.0f} USD; "
                f"ours costs {ours.usd / rival.usd:.0%} of that"
            )
    return "\n".join(lines)


def plot(rows: Sequence[Row], ours: Row, path: Path) -> None:
    """Cost against the tail for every setting, and the nodes of one day."""
    import matplotlib

    matplotlib.use("Agg")
    # Its own annotations are partial.
    pyplot: Any = __import__("matplotlib.pyplot", fromlist=["pyplot"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    looks = {"qps": "#8d99ae", "fixed": "#edae49", "clairvoyant": "#66a182", "forecast": "#d1495b", "ours": "#d1495b"}
    words = {"qps": "QPS threshold", "fixed": "fixed fleet", "clairvoyant": "clairvoyant", "ours": "ours"}
    for group, colour in looks.items():
        points = sorted((row.usd, row.ttft_s_p99) for row in rows if row.group == group)
        style = "x" if group == "forecast" else "o-"
        left.plot(*zip(*points, strict=True), style, color=colour, label=words.get(group, "ours, with a forecast"))
    left.set_yscale("log")
    left.set_xlabel("USD")
    left.set_ylabel("time to first token, p99 in s")
    left.legend(frameon=False)
    rival, seer = cheapest(rows, "qps", ours.ttft_s_p99), cheapest(rows, "clairvoyant", ours.ttft_s_p99)
    for row, colour in ((rival, looks["qps"]), (seer, looks["clairvoyant"]), (ours, looks["ours"])):
        if row is not None:
            day = [(at / HOUR_S, nodes) for at, nodes in row.ready if at <= DAY_S]
            right.plot(*zip(*day, strict=True), color=colour, linewidth=0.8, label=row.name)
    right.set_xlabel("hour of the first day")
    right.set_ylabel("nodes that serve")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Run all policies and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.autoscaling", description=__doc__)
    parser.add_argument("--days", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a folder for autoscaling.md and autoscaling.png")
    given = parser.parse_args(arguments)
    jobs: list[tuple[str, float | str]] = [("ours", 0.0), *(("forecast", name) for name in FORECASTS)]
    jobs += [("qps", target) for target in QPS_TARGETS]
    jobs += [("fixed", nodes) for nodes in FLEETS]
    jobs += [("clairvoyant", utilization) for utilization in UTILIZATIONS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(run, group, setting, given.days, given.seed) for group, setting in jobs]
        rows = [future.result() for future in running]
    ours = rows[0]
    words = f"{table(rows, ours)}\n\n{verdict(rows, ours)}\n"
    print(
        f"{len(workload_of(given.days, given.seed).at)} requests in {given.days:g} days, seed {given.seed}\n\n{words}"
    )
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "autoscaling.md").write_text(words)
        plot(rows, ours, given.out / "autoscaling.png")
    rival = cheapest(rows, "qps", ours.ttft_s_p99)
    return 0 if rival is None or ours.usd <= MOST_OF_QPS_COST * rival.usd else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
