"""The route board and the heartbeats in memory: what routes.lua and `HeartbeatBoard` do, and a flush."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crosslogic.domain.heartbeat import Heartbeat
from crosslogic.domain.node import FINAL_STATES, RouteEntry
from crosslogic.hot.heartbeats import MEMORY_S
from crosslogic.hot.routes import TOMBSTONE_S


class MemoryBoard:
    """Route entries by node; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._gone: dict[str, tuple[int, float]] = {}
        self.entries: dict[str, RouteEntry] = {}

    def publish(self, entry: RouteEntry) -> bool:
        current = self.entries.get(entry.node_id)
        generation, until = self._gone.get(entry.node_id, (0, 0.0))
        if current is not None and current.generation >= entry.generation:
            return False
        if generation >= entry.generation and self._clock() < until:
            return False
        if entry.state in FINAL_STATES:
            self.entries.pop(entry.node_id, None)
            self._gone[entry.node_id] = (entry.generation, self._clock() + TOMBSTONE_S)
        else:
            self.entries[entry.node_id] = entry
        return True

    def read_all(self) -> list[RouteEntry]:
        return list(self.entries.values())

    def flush(self) -> None:
        """Redis has lost its memory."""
        self.entries.clear()
        self._gone.clear()


class MemoryHeartbeats:
    """The latest heartbeat of every node; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._latest: dict[str, tuple[Heartbeat, float]] = {}

    def put(self, heartbeat: Heartbeat) -> None:
        self._latest[heartbeat.node_id] = (heartbeat, self._clock() + MEMORY_S)

    def read_many(self, node_ids: Sequence[str]) -> dict[str, Heartbeat]:
        now = self._clock()
        found = {node_id: self._latest[node_id] for node_id in node_ids if node_id in self._latest}
        return {node_id: heartbeat for node_id, (heartbeat, until) in found.items() if now < until}

    def flush(self) -> None:
        """Redis has lost its memory."""
        self._latest.clear()
