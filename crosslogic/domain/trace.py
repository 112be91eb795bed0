"""A finished span, as who makes it and who sends it know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Value = str | int | float | bool


class Span(NamedTuple):
    """One step of a request. Times are Unix nanoseconds; a `parent_id` of 0 is no parent, an empty `error` no error."""

    name: str
    is_server: bool
    trace_id: int
    span_id: int
    parent_id: int
    is_parent_remote: bool
    tracestate: str
    started_ns: int
    ended_ns: int
    attributes: Mapping[str, Value]
    error: str


Export = Callable[[Sequence[Span]], None]
