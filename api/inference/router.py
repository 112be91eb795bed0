"""The route table: every node this process may use, in memory, and the choice among them.

Entries arrive by push from Redis and by full reads from Postgres; of two readings of one node the higher generation
holds (F4). A node that left is remembered for a while, so that a late message cannot bring it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable, Sequence

from api.inference.upstream import FailureKind, Upstream
from crosslogic.domain.ids import NODE
from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY, RouteEntry
from crosslogic.domain.scheduling import choose, ejection_s

# Messages older than this cannot be in flight any more.
REMEMBER_GONE_S = 600.0
SUSPICIOUS = frozenset({FailureKind.CONNECT, FailureKind.RESET})
BLAMELESS = frozenset({FailureKind.BUSY, FailureKind.TOTAL})
# After its ejection one request finds out whether a node is well again; for so long the others keep away.
TRIAL_S = 1.0
# So many failed connections in a row, and no request is started there any more until a connection succeeds (F2).
UNREACHABLE_AFTER = 3
PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 2.0


class Node:
    """One node as this process sees it: its latest entry, its connections and what it has been through."""

    __slots__ = (
        "connect_failures",
        "ejected_until",
        "entry",
        "failures",
        "head",
        "id",
        "is_gone",
        "tokens_in_flight",
        "upstream",
    )

    def __init__(self, entry: RouteEntry, upstream: Upstream) -> None:
        self.entry = entry
        self.upstream = upstream
        self.id = NODE.parse(entry.node_id)
        # The lines by which every answer says who gave it.
        self.head = (f"x-crosslogic-node: {entry.node_id}\r\nx-crosslogic-region: {entry.region}\r\n").encode()
        self.tokens_in_flight = 0
        self.failures = 0
        self.connect_failures = 0
        self.ejected_until = 0.0
        self.is_gone = False

    @property
    def capacity_tokens_per_s(self) -> int:
        """Measured at admission; 0 when unknown."""
        return self.entry.capacity_tokens_per_s

    @property
    def is_unreachable(self) -> bool:
        """Did the last connections all fail?"""
        return self.connect_failures >= UNREACHABLE_AFTER

    def succeeded(self) -> None:
        """It answered as it should, to the end; a first byte alone proves too little."""
        self.failures = 0
        self.connect_failures = 0
        self.ejected_until = 0.0

    def failed(self, kind: FailureKind, now: float) -> bool:
        """Note a failure; True when it got the node ejected. Being full, or asked for too much, is none."""
        if kind in BLAMELESS:
            return False
        self.failures += 1
        self.connect_failures = self.connect_failures + 1 if kind is FailureKind.CONNECT else 0
        pause_s = ejection_s(self.failures, is_connection_failure=kind in SUSPICIOUS)
        self.ejected_until = max(self.ejected_until, now + pause_s)
        return pause_s > 0


class RouteTable:
    """All nodes by model and region."""

    def __init__(self, credential_of: Callable[[str], str], tls: ssl.SSLContext | None) -> None:
        self._credential_of = credential_of
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._nodes: dict[str, Node] = {}
        self._gone: dict[str, tuple[int, float]] = {}
        self._routable: dict[tuple[str, str], list[Node]] = {}
        self._on_the_way: dict[tuple[str, str], int] = {}
        self._changed = asyncio.Event()
        self._turn = 0
        self.is_loaded = False
        self.refreshed_at = 0.0

    # Feeding

    def apply(self, entry: RouteEntry) -> None:
        """Take one node's entry if it is newer than what is known."""
        if self._take(entry):
            self._rebuild()

    def replace(self, entries: Iterable[RouteEntry]) -> None:
        """Take a full reading: nodes that are not in it are gone."""
        present: set[str] = set()
        for entry in entries:
            present.add(entry.node_id)
            self._take(entry)
        for node_id in [node_id for node_id in self._nodes if node_id not in present]:
            self._forget(node_id, self._nodes[node_id].entry.generation)
        horizon = self._loop.time() - REMEMBER_GONE_S
        self._gone = {node_id: mark for node_id, mark in self._gone.items() if mark[1] > horizon}
        self.is_loaded = True
        self.refreshed_at = self._loop.time()
        self._rebuild()

    def _take(self, entry: RouteEntry) -> bool:
        gone = self._gone.get(entry.node_id)
        if gone is not None and entry.generation <= gone[0]:
            return False
        node = self._nodes.get(entry.node_id)
        if node is not None and entry.generation <= node.entry.generation:
            return False
        if entry.state in FINAL_STATES:
            self._forget(entry.node_id, entry.generation)
        elif node is None or node.entry.endpoint != entry.endpoint:
            if node is not None:
                node.is_gone = True
                node.upstream.close()
            upstream = Upstream(entry.endpoint, self._credential_of(entry.node_id), self._tls)
            self._nodes[entry.node_id] = Node(entry, upstream)
        else:
            node.entry = entry
        return True

    def _forget(self, node_id: str, generation: int) -> None:
        node = self._nodes.pop(node_id, None)
        if node is not None:
            node.is_gone = True
            node.upstream.close()
        self._gone[node_id] = (generation, self._loop.time())

    def _rebuild(self) -> None:
        routable: dict[tuple[str, str], list[Node]] = {}
        on_the_way: dict[tuple[str, str], int] = {}
        for node in self._nodes.values():
            place = (node.entry.model, node.entry.region)
            if node.entry.is_routable:
                routable.setdefault(place, []).append(node)
            elif node.entry.state in ON_THE_WAY and not node.entry.is_tombstoned:
                on_the_way[place] = on_the_way.get(place, 0) + 1
        self._routable, self._on_the_way = routable, on_the_way
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # Asking

    def choose(self, model: str, regions: Sequence[str], tried: Sequence[Node]) -> Node | None:
        """The node for the next try: the first region in order that has an untried one decides."""
        now = self._loop.time()
        ejected: list[Node] = []
        for region in regions:
            nodes = self._routable.get((model, region))
            if not nodes:
                continue
            untried = [node for node in nodes if node not in tried and not node.is_unreachable]
            healthy = [node for node in untried if node.ejected_until <= now]
            if healthy:
                self._turn += 1
                chosen = choose(healthy, now, self._turn)
                if chosen is not None and chosen.ejected_until:
                    chosen.ejected_until = now + TRIAL_S
                return chosen
            ejected.extend(untried)
        self._turn += 1
        return choose(ejected, now, self._turn)

    def is_any_on_the_way(self, model: str, regions: Sequence[str]) -> bool:
        """Will a node of the model be there soon in one of the regions?"""
        return any((model, region) in self._on_the_way for region in regions)

    def is_any_routable(self, model: str, regions: Sequence[str]) -> bool:
        """Is a node of the model routable in one of the regions?"""
        return any((model, region) in self._routable for region in regions)

    def regions_of(self, model: str) -> list[str]:
        """Where the model is served now."""
        return sorted(region for name, region in self._routable if name == model)

    async def next_change(self) -> None:
        """Wait until an entry has changed."""
        await self._changed.wait()

    async def keep_probing(self) -> None:
        """Run for the life of the process: find out when an unreachable node can be reached again."""
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            for node in self.nodes:
                if not node.is_unreachable or not node.entry.is_routable:
                    continue
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(PROBE_TIMEOUT_S):
                        connection = await node.upstream.connect()
                    node.upstream.release(connection)
                    node.connect_failures = 0
                    self._rebuild()

    @property
    def nodes(self) -> list[Node]:
        """All nodes that are not gone."""
        return list(self._nodes.values())

    def close(self) -> None:
        """Close all idle connections."""
        for node in self._nodes.values():
            node.upstream.close()
