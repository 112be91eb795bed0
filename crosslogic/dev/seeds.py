"""The demo that dev mode starts with: an org with its key, and two deployments that the embedded stack can serve."""

from __future__ import annotations

import asyncpg

from crosslogic.domain import keys
from crosslogic.domain.deployment import RegionTarget
from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.tenancy import ENVIRONMENT_NAMES
from crosslogic.new_ids import new_id
from crosslogic.settings import Settings
from crosslogic.store.catalog import CatalogStore
from crosslogic.store.tenancy import TenancyStore

ACTOR = "setup"
ORG = "demo"
HOME_REGION = "in-mumbai"

# The deployment is named after the alias that most examples use.
DEPLOYMENTS = {
    "llama-7b": ("llama-3-8b", (RegionTarget("in-mumbai", 2, 2), RegionTarget("us-east", 1, 1))),
    "bge-base-en": ("bge-base-en", (RegionTarget("in-mumbai", 1, 1),)),
}


async def sow(pool: asyncpg.Pool, settings: Settings) -> list[str]:
    """Create what is missing of the demo and say what that was. What is there stays as its owner has made it.

    Dev mode only: raises InvariantViolated elsewhere, because everybody knows the demo's key.
    """
    if not settings.is_dev:
        raise InvariantViolated("the demo's seeds are for dev mode only")
    return await _sow_tenancy(TenancyStore(pool)) + await _sow_catalog(CatalogStore(pool), settings)


async def _sow_tenancy(store: TenancyStore) -> list[str]:
    sown: list[str] = []
    org, is_new = await store.create_org(
        new_id(), ORG, region_preferences=(HOME_REGION,), is_operator=True, actor=ACTOR
    )
    if is_new:
        sown.append(f"org {ORG}")
    for name in ENVIRONMENT_NAMES:
        environment, is_new = await store.create_environment(new_id(), org.id, name, actor=ACTOR)
        if is_new:
            sown.append(f"environment {name}")
        if name == "dev":
            _, is_new = await store.create_key(
                new_id(),
                environment.id,
                secret_hash=keys.hash_secret(keys.DEMO_SECRET),
                hint=keys.hint_of(keys.DEMO_SECRET),
                name="the key of the documentation's examples",
                actor=ACTOR,
            )
            if is_new:
                sown.append(f"key {keys.DEMO_SECRET}")
    return sown


async def _sow_catalog(store: CatalogStore, settings: Settings) -> list[str]:
    sown: list[str] = []
    catalog = await store.load()
    for name, (model, regions) in DEPLOYMENTS.items():
        if name not in catalog.deployments:
            await store.put_deployment(name, model=model, strategy=None, regions=regions, actor=ACTOR)
            sown.append(f"deployment {name}")
        if settings.cloud_provider == "local" and not catalog.models[model].metadata:
            # Whoever reads an answer must be able to know which weights wrote it.
            stand_in = {
                "served_by": "SmolLM2-135M-Instruct",
                "note": f"The local cloud has no GPUs: a small model stands in for {model}. Do not judge its answers.",
            }
            await store.set_metadata(model, stand_in, actor=ACTOR)
            sown.append(f"metadata of {model}")
    return sown
