"""An engine's events on their way to the client: whole events only, usage taken note of, `[DONE]` held back."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from api.inference.upstream import FailureKind, NodeFailure

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

LONGEST_EVENT_BYTES = 1 << 20
DONE = b"data: [DONE]\n\n"

# An event with one of these is looked at one by one; all others are passed on in the bunches they came in.
_SPECIAL = (b'"usage":{', b'"usage": {', b"[DONE]", b'"error"', b'"timings"')
_TEXTS = (b'"content":"', b'"text":"', b'"reasoning_content":"', b'"arguments":"')


class EventStream:
    """Reads one engine's stream. `tokens` counts events that carry text: engines send one for each token."""

    __slots__ = ("_tail", "_wants_usage", "is_done", "tokens", "usage")

    def __init__(self, *, wants_usage: bool) -> None:
        self._tail = b""
        self._wants_usage = wants_usage
        self.tokens = 0
        self.usage: dict[str, Any] | None = None
        self.is_done = False

    def feed(self, data: bytes) -> bytes:
        """What may be relayed now: b"" while an event is incomplete. Raises NodeFailure for an engine's error event."""
        if self._tail:
            data = self._tail + data
        cut = data.rfind(b"\n\n") + 2
        if cut < len(data):
            self._tail = data[cut:] if cut > 1 else data
            if len(self._tail) > LONGEST_EVENT_BYTES:
                raise NodeFailure(FailureKind.GARBAGE, "endless event")
            if cut == 1:
                return b""
            data = data[:cut]
        else:
            self._tail = b""
        for text in _TEXTS:
            self.tokens += data.count(text) - data.count(text + b'"')
        for mark in _SPECIAL:
            if mark in data:
                return b"".join([self._inspect(event) for event in data.split(b"\n\n") if event.strip()])
        return data

    def _inspect(self, event: bytes) -> bytes:
        field, _, payload = event.partition(b":")
        payload = payload.strip()
        if field == b"error":
            raise NodeFailure(FailureKind.ERROR, "error event")
        if field != b"data":
            return event + b"\n\n"
        if payload == b"[DONE]":
            self.is_done = True
            return b""
        try:
            chunk = _decode(payload)
        except msgspec.DecodeError as error:
            raise NodeFailure(FailureKind.GARBAGE, "an event that is not JSON") from error
        if not isinstance(chunk, dict):
            raise NodeFailure(FailureKind.GARBAGE, "an event that is no object")
        chunk = cast("dict[str, Any]", chunk)
        if chunk.get("error"):
            raise NodeFailure(FailureKind.ERROR, "error event")
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.usage = cast("dict[str, Any]", usage)
            if not self._wants_usage:
                if not chunk.get("choices"):
                    return b""
                del chunk["usage"]
        # How fast the machine is stays our business.
        chunk.pop("timings", None)
        return b"data: " + _encode(chunk) + b"\n\n"


def usage_tokens(usage: dict[str, Any] | None) -> tuple[int, int, int] | None:
    """(prompt, completion, cached) of an OpenAI usage object; None when it cannot be believed."""
    if usage is None:
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    details = usage.get("prompt_tokens_details")
    cached = cast("dict[str, Any]", details).get("cached_tokens", 0) if isinstance(details, dict) else 0
    counts = (prompt, completion or 0, cached or 0)
    if not all(isinstance(count, int) and 0 <= count < 1 << 40 for count in counts):
        return None
    return cast("tuple[int, int, int]", counts)
