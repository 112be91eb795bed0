from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from crosslogic.domain.health import (
    FIRST_PROBATION_S,
    FORGIVEN_AFTER_S,
    LONGEST_PROBATION_S,
    SEVERITY,
    AgentWord,
    Course,
    HealthPolicy,
    MachineStatus,
    RequestView,
    Signals,
    Source,
    Standing,
    Verdict,
    combine,
    judge,
)
from crosslogic.domain.heartbeat import Heartbeat

POLICY = HealthPolicy()

M, V = MachineStatus, Verdict

KILLING = {V.BROKEN, V.LOST}
ENDING = KILLING | {V.ILL}

WELL = Signals(True, 0.0, M.RUNNING)
# Silent for long, and confirmed by polls.
SILENT = Signals(False, 1000.0, M.RUNNING, failed_polls=50)
MUTE = Signals(True, 1000.0, M.RUNNING, failed_generations=50)
UP = AgentWord(1.0, True)
ANSWERED = RequestView(starts=20, answers=20)
FAILED = RequestView(starts=20, errors=20, failures_in_a_row=20)
UNREACHED = RequestView(is_unreachable=True, is_ejected=True)

seconds = st.floats(0, 1e6)
counts = st.integers(0, 100)
words = st.builds(
    AgentWord,
    age_s=seconds,
    is_engine_up=st.booleans(),
    tokens_ago_s=st.none() | seconds,
    waiting=counts,
    gpu_temperature_c=st.none() | st.floats(0, 120),
    out_of_memory=st.integers(0, 10),
)
views = st.builds(
    RequestView,
    starts=counts,
    answers=counts,
    errors=counts,
    busy=counts,
    failures_in_a_row=st.integers(0, 10),
    is_unreachable=st.booleans(),
    ttft_s=st.floats(0, 100),
    median_ttft_s=st.floats(0, 100),
)
signals = st.builds(
    Signals,
    is_answering=st.booleans(),
    silent_for_s=seconds,
    machine=st.sampled_from(MachineStatus),
    failed_polls=st.integers(1, 20),
    failed_generations=st.integers(0, 20),
    is_busy=st.booleans(),
    is_slow=st.booleans(),
    agent=st.none() | words,
    requests=st.none() | views,
    do_peers_answer=st.none() | st.booleans(),
)


def verdict(given: Signals, **changes: Any) -> Verdict:
    return judge(replace(given, **changes), POLICY).verdict


class TestDeath:
    def test_is_silence_that_the_cloud_explains(self) -> None:
        assert verdict(SILENT, machine=M.GONE, silent_for_s=0.1, failed_polls=1) is V.LOST

    @pytest.mark.parametrize(
        ("second", "is_believed"),
        [
            ({"agent": AgentWord(15.0, True)}, True),
            ({"agent": AgentWord(14.9, True)}, False),
            ({"agent": AgentWord(1.0, False)}, False),
            ({"agent": AgentWord(1.0, False), "silent_for_s": 90.0}, True),
            ({"requests": UNREACHED}, True),
            ({"requests": FAILED}, True),
            ({"requests": RequestView(failures_in_a_row=3)}, True),
            ({"requests": RequestView(failures_in_a_row=2)}, False),
            ({"requests": ANSWERED}, False),
            ({"agent": AgentWord(99.0, False), "requests": ANSWERED}, False),
            ({}, False),
        ],
    )
    def test_of_a_silent_engine_takes_a_second_source(self, second: dict[str, Any], is_believed: bool) -> None:
        """PRD/requirements.md: silence over 15 s, confirmed by a poll; the agent may restart an engine meanwhile."""
        found = verdict(Signals(False, 5.0, M.RUNNING, failed_polls=2), **second)
        assert found is (V.BROKEN if is_believed else V.SUSPECT)
        # One missed poll agrees with nobody yet.
        assert verdict(Signals(False, 5.0, M.RUNNING, failed_polls=1), **{**second, "silent_for_s": 5.0}) is V.SUSPECT

    @pytest.mark.parametrize(("silent_for_s", "polls"), list(itertools.product([29.9, 30.0], [2, 3])))
    def test_is_believed_alone_where_nobody_else_speaks_after_twice_the_time(
        self, silent_for_s: float, polls: int
    ) -> None:
        found = verdict(Signals(False, silent_for_s, M.UNKNOWN, failed_polls=polls))
        assert found is (V.BROKEN if (silent_for_s, polls) == (30.0, 3) else V.SUSPECT)

    @pytest.mark.parametrize(
        ("second", "is_believed"),
        [
            ({"requests": FAILED}, True),
            ({"requests": ANSWERED}, False),
            ({"agent": AgentWord(1.0, True, tokens_ago_s=30.0)}, True),
            ({"agent": AgentWord(1.0, True, tokens_ago_s=29.0)}, False),
            ({"agent": AgentWord(1.0, True)}, False),
            ({"agent": AgentWord(1.0, True), "silent_for_s": 30.0, "failed_generations": 3}, True),
            ({}, False),
        ],
    )
    def test_of_an_engine_that_only_says_that_it_is_well(self, second: dict[str, Any], is_believed: bool) -> None:
        """The zombie: `/health` is answered, and nothing is generated."""
        found = verdict(Signals(True, 20.0, M.RUNNING, failed_generations=2), **second)
        assert found is (V.BROKEN if is_believed else V.SUSPECT)

    def test_is_not_believed_while_nobody_answers_us(self) -> None:
        """Then it is us who are cut off; but not for ever, and the cloud's own word counts all the same."""
        dead = Signals(False, 60.0, M.RUNNING, failed_polls=20, agent=AgentWord(60.0, False), do_peers_answer=False)
        assert verdict(dead) is V.SUSPECT
        assert verdict(dead, do_peers_answer=True) is V.BROKEN
        assert verdict(dead, do_peers_answer=None) is V.BROKEN
        assert verdict(dead, silent_for_s=120.0) is V.BROKEN
        assert verdict(dead, machine=M.GONE) is V.LOST

    @given(signals)
    def test_never_comes_to_an_engine_that_does_what_is_asked(self, given: Signals) -> None:
        assert verdict(given, is_answering=True, failed_polls=0, failed_generations=0) not in KILLING

    @given(signals)
    def test_never_comes_to_one_that_answers_requests(self, given: Signals) -> None:
        assume(given.machine is not M.GONE)
        assert verdict(given, requests=ANSWERED) not in KILLING

    @given(signals)
    def test_takes_two_sources_or_a_lone_one_that_nobody_contradicts(self, given: Signals) -> None:
        """No single signal kills."""
        found = judge(given, POLICY)
        if found.verdict in KILLING and len(found.against) == 1:
            assert found.against == {Source.POLL}
            assert given.silent_for_s >= POLICY.lone_silence_s
            # Of one that answers, the cloud's "gone" is a list that lags: it is no word against it.
            assert given.is_answering or given.machine is not M.GONE
            # Nobody else had a word on what was missed: of silence no agent, of generation none that sees tokens.
            assert given.is_answering or given.agent is None
            assert given.requests is None or not (given.requests.answers > given.requests.errors)

    @given(st.sampled_from([UP, AgentWord(1.0, True, tokens_ago_s=1.0)]), seconds, counts)
    def test_by_polls_alone_is_refused_when_the_agent_is_well(self, word: AgentWord, silent: float, polls: int) -> None:
        """A worker that is cut off sees every engine silent."""
        assert verdict(SILENT, agent=word, silent_for_s=silent, failed_polls=polls) is V.SUSPECT

    @given(signals, st.floats(0, 1e6), st.integers(0, 20), st.integers(0, 20))
    def test_comes_no_later_with_more_silence(self, given: Signals, longer_s: float, polls: int, mute: int) -> None:
        """Monotone: more of the same evidence never makes it better."""
        word = given.agent
        worse = replace(
            given,
            silent_for_s=given.silent_for_s + longer_s,
            failed_polls=given.failed_polls + polls,
            failed_generations=given.failed_generations + mute if given.failed_generations else 0,
            agent=word and replace(word, out_of_memory=word.out_of_memory + polls),
        )
        assert SEVERITY[verdict(worse)] >= SEVERITY[verdict(given)]


class TestOverload:
    @given(signals)
    def test_never_kills_and_never_makes_ill_by_slowness(self, given: Signals) -> None:
        assume(given.machine is not M.GONE)
        found = judge(replace(given, is_busy=True), POLICY)
        assert found.verdict not in KILLING
        # What makes it ill is heat, memory or failures: never what a queue does.
        assert "take" not in found.reason

    def test_of_an_engine_with_a_long_queue_is_no_illness(self) -> None:
        slow = RequestView(answers=20, ttft_s=30.0, median_ttft_s=1.0)
        assert verdict(WELL, is_slow=True, requests=slow) is V.ILL
        assert verdict(WELL, is_slow=True, requests=slow, agent=replace(UP, waiting=1)) is V.HEALTHY
        assert verdict(WELL, is_slow=True, requests=replace(slow, busy=1)) is V.HEALTHY


class TestIllness:
    HOT = replace(UP, gpu_temperature_c=90.0)
    OUT_OF_MEMORY = replace(UP, out_of_memory=3)
    SLOW = RequestView(answers=20, ttft_s=3.1, median_ttft_s=1.0)
    FAILING = RequestView(answers=9, errors=11)

    @pytest.mark.parametrize(
        "one",
        [
            {"agent": HOT},
            {"agent": OUT_OF_MEMORY},
            {"agent": replace(HOT, out_of_memory=3)},
            {"requests": SLOW},
            {"requests": FAILING},
            {"is_slow": True},
        ],
    )
    def test_of_one_source_is_watched(self, one: dict[str, Any]) -> None:
        found = verdict(WELL, **one)
        # Failures are more than a symptom: it may not serve at all.
        assert found is (V.SUSPECT if one.get("requests") is self.FAILING else V.AILING)

    @pytest.mark.parametrize(
        "two",
        [
            {"agent": HOT, "requests": SLOW},
            {"agent": HOT, "is_slow": True},
            {"agent": OUT_OF_MEMORY, "requests": FAILING},
            {"requests": SLOW, "is_slow": True},
        ],
    )
    def test_of_two_sources_drains(self, two: dict[str, Any]) -> None:
        assert verdict(WELL, **two) is V.ILL

    @pytest.mark.parametrize(
        ("fields", "is_symptom"),
        [
            ({"agent": replace(UP, gpu_temperature_c=89.9)}, False),
            ({"agent": replace(UP, out_of_memory=2)}, False),
            ({"agent": replace(HOT, age_s=15.0)}, False),
            ({"requests": replace(SLOW, ttft_s=3.0)}, False),
            ({"requests": RequestView(answers=20, ttft_s=0.9, median_ttft_s=0.1)}, False),
            ({"requests": RequestView(answers=5, errors=5)}, False),
            ({"requests": RequestView(answers=4, errors=5)}, False),
        ],
    )
    def test_begins_at_its_threshold(self, fields: dict[str, Any], is_symptom: bool) -> None:
        assert (verdict(WELL, **fields) is not V.HEALTHY) is is_symptom

    @given(signals)
    def test_takes_two_sources(self, given: Signals) -> None:
        found = judge(given, POLICY)
        assert found.verdict is not V.ILL or len(found.against) >= 2


class TestNotice:
    @given(signals, words)
    def test_comes_first(self, given: Signals, word: AgentWord) -> None:
        found = judge(replace(given, agent=replace(word, notice="aws: terminate")), POLICY)
        assert found.verdict is V.INTERRUPTED
        assert "aws: terminate" in found.reason


class TestCombine:
    def test_adds_counts_and_lets_most_decide_what_is_unreachable(self) -> None:
        one = RequestView(starts=2, answers=1, errors=1, failures_in_a_row=5, is_unreachable=True, ttft_s=1.0)
        two = RequestView(starts=4, answers=4, failures_in_a_row=0)
        assert combine([one, two]) == RequestView(6, 5, 1, 0, 0, False, False, 0, 1.0, 0.0)
        both = combine([one, one])
        assert both is not None
        assert both.is_unreachable
        assert both.failures_in_a_row == 5
        assert combine([]) is None


class TestCourse:
    def beat(self, at: float, tokens: int = 0, running: int = 1, out_of_memory: int = 0) -> Heartbeat:
        return Heartbeat("n", at, True, running=running, completion_tokens=tokens, out_of_memory=out_of_memory)

    def test_tells_since_when_a_busy_engine_makes_no_token(self) -> None:
        course = Course(POLICY)
        for at, tokens in ((0.0, 5), (5.0, 9), (10.0, 9), (15.0, 9)):
            course.take(self.beat(at, tokens))
        assert course.word(self.beat(15.0, 9), 16.0).tokens_ago_s == 10.0
        course.take(self.beat(20.0, 2))  # A new engine: its count began again.
        assert course.word(self.beat(20.0, 2), 20.0).tokens_ago_s == 0.0

    def test_of_an_idle_engine_says_nothing_of_tokens(self) -> None:
        course = Course(POLICY)
        course.take(self.beat(0.0, 5, running=0))
        assert course.word(self.beat(0.0, 5, running=0), 100.0).tokens_ago_s is None
        course.take(self.beat(500.0, 5))
        assert course.word(self.beat(500.0, 5), 500.0).tokens_ago_s == 0.0

    def test_counts_what_is_new_within_the_window(self) -> None:
        course = Course(POLICY)
        for at, count in ((0.0, 7), (10.0, 8), (20.0, 9), (30.0, 1)):
            course.take(self.beat(at, out_of_memory=count))
        assert course.word(self.beat(30.0), 30.0).out_of_memory == 3
        course.take(self.beat(315.0, out_of_memory=1))
        assert course.word(self.beat(315.0), 315.0).out_of_memory == 2

    def test_takes_the_same_again_for_nothing(self) -> None:
        course = Course(POLICY)
        for _ in range(3):
            course.take(self.beat(0.0, out_of_memory=7))
            course.take(self.beat(1.0, out_of_memory=8))
        assert course.word(self.beat(1.0), 1.0).age_s == 0.0


class TestStanding:
    def run(self, standing: Standing, verdict: Verdict, since: float, until: float) -> tuple[Standing, float | None]:
        """One verdict every second; the standing after it, and when it showed HEALTHY first."""
        healthy_at = None
        for now in range(int(since), int(until)):
            standing = standing.after(verdict, float(now))
            if healthy_at is None and standing.shown is V.HEALTHY:
                healthy_at = float(now)
        return standing, healthy_at

    def test_asks_for_twice_the_time_after_each_fall(self) -> None:
        standing, now, probations = Standing(), 0.0, list[float]()
        for _ in range(10):
            standing = standing.after(V.SUSPECT, now)
            assert standing.shown is V.SUSPECT
            standing, healthy_at = self.run(standing, V.HEALTHY, now + 1, now + 400)
            assert healthy_at is not None
            probations.append(healthy_at - now - 1)
            now = healthy_at + 1
        expected = [min(LONGEST_PROBATION_S, FIRST_PROBATION_S * 2**fall) for fall in range(10)]
        assert probations == expected

    def test_is_forgiven_after_a_quiet_hour(self) -> None:
        standing = Standing(falls=9, fell_at=0.0)
        assert standing.after(V.SUSPECT, FORGIVEN_AFTER_S + 1).falls == 1
        assert standing.after(V.SUSPECT, FORGIVEN_AFTER_S - 1).falls == 10

    @given(st.lists(st.tuples(st.sampled_from(Verdict), st.floats(0, 100)), max_size=60))
    def test_shows_what_is_worse_at_once_and_recovers_within_bounds(self, course: list[tuple[Verdict, float]]) -> None:
        standing, now = Standing(), 0.0
        for found, pause_s in course:
            now += pause_s
            standing = standing.after(found, now)
            assert SEVERITY[standing.shown] >= SEVERITY[found]
            assert standing.probation_s <= LONGEST_PROBATION_S
        standing = standing.after(V.HEALTHY, now).after(V.HEALTHY, now + LONGEST_PROBATION_S)
        assert standing.shown is V.HEALTHY

    @given(st.integers(2, 10), st.integers(600, 3000))
    def test_of_a_flapping_node_changes_ever_more_seldom(self, period_s: int, lasting_s: int) -> None:
        standing, changes = Standing(), 0
        for now in range(lasting_s):
            found = V.SUSPECT if now // period_s % 2 else V.HEALTHY
            after = standing.after(found, float(now))
            changes += after.shown is not standing.shown
            standing = after
        # Undamped it would be one change per period.
        assert changes <= 6

    def test_policies_scale_with_silence(self) -> None:
        assert HealthPolicy.scaled(15.0) == HealthPolicy()
        scaled = dataclasses.asdict(HealthPolicy.scaled(1.5))
        assert (scaled["lone_silence_s"], scaled["cut_off_s"]) == (3.0, 12.0)
