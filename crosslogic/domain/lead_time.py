"""Lead times: how long a node takes from its order to its first request, learnt from those that came before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from crosslogic.domain.node import Node, NodeState


class Phase(StrEnum):
    """The parts of a node's start that are told apart, in their order."""

    PROVISION = "provision"  # From the order until the machine runs.
    BOOT = "boot"  # Until the engine answers.
    LOAD = "load"  # Until it has generated and is admitted.


PHASE_OF = {
    NodeState.REQUESTED: Phase.PROVISION,
    NodeState.LAUNCHING: Phase.PROVISION,
    NodeState.BOOTING: Phase.BOOT,
    NodeState.LOADING: Phase.LOAD,
}

# Fewer say too little: then a coarser group is asked, and in the end these, which are a rented GPU's with an 8B model.
LEAST_SAMPLES = 5
MOST_SAMPLES = 200
USUAL_S = {Phase.PROVISION: (120.0, 300.0), Phase.BOOT: (120.0, 240.0), Phase.LOAD: (60.0, 150.0)}


@dataclass(frozen=True, slots=True)
class PhaseSample:
    """One node's time in one phase, in seconds."""

    phase: Phase
    seconds: float
    cloud: str
    gpu: str
    model: str


@dataclass(frozen=True, slots=True)
class Eta:
    """When a node will serve: in `p50_s` or sooner in half of the cases, in `p90_s` or sooner in nine of ten.

    `samples` is the smallest number of nodes that a phase was learnt from, `basis` what they have in common with it:
    `cloud, gpu, model` at best, `usual` where nothing was learnt.
    """

    p50_s: float
    p90_s: float
    samples: int
    basis: str


# From the closest to the coarsest: the fields of a sample that must agree.
GROUPS: tuple[tuple[str, ...], ...] = (("cloud", "gpu", "model"), ("cloud", "model"), ("model",), ("cloud",), ())
USUAL = "usual"


class LeadTimes:
    """What was learnt. The samples are given newest first; the newest `MOST_SAMPLES` of a group count."""

    def __init__(self, samples: Iterable[PhaseSample] = ()) -> None:
        self._seconds: dict[tuple[Phase, tuple[str, ...], tuple[str, ...]], list[float]] = {}
        for sample in samples:
            for group in GROUPS:
                found = self._seconds.setdefault((sample.phase, group, _values(sample, group)), [])
                if len(found) < MOST_SAMPLES:
                    found.append(sample.seconds)

    def eta(self, *, cloud: str, gpu: str, model: str, phase: Phase = Phase.PROVISION, age_s: float = 0.0) -> Eta:
        """For a node that has been in `phase` for `age_s`; without those two: for one that is ordered now."""
        of = PhaseSample(phase, age_s, cloud, gpu, model)
        phases = list(Phase)
        p50, spread_squares, least, coarsest = 0.0, 0.0, MOST_SAMPLES, 0
        for each in phases[phases.index(phase) :]:
            seconds, place = self._group(each, of)
            middle, high = _left(seconds, each, age_s if each is phase else 0.0)
            p50 += middle
            # Phases are taken to be independent: their spreads add up as squares.
            spread_squares += (high - middle) ** 2
            least, coarsest = min(least, len(seconds)), max(coarsest, place)
        basis = USUAL if coarsest == len(GROUPS) else ", ".join(GROUPS[coarsest]) or "all"
        return Eta(p50, p50 + math.sqrt(spread_squares), least, basis)

    def eta_of(self, node: Node, ended: Mapping[Phase, float], now: float) -> Eta:
        """For a node that is on its way, of whose start these phases have ended; `now` is in Unix seconds."""
        age_s = now - node.created_at.timestamp()
        return self.eta(
            cloud=node.provider,
            gpu=node.gpu,
            model=node.model,
            phase=PHASE_OF[node.state],
            age_s=max(0.0, age_s - sum(ended.values())),
        )

    def _group(self, phase: Phase, of: PhaseSample) -> tuple[Sequence[float], int]:
        for place, group in enumerate(GROUPS):
            seconds = self._seconds.get((phase, group, _values(of, group)), ())
            if len(seconds) >= LEAST_SAMPLES:
                return seconds, place
        return (), len(GROUPS)


def _values(sample: PhaseSample, group: Sequence[str]) -> tuple[str, ...]:
    return tuple(getattr(sample, name) for name in group)


def _left(seconds: Sequence[float], phase: Phase, age_s: float) -> tuple[float, float]:
    """The median and the ninetieth percentile of what is left of a phase that has lasted for `age_s`."""
    if not seconds:
        middle, high = USUAL_S[phase]
        seconds = (middle, high)
    longer = sorted(one - age_s for one in seconds if one > age_s)
    if not longer:
        # Later than any before: what has taken long will take long.
        return age_s / 2, age_s
    return _quantile(longer, 0.5), _quantile(longer, 0.9)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
