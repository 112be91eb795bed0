"""What a route choice costs: `python -m bench.route_choice` prints µs per choice by strategy and size of the pool."""

from __future__ import annotations

import asyncio
import random
import timeit
from collections.abc import Callable
from typing import Any

from api.inference.router import RouteTable
from crosslogic.domain import ids
from crosslogic.domain.affinity import prefix_blocks
from crosslogic.domain.node import NodeState, RouteEntry
from crosslogic.domain.scheduling import (
    COST_WEIGHTED,
    LATENCY_WEIGHTED,
    LEAST_LOAD,
    PREFIX_AFFINITY,
    ROUND_ROBIN,
)
from crosslogic.new_ids import new_id

SIZES = (1, 16, 1000)
STRATEGIES = (ROUND_ROBIN, LEAST_LOAD, LATENCY_WEIGHTED, COST_WEIGHTED, PREFIX_AFFINITY)
REPEATS, NUMBER = 5, 5_000


def microseconds(call: Callable[[], Any]) -> float:
    """The best of some runs, which is the one least disturbed."""
    return min(timeit.repeat(call, repeat=REPEATS, number=NUMBER)) / NUMBER * 1e6


def table_of(size: int, strategy: str) -> RouteTable:
    """A pool whose nodes have work in flight, latencies and three prices."""
    table = RouteTable(lambda _: "none", None)
    table.set_strategies({"d": strategy})
    table.replace(
        RouteEntry(
            ids.NODE.show(new_id()),
            1,
            NodeState.READY,
            "m",
            "r",
            f"http://127.0.0.1:{10_000 + number}",
            "d",
            1000 + number,
            price_microdollars_per_h=(1 + number % 3) * 1_000_000,
        )
        for number in range(size)
    )
    chance = random.Random(1)
    for node in table.nodes:
        node.take(chance.randrange(20_000))
        node.first_token(chance.uniform(0.1, 0.2), 0.0)
    return table


async def main() -> None:
    """Print the table."""
    text = "".join(random.Random(2).choices("abcdefgh ", k=16_000))
    body = {"messages": [{"role": "user", "content": text[start : start + 1600]} for start in range(0, 16_000, 1600)]}
    blocks = prefix_blocks(body)
    print(f"{'µs per choice':18}" + "".join(f"{size:>8}" for size in SIZES) + "   among so many nodes")
    for strategy in STRATEGIES:
        cells: list[float] = []
        for size in SIZES:
            table = table_of(size, strategy)
            pool = table.pools[0]
            known = blocks if pool.wants_prefix else ()
            cells.append(microseconds(lambda table=table, pool=pool, known=known: table.choose(pool, (), known)))
        print(f"{strategy:18}" + "".join(f"{cell:8.2f}" for cell in cells))
    table = table_of(16, LEAST_LOAD)
    pool = table.pools[0]
    node = table.nodes[0]
    tried = table.nodes[:2]
    short = {"messages": [{"role": "user", "content": text[:1000]}]}
    choice = table.choose(pool)
    assert choice is not None

    def relay() -> None:
        node.take(1100)
        node.first_token(0.15, 1.0)
        node.succeeded(1.0)
        node.give_back(1100)

    others = {
        "with two tried": lambda: table.choose(pool, tried),
        "choose_in, 4 regions": lambda: table.choose_in("m", ("q", "r", "s", "t")),
        "take … give_back": relay,
        "prefix_blocks, 16 kB": lambda: prefix_blocks(body),
        "prefix_blocks, 1 kB": lambda: prefix_blocks(short),
        "Choice.header": choice.header,
        "Choice.explain": choice.explain,
    }
    for name, call in others.items():
        print(f"{name:22}{microseconds(call):8.2f}")


if __name__ == "__main__":
    asyncio.run(main())
