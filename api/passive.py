"""Tells the fleet's watch what this process has seen of nodes: the signal that comes from requests themselves.

Everything here is off the hot path: once a second it reads counters that the router keeps anyway.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence

from api.inference.router import Node, RouteTable
from crosslogic.domain.errors import Unavailable
from crosslogic.domain.health import RequestView
from crosslogic.hot.passive import PassiveBoard

log = logging.getLogger("crosslogic.passive")

INTERVAL_S = 1.0
# Counts are those of so many seconds: enough for a share to mean something, few enough to notice within seconds.
WINDOW_S = 10.0

# A node's counters: starts, answers, errors, busy.
Counts = tuple[int, int, int, int]
_NONE: Counts = (0, 0, 0, 0)


class PassiveView:
    """One process's view of its nodes."""

    def __init__(self, table: RouteTable, board: PassiveBoard, process_id: str) -> None:
        self._table = table
        self._board = board
        self._process_id = process_id
        self._past: deque[tuple[float, dict[Node, Counts]]] = deque()
        self._told: frozenset[str] = frozenset()

    def look(self, now: float) -> dict[str, dict[str, RequestView]]:
        """What there is to say at `now`, by region and node id. Nodes that nobody used are left out."""
        nodes = self._table.nodes
        counts = {node: _counts(node) for node in nodes}
        self._past.append((now, counts))
        while len(self._past) > 1 and self._past[1][0] <= now - WINDOW_S:
            self._past.popleft()
        before = self._past[0][1]
        found: dict[str, dict[str, RequestView]] = {}
        for node in nodes:
            # One that came since then had no counts before.
            starts, answers, errors, busy = _less(counts[node], before.get(node, _NONE))
            is_ejected = node.is_out and now < node.ejected_until
            if not (starts or answers or errors or busy or is_ejected or node.is_unreachable):
                continue
            found.setdefault(node.entry.region, {})[node.entry.node_id] = RequestView(
                starts,
                answers,
                errors,
                busy,
                node.failures,
                node.is_unreachable,
                is_ejected,
                node.requests_in_flight,
                round(node.ttft_s, 4),
                round(node.pool.median_ttft_s, 4),
            )
        return found

    async def tell(self, now: float) -> None:
        """Publish it. Raises Unavailable when Redis does not answer."""
        found = self.look(now)
        # A region with nothing left to say is told so once, instead of standing by its last word.
        for region in found.keys() | self._told:
            await self._board.put(region, self._process_id, found.get(region, {}))
        self._told = frozenset(found)

    async def keep_telling(self) -> None:
        """Run for the life of the process."""
        loop = asyncio.get_running_loop()
        is_away = False
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.tell(loop.time())
                is_away = False
            except Unavailable as error:
                if not is_away:
                    log.warning("what requests say of nodes is not told: %s", error.message)
                is_away = True


def _counts(node: Node) -> Counts:
    return (node.starts, node.answers, node.errors, node.refusals)


def _less(now: Sequence[int], before: Sequence[int]) -> Counts:
    starts, answers, errors, busy = (a - b for a, b in zip(now, before, strict=True))
    return starts, answers, errors, busy
