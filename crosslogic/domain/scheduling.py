"""Which node answers: a pure choice among the routable nodes of a model, region by region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

# A node whose capacity nobody has measured yet counts as a slow one.
DEFAULT_CAPACITY_TOKENS_PER_S = 20

# Passive ejection: a refused or broken connection ejects at once, other failures after two in a row. The first
# ejection is short, because active health has the final word within seconds; each further one doubles.
FIRST_EJECTION_S = 1.0
LONGEST_EJECTION_S = 30.0
FAILURES_BEFORE_EJECTION = 2


class Candidate(Protocol):
    """What a choice needs to know of a node. `ejected_until` is on the same clock as the choice's `now`."""

    @property
    def capacity_tokens_per_s(self) -> int:
        """Measured at admission; 0 when unknown."""
        ...

    @property
    def tokens_in_flight(self) -> int:
        """Tokens held by running requests, until their streams end."""
        ...

    @property
    def ejected_until(self) -> float:
        """Not chosen before this instant unless nothing else is left."""
        ...


C = TypeVar("C", bound=Candidate)


def load(candidate: Candidate) -> float:
    """Seconds of work in flight: tokens in flight over tokens per second."""
    return candidate.tokens_in_flight / (candidate.capacity_tokens_per_s or DEFAULT_CAPACITY_TOKENS_PER_S)


def choose(candidates: Sequence[C], now: float, turn: int) -> C | None:
    """The least loaded candidate; equal ones take turns by `turn`, any number that grows. None when there is none.

    Ejected candidates are left out, unless all are: then they are tried again, since a wrong suspicion must not take a
    whole pool away.
    """
    usable = [candidate for candidate in candidates if candidate.ejected_until <= now] or candidates
    if not usable:
        return None
    start = turn % len(usable)
    best = usable[start]
    least = load(best)
    for step in range(1, len(usable)):
        candidate = usable[start - step]
        seconds = load(candidate)
        if seconds < least:
            best, least = candidate, seconds
    return best


def ejection_s(failures_in_a_row: int, *, is_connection_failure: bool) -> float:
    """How long to leave a node out after so many failures in a row, in seconds; 0: not at all."""
    excess = failures_in_a_row - (1 if is_connection_failure else FAILURES_BEFORE_EJECTION)
    if excess < 0:
        return 0.0
    # Beyond 2¹⁶ the longest is reached long since, and a float could not hold the power.
    return min(LONGEST_EJECTION_S, FIRST_EJECTION_S * 2 ** min(excess, 16))
