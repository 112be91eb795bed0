"""Sweeps in memory: what `crosslogic.store.sweeps.SweepStore` keeps."""

from __future__ import annotations

from crosslogic.contracts.sweep import FleetSweepResult


class MemorySweeps:
    """The sweeps that were written down, by id."""

    def __init__(self) -> None:
        self.rows: dict[str, FleetSweepResult] = {}

    def record(self, swept: FleetSweepResult) -> FleetSweepResult:
        return self.rows.setdefault(swept.sweep_id, swept)
