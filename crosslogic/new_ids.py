"""New ids: the clock and randomness that `crosslogic.domain.ids` leaves out. Workflows have their own."""

from __future__ import annotations

import secrets
import time
from uuid import UUID

from crosslogic.domain.ids import uuid7


def new_id() -> UUID:
    """A UUIDv7 of now."""
    return uuid7(time.time_ns() // 1_000_000, secrets.randbits(80))
