from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.ids import NODE, unix_ms_of
from crosslogic.domain.spot import Place, Preemption, Prior, hazard_per_hour, hazards, successor_of
from crosslogic.new_ids import new_id

NOW = datetime(2026, 11, 24, tzinfo=UTC)
PRIOR = Prior(0.05, 20.0)


def taken(zone: str, times: int = 1, cloud: str = "aws") -> list[Preemption]:
    return [Preemption(Place(cloud, zone, "L4"), "us-east", NOW, True, 600.0)] * times


class TestHazard:
    def test_of_what_nobody_tried_is_the_prior(self) -> None:
        assert hazard_per_hour([], 0.0, PRIOR) == pytest.approx(0.05)

    def test_is_what_was_seen_when_there_was_enough_to_see(self) -> None:
        assert hazard_per_hour(taken("a", 500), 1000.0, PRIOR) == pytest.approx(0.5, rel=0.02)

    def test_of_one_early_preemption_condemns_nobody(self) -> None:
        assert hazard_per_hour(taken("a"), 0.1, PRIOR) < 0.1

    def test_refuses_negative_hours(self) -> None:
        with pytest.raises(ValueError, match="negative"):
            hazard_per_hour([], -1.0, PRIOR)

    @given(st.integers(0, 200), st.floats(0, 1e5), st.floats(1e-4, 10), st.floats(0.1, 1e4))
    def test_lies_between_the_prior_and_what_was_seen(
        self, times: int, hours: float, rate: float, weight: float
    ) -> None:
        found = hazard_per_hour(taken("a", times), hours, Prior(rate, weight))
        seen = times / hours if hours else float("inf") if times else rate
        assert min(rate, seen) * (1 - 1e-9) <= found <= max(rate, seen) * (1 + 1e-9)
        assert hazard_per_hour(taken("a", times + 1), hours, Prior(rate, weight)) > found


class TestHazards:
    def test_of_a_new_zone_are_those_of_its_sisters(self) -> None:
        hours = {Place("aws", "a", "L4"): 200.0, Place("aws", "b", "L4"): 0.0, Place("gcp", "a", "L4"): 200.0}
        found = {hazard.place: hazard for hazard in hazards(taken("a", 100), hours)}
        bad, new, other = (found[place].per_hour for place in hours)
        assert bad > new > PRIOR.per_hour * 5
        assert other < PRIOR.per_hour

    def test_come_lowest_first_with_what_they_were_learnt_from(self) -> None:
        hours = {Place("aws", "a", "L4"): 10.0, Place("aws", "b", "L4"): 10.0}
        found = hazards(taken("a", 2), hours)
        assert [hazard.place.zone for hazard in found] == ["b", "a"]
        assert [(hazard.preemptions, hazard.exposure_hours) for hazard in found] == [(0, 10.0), (2, 10.0)]

    def test_know_places_that_never_came_to_serve(self) -> None:
        assert [hazard.place.zone for hazard in hazards(taken("z"), {})] == ["z"]


class TestSuccessor:
    def test_is_one_for_each_node(self) -> None:
        """F9."""
        node = new_id()
        assert successor_of(node) == successor_of(node)
        assert len({node, successor_of(node), successor_of(successor_of(node))}) == 3

    def test_is_a_node_id_of_its_own_machine(self) -> None:
        node = new_id()
        successor = successor_of(node)
        assert successor.version == 7
        assert unix_ms_of(successor) == unix_ms_of(node)
        # The cluster's name ends in these.
        assert NODE.show(successor)[-10:] != NODE.show(node)[-10:]
