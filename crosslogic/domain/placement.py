"""Placement: which GPU, in which cloud, region and zone a node is tried first, by what serving there really costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from crosslogic.domain.errors import Rejected

# A node without a GPU: its engine runs on the machine's processors.
CPU = "cpu"

# Memory in GB of the GPUs that we rent, by the names SkyPilot has for them. Source: the makers' data sheets.
GPU_MEMORY_GB: Mapping[str, int] = {
    "T4": 16,
    "L4": 24,
    "A10G": 24,
    "A10": 24,
    "A100": 40,
    "L40S": 48,
    "A100-80GB": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
# Clouds rent GPUs by these numbers; an engine splits a model over a power of two.
GPU_COUNTS = (1, 2, 4, 8)

# SkyPilot tries places one after the other, each for a minute or more. An order that would take longer is better
# refused, so that somebody decides.
MOST_PLACES = 24


@dataclass(frozen=True, slots=True)
class Gpus:
    """So many GPUs of one kind; none of them is the machine's processors."""

    name: str
    count: int = 1

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.name}:{self.count}"

    @classmethod
    def read(cls, text: str) -> Gpus:
        """`L4`, `A100:8` or `cpu`. Raises Rejected for any other form."""
        name, _, count = text.strip().partition(":")
        if name.lower() == CPU and not count:
            return cls(CPU)
        if not name or (count and (not count.isdecimal() or not 1 <= int(count) <= 64)):
            raise Rejected(
                f"Cannot read the GPU {text[:64]!r}: write NAME or NAME:COUNT, such as L4 or A100:8.",
                code="invalid_gpu",
                param="gpus",
            )
        return cls(name, int(count or 1))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a cloud's catalog rents out. Prices are microdollars an hour; None: not to be had that way.

    `zone` is empty where prices are those of a whole region.
    """

    cloud: str
    region: str
    gpus: Gpus
    instance_type: str = ""
    on_demand_microdollars_per_h: int | None = None
    spot_microdollars_per_h: int | None = None
    zone: str = ""


# (cloud, region, zone, GPU's name): where nodes are taken back together. An empty zone is any zone of the region.
Market = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Exposure:
    """What a market has done to our spot nodes: hours that they ran there, and how often one was taken."""

    hours: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class RiskPolicy:
    """How preemptions are counted against a price.

    A market that we know little of is taken for an average one: `prior_hours` at `prior_preemptions_per_h`, before what
    was seen. Each preemption wastes `lost_h`: the replacement's warm-up is paid and serves nobody.
    """

    prior_preemptions_per_h: float = 0.05
    prior_hours: float = 20.0
    lost_h: float = 0.25


DEFAULT_RISK = RiskPolicy()


@dataclass(frozen=True, slots=True)
class Place:
    """One place to try. `price_microdollars_per_h` is the list price there, 0 for unknown or owned."""

    cloud: str
    region: str = ""
    zone: str = ""
    gpu: str = CPU
    instance_type: str = ""
    is_spot: bool = False
    price_microdollars_per_h: int = 0
    reason: str = ""

    @property
    def infra(self) -> str:
        """`cloud/region/zone`, as far as it is known."""
        return "/".join(part for part in (self.cloud, self.region, self.zone) if part)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a node may be. `clouds` empty: any; `zone` empty: any. `regions` are the clouds' names of one of ours."""

    gpus: tuple[Gpus, ...]
    regions: frozenset[str]
    is_spot: bool
    clouds: frozenset[str] = frozenset()
    zone: str = ""


def fitting(vram_gb: int) -> list[Gpus]:
    """The fewest GPUs of each kind that hold a model, smallest GPU first. Raises Rejected when no machine does."""
    found: list[Gpus] = []
    for name, memory_gb in sorted(GPU_MEMORY_GB.items(), key=lambda item: item[1]):
        count = next((count for count in GPU_COUNTS if count * memory_gb >= vram_gb), None)
        if count is not None:
            found.append(Gpus(name, count))
    if not found:
        raise Rejected(
            f"No machine that we know holds {vram_gb} GB; name its GPUs in the field gpus.", code="no_gpu", param="gpus"
        )
    return found


def hazard_per_h(exposure: Exposure | None, policy: RiskPolicy = DEFAULT_RISK) -> float:
    """Preemptions to expect in an hour: what was seen, shrunk towards the prior (a Gamma prior's posterior mean)."""
    seen = exposure or Exposure(0.0, 0)
    expected = policy.prior_preemptions_per_h * policy.prior_hours + seen.preemptions
    return expected / (policy.prior_hours + max(0.0, seen.hours))


def serving_cost(price_microdollars_per_h: int, hazard: float, policy: RiskPolicy = DEFAULT_RISK) -> float:
    """Microdollars for an hour that serves: every hour pays for the warm-ups that its preemptions waste."""
    return price_microdollars_per_h * (1 + hazard * policy.lost_h)


def rank(
    offers: Iterable[Offer],
    wish: Wish,
    history: Mapping[Market, Exposure],
    policy: RiskPolicy = DEFAULT_RISK,
) -> list[Place]:
    """The places that fit the wish, cheapest hour of serving first; at most MOST_PLACES.

    A GPU fits if its machine has at least as many as asked. Equal costs keep the order of the wish's GPUs.
    """
    ranked: list[tuple[float, int, Place]] = []
    for offer in offers:
        position = next(
            (i for i, g in enumerate(wish.gpus) if g.name == offer.gpus.name and g.count <= offer.gpus.count), None
        )
        price = offer.spot_microdollars_per_h if wish.is_spot else offer.on_demand_microdollars_per_h
        if position is None or price is None or offer.region not in wish.regions:
            continue
        if wish.clouds and offer.cloud not in wish.clouds:
            continue
        if wish.zone and offer.zone not in ("", wish.zone):
            continue
        place = Place(
            offer.cloud,
            offer.region,
            wish.zone or offer.zone,
            str(offer.gpus),
            offer.instance_type,
            wish.is_spot,
            price,
        )
        hazard = hazard_per_h(exposure_of(place, history), policy) if wish.is_spot else 0.0
        cost = serving_cost(price, hazard, policy)
        ranked.append((cost, position, replace(place, reason=_reason(place, hazard, cost))))
    ranked.sort(key=lambda entry: (entry[0], entry[1], entry[2].infra, entry[2].instance_type))
    return _first_of_each(place for _, _, place in ranked)[:MOST_PLACES]


def exposure_of(place: Place, history: Mapping[Market, Exposure]) -> Exposure | None:
    """What is known of a place: of its zone if the place names one, else of its whole region."""
    gpu = Gpus.read(place.gpu).name
    if place.zone:
        return history.get((place.cloud, place.region, place.zone, gpu))
    seen = [
        exposure
        for (cloud, region, _, name), exposure in history.items()
        if (cloud, region, name) == (place.cloud, place.region, gpu)
    ]
    if not seen:
        return None
    return Exposure(sum(exposure.hours for exposure in seen), sum(exposure.preemptions for exposure in seen))


def explain(places: Sequence[Place]) -> str:
    """The choice in plain words, for the node's row and the Temporal UI."""
    if not places:
        return "no place was found"
    first, *others = places
    return f"{first.infra} first: {first.reason}" + (f"; {len(others)} more if it is full" if others else "")


def _first_of_each(places: Iterable[Place]) -> list[Place]:
    """Each (infra, GPUs) once: the cheapest instance type stands for it, and SkyPilot picks it by the same price."""
    found: dict[tuple[str, str], Place] = {}
    for place in places:
        found.setdefault((place.infra, place.gpu), place)
    return list(found.values())


def _reason(place: Place, hazard: float, cost: float) -> str:
    dollars = f"{place.gpu} at ${place.price_microdollars_per_h / 1_000_000:.3f}/h"
    if not place.price_microdollars_per_h:
        return f"{place.gpu} on machines of our own"
    if not place.is_spot:
        return f"{dollars} on demand"
    return f"{dollars} spot, {hazard:.3f} preemptions/h expected, so ${cost / 1_000_000:.3f} an hour of serving"
