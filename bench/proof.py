"""Proof that everything was on: each answered request is in Postgres, and every layer of the limits has counted it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import asyncpg
import msgspec
import redis.asyncio as aioredis

from bench.engine import PROMPT_TOKENS
from bench.load import Run
from bench.seed import Seeded
from crosslogic.domain.ids import encode
from crosslogic.domain.limits import DAY_TOKENS, SPEND, Subject

SHIPPED_WITHIN_S = 30.0
# The default of CROSSLOGIC_REDIS_PREFIX.
PREFIX: Final = "cic:"

_SUMS = """
    SELECT count(*) AS records, count(DISTINCT id) AS ids,
           count(*) FILTER (WHERE outcome = 'completed' AND token_source = 'engine') AS completed,
           coalesce(sum(prompt_tokens), 0)::bigint AS prompt_tokens,
           coalesce(sum(completion_tokens), 0)::bigint AS completion_tokens,
           coalesce(sum(list_price_microdollars), 0)::bigint AS microdollars,
           count(DISTINCT node_id) AS nodes
    FROM usage_records WHERE key_id = $1
"""


@dataclass(slots=True)
class Sent:
    """What the load had answered, from the first warm-up to the last drain."""

    answered: int = 0
    failed: int = 0
    completion_tokens: int = 0

    def add(self, run: Run) -> None:
        """Count a run."""
        self.answered += run.answered
        self.failed += run.failed
        self.completion_tokens += run.completion_tokens


@dataclass(frozen=True, slots=True)
class Proof:
    """The three counts beside one another. `problems` is empty when they agree."""

    answered: int
    records: int
    tokens: int
    counted_tokens: Mapping[str, int]
    holds_left: int
    nodes: int
    problems: tuple[str, ...] = ()

    def text(self) -> str:
        """In a few lines of Markdown."""
        counted = ", ".join(f"{layer} {used:,}" for layer, used in self.counted_tokens.items())
        lines = [
            f"Proof that everything was on: {self.answered:,} requests answered, {self.records:,} usage records with "
            f"{self.tokens:,} tokens; tokens a day by the limits' layers: {counted}; {self.nodes} nodes used, "
            f"{self.holds_left} holds left."
        ]
        return "\n".join([*lines, *(f"NOT PROVEN: {problem}" for problem in self.problems)])


def compare(
    sent: Sent, sums: Mapping[str, int], day_tokens: Mapping[str, int], spend_microdollars: int, holds_left: int
) -> Proof:
    """Everything that must be equal, and a line for each thing that is not."""
    tokens = sums["prompt_tokens"] + sums["completion_tokens"]
    pairs = [
        ("requests that failed", sent.failed, 0),
        ("usage records and requests answered", sums["records"], sent.answered),
        ("usage records with an id of their own and requests answered", sums["ids"], sent.answered),
        ("records completed with the engine's own usage and requests answered", sums["completed"], sent.answered),
        ("prompt tokens recorded and sent", sums["prompt_tokens"], PROMPT_TOKENS * sent.answered),
        ("completion tokens recorded and received", sums["completion_tokens"], sent.completion_tokens),
        *((f"tokens/day that layer {layer} counted and recorded", used, tokens) for layer, used in day_tokens.items()),
        ("spend that layer org counted and recorded", spend_microdollars, sums["microdollars"]),
        ("holds left in Valkey", holds_left, 0),
    ]
    problems = tuple(f"{what}: {found:,} and {wanted:,}" for what, found, wanted in pairs if found != wanted)
    return Proof(sent.answered, sums["records"], tokens, dict(day_tokens), holds_left, sums["nodes"], problems)


async def prove(database_url: str, redis_url: str, seeded: Seeded, sent: Sent, prefix: str = PREFIX) -> Proof:
    """Wait until the shipper has shipped, then compare."""
    connection = await asyncpg.connect(database_url)
    redis: Any = aioredis.from_url(redis_url)
    try:
        deadline = asyncio.get_running_loop().time() + SHIPPED_WITHIN_S
        while True:
            row = await connection.fetchrow(_SUMS, seeded.key_id)
            assert row is not None
            if row["records"] >= sent.answered or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.2)
        # All counters lie under the generation that counts, which a rebuild makes anew.
        begin = f"{prefix}limits:{(await redis.get(f'{prefix}limits:generation') or b'').decode()}:"
        accounts = {
            layer: read_account(await redis.get(begin + Subject(layer, encode(subject)).name))
            for layer, subject in seeded.subjects.items()
        }
        holds = [hold async for key in redis.scan_iter(match=f"{begin}holds:*") for hold in await redis.hkeys(key)]
        day_tokens = {layer: account[DAY_TOKENS] for layer, account in accounts.items()}
        return compare(sent, dict(row), day_tokens, accounts["org"][SPEND], len(holds))
    finally:
        await connection.close()
        await redis.aclose()


def read_account(packed: bytes | None) -> list[int]:
    """The sums of a subject's four meters; crosslogic/hot/limits.lua keeps amounts by bucket, in MessagePack."""
    if packed is None:
        return [0, 0, 0, 0]
    sums: list[int] = []
    for amounts in msgspec.msgpack.decode(packed)[:4]:
        # Lua has no empty map: it comes as an empty array.
        sums.append(sum(cast("dict[int, int]", amounts).values()) if amounts else 0)
    return sums
