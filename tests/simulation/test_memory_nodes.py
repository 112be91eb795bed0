"""The registry in memory is the one in Postgres: the same operations, the same answers."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from datetime import datetime
from typing import Any, cast
from uuid import UUID

import asyncpg

from crosslogic.domain.errors import CrossLogicError
from crosslogic.domain.ids import uuid7
from crosslogic.domain.node import Intent, Node, NodeEvent
from crosslogic.store.nodes import NodeStore
from tests.simulation import clock
from tests.simulation.memory_nodes import MemoryNodes

OPERATIONS = 1_500
MODELS = ("llama-3-8b", "bge-base-en")
REGIONS = ("in-mumbai", "us-east")


class Sequences:
    """Random operations, done to both."""

    def __init__(self, seed: int, real: NodeStore) -> None:
        self._dice = random.Random(seed)
        self._real = real
        self.now = clock.EPOCH
        self.memory = MemoryNodes(lambda: self.now, models=MODELS, regions=REGIONS, deployments=lambda: ("llama-7b",))
        self._ids = [uuid7(1_000 + n, self._dice.getrandbits(80)) for n in range(12)]

    def _intent(self) -> Intent:
        dice, node_id = self._dice, self._dice.choice(self._ids)
        cluster = dice.choice([f"cic-{node_id}", f"cic-{node_id}", f"cic-{self._ids[0]}"])
        return Intent(
            node_id,
            dice.choice([*MODELS, *MODELS, "gone"]),
            dice.choice([*REGIONS, *REGIONS, "mars"]),
            "local",
            cluster,
            f"provision/{node_id}",
            dice.choice([None, "llama-7b"]),
            is_pinned=dice.random() < 0.5,
        )

    def _draw(self) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        dice, node_id = self._dice, self._dice.choice(self._ids)
        kind = dice.choice(["intend", "advance", "advance", "advance", "advance", "tombstone", "hand_over", "read"])
        if kind == "intend":
            return "intend", (self._intent(),), {}
        if kind == "advance":
            event = dice.choice([*NodeEvent, NodeEvent.LAUNCH, NodeEvent.BOOT, NodeEvent.LOAD, NodeEvent.ADMIT])
            endpoint = "https://10.0.0.1" if event is NodeEvent.BOOT else None
            capacity = 500 if event is NodeEvent.ADMIT else None
            return "advance", (node_id, event, "why"), {"endpoint": endpoint, "capacity_tokens_per_s": capacity}
        if kind == "tombstone":
            # Rarely: a tombstone is for ever, and most of what follows should still have something to change.
            if dice.random() < 0.7:
                return "get", (node_id,), {}
            known = Intent(node_id, MODELS[0], REGIONS[0], "local", f"late-{node_id}", f"provision/{node_id}")
            return "tombstone", (known, "over"), {}
        if kind == "hand_over":
            return "hand_over", (node_id, f"node/{node_id}"), {}
        reads: list[tuple[str, tuple[Any, ...]]] = [
            ("find", (node_id,)),
            ("list_alive", ()),
            ("list_alive", (dice.choice(REGIONS),)),
            ("list_all", ()),
            ("list_replicas", ("llama-7b", 1e9)),
            ("route_entries", ()),
            ("find_by_cluster", ([f"cic-{node_id}", "cic-nobody"],)),
        ]
        return *dice.choice(reads), {}

    async def step(self) -> tuple[Any, Any]:
        """What both answer to the next operation."""
        name, arguments, options = self._draw()
        try:
            real: Any = await getattr(self._real, name)(*arguments, **options)
        except CrossLogicError as error:
            real = error
        except asyncpg.PostgresError as error:
            # The memory has no CHECK; what would break one never happens to it either.
            raise AssertionError(f"{name}{arguments} broke a constraint: {error}") from error
        try:
            memory: Any = getattr(self.memory, name)(*arguments, **options)
        except CrossLogicError as error:
            memory = error
        return seen(real), seen(memory)


def seen(answer: Any) -> Any:
    """An answer without its instants, which differ, but for whether there are any."""
    if isinstance(answer, Node):
        values = {field.name: getattr(answer, field.name) for field in fields(answer)}
        return {key: bool(value) if isinstance(value, datetime) else value for key, value in values.items()}
    if isinstance(answer, CrossLogicError):
        return type(answer), getattr(answer, "code", ""), getattr(answer, "status", 0)
    if isinstance(answer, dict):
        return {key: seen(value) for key, value in cast(dict[str, Any], answer).items()}
    if isinstance(answer, list):
        return [seen(value) for value in cast(list[Any], answer)]
    if hasattr(answer, "ended_for_s"):
        return replace(answer, ended_for_s=0.0)
    return answer


class TestMemoryNodes:
    async def test_answers_as_postgres_does(self, pool: asyncpg.Pool) -> None:
        await pool.execute("INSERT INTO deployments (name, model) VALUES ('llama-7b', 'llama-3-8b')")
        changes: set[UUID] = set()
        for seed in range(3):
            await pool.execute("DELETE FROM nodes")
            sequences = Sequences(seed, NodeStore(pool))
            for number in range(OPERATIONS // 3):
                sequences.now = clock.EPOCH.replace(microsecond=number)
                real, memory = await sequences.step()
                assert real == memory, f"operation {number} of seed {seed}"
            changes |= set(sequences.memory.rows)
            assert any(node.ended_at for node in sequences.memory.rows.values())
        assert len(changes) > 20
