"""Spot machines: how soon a cloud takes them back, learnt from what it took, and who follows a node that was taken."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from crosslogic.domain.ids import unix_ms_of, uuid7


@dataclass(frozen=True, slots=True)
class Place:
    """What a cloud sells under one price, and takes back under one pressure. `zone` is empty where nobody knows it."""

    cloud: str
    zone: str
    gpu: str


@dataclass(frozen=True, slots=True)
class Preemption:
    """A spot machine that its cloud took, or said that it would take. `lived_s` counts from when it served."""

    place: Place
    region: str
    at: datetime
    had_notice: bool
    lived_s: float


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of a place that nobody has tried: a rate, and how many machine-hours it is worth.

    The default is one preemption in 20 machine-hours: a GPU in short supply, because a wrong guess on that side costs
    some cents and on the other an interruption.
    """

    per_hour: float = 0.05
    weight_hours: float = 20.0


@dataclass(frozen=True, slots=True)
class Hazard:
    """The rate at which a place takes machines back, and what it was learnt from."""

    place: Place
    per_hour: float
    preemptions: int
    exposure_hours: float


def hazard_per_hour(history: Sequence[Preemption], exposure_hours: float, prior: Prior) -> float:
    """Preemptions to expect per machine-hour at one place, after `history` in `exposure_hours` of machines' lives.

    The mean of a gamma posterior over a Poisson rate: the prior counts as `weight_hours` of experience, so that one
    early preemption condemns no place and a quiet hour acquits none. Raises ValueError for negative hours.
    """
    if exposure_hours < 0:
        raise ValueError(f"exposure_hours must not be negative, got {exposure_hours}")
    return (len(history) + prior.per_hour * prior.weight_hours) / (exposure_hours + prior.weight_hours)


def hazards(
    history: Sequence[Preemption], exposure_hours: Mapping[Place, float], prior: Prior | None = None
) -> list[Hazard]:
    """The hazard of every place that was tried, lowest first.

    A zone is shrunk to what its cloud does with this GPU in all zones, and that to the prior: a new zone of a cloud
    that is known inherits from its sisters.
    """
    prior = prior or Prior()
    found: list[Hazard] = []
    for place in exposure_hours.keys() | {preemption.place for preemption in history}:
        sisters = _of(history, place.cloud, place.gpu)
        sisters_hours = sum(
            hours for other, hours in exposure_hours.items() if (other.cloud, other.gpu) == (place.cloud, place.gpu)
        )
        inherited = Prior(hazard_per_hour(sisters, sisters_hours, prior), prior.weight_hours)
        own = [preemption for preemption in sisters if preemption.place == place]
        hours = exposure_hours.get(place, 0.0)
        found.append(Hazard(place, hazard_per_hour(own, hours, inherited), len(own), hours))
    return sorted(found, key=lambda hazard: (hazard.per_hour, hazard.place.cloud, hazard.place.zone, hazard.place.gpu))


def _of(history: Sequence[Preemption], cloud: str, gpu: str) -> list[Preemption]:
    return [preemption for preemption in history if (preemption.place.cloud, preemption.place.gpu) == (cloud, gpu)]


def successor_of(node_id: UUID) -> UUID:
    """The id of the one node that may replace this one: whoever orders it, and however often, it is the same (F9)."""
    digest = hashlib.sha256(b"successor of " + node_id.bytes).digest()
    return uuid7(unix_ms_of(node_id), int.from_bytes(digest[:10], "big"))
