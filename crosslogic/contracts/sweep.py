"""Inputs and results of the sweep and of its activities. Fields are only ever added, with defaults."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FleetSweepInput:
    """What to sweep, and whether to do anything about what is found."""

    provider: str = ""  # Empty: every cloud that is connected.
    dry_run: bool = False  # Only look and report.
    look_again_s: float = 30.0  # How long after the first look the second comes. The clouds' lists lag.
    end_all_unintended: bool = False  # However many there are. Without it, more than a few are left to people.


@dataclass(frozen=True)
class SweepFinding:
    """One machine (or one row without its machine) that is not as intended. `standing` is a `Standing` value."""

    provider: str
    cluster: str
    standing: str
    reason: str
    node_id: str = ""
    outcome: str = ""  # What was done about it.


@dataclass(frozen=True)
class Inventory:
    """What one look at the clouds found. `unasked` are the clouds that did not answer."""

    machines: int = 0
    owned: int = 0
    ending: int = 0
    findings: list[SweepFinding] = field(default_factory=list[SweepFinding])
    unasked: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class FleetSweepResult:
    """The proof: `machines` = `owned` + `ending` + orphans + unexplained + `foreign`; `unexplained` must be 0."""

    sweep_id: str
    provider: str
    dry_run: bool
    machines: int  # Listed by the clouds under our prefix, not counting those that are gone.
    created: int  # Nodes written down since the sweep before.
    owned: int
    ending: int
    destroyed: int  # Ended by this sweep, and confirmed.
    foreign: int
    missing: int
    unexplained: int  # Bearing our mark without ever having been intended.
    unasked: list[str] = field(default_factory=list[str])
    findings: list[SweepFinding] = field(default_factory=list[SweepFinding])
