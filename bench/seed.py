"""What our gateway finds in its database: a tenant with limits in all four layers, and ready nodes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg

from crosslogic.domain import keys
from crosslogic.domain.tenancy import GLOBAL_SUBJECT
from crosslogic.new_ids import new_id
from crosslogic.store.migrations import migrate
from crosslogic.store.tenancy import TenancyStore

ACTOR = "bench"
REGION = "us-east"

# Far above what any machine can ask: every layer decides, none refuses.
HIGH: Final = {
    "requests_per_min": 10**9,
    "tokens_per_min": 10**12,
    "tokens_per_day": 10**14,
    "concurrency": 10**6,
}
HIGH_SPEND_MICRODOLLARS: Final = 10**15

_ADD_NODE = """
    INSERT INTO nodes (id, model, region, provider, cluster, state, endpoint, workflow_id, generation, ready_at,
                       capacity_tokens_per_s)
    VALUES ($1, $2, $3, 'joined', $4, 'ready', $5, 'bench', 3, now(), 2000)
"""


@dataclass(frozen=True, slots=True)
class Seeded:
    """The tenant that the load is sent as. `subjects` are its limits' layers with their ids."""

    secret: str
    org_id: UUID
    environment_id: UUID
    key_id: UUID

    @property
    def subjects(self) -> Mapping[str, UUID]:
        """Whom each layer's limits bind."""
        return {"global": GLOBAL_SUBJECT, "org": self.org_id, "environment": self.environment_id, "key": self.key_id}


async def seed(database_url: str, engines: Mapping[str, Sequence[str]]) -> Seeded:
    """Migrate, then make one tenant with a key, and a ready node for each engine of each model."""
    await migrate(database_url)
    pool = await asyncpg.create_pool(database_url, min_size=1, max_size=2)
    try:
        store = TenancyStore(pool)
        org, _ = await store.create_org(new_id(), "bench", region_preferences=(REGION,), actor=ACTOR)
        environment, _ = await store.create_environment(new_id(), org.id, "prod", actor=ACTOR)
        secret = keys.mint("prod", secrets.token_bytes(keys.RANDOM_BYTES))
        key, _ = await store.create_key(
            new_id(), environment.id, secret_hash=keys.hash_secret(secret), hint=keys.hint_of(secret), actor=ACTOR
        )
        seeded = Seeded(secret, org.id, environment.id, key.id)
        for layer, subject in seeded.subjects.items():
            spend = {"monthly_spend_microdollars": HIGH_SPEND_MICRODOLLARS} if layer == "org" else {}
            await store.set_limits(layer, subject, HIGH | spend, actor=ACTOR)
        for model, endpoints in engines.items():
            for endpoint in endpoints:
                node_id = new_id()
                await pool.execute(_ADD_NODE, node_id, model, REGION, str(node_id), endpoint)
    finally:
        await pool.close()
    return seeded
