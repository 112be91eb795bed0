"""Inputs and results of the ledger's workflows and activities. Fields are only ever added, with defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UsageSealingInput:
    """One round of sealing and rating; so many orgs are rated in one transaction."""

    orgs_at_once: int = 200


@dataclass(frozen=True)
class Sealed:
    """Hours in [start, end), as ISO instants, were sealed; equal when none could be.

    `waits_for` says what keeps the next hour open; empty when only time does.
    """

    start: str
    end: str
    waits_for: str = ""


@dataclass(frozen=True)
class HourSpan:
    """Hours in [start, end), as ISO instants."""

    start: str
    end: str


@dataclass(frozen=True)
class Rated:
    """How many orgs' hours were rated by one call; 0 when all are."""

    count: int
    hour: str = ""
