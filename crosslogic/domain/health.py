"""Health: what several signals about one node mean together.

Four sources speak of a node: our own polls, its agent's heartbeats, its cloud, and the requests that API processes send
it. None of them is believed alone while another one contradicts it: a worker that is cut off sees every engine silent,
clouds list late, and one client's odd requests may fail on a sound engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from crosslogic.domain.heartbeat import Heartbeat


class MachineStatus(StrEnum):
    """What the cloud says of a machine."""

    STARTING = "starting"
    RUNNING = "running"
    GONE = "gone"  # Terminated, preempted, or not in the cloud's list.
    UNKNOWN = "unknown"  # The cloud could not be asked, or there is no cloud behind the node.


class Verdict(StrEnum):
    """What to do about a node."""

    HEALTHY = "healthy"
    AILING = "ailing"  # It serves, and one signal says badly: left alone and watched.
    SUSPECT = "suspect"  # One signal says that it does not serve: look again before acting.
    ILL = "ill"  # It lives and two signals say that it serves badly: drain it, and replace it.
    BROKEN = "broken"  # The machine may be there, but two signals agree that it does not serve.
    LOST = "lost"  # The cloud took the machine.
    INTERRUPTED = "interrupted"  # The cloud has said that it will take the machine: drain it, and replace it.


# From the best to the worst.
SEVERITY = {verdict: rank for rank, verdict in enumerate(Verdict)}
# The node's workflow has nothing to do.
IN_SERVICE = frozenset({Verdict.HEALTHY, Verdict.AILING})


class Source(StrEnum):
    """Who says something about a node. What two of one source say counts once."""

    POLL = "poll"
    HEARTBEAT = "heartbeat"
    CLOUD = "cloud"
    REQUESTS = "requests"


@dataclass(frozen=True, slots=True)
class AgentWord:
    """What the latest heartbeat of a node's agent says; `age_s` is the time since it came.

    `tokens_ago_s` is the time since its count of tokens last grew, None where nothing is being generated or nobody
    knows; `out_of_memory` counts within `HealthPolicy.burst_s`.
    """

    age_s: float
    is_engine_up: bool
    tokens_ago_s: float | None = None
    waiting: int = 0
    gpu_temperature_c: float | None = None
    out_of_memory: int = 0
    notice: str = ""


@dataclass(frozen=True, slots=True)
class RequestView:
    """What one API process says of one node, over the last seconds (`crosslogic.hot.passive`).

    Counts are those of the window: `answers` came to their end as they should, `errors` did not; a node that said
    "busy" made no error. `ttft_s` is its smoothed time to first token, `median_ttft_s` its pool's; 0: unknown.
    """

    starts: int = 0
    answers: int = 0
    errors: int = 0
    busy: int = 0
    failures_in_a_row: int = 0
    is_unreachable: bool = False
    is_ejected: bool = False
    in_flight: int = 0
    ttft_s: float = 0.0
    median_ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Signals:
    """The latest reading of each source; None: it does not speak of this node.

    `silent_for_s` is the time since the engine last did what a poll asked of it: answer, and, where polls have asked
    for it, generate. `failed_polls` counts polls in a row without an answer, `failed_generations` those that were
    answered and yet generated nothing. An engine `is_busy` if it refused a poll for its load, or missed one while it
    was generating for others. `is_slow`: generations take over three times what they used to.
    `do_peers_answer`: do other nodes answer us now? None: there are none, or nobody asked.
    """

    is_answering: bool
    silent_for_s: float
    machine: MachineStatus
    failed_polls: int = 0
    failed_generations: int = 0
    is_busy: bool = False
    is_slow: bool = False
    agent: AgentWord | None = None
    requests: RequestView | None = None
    do_peers_answer: bool | None = None


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """Thresholds of a verdict, times in seconds; those the product promises are its own (PRD/requirements.md, Fleet).

    `silence_s`: a heartbeat this old, or a poll unanswered for this long, is silence. `lone_silence_s`: silence is
    believed without a second source, where none speaks. `restart_s`: an agent that says that its engine is down is
    given this long to start it again. `cut_off_s`: while no other node answers us either, it is us, for so long.
    `stall_s`: a busy engine that makes no token for this long is stuck.
    """

    silence_s: float = 15.0
    lone_silence_s: float = 30.0
    restart_s: float = 90.0
    cut_off_s: float = 120.0
    stall_s: float = 30.0
    agreeing_polls: int = 2  # Failures of a poll in a row that another source agrees with.
    confirming_polls: int = 3  # The same with nobody to agree.
    gpu_temperature_c: float = 90.0  # Data-centre GPUs slow down around here (NVIDIA: "slowdown temperature").
    out_of_memory: int = 3  # So many within `burst_s` are a burst.
    burst_s: float = 300.0
    error_share: float = 0.5
    least_requests: int = 10  # A share of fewer may be chance.
    slow_times: float = 3.0
    slow_by_s: float = 1.0  # And this much more, which clients can feel.

    @classmethod
    def scaled(cls, silence_s: float) -> HealthPolicy:
        """The product's ratios for another silence; times that are no silence stay as they are."""
        factor = silence_s / 15.0
        return cls(silence_s, 30.0 * factor, 90.0 * factor, 120.0 * factor, 30.0 * factor)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, its reason in plain words, and who spoke against the node."""

    verdict: Verdict
    reason: str
    against: frozenset[Source] = frozenset()


def judge(signals: Signals, policy: HealthPolicy) -> Judgement:
    """Weigh what the sources say.

    Death takes two sources, and none that contradicts them: an engine that does what a poll asks is never dead, and
    neither is one that is busy. Only where nobody else can speak of the node is a poll's silence believed alone, after
    twice the time. Serving badly takes two sources, too.
    """
    if signals.agent is not None and signals.agent.notice:
        return Judgement(
            Verdict.INTERRUPTED,
            f"the cloud takes the machine: {signals.agent.notice}",
            frozenset({Source.CLOUD}),
        )
    of_life, of_service = _judge_life(signals, policy), _judge_service(signals, policy)
    return max(of_life, of_service, key=lambda judgement: SEVERITY[judgement.verdict])


def _judge_life(signals: Signals, policy: HealthPolicy) -> Judgement:
    """Does it serve at all?"""
    if signals.is_answering and not signals.failed_generations:
        if _is_shunned(signals.requests, policy):
            return _suspect("it answers polls, and requests do not reach it", Source.REQUESTS)
        return Judgement(Verdict.HEALTHY, "the engine answers")
    if signals.is_busy:
        return Judgement(Verdict.HEALTHY, "the engine is busy: overloaded is not broken")
    if signals.is_answering:
        return _judge_mute(signals, policy)
    if signals.machine is MachineStatus.GONE:
        reason = "the engine is silent and the cloud says that the machine is gone"
        return Judgement(Verdict.LOST, reason, frozenset({Source.POLL, Source.CLOUD}))
    return _judge_silent(signals, policy)


def _judge_silent(signals: Signals, policy: HealthPolicy) -> Judgement:
    words = f"the engine has been silent for {signals.silent_for_s:.0f} s and {signals.failed_polls} polls"
    missed = f"the engine has missed {signals.failed_polls} polls"
    agent, requests = signals.agent, signals.requests
    is_confirmed = signals.failed_polls >= policy.agreeing_polls
    if is_vouched_for(requests, policy):
        return _suspect(f"{missed}, yet requests are answered", Source.POLL)
    if _is_shunned(requests, policy):
        if is_confirmed and signals.silent_for_s >= policy.silence_s / 3:
            return _dead(signals, policy, f"{words}, and requests fail there", Source.REQUESTS)
        return _suspect(f"{missed}, and requests fail there", Source.POLL, Source.REQUESTS)
    if agent is not None:
        if agent.age_s >= policy.silence_s:
            told = f"its agent has been silent for {agent.age_s:.0f} s"
            if is_confirmed:
                return _dead(signals, policy, f"{words}, and {told}", Source.HEARTBEAT)
            return _suspect(f"{missed}, and {told}", Source.POLL, Source.HEARTBEAT)
        if agent.is_engine_up:
            return _suspect(f"{missed}, yet its agent says that it is up", Source.POLL)
        if is_confirmed and signals.silent_for_s >= policy.restart_s:
            return _dead(signals, policy, f"{words}, and its agent cannot start it again", Source.HEARTBEAT)
        return _suspect(f"{missed}; its agent is starting it again", Source.POLL, Source.HEARTBEAT)
    if signals.failed_polls >= policy.confirming_polls and signals.silent_for_s >= policy.lone_silence_s:
        return _dead(signals, policy, words)
    return _suspect(missed, Source.POLL)


def _judge_mute(signals: Signals, policy: HealthPolicy) -> Judgement:
    """It takes requests, and nothing comes out."""
    words = f"the engine answers but has generated nothing for {signals.silent_for_s:.0f} s"
    agent = signals.agent
    is_confirmed = signals.failed_generations >= policy.agreeing_polls
    if is_vouched_for(signals.requests, policy):
        return _suspect(f"{words}, yet requests are answered", Source.POLL)
    if _is_shunned(signals.requests, policy):
        if is_confirmed:
            return _dead(signals, policy, f"{words}, and requests fail there", Source.REQUESTS)
        return _suspect(f"{words}, and requests fail there", Source.POLL, Source.REQUESTS)
    if agent is not None and agent.age_s < policy.silence_s and agent.tokens_ago_s is not None:
        if agent.tokens_ago_s < policy.stall_s:
            return _suspect(f"{words}, yet its agent sees tokens", Source.POLL)
        if is_confirmed:
            return _dead(signals, policy, f"{words}, and its agent sees none either", Source.HEARTBEAT)
    if signals.failed_generations >= policy.confirming_polls and signals.silent_for_s >= policy.lone_silence_s:
        return _dead(signals, policy, words)
    return _suspect(words, Source.POLL)


def _dead(signals: Signals, policy: HealthPolicy, reason: str, *others: Source) -> Judgement:
    against = frozenset({Source.POLL, *others})
    if signals.do_peers_answer is False and signals.silent_for_s < policy.cut_off_s:
        return Judgement(Verdict.SUSPECT, f"{reason}; no other node answers either: perhaps we are cut off", against)
    return Judgement(Verdict.BROKEN, reason, against)


def _suspect(reason: str, *against: Source) -> Judgement:
    return Judgement(Verdict.SUSPECT, reason, frozenset(against))


def _judge_service(signals: Signals, policy: HealthPolicy) -> Judgement:
    """Does it serve well? One symptom of each source counts."""
    symptoms = dict(_symptoms(signals, policy))
    if not symptoms:
        return Judgement(Verdict.HEALTHY, "the engine answers")
    verdict = Verdict.ILL if len(symptoms) > 1 else Verdict.AILING
    return Judgement(verdict, " and ".join(symptoms.values()), frozenset(symptoms))


def _symptoms(signals: Signals, policy: HealthPolicy) -> Iterable[tuple[Source, str]]:
    agent, requests = signals.agent, signals.requests
    is_overloaded = signals.is_busy or (agent is not None and agent.waiting > 0)
    if agent is not None and agent.age_s < policy.silence_s:
        if agent.gpu_temperature_c is not None and agent.gpu_temperature_c >= policy.gpu_temperature_c:
            yield Source.HEARTBEAT, f"its GPU has {agent.gpu_temperature_c:.0f} °C"
        elif agent.out_of_memory >= policy.out_of_memory:
            yield Source.HEARTBEAT, f"it ran out of memory {agent.out_of_memory} times in {policy.burst_s:.0f} s"
    if requests is not None:
        # Requests that wait in a queue are slow, and that is no fault of the engine.
        is_overloaded = is_overloaded or requests.busy > 0
        slow_above_s = max(policy.slow_times * requests.median_ttft_s, requests.median_ttft_s + policy.slow_by_s)
        if _is_failing(requests, policy):
            yield Source.REQUESTS, f"{requests.errors} of {requests.errors + requests.answers} requests failed there"
        elif requests.median_ttft_s and requests.ttft_s > slow_above_s and not is_overloaded:
            yield (
                Source.REQUESTS,
                f"its first tokens take {requests.ttft_s:.1f} s where others take {requests.median_ttft_s:.1f} s",
            )
    if signals.is_slow and signals.is_answering and not is_overloaded:
        yield Source.POLL, f"a generation takes over {policy.slow_times:g} times what it used to"


def _is_failing(requests: RequestView, policy: HealthPolicy) -> bool:
    ended = requests.answers + requests.errors
    return ended >= policy.least_requests and requests.errors > policy.error_share * ended


def _is_shunned(requests: RequestView | None, policy: HealthPolicy) -> bool:
    """Do requests say that it does not serve?"""
    if requests is None or is_vouched_for(requests, policy):
        return False
    return requests.is_unreachable or _is_failing(requests, policy) or requests.failures_in_a_row >= FAILURES_IN_A_ROW


def is_vouched_for(requests: RequestView | None, policy: HealthPolicy) -> bool:
    """Do requests say that it serves?"""
    return requests is not None and requests.answers > requests.errors and not requests.is_unreachable


# One process's requests that failed one after the other, with no answer in between.
FAILURES_IN_A_ROW = 3


def combine(views: Sequence[RequestView]) -> RequestView | None:
    """The views of several API processes as one: counts add up, and what most of them cannot reach is unreachable.

    A node fails "in a row" as often as for the process that it failed for least: what one of them sees alone may be its
    own fault.
    """
    if not views:
        return None
    unreachable = sum(view.is_unreachable for view in views)
    timed = [view for view in views if view.ttft_s]
    return RequestView(
        starts=sum(view.starts for view in views),
        answers=sum(view.answers for view in views),
        errors=sum(view.errors for view in views),
        busy=sum(view.busy for view in views),
        failures_in_a_row=min(view.failures_in_a_row for view in views),
        is_unreachable=unreachable * 2 > len(views),
        is_ejected=any(view.is_ejected for view in views),
        in_flight=sum(view.in_flight for view in views),
        ttft_s=sum(view.ttft_s for view in timed) / len(timed) if timed else 0.0,
        median_ttft_s=sum(view.median_ttft_s for view in timed) / len(timed) if timed else 0.0,
    )


class Course:
    """What a row of heartbeats tells that no single one can. The receiver's clock decides."""

    def __init__(self, policy: HealthPolicy) -> None:
        self._policy = policy
        self._tokens = -1
        self._grew_at = 0.0
        self._is_generating = False
        self._count = 0
        self._bursts: list[tuple[float, int]] = []  # When memory ran out, and how often.
        self._is_known = False

    def take(self, heartbeat: Heartbeat) -> None:
        """Take the next one; the same again changes nothing."""
        now = heartbeat.received_at
        was_generating, self._is_generating = self._is_generating, bool(heartbeat.running)
        tokens = heartbeat.prompt_tokens + heartbeat.completion_tokens
        # A count that fell is a new engine's. One that begins to generate has had no time yet.
        if tokens != self._tokens or not was_generating:
            self._tokens, self._grew_at = tokens, now
        # What had happened before the first one is no news.
        grown = heartbeat.out_of_memory - self._count if self._is_known else 0
        if grown < 0:
            grown = heartbeat.out_of_memory
        self._count, self._is_known = heartbeat.out_of_memory, True
        if grown > 0:
            self._bursts.append((now, grown))
        self._bursts = [burst for burst in self._bursts if burst[0] > now - self._policy.burst_s]

    def word(self, heartbeat: Heartbeat, now: float) -> AgentWord:
        """What the latest one says in the light of those before."""
        return AgentWord(
            age_s=max(0.0, now - heartbeat.received_at),
            is_engine_up=heartbeat.is_engine_up,
            tokens_ago_s=max(0.0, heartbeat.received_at - self._grew_at) if self._is_generating else None,
            waiting=heartbeat.waiting or 0,
            gpu_temperature_c=heartbeat.gpu_temperature_c,
            out_of_memory=sum(count for _, count in self._bursts),
            notice=heartbeat.notice,
        )


# A node that falters must stay well this long to count as well; twice as long each further time, up to the longest.
FIRST_PROBATION_S = 5.0
LONGEST_PROBATION_S = 300.0
# After so long without faltering everything is forgotten.
FORGIVEN_AFTER_S = 3600.0


@dataclass(frozen=True, slots=True)
class Standing:
    """A verdict as it is shown, damped. A worse one shows at once; HEALTHY only after probation."""

    shown: Verdict = Verdict.HEALTHY
    falls: int = 0
    fell_at: float = 0.0
    well_since: float | None = None

    @property
    def probation_s(self) -> float:
        """How long it must be well before it counts as well again."""
        # The exponent is bounded, so that no number of falls makes a number too large for a float.
        return min(LONGEST_PROBATION_S, FIRST_PROBATION_S * 2 ** min(max(0, self.falls - 1), 16))

    def after(self, verdict: Verdict, now: float) -> Standing:
        """The standing after a verdict at `now`, seconds of any one clock."""
        if verdict is not Verdict.HEALTHY:
            if self.shown is Verdict.HEALTHY:
                falls = 1 if now - self.fell_at > FORGIVEN_AFTER_S else self.falls + 1
                return Standing(verdict, falls, now)
            # On probation it shows the worst of what it was and is; else what it is.
            is_worse = SEVERITY[verdict] > SEVERITY[self.shown]
            shown = verdict if is_worse or self.well_since is None else self.shown
            return Standing(shown, self.falls, now)
        if self.shown is Verdict.HEALTHY:
            return self
        since = now if self.well_since is None else self.well_since
        if now - since >= self.probation_s:
            return Standing(Verdict.HEALTHY, self.falls, self.fell_at)
        return Standing(self.shown, self.falls, self.fell_at, since)
