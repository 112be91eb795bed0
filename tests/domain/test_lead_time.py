from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.lead_time import LEAST_SAMPLES, MOST_SAMPLES, PHASE_OF, USUAL, Eta, LeadTimes, Phase, PhaseSample
from crosslogic.domain.node import ON_THE_WAY, Node, NodeState
from crosslogic.new_ids import new_id


def eta_in(times: LeadTimes, phase: Phase = Phase.PROVISION, age_s: float = 0.0) -> Eta:
    return times.eta(cloud="aws", gpu="L4", model="m", phase=phase, age_s=age_s)


SAMPLE = PhaseSample(Phase.PROVISION, 100.0, "aws", "L4", "m")


def learnt(*seconds: float, **fields: str) -> list[PhaseSample]:
    """Nodes that took so long in each of the three phases."""
    return [replace(SAMPLE, phase=phase, seconds=one, **fields) for one in seconds for phase in Phase]


class TestEta:
    def test_sums_the_phases_to_come(self) -> None:
        times = LeadTimes(learnt(10, 20, 30, 40, 50))
        eta = eta_in(times)
        assert (eta.p50_s, eta.samples, eta.basis) == (90, 5, "cloud, gpu, model")
        assert eta.p90_s == pytest.approx(90 + 20 * 3**0.5)
        assert eta_in(times, phase=Phase.LOAD).p50_s == 30

    def test_counts_those_only_that_took_longer_than_this_one_already_has(self) -> None:
        times = LeadTimes(learnt(10, 20, 30, 40, 50))
        assert eta_in(times, phase=Phase.LOAD, age_s=25).p50_s == 15  # Of 5, 15 and 25.
        # Later than all of them: as likely to take half as long again.
        late = eta_in(times, phase=Phase.LOAD, age_s=80)
        assert (late.p50_s, late.p90_s) == (40, 80)

    @pytest.mark.parametrize(
        ("others", "basis"),
        [
            ({"gpu": "T4"}, "cloud, model"),
            ({"cloud": "gcp", "gpu": "T4"}, "model"),
            ({"gpu": "T4", "model": "n"}, "cloud"),
            ({"cloud": "gcp", "model": "n"}, "all"),
        ],
    )
    def test_falls_back_to_what_is_most_alike(self, others: dict[str, str], basis: str) -> None:
        few = learnt(*[1.0] * (LEAST_SAMPLES - 1))
        eta = eta_in(LeadTimes([*few, *learnt(*[60.0] * 9, **others)]))
        assert (eta.p50_s, eta.basis) == (180, basis)

    def test_knows_nothing_at_first(self) -> None:
        eta = eta_in(LeadTimes())
        assert (eta.samples, eta.basis) == (0, USUAL)
        assert 60 < eta.p50_s < eta.p90_s

    def test_forgets_what_newer_nodes_have_shown(self) -> None:
        times = LeadTimes([*learnt(*[10.0] * MOST_SAMPLES), *learnt(*[999.0] * 500)])
        assert eta_in(times).p90_s == 30

    @given(st.lists(st.floats(0, 1e5), max_size=30), st.sampled_from(Phase), st.floats(0, 1e6))
    def test_is_never_negative(self, seconds: list[float], phase: Phase, age_s: float) -> None:
        eta = eta_in(LeadTimes(learnt(*seconds)), phase, age_s)
        assert 0 <= eta.p50_s <= eta.p90_s


class TestEtaOf:
    def test_takes_the_time_in_the_phase_from_those_that_have_ended(self) -> None:
        made_at = datetime(2026, 1, 1, tzinfo=UTC)
        node = Node(
            id=new_id(), deployment=None, model="m", region="r", provider="aws", cluster="c", gpu="L4", is_spot=True,
            is_pinned=False, state=NodeState.BOOTING, generation=1, reason="", endpoint="", capacity_tokens_per_s=0,
            workflow_id="w", drain_timeout_s=1, created_at=made_at, changed_at=made_at, ready_at=None,
            tombstoned_at=None, ended_at=None,
        )  # fmt: skip
        now = (made_at + timedelta(seconds=125)).timestamp()
        eta = LeadTimes(learnt(10, 20, 30, 40, 50)).eta_of(node, {Phase.PROVISION: 100.0}, now)
        assert eta.p50_s == 15 + 30

    def test_knows_the_phase_of_every_state_on_the_way(self) -> None:
        assert set(PHASE_OF) == ON_THE_WAY
