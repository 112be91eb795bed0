"""Calendar months, UTC and half-open: what is billed at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from crosslogic.domain.errors import Rejected

_SHOWN = re.compile(r"(2[0-9]{3})-(0[1-9]|1[0-2])")


@dataclass(frozen=True, slots=True, order=True)
class BillingMonth:
    """One month. `str` shows it as 2026-11."""

    year: int
    month: int

    @classmethod
    def of(cls, at: datetime) -> BillingMonth:
        """The month that an instant lies in."""
        at = at.astimezone(UTC)
        return cls(at.year, at.month)

    @classmethod
    def parse(cls, text: str) -> BillingMonth:
        """The month of a text such as 2026-11. Raises Rejected for anything else."""
        found = _SHOWN.fullmatch(text)
        if found is None:
            raise Rejected(f"{text[:32]!r} is not a month; write it as 2026-11.", code="invalid_month", param="month")
        return cls(int(found[1]), int(found[2]))

    @property
    def starts_at(self) -> datetime:
        """Its first instant."""
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    @property
    def ends_at(self) -> datetime:
        """The first instant of the next month."""
        return self.next.starts_at

    @property
    def next(self) -> BillingMonth:
        """The month after."""
        return BillingMonth(self.year + self.month // 12, self.month % 12 + 1)

    @property
    def hours(self) -> int:
        """How many hours it has: 672 to 744."""
        return (self.ends_at - self.starts_at) // timedelta(hours=1)

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.month:02d}"


def hour_of(at: datetime) -> datetime:
    """The full hour (UTC) that an instant lies in."""
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
