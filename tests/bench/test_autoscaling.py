from __future__ import annotations

import pytest

from bench.autoscaling import SLO_S, Clairvoyant, Fixed, Ours, QpsThreshold
from bench.fleet_model import Machine, Result, Scaler, Workload, read_trace, simulate, stretch

MACHINE = Machine()
# A night and a morning.
LOAD = stretch(read_trace(), 8 / 24, seed=3)
NIGHT = stretch(read_trace(), 2 / 24, seed=3)


def run(scaler: Scaler, load: Workload = LOAD) -> Result:
    return simulate(load, scaler, MACHINE, seed=3)


class TestStretch:
    def test_keeps_the_traces_requests_and_follows_the_day(self) -> None:
        trace = read_trace()
        assert len(trace) == 8819
        assert {(prompt, made) for _, prompt, made in trace} >= set(zip(LOAD.prompt, LOAD.generated, strict=True))
        assert LOAD.at == sorted(LOAD.at)
        by_hour = [sum(hour <= at / 3600 < hour + 1 for at in LOAD.at) for hour in range(8)]
        assert by_hour[3] < by_hour[5] < by_hour[7]

    def test_is_the_same_for_a_seed(self) -> None:
        assert stretch(read_trace(), 2 / 24, seed=3) == NIGHT
        assert stretch(read_trace(), 2 / 24, seed=4) != NIGHT


class TestSimulate:
    def test_an_idle_node_answers_after_its_prompt(self) -> None:
        one = Workload([10.0], [2500], [10], 60.0)
        assert run(Fixed(1), one).ttft_s == [pytest.approx(1.0 + MACHINE.token_s)]

    def test_a_full_node_makes_the_next_one_wait(self) -> None:
        # Two are handed over; the third waits for room in the queue.
        three = Workload([10.0, 10.0, 10.0], [10_000] * 3, [0] * 3, 60.0)
        result = simulate(three, Fixed(1), MACHINE, 3, start_nodes=1)
        assert [round(ttft - MACHINE.token_s, 6) for ttft in result.ttft_s] == [4, 8, 12]

    def test_pays_for_every_node_from_its_order(self) -> None:
        quiet = Workload([1.0], [10], [1], 3600.0)
        result = simulate(quiet, Clairvoyant(quiet, MACHINE, 0.5), MACHINE, 3, start_nodes=1)
        assert (result.node_h, result.usd) == (1.0, MACHINE.usd_per_h)

    def test_is_the_same_for_a_seed(self) -> None:
        assert run(QpsThreshold(0.3), NIGHT) == run(QpsThreshold(0.3), NIGHT)


class TestOurs:
    def test_keeps_a_far_better_tail_than_the_threshold_of_the_same_cost(self) -> None:
        ours, rival = run(Ours(MACHINE)), run(QpsThreshold(0.08))
        assert ours.usd == pytest.approx(rival.usd, rel=0.05)
        assert ours.ttft_s_at(0.99) < 0.1 * rival.ttft_s_at(0.99)
        assert ours.attained(SLO_S) > 0.9
        # And costs more than whoever knows the future.
        assert run(Clairvoyant(LOAD, MACHINE, 0.5)).usd < ours.usd
