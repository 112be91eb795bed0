"""What a watch remembers of a region's nodes between two looks: when each is polled next, and what it has told."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from crosslogic.contracts.node import JOINED, Machine
from crosslogic.domain.health import (
    AgentWord,
    Course,
    HealthPolicy,
    Judgement,
    MachineStatus,
    RequestView,
    Signals,
    Standing,
    Verdict,
    combine,
    judge,
)
from crosslogic.domain.heartbeat import Heartbeat
from crosslogic.domain.node import Node

# After a poll that failed the next one comes soon: death is confirmed within seconds, and so is a mistake.
RETRY_S = 1.0
# Share of the newest sample in what a node's generations used to take.
BASELINE_SHARE = 0.1
# One slow generation may be chance.
SLOW_IN_A_ROW = 3
# What is bad enough to act on is told again after this, should the first telling have been lost.
TELL_AGAIN_S = 30.0
# A memory that was not used for so many poll intervals is of no use: another's watch may have been here meanwhile.
STALE_INTERVALS = 4.0

_WELL = Judgement(Verdict.HEALTHY, "the engine answers")
_ACTED_ON = frozenset({Verdict.ILL, Verdict.BROKEN, Verdict.LOST, Verdict.INTERRUPTED})


@dataclass(frozen=True, slots=True)
class Poll:
    """How one poll went. `has_generated` is None if it was not asked to; `took_s` is the generation's time."""

    is_answering: bool
    has_generated: bool | None = None
    is_busy: bool = False
    took_s: float = 0.0


@dataclass(slots=True)
class NodeMemory:
    """One node, seconds of the event loop's clock."""

    well_at: float
    poll_at: float
    generate_at: float
    course: Course
    failed_polls: int = 0
    failed_generations: int = 0
    is_busy: bool = False
    baseline_s: float = 0.0
    slow_in_a_row: int = 0
    is_being_polled: bool = False
    standing: Standing = field(default_factory=Standing)
    told_at: float = float("-inf")
    judgement: Judgement = _WELL


class RegionMemory:
    """All nodes of one region."""

    def __init__(self, policy: HealthPolicy, poll_interval_s: float, generation_interval_s: float) -> None:
        self._policy = policy
        self._poll_interval_s = poll_interval_s
        self._generation_interval_s = generation_interval_s
        self._nodes: dict[str, NodeMemory] = {}
        self._used_at = float("-inf")

    def is_stale(self, now: float) -> bool:
        """Is it too long ago that a watch used it? What another worker may have seen since then is not known here."""
        return now - self._used_at > STALE_INTERVALS * self._poll_interval_s

    def keep(self, nodes: Mapping[str, Node], now: float) -> None:
        """These nodes are there; the others are forgotten."""
        self._used_at = now
        for node_id in self._nodes.keys() - nodes.keys():
            del self._nodes[node_id]
        for node_id in nodes.keys() - self._nodes.keys():
            # Spread, so that a thousand engines are not asked in the same moment.
            share = zlib.crc32(node_id.encode()) / 2**32
            first = now + share * self._poll_interval_s
            generate_at = now + share * self._generation_interval_s
            self._nodes[node_id] = NodeMemory(now, first, generate_at, Course(self._policy))

    def hear(self, heartbeats: Mapping[str, Heartbeat]) -> None:
        """Take the latest heartbeats."""
        for node_id, heartbeat in heartbeats.items():
            memory = self._nodes.get(node_id)
            if memory is not None:
                memory.course.take(heartbeat)

    def due(self, node_id: str, now: float, *, is_accused: bool) -> bool | None:
        """Poll this node now, and is it to generate (True) or to answer only (False)? None: not yet.

        A node that is accused, by requests or by its agent, is polled at once.
        """
        memory = self._nodes[node_id]
        if memory.is_being_polled:
            return None
        if memory.failed_polls:
            # Whoever does not answer need not be asked for more; that would only take longer to fail.
            return False if now >= memory.poll_at else None
        if now >= memory.generate_at or (memory.failed_generations and now >= memory.poll_at):
            return True
        return False if now >= memory.poll_at or (is_accused and memory.poll_at - now > RETRY_S) else None

    def start(self, node_id: str) -> None:
        """A poll of this node is under way."""
        self._nodes[node_id].is_being_polled = True

    def take(self, node_id: str, poll: Poll, now: float, *, is_heard_of: bool) -> None:
        """It is over."""
        memory = self._nodes.get(node_id)
        if memory is None:
            return
        memory.is_being_polled = False
        memory.is_busy = poll.is_busy
        memory.failed_polls = 0 if poll.is_answering else memory.failed_polls + 1
        if poll.has_generated is not None:
            memory.generate_at = now + self._generation_interval_s
            if poll.has_generated:
                self._time(memory, poll.took_s)
            memory.failed_generations = 0 if poll.has_generated or poll.is_busy else memory.failed_generations + 1
        if not memory.failed_polls and not memory.failed_generations:
            memory.well_at = now
            # Whoever is heard of by heartbeats is only asked to generate.
            memory.poll_at = memory.generate_at if is_heard_of else now + self._poll_interval_s
        else:
            memory.poll_at = now + min(RETRY_S, self._poll_interval_s)

    def _time(self, memory: NodeMemory, took_s: float) -> None:
        policy = self._policy
        baseline = memory.baseline_s
        is_slow = bool(baseline) and took_s > max(policy.slow_times * baseline, baseline + policy.slow_by_s)
        memory.slow_in_a_row = memory.slow_in_a_row + 1 if is_slow else 0
        if not baseline:
            memory.baseline_s = took_s
        elif not is_slow:
            # What is slow is not what it used to be: else slowness became the norm by lasting.
            memory.baseline_s += BASELINE_SHARE * (took_s - baseline)

    def give_up(self) -> None:
        """The polls that are under way were broken off."""
        for memory in self._nodes.values():
            memory.is_being_polled = False

    def judge(
        self,
        node: Node,
        views: list[RequestView],
        heartbeat: Heartbeat | None,
        machines: Mapping[str, Machine] | None,
        now: float,
        wall: float,
    ) -> None:
        """Weigh what is known of a node. `wall` is Unix seconds, as heartbeats have them."""
        memory = self._nodes[node.node_id]
        # Once a failure is known, time counts from the last poll that went well.
        is_failing = memory.failed_polls > 0 or memory.failed_generations > 0
        word: AgentWord | None = None if heartbeat is None else memory.course.word(heartbeat, wall)
        judgement = judge(
            Signals(
                is_answering=memory.failed_polls == 0,
                silent_for_s=now - memory.well_at if is_failing else 0.0,
                machine=status_of(node, machines),
                failed_polls=memory.failed_polls,
                failed_generations=memory.failed_generations,
                is_busy=memory.is_busy,
                is_slow=memory.slow_in_a_row >= SLOW_IN_A_ROW,
                agent=word,
                requests=combine(views),
            ),
            self._policy,
        )
        is_first = memory.failed_polls + memory.failed_generations == 1
        if judgement.verdict is Verdict.SUSPECT and is_first and len(judgement.against) == 1:
            # One missed poll is no news; the next one, a second later, tells.
            judgement = Judgement(Verdict.HEALTHY, judgement.reason)
        memory.judgement = judgement

    def settle(self, node_id: str, known: str, now: float, *, may_be_ill: bool) -> Judgement | None:
        """What is to be told of a node whose known verdict is `known`; None: nothing new.

        An ill node that must not be drained yet is shown as ailing.
        """
        memory = self._nodes[node_id]
        judgement = memory.judgement
        if judgement.verdict is Verdict.ILL and not may_be_ill:
            judgement = Judgement(Verdict.AILING, f"{judgement.reason}; too few others serve to take it out")
        memory.standing = memory.standing.after(judgement.verdict, now)
        shown = memory.standing.shown
        is_again = shown in _ACTED_ON and shown is judgement.verdict and now - memory.told_at >= TELL_AGAIN_S
        if shown == known and not is_again:
            return None
        memory.told_at = now
        if shown is judgement.verdict:
            return judgement
        return Judgement(shown, f"{judgement.reason}; on probation", judgement.against)

    def verdict_of(self, node_id: str) -> Verdict:
        """What was judged of a node last."""
        return self._nodes[node_id].judgement.verdict


def status_of(node: Node, machines: Mapping[str, Machine] | None) -> MachineStatus:
    """What a cloud's list says of a node's machine."""
    if machines is None or node.provider == JOINED:
        return MachineStatus.UNKNOWN
    machine = machines.get(node.cluster)
    return MachineStatus.GONE if machine is None else MachineStatus(machine.status)
