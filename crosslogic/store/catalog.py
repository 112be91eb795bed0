"""The catalog's SQL: models, regions and deployments."""

from __future__ import annotations

import json

import asyncpg

from crosslogic.domain.catalog import Catalog, Deployment, Model
from crosslogic.domain.deployment import RegionTarget
from crosslogic.domain.regions import Region, RegionMap


class CatalogStore:
    """Reads the catalog whole: it is small, and its readers hold it in memory."""

    SELECT_MODELS = """
        SELECT name, family, kind, context_tokens, vram_gb, input_price_e10, output_price_e10, aliases,
               default_max_tokens, metadata::text AS metadata
        FROM models ORDER BY name
    """
    SELECT_REGIONS = "SELECT name, title, multiplier_bp, aliases, fallback FROM regions ORDER BY position, name"
    SELECT_DEPLOYMENTS = "SELECT name, model, strategy FROM deployments ORDER BY name"
    SELECT_TARGETS = """
        SELECT t.deployment, t.region, t.replicas_min, t.replicas_max
        FROM deployment_regions t JOIN regions r ON r.name = t.region
        ORDER BY t.deployment, r.position, r.name
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def load(self) -> Catalog:
        """One consistent reading of everything."""
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            models = await connection.fetch(self.SELECT_MODELS)
            regions = await connection.fetch(self.SELECT_REGIONS)
            deployments = await connection.fetch(self.SELECT_DEPLOYMENTS)
            targets = await connection.fetch(self.SELECT_TARGETS)
        by_deployment: dict[str, list[RegionTarget]] = {}
        for row in targets:
            by_deployment.setdefault(row["deployment"], []).append(
                RegionTarget(row["region"], row["replicas_min"], row["replicas_max"])
            )
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
                )
                for row in models
            ],
            regions=RegionMap.of(
                Region(row["name"], row["title"], row["multiplier_bp"], tuple(row["aliases"]), tuple(row["fallback"]))
                for row in regions
            ),
            deployments=[
                Deployment(row["name"], row["model"], row["strategy"], tuple(by_deployment.get(row["name"], ())))
                for row in deployments
            ],
        )
