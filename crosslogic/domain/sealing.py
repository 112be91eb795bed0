"""When an hour of usage can be sealed: once no request that was admitted in it can still be running or unrecorded."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from crosslogic.domain.months import hour_of

# A process that has just started serves before its log is known here, and clocks are not all the same.
GRACE = timedelta(minutes=2)


def sealable_until(now: datetime, complete_until: Iterable[datetime], longest_request: timedelta) -> datetime:
    """The full hour before which everything can be sealed.

    `complete_until` tells for each usage log before which admission everything is in Postgres, requests that still run
    included. Where no log is known, the longest life of a request has to pass.
    """
    limits = list(complete_until) or [now - longest_request]
    return hour_of(min(now - GRACE, *limits))
