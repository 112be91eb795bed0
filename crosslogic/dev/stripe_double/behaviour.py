"""How the double misbehaves, and how fast its months are: set through its control API, counted, never random."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Fault(_Strict):
    """After `after` matching calls, `count` of them go wrong. An operation is a method and a path's pattern.

    `conflict` (409), `rate_limited` (429), `lock_timeout` (429) and `unavailable` (503) have no effect and are
    forgotten. `error_before` and `error_after` answer 500 without and with the effect, and their idempotency key
    repeats it. `lost_reply` has the effect and closes the connection; `slow` answers after `delay_s`. `reorder` and
    `reject_later` are for meter events: applied after the customer's next one for that meter and window; accepted and
    thrown away, with a report.
    """

    operation: str = Field(examples=["POST /v1/billing/meter_events"])
    kind: Literal[
        "conflict",
        "rate_limited",
        "lock_timeout",
        "unavailable",
        "error_before",
        "error_after",
        "lost_reply",
        "slow",
        "reorder",
        "reject_later",
    ]
    contains: str = Field(default="", description="Only calls whose body, as it was sent, holds this text.")
    count: int = Field(default=1, ge=0)
    after: int = Field(default=0, ge=0)
    delay_s: float = Field(default=1.0, ge=0, le=600)


class Behaviour(_Strict):
    """Everything that can be ordered. Lags and times are seconds of the double's clock unless said otherwise."""

    summary_lag_s: float = Field(default=0.0, ge=0, description="Summaries and previews show an event so much later.")
    processing_lag_s: float = Field(default=0.0, ge=0, description="Nothing sees an event earlier, invoices neither.")
    search_lag_s: float = Field(default=0.0, ge=0, description="Searches find an object so much later.")
    draft_s: float = Field(default=3600.0, ge=0, description="An invoice of a period stays a draft for so long.")
    payment_retry_s: float = Field(default=259_200.0, gt=0, description="Time between two attempts at a payment.")
    calls_per_s: int = Field(default=1000, ge=1, description="More calls in a second of real time are answered 429.")
    webhook_retry_s: float = Field(default=5.0, gt=0, description="Pause after a failed delivery, doubled each time.")
    webhook_copies: int = Field(default=1, ge=0, le=10, description="Each event is delivered so often; 0: kept back.")
    webhook_order: Literal["sent", "reversed"] = Field(
        default="sent", description="Order in which the deliveries that are due leave."
    )
    faults: list[Fault] = Field(default_factory=list[Fault])

    def next_fault(self, operation: str, body: str) -> Fault | None:
        """Count this call, and say which fault it meets."""
        for fault in self.faults:
            if fault.operation != operation or not fault.count or fault.contains not in body:
                continue
            if fault.after:
                fault.after -= 1
                continue
            fault.count -= 1
            return fault
        return None
