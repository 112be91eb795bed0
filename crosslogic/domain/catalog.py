"""What we serve: models, regions, and the deployments that promise the one in the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from crosslogic.domain.deployment import DEFAULT_SCALING, RegionTarget, ScalingSettings
from crosslogic.domain.regions import RegionMap
from crosslogic.domain.reservation import Holder, Reservation, active, next_change, units_by_pool
from crosslogic.domain.revision import DEFAULT_SPEC, RevisionSpec


@dataclass(frozen=True, slots=True)
class ModelDeadlines:
    """A model's own deadlines, in milliseconds; None: the API's setting.

    To connect to a node, to the first token, between two chunks of a stream, and for the whole request.
    """

    connect_timeout_ms: int | None = None
    first_token_timeout_ms: int | None = None
    idle_timeout_ms: int | None = None
    total_timeout_ms: int | None = None


NO_DEADLINES = ModelDeadlines()


@dataclass(frozen=True, slots=True)
class Model:
    """What clients name. Prices are list prices in 10⁻¹⁰ USD a token; an embedding model has no output price."""

    name: str
    family: str
    kind: str
    context_tokens: int
    input_price_e10: int
    output_price_e10: int | None
    aliases: tuple[str, ...] = ()
    default_max_tokens: int = 1024
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    vram_gb: int = 0
    deadlines: ModelDeadlines = NO_DEADLINES


@dataclass(frozen=True, slots=True)
class Deployment:
    """The promise to serve one model in these regions.

    `revision` serves. While a roll-out is on, `rollout_revision` gets `traffic_bp` of the traffic, in basis points, and
    `rollout_from` the rest, whichever of the two is the serving one by now.
    """

    name: str
    model: str
    strategy: str
    regions: tuple[RegionTarget, ...] = ()
    scaling: ScalingSettings = DEFAULT_SCALING
    revision: int = 1
    rollout_revision: int | None = None
    rollout_from: int | None = None
    rollout_workflow_id: str | None = None
    traffic_bp: int = 0


@dataclass(frozen=True, slots=True)
class Catalog:
    """One consistent reading of the catalog. `by_alias` knows every model's name too.

    `reservations` (each org's sum) and `reserved_units` are those of an instant, and hold until `changes_at`; `booked`
    are all that have not ended by then. `specs` are those of the revisions that serve or are rolled out.
    """

    models: Mapping[str, Model]
    by_alias: Mapping[str, str]
    regions: RegionMap
    deployments: Mapping[str, Deployment]
    reservations: Mapping[Holder, Reservation] = field(default_factory=dict[Holder, Reservation])
    reserved_units: Mapping[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    booked: tuple[Reservation, ...] = ()
    changes_at: datetime | None = None
    specs: Mapping[tuple[str, int], RevisionSpec] = field(default_factory=dict[tuple[str, int], RevisionSpec])

    @classmethod
    def of(
        cls,
        models: Iterable[Model],
        regions: RegionMap,
        deployments: Iterable[Deployment],
        booked: Iterable[Reservation] = (),
        specs: Mapping[tuple[str, int], RevisionSpec] | None = None,
    ) -> Catalog:
        """Build the catalog, with no reservation active yet; a model's name wins over another model's alias."""
        known = {model.name: model for model in models}
        aliases = {alias: model.name for model in known.values() for alias in model.aliases}
        return cls(
            models=known,
            by_alias=aliases | {name: name for name in known},
            regions=regions,
            deployments={deployment.name: deployment for deployment in deployments},
            booked=tuple(booked),
            specs=specs or {},
        )

    def at(self, now: datetime) -> Catalog:
        """The same reading with the reservations of this instant."""
        held = active(self.booked, now)
        return replace(
            self,
            reservations=held,
            reserved_units=units_by_pool(held.values()),
            changes_at=next_change(self.booked, now),
        )

    def spec_of(self, deployment: str, revision: int) -> RevisionSpec:
        """What that revision's nodes run; where nothing is known of it, whatever their provider has."""
        return self.specs.get((deployment, revision), DEFAULT_SPEC)

    def resolve_model(self, name: str) -> Model | None:
        """The model of that name or alias, in any case; None if there is none."""
        found = self.by_alias.get(name) or self.by_alias.get(name.strip().lower())
        return self.models[found] if found else None
