"""Usage that comes from elsewhere: a line of a file becomes a usage record, always the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

from crosslogic.domain import ids
from crosslogic.domain.errors import Rejected
from crosslogic.domain.usage import Outcome, TokenSource, UsageRecord

Choice = TypeVar("Choice", bound=StrEnum)

# What every line must have. The rest has defaults.
NEEDED = ("request_id", "admitted_at", "org_id", "environment_id", "key_id", "home_region", "model")
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens")
KNOWN = frozenset(
    {
        *NEEDED,
        *TOKENS,
        *("client_request_id", "reservation_id", "served_region", "node_id", "endpoint_kind", "is_streamed"),
        *("token_source", "latency_ms", "ttft_ms", "status", "outcome", "list_price_microdollars", "tries"),
        *("continuations", "billed_hour"),
    }
)
# Nothing real comes near; Postgres's BIGINT is far.
MOST_TOKENS = 10**12


def record_of(line: Mapping[str, Any], now: datetime) -> tuple[UsageRecord, datetime | None]:
    """The record of one line, and the hour it was billed in elsewhere if it came late there.

    A `request_id` of ours (`req_…`) stays; any other text becomes an id of its instant and its text, so that the same
    line is the same record whenever it comes. Values may be texts, as CSV has them. Raises Rejected naming the field.
    """
    unknown = sorted(set(line) - KNOWN)
    if unknown:
        raise _wrong(unknown[0], f"is no field of usage; the fields are {', '.join(sorted(KNOWN))}")
    for name in NEEDED:
        if not line.get(name):
            raise _wrong(name, "is missing")
    admitted_at = _instant(line, "admitted_at")
    if admitted_at > now:
        raise _wrong("admitted_at", "lies in the future")
    request_id = _request_id(str(line["request_id"]), admitted_at)
    outcome = _choice(line, "outcome", Outcome, Outcome.COMPLETED)
    record = UsageRecord(
        id=request_id,
        client_request_id=str(line.get("client_request_id") or "")[:128],
        org_id=_id(line, "org_id", ids.ORG),
        environment_id=_id(line, "environment_id", ids.ENVIRONMENT),
        key_id=_id(line, "key_id", ids.KEY),
        reservation_id=_id(line, "reservation_id", ids.RESERVATION) if line.get("reservation_id") else None,
        home_region=str(line["home_region"]),
        served_region=str(line.get("served_region") or ""),
        model=str(line["model"]),
        node_id=_id(line, "node_id", ids.NODE) if line.get("node_id") else None,
        endpoint_kind=str(line.get("endpoint_kind") or "chat"),
        is_streamed=_claim(line, "is_streamed"),
        prompt_tokens=_whole(line, "prompt_tokens"),
        completion_tokens=_whole(line, "completion_tokens"),
        cached_tokens=_whole(line, "cached_tokens"),
        token_source=_choice(line, "token_source", TokenSource, TokenSource.ENGINE),
        latency_ms=_whole(line, "latency_ms"),
        ttft_ms=_whole(line, "ttft_ms") if line.get("ttft_ms") not in (None, "") else None,
        status=_whole(line, "status", 200),
        outcome=outcome,
        list_price_microdollars=_whole(line, "list_price_microdollars"),
        tries=_whole(line, "tries"),
        continuations=_whole(line, "continuations"),
    )
    if outcome in (Outcome.FAILED, Outcome.CUT) and record.prompt_tokens + record.completion_tokens:
        raise _wrong("outcome", f"is {outcome}, which is never charged, but there are tokens")
    billed_hour = _instant(line, "billed_hour") if line.get("billed_hour") else None
    if billed_hour is not None and billed_hour != billed_hour.replace(minute=0, second=0, microsecond=0):
        raise _wrong("billed_hour", "is not a full hour")
    return record, billed_hour


def line_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the store as a line that `record_of` turns into the same record; None is left out."""
    kinds = {
        "org_id": ids.ORG,
        "environment_id": ids.ENVIRONMENT,
        "key_id": ids.KEY,
        "reservation_id": ids.RESERVATION,
        "node_id": ids.NODE,
    }
    line: dict[str, Any] = {
        "request_id": ids.REQUEST.show(row["id"]),
        "admitted_at": _show(datetime.fromtimestamp(ids.unix_ms_of(row["id"]) / 1000, UTC)),
    }
    for name, value in row.items():
        if name != "id" and value is not None:
            shown = kinds[name].show(value) if name in kinds else value
            line[name] = _show(shown) if isinstance(shown, datetime) else shown
    return line


def _request_id(text: str, admitted_at: datetime) -> UUID:
    unix_ms = round(admitted_at.timestamp() * 1000)
    if text.startswith("req_"):
        request_id = ids.REQUEST.parse(text)
        if ids.unix_ms_of(request_id) != unix_ms:
            raise _wrong("admitted_at", "is not the instant that request_id carries")
        return request_id
    return ids.uuid7(unix_ms, int.from_bytes(hashlib.sha256(text.encode()).digest()[:10], "big"))


def _show(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _instant(line: Mapping[str, Any], name: str) -> datetime:
    try:
        at = datetime.fromisoformat(str(line[name]))
        if at.tzinfo is None or at.year < 2000:
            raise ValueError("no offset")
        return at.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise _wrong(name, "is not an instant with an offset such as 2026-11-01T00:00:00Z") from error


def _id(line: Mapping[str, Any], name: str, kind: ids.Kind) -> UUID:
    try:
        return kind.parse(str(line[name]))
    except Rejected as error:
        raise _wrong(name, f"cannot be used: {error.message}") from error


def _whole(line: Mapping[str, Any], name: str, default: int = 0) -> int:
    value = line.get(name)
    if value in (None, ""):
        return default
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal()) or int(text) > MOST_TOKENS:
        raise _wrong(name, f"must be a whole number of 0 to {MOST_TOKENS}, not {text[:40]!r}")
    return int(text)


def _claim(line: Mapping[str, Any], name: str) -> bool:
    text = str(line.get(name) or "false").lower()
    if text not in ("true", "false"):
        raise _wrong(name, "must be true or false")
    return text == "true"


def _choice(line: Mapping[str, Any], name: str, of: type[Choice], default: Choice) -> Choice:
    try:
        return of(line.get(name) or default)
    except ValueError as error:
        raise _wrong(name, f"must be one of {', '.join(of)}") from error


def _wrong(name: str, why: str) -> Rejected:
    return Rejected(f"{name[:64]} {why}.", code="invalid_usage", param=name[:64])
