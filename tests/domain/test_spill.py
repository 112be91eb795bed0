"""What a lost region hands on, and what a full one does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.spill import FIRST_S, TRICKLE, Loss, may_relieve


def loss(arrived: int, spilled: int) -> Loss:
    made = Loss(1_000.0)
    made.arrived, made.spilled = arrived, spilled
    return made


class TestLoss:
    @pytest.mark.parametrize(
        ("after_s", "arrived", "spilled", "load", "may"),
        [
            (0, 1, 0, 0.0, True),
            (0, 1, 9, 0.0, True),  # The trickle, whatever its share.
            (0, 40, 10, 0.0, False),
            (30, 50, 10, 0.0, False),
            (30, 51, 10, 0.0, True),  # A fifth of 51 is more than ten.
            (30, 1_000, 199, 0.0, True),
            (30, 1_000, 200, 0.0, False),
            (30, 1_000, 200, 5.0, False),
            (59.9, 1_000, 0, 5.0, True),  # Whether there is room is asked elsewhere.
            (60, 1_000, 200, 0.79, True),
            (60, 1_000, 200, 0.8, False),
            (3_600, 1_000, 1_000, 0.0, True),
            (3_600, 1_000, 0, 0.95, False),
        ],
    )
    def test_cases(self, after_s: float, arrived: int, spilled: int, load: float, may: bool) -> None:
        assert loss(arrived, spilled).may_spill(1_000.0 + after_s, load) is may

    @pytest.mark.parametrize(("processes", "most"), [(1, 10), (2, 5), (3, 4), (20, 1)])
    def test_processes_share_the_trickle(self, processes: int, most: int) -> None:
        assert loss(1, most - 1).may_spill(1_000.0, 0.0, processes)
        assert not loss(1, most).may_spill(1_000.0, 0.0, processes)

    @given(st.lists(st.floats(0, 59), max_size=400))
    def test_in_the_first_minute_no_more_than_a_fifth_or_ten(self, arrivals: list[float]) -> None:
        lost = Loss(0.0)
        for at in sorted(arrivals):
            lost.arrived += 1
            lost.spilled += lost.may_spill(at, 0.0)
        assert lost.spilled <= max(TRICKLE, len(arrivals) / 5 + 1)
        assert lost.spilled >= min(len(arrivals), TRICKLE, len(arrivals) // 5)

    def test_says_when_more_may_go(self) -> None:
        assert loss(0, 0).first_ends_in_s(1_012.0) == FIRST_S - 12
        assert loss(0, 0).first_ends_in_s(2_000.0) == 0


class TestMayRelieve:
    @pytest.mark.parametrize(("load", "may"), [(0.0, True), (0.59, True), (0.6, False), (1.5, False)])
    def test_only_into_a_region_that_has_plenty(self, load: float, may: bool) -> None:
        assert may_relieve(load) is may
