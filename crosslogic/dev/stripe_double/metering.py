"""Meters, their events and summaries, as the documentation has them: asynchronous, and unique for a day only."""

from __future__ import annotations

import re
from typing import Any

from crosslogic.dev.stripe_double.books import Body, Books, iso, part
from crosslogic.dev.stripe_double.refusals import Refusal

# Source of all five: the API reference of billing.meter_events and meter_event_adjustments.
_MOST_NAME = 100  # characters
_MOST_DIGITS = 15
_OLDEST_S = 35 * 86_400
_AHEAD_S = 300
_UNIQUE_S = _CANCEL_S = 86_400

_WINDOWS = {"hour": 3600, "day": 86_400}
_NOT_FOUND = "meter_event_customer_not_found"


def create_meter(books: Books, params: Body) -> Body:
    """POST /v1/billing/meters."""
    name = params["event_name"]
    if len(name) > _MOST_NAME:
        raise Refusal(f"event_name has more than {_MOST_NAME} characters", param="event_name")
    if any(meter["event_name"] == name and meter["status"] == "active" for meter in books.all("billing.meter")):
        raise Refusal(f"A meter with the event name {name} exists already.", param="event_name")
    return books.add(
        "billing.meter",
        "mtr",
        {
            "display_name": params["display_name"],
            "event_name": name,
            "event_time_window": params.get("event_time_window"),
            "default_aggregation": params["default_aggregation"],
            "customer_mapping": params.get("customer_mapping")
            or {"type": "by_id", "event_payload_key": "stripe_customer_id"},
            "value_settings": params.get("value_settings") or {"event_payload_key": "value"},
            "status": "active",
            "status_transitions": {"deactivated_at": None},
            "updated": books.second,
        },
    )


def update_meter(books: Books, params: Body, identifier: str) -> Body:
    """POST /v1/billing/meters/{id}: the name is all that may change."""
    return books.save(books.get("billing.meter", identifier) | params | {"updated": books.second})


def deactivate_meter(books: Books, _: Body, identifier: str) -> Body:
    """POST /v1/billing/meters/{id}/deactivate."""
    transitions = {"deactivated_at": books.second}
    return books.save(
        books.get("billing.meter", identifier) | {"status": "inactive", "status_transitions": transitions}
    )


def reactivate_meter(books: Books, _: Body, identifier: str) -> Body:
    """POST /v1/billing/meters/{id}/reactivate."""
    transitions = {"deactivated_at": None}
    return books.save(books.get("billing.meter", identifier) | {"status": "active", "status_transitions": transitions})


def create_event(books: Books, params: Body, *, key: str = "", fault: str = "") -> Body:
    """POST /v1/billing/meter_events: checked now, applied later, refused if its identifier came within a day."""
    name, payload, now = params["event_name"], params["payload"], books.now
    identifier: str = params.get("identifier") or f"auto_{key or books.second}"
    for field, text in (("event_name", name), ("identifier", identifier)):
        if len(text) > _MOST_NAME:
            raise Refusal(f"Invalid string: {field} has more than {_MOST_NAME} characters", param=field)
    meter = _meter_of(books, name)
    at = int(params.get("timestamp", books.second))
    if at < now - _OLDEST_S:
        raise Refusal("The timestamp must be within the past 35 days.", code="timestamp_too_far_in_past")
    if at > now + _AHEAD_S:
        raise Refusal("The timestamp must be at most 5 minutes in the future.", code="timestamp_in_future")
    value, customer = _value_of(meter, payload), _customer_of(meter, payload)
    known = books.database.execute(
        "SELECT 1 FROM meter_events WHERE identifier = ? AND received_at > ?", (identifier, now - _UNIQUE_S)
    ).fetchone()
    if known:
        raise Refusal(f"An event already exists with identifier {identifier}.", param="identifier")
    window = at - at % _WINDOWS.get(meter["event_time_window"], 1)
    before = books.database.execute(
        "SELECT count(*) FROM meter_events WHERE meter = ? AND customer = ? AND window = ?",
        (meter["id"], customer, window),
    ).fetchone()[0]
    # One that is applied late stands behind the customer's next one for that window.
    place = before + (1.5 if fault == "reorder" else 0)
    code = (
        _NOT_FOUND if not _exists(books, customer) else "meter_event_invalid_value" if fault == "reject_later" else ""
    )
    books.database.execute(
        "INSERT INTO meter_events (meter, customer, identifier, at, window, value, received_at, place, is_void)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (meter["id"], customer, identifier, at, window, value, now, place, bool(code)),
    )
    if code:
        _report(books, meter, code, key)
    return {
        "object": "billing.meter_event",
        "created": books.second,
        "event_name": name,
        "identifier": identifier,
        "livemode": False,
        "payload": payload,
        "timestamp": at,
    }


def adjust(books: Books, params: Body) -> Body:
    """POST /v1/billing/meter_event_adjustments: takes an event back within a day of its receipt."""
    identifier: str = part(params, "cancel").get("identifier", "")
    meter = _meter_of(books, params["event_name"])
    row = books.database.execute(
        "SELECT * FROM meter_events WHERE identifier = ? AND meter = ? ORDER BY seq DESC LIMIT 1",
        (identifier, meter["id"]),
    ).fetchone()
    if row is None:
        raise Refusal(f"No event with identifier {identifier} exists.", param="cancel[identifier]")
    if row["received_at"] <= books.now - _CANCEL_S:
        raise Refusal("An event can be cancelled within 24 hours of its receipt only.", param="cancel[identifier]")
    books.database.execute("UPDATE meter_events SET is_void = 1 WHERE seq = ?", (row["seq"],))
    return {
        "object": "billing.meter_event_adjustment",
        "cancel": {"identifier": identifier},
        "event_name": params["event_name"],
        "livemode": False,
        "status": "pending",
        "type": "cancel",
    }


def summaries(books: Books, params: Body, meter_id: str) -> list[Body]:
    """GET /v1/billing/meters/{id}/event_summaries: one for the range, or one a window with usage, newest first."""
    meter = books.get("billing.meter", meter_id)
    start, end, window = params["start_time"], params["end_time"], params.get("value_grouping_window")
    step = _WINDOWS.get(window or "", 60)
    for field, at in (("start_time", start), ("end_time", end)):
        if at % step:
            raise Refusal(f"{field} must be aligned to the boundaries of {window or 'minute'}s", param=field)
    if end <= start:
        raise Refusal("end_time must be after start_time", param="end_time")
    books.get("customer", params["customer"], "customer")
    if window is None:
        ranges = [(start, end)]
    else:
        hit = {at - at % step for at in _times(books, meter, params["customer"], start, end)}
        ranges = [(at, at + step) for at in sorted(hit, reverse=True)]
    lag_s = books.behaviour.summary_lag_s
    return [
        {
            "id": f"mtrusg_{meter_id}_{params['customer']}_{left}_{right}",
            "object": "billing.meter_event_summary",
            # Stripe says sums in floating point.
            "aggregated_value": float(aggregate(books, meter, params["customer"], left, right, lag_s)),
            "start_time": left,
            "end_time": right,
            "livemode": False,
            "meter": meter_id,
        }
        for left, right in ranges
    ]


def aggregate(books: Books, meter: Body, customer: str, start: int, end: int, lag_s: float = 0.0) -> int:
    """The meter's value in [start, end), of what had been applied `lag_s` before now."""
    rows = books.database.execute(
        "SELECT window, value FROM meter_events WHERE meter = ? AND customer = ? AND at >= ? AND at < ? AND NOT is_void"
        " AND received_at <= ? ORDER BY window, place, seq",
        (meter["id"], customer, start, end, books.now - max(lag_s, books.behaviour.processing_lag_s)),
    ).fetchall()
    # Of a window that is reported as a whole, the last report counts.
    values = (
        list({row["window"]: row["value"] for row in rows}.values())
        if meter["event_time_window"]
        else [row["value"] for row in rows]
    )
    formula = meter["default_aggregation"]["formula"]
    if formula == "count":
        return len(values)
    return sum(values) if formula == "sum" else (values or [0])[-1]


def _times(books: Books, meter: Body, customer: str, start: int, end: int) -> list[int]:
    lag_s = max(books.behaviour.summary_lag_s, books.behaviour.processing_lag_s)
    rows = books.database.execute(
        "SELECT at FROM meter_events WHERE meter = ? AND customer = ? AND at >= ? AND at < ? AND NOT is_void"
        " AND received_at <= ?",
        (meter["id"], customer, start, end, books.now - lag_s),
    )
    return [row["at"] for row in rows]


def _meter_of(books: Books, name: str) -> Body:
    for meter in books.all("billing.meter"):
        if meter["event_name"] == name and meter["status"] == "active":
            return meter
    raise Refusal(f"No active meter found for event name {name}", code="no_meter", param="event_name")


def _value_of(meter: Body, payload: dict[str, str]) -> int:
    field = meter["value_settings"]["event_payload_key"]
    text = payload.get(field)
    if text is None and meter["default_aggregation"]["formula"] == "count":
        return 1
    if text is None or not re.fullmatch(rf"-?\d{{1,{_MOST_DIGITS}}}", text):
        raise Refusal(
            f"Invalid payload: {field} must be a whole number of at most {_MOST_DIGITS} digits",
            code="meter_event_invalid_value",
            param=f"payload[{field}]",
        )
    return int(text)


def _customer_of(meter: Body, payload: dict[str, str]) -> str:
    field = meter["customer_mapping"]["event_payload_key"]
    if not payload.get(field):
        raise Refusal(f"Missing required payload: {field}", code="meter_event_no_customer_defined")
    return payload[field]


def _exists(books: Books, customer: str) -> bool:
    found = books.find(customer)
    return found is not None and not found.get("deleted")


def _report(books: Books, meter: Body, code: str, key: str) -> None:
    error: dict[str, Any] = {
        "code": code,
        "error_count": 1,
        "sample_errors": [{"error_message": f"The event was not applied: {code}.", "request": {"identifier": key}}],
    }
    books.emit_thin(
        "v1.billing.meter.error_report_triggered",
        meter,
        {
            "developer_message_summary": f"There is 1 invalid event for {meter['event_name']}.",
            "reason": {"error_count": 1, "error_types": [error]},
            "validation_start": iso(books.now),
            "validation_end": iso(books.now),
        },
    )
