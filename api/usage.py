"""`GET /v1/usage`: what a key's environment has used, summed from Postgres."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from api.inference.auth import within
from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.reservation import next_hour
from crosslogic.domain.tenancy import Principal
from crosslogic.store.usage import UsageStore

LONGEST_SPAN = timedelta(days=400)
READ_TIMEOUT_S = 10.0


async def summarize(
    store: UsageStore, principal: Principal, options: Mapping[str, str], now: datetime
) -> dict[str, Any]:
    """Usage of [start, end), by default of this month up to now. Records arrive within seconds of their request.

    Raises Rejected for instants that cannot be read, Unavailable when Postgres does not answer.
    """
    start_at = _instant(options, "start") or now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    asked_end_at = _instant(options, "end")
    end_at = asked_end_at or now + timedelta(seconds=1)
    if not start_at < end_at <= start_at + LONGEST_SPAN:
        raise Rejected(
            f"end must be after start, by at most {LONGEST_SPAN.days} days.", code="invalid_range", param="end"
        )
    # The hour that is running is read as a whole: nothing in it is later than now.
    read_until = asked_end_at or next_hour(now)
    try:
        rows = await within(READ_TIMEOUT_S, store.sum_environment(principal.environment_id, start_at, read_until))
    except Exception as error:
        raise Unavailable("Usage cannot be read at the moment; try again.", retry_after_s=5) from error
    totals = {
        name: sum(row[name] for row in rows)
        for name in ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
    }
    return {
        "object": "usage",
        "environment": ids.ENVIRONMENT.show(principal.environment_id),
        "start": _show(start_at),
        "end": _show(end_at),
        **totals,
        "total_tokens": totals["prompt_tokens"] + totals["completion_tokens"],
        "models": rows,
    }


def _instant(options: Mapping[str, str], name: str) -> datetime | None:
    text = options.get(name)
    if not text:
        return None
    try:
        instant = datetime.fromisoformat(text)
        if instant.tzinfo is None:
            raise ValueError("without an offset")
        return instant.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Rejected(
            f"{name} is not an instant with an offset such as 2026-11-01T00:00:00Z.", code="invalid_range", param=name
        ) from error


def _show(instant: datetime) -> str:
    return instant.isoformat(timespec="seconds").replace("+00:00", "Z")
