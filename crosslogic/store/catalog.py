"""The catalog's SQL: models, regions and deployments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import asyncpg

from crosslogic.domain.catalog import Catalog, Deployment, Model, ModelDeadlines
from crosslogic.domain.deployment import Placement, RegionTarget, ScalingSettings
from crosslogic.domain.errors import Rejected
from crosslogic.domain.regions import Region, RegionMap
from crosslogic.store.audit import AuditStore
from crosslogic.store.reservations import ReservationStore
from crosslogic.store.revisions import RevisionStore, read_spec


class CatalogStore:
    """The catalog is read whole: it is small, and its readers hold it in memory. Writes leave an audit row (H11)."""

    SELECT_MODELS = """
        SELECT name, family, kind, context_tokens, vram_gb, input_price_e10, output_price_e10, aliases,
               default_max_tokens, metadata::text AS metadata, connect_timeout_ms, first_token_timeout_ms,
               idle_timeout_ms, total_timeout_ms
        FROM models ORDER BY name
    """
    SELECT_REGIONS = "SELECT name, title, multiplier_bp, aliases, fallback FROM regions ORDER BY position, name"
    SELECT_DEPLOYMENTS = """
        SELECT name, model, strategy, placement, on_demand_base, ttft_target_ms, spend_cap_microdollars_per_h, idle_s,
               gpus, revision, rollout_revision, rollout_from, rollout_workflow_id, traffic_bp
        FROM deployments ORDER BY name
    """
    SELECT_TARGETS = """
        SELECT t.deployment, t.region, t.replicas_min, t.replicas_max
        FROM deployment_regions t JOIN regions r ON r.name = t.region
        ORDER BY t.deployment, r.position, r.name
    """

    INSERT_DEPLOYMENT = "INSERT INTO deployments (name, model) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING"
    LOCK_DEPLOYMENT = """
        SELECT name, model, strategy, placement, on_demand_base, ttft_target_ms, spend_cap_microdollars_per_h, idle_s,
               gpus, revision, rollout_revision, rollout_from, rollout_workflow_id, traffic_bp
        FROM deployments WHERE name = $1 FOR UPDATE
    """
    UPDATE_DEPLOYMENT = """
        UPDATE deployments SET strategy = $2, placement = $3, on_demand_base = $4, ttft_target_ms = $5,
                               spend_cap_microdollars_per_h = $6, idle_s = $7, gpus = $8
        WHERE name = $1
    """
    SELECT_TARGETS_OF = """
        SELECT t.deployment, t.region, t.replicas_min, t.replicas_max
        FROM deployment_regions t JOIN regions r ON r.name = t.region
        WHERE t.deployment = $1
        ORDER BY r.position, r.name
    """
    DELETE_TARGETS = "DELETE FROM deployment_regions WHERE deployment = $1 AND region <> ALL($2::text[])"
    UPSERT_TARGET = """
        INSERT INTO deployment_regions (deployment, region, replicas_min, replicas_max) VALUES ($1, $2, $3, $4)
        ON CONFLICT (deployment, region) DO UPDATE SET
            replicas_min = excluded.replicas_min, replicas_max = excluded.replicas_max
    """
    SET_METADATA = """
        UPDATE models SET metadata = $2::text::jsonb WHERE name = $1 AND metadata <> $2::text::jsonb
    """

    LOCK_MODEL = """
        SELECT metadata::text AS metadata, connect_timeout_ms, first_token_timeout_ms, idle_timeout_ms, total_timeout_ms
        FROM models WHERE name = $1 FOR UPDATE
    """
    UPDATE_MODEL = """
        UPDATE models SET metadata = $2::text::jsonb, connect_timeout_ms = $3, first_token_timeout_ms = $4,
                          idle_timeout_ms = $5, total_timeout_ms = $6
        WHERE name = $1
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def load(self) -> Catalog:
        """One consistent reading of everything, with the reservations of this moment."""
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            models = await connection.fetch(self.SELECT_MODELS)
            regions = await connection.fetch(self.SELECT_REGIONS)
            deployments = await connection.fetch(self.SELECT_DEPLOYMENTS)
            targets = await connection.fetch(self.SELECT_TARGETS)
            revisions = await connection.fetch(RevisionStore.SELECT_IN_USE)
            booked = await ReservationStore.booked(connection)
        by_deployment: dict[str, list[RegionTarget]] = {}
        for row in targets:
            by_deployment.setdefault(row["deployment"], []).append(_target(row))
        return Catalog.of(
            models=[
                Model(
                    name=row["name"],
                    family=row["family"],
                    kind=row["kind"],
                    context_tokens=row["context_tokens"],
                    input_price_e10=row["input_price_e10"],
                    output_price_e10=row["output_price_e10"],
                    aliases=tuple(row["aliases"]),
                    default_max_tokens=row["default_max_tokens"],
                    metadata=json.loads(row["metadata"]),
                    vram_gb=row["vram_gb"],
                    deadlines=ModelDeadlines(
                        connect_timeout_ms=row["connect_timeout_ms"],
                        first_token_timeout_ms=row["first_token_timeout_ms"],
                        idle_timeout_ms=row["idle_timeout_ms"],
                        total_timeout_ms=row["total_timeout_ms"],
                    ),
                )
                for row in models
            ],
            regions=RegionMap.of(
                Region(row["name"], row["title"], row["multiplier_bp"], tuple(row["aliases"]), tuple(row["fallback"]))
                for row in regions
            ),
            deployments=[_deployment(row, by_deployment.get(row["name"], ())) for row in deployments],
            booked=booked,
            specs={(row["deployment"], row["revision"]): read_spec(row["spec"]) for row in revisions},
        ).at(datetime.now(UTC))

    async def put_deployment(
        self,
        name: str,
        *,
        model: str,
        strategy: str | None,
        regions: Sequence[RegionTarget],
        actor: str,
        scaling: Mapping[str, Any] | None = None,
    ) -> tuple[Deployment, bool]:
        """Make the deployment what is given here, regions that are left out included; and whether this call made it.

        Without a strategy the deployment's own (or the default) stays, and so does every field of `ScalingSettings`
        that `scaling` does not name. Raises Rejected 409 for another model than the
        deployment has: its nodes serve that one.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            status = await connection.execute(self.INSERT_DEPLOYMENT, name, model)
            is_new = status == "INSERT 0 1"
            row = await connection.fetchrow(self.LOCK_DEPLOYMENT, name)
            assert row is not None
            if row["model"] != model:
                raise Rejected(
                    f"Deployment {name} serves {row['model']}, as do its nodes. Make a new deployment for {model}.",
                    status=409,
                    code="deployment_serves_another_model",
                    param="model",
                )
            before = _deployment(
                row, [_target(found) for found in await connection.fetch(self.SELECT_TARGETS_OF, name)]
            )
            own = replace(before.scaling, **(scaling or {}))
            after = replace(before, strategy=strategy or before.strategy, scaling=own)
            if after != before:
                await connection.execute(
                    self.UPDATE_DEPLOYMENT,
                    name,
                    after.strategy,
                    own.placement,
                    own.on_demand_base,
                    own.ttft_target_ms,
                    own.spend_cap_microdollars_per_h,
                    own.idle_s,
                    list(own.gpus),
                )
            await connection.execute(self.DELETE_TARGETS, name, [target.region for target in regions])
            await connection.executemany(
                self.UPSERT_TARGET,
                [(name, target.region, target.replicas_min, target.replicas_max) for target in regions],
            )
            targets = await connection.fetch(self.SELECT_TARGETS_OF, name)
            after = replace(after, regions=tuple(_target(target) for target in targets))
            if is_new or after != before:
                await AuditStore.append(
                    connection,
                    actor=actor,
                    action="deployment.put",
                    subject=name,
                    details={
                        "model": model,
                        "strategy": after.strategy,
                        "regions": {
                            target.region: [target.replicas_min, target.replicas_max] for target in after.regions
                        },
                        "scaling": asdict(own),
                    },
                )
        return after, is_new

    async def update_model(self, model: str, changes: Mapping[str, Any], *, actor: str) -> bool:
        """Set any of `metadata` and the deadlines (None: the API's setting); False if they are that already.

        Raises Rejected 404.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(self.LOCK_MODEL, model)
            if row is None:
                raise Rejected(
                    f"There is no model {model}. List the models to see which there are.",
                    status=404,
                    code="model_not_found",
                )
            before = dict(row) | {"metadata": json.loads(row["metadata"])}
            after = before | dict(changes)
            if after == before:
                return False
            await connection.execute(
                self.UPDATE_MODEL,
                model,
                json.dumps(after["metadata"]),
                after["connect_timeout_ms"],
                after["first_token_timeout_ms"],
                after["idle_timeout_ms"],
                after["total_timeout_ms"],
            )
            await AuditStore.append(
                connection,
                actor=actor,
                action="model.update",
                subject=model,
                details={name: {"from": before[name], "to": after[name]} for name in changes},
            )
        return True

    async def set_metadata(self, model: str, metadata: Mapping[str, Any], *, actor: str) -> bool:
        """Replace what clients see of a model under `metadata`; False if it is that already."""
        async with self._pool.acquire() as connection, connection.transaction():
            status = await connection.execute(self.SET_METADATA, model, json.dumps(metadata))
            if status == "UPDATE 0":
                return False
            await AuditStore.append(
                connection,
                actor=actor,
                action="model.set_metadata",
                subject=model,
                details={"metadata": dict(metadata)},
            )
        return True


def _deployment(row: asyncpg.Record, targets: Sequence[RegionTarget]) -> Deployment:
    scaling = ScalingSettings(
        placement=Placement(row["placement"]),
        on_demand_base=row["on_demand_base"],
        ttft_target_ms=row["ttft_target_ms"],
        spend_cap_microdollars_per_h=row["spend_cap_microdollars_per_h"],
        idle_s=row["idle_s"],
        gpus=tuple(row["gpus"]),
    )
    return Deployment(
        row["name"],
        row["model"],
        row["strategy"],
        tuple(targets),
        scaling,
        revision=row["revision"],
        rollout_revision=row["rollout_revision"],
        rollout_from=row["rollout_from"],
        rollout_workflow_id=row["rollout_workflow_id"],
        traffic_bp=row["traffic_bp"],
    )


def _target(row: asyncpg.Record) -> RegionTarget:
    return RegionTarget(row["region"], row["replicas_min"], row["replicas_max"])
