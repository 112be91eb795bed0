"""An engine's events on their way to the client: whole events only, usage taken note of, `[DONE]` held back."""

from __future__ import annotations

import re
from typing import Any, cast

import msgspec

from api.inference.upstream import FailureKind, NodeFailure

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

LONGEST_EVENT_BYTES = 1 << 20
DONE = b"data: [DONE]\n\n"

# An event with one of these is looked at one by one; all others are passed on in the bunches they came in.
_SPECIAL = (b'"usage":{', b'"usage": {', b"[DONE]", b'"error"', b'"timings"', b"error:")
_TEXTS = tuple(
    b'"%b":%b"' % (field, space)
    for field in (b"content", b"text", b"reasoning_content", b"reasoning", b"arguments")
    for space in (b"", b" ")
)
_MODEL = re.compile(rb'"model":\s*"(?:[^"\\]|\\.)*"')


class EventStream:
    """Reads one engine's stream. `tokens` counts events that carry text: engines send one for each token."""

    __slots__ = ("_foreign_name", "_name", "_tail", "_wants_usage", "is_done", "tokens", "usage")

    def __init__(self, model: str, *, wants_usage: bool) -> None:
        self._name = b'"model":"%b"' % model.encode()
        # What to write our name of the model over: None before the first event, b"" when the engine writes it already.
        self._foreign_name: bytes | None = None
        self._tail = b""
        self._wants_usage = wants_usage
        self.tokens = 0
        self.usage: dict[str, Any] | None = None
        self.is_done = False

    def feed(self, data: bytes) -> bytes:
        """What may be relayed now: b"" while an event is incomplete. Raises NodeFailure for an engine's error event."""
        if self._tail:
            data = self._tail + data
        if b"\r" in data:
            # JSON has no raw carriage return, so these end lines; one at the very end waits for what follows.
            data = data.replace(b"\r\n", b"\n")
        end = data.rfind(b"\n\n")
        cut = end + 2 if end >= 0 else 0
        self._tail = data[cut:]
        if len(self._tail) > LONGEST_EVENT_BYTES:
            raise NodeFailure(FailureKind.GARBAGE, "endless event")
        if not cut:
            return b""
        if self._tail:
            data = data[:cut]
        if self._foreign_name is None:
            found = _MODEL.search(data)
            if found is not None:
                self._foreign_name = b"" if found[0] == self._name else found[0]
        if self._foreign_name:
            data = data.replace(self._foreign_name, self._name)
        for text in _TEXTS:
            self.tokens += data.count(text) - data.count(text + b'"')
        for mark in _SPECIAL:
            if mark in data:
                return b"".join([self._inspect(event) for event in data.split(b"\n\n") if event.strip()])
        return data

    def _inspect(self, event: bytes) -> bytes:
        """One event as it may be relayed; what needs no change keeps its bytes."""
        if not any(mark in event for mark in _SPECIAL):
            return event + b"\n\n"
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
        # How fast the machine is stays our business.
        is_changed = chunk.pop("timings", None) is not None
        if isinstance(usage, dict):
            self.usage = cast("dict[str, Any]", usage)
            if not self._wants_usage:
                if not chunk.get("choices"):
                    return b""
                del chunk["usage"]
                is_changed = True
        return (b"data: " + _encode(chunk) if is_changed else event) + b"\n\n"


def answer_bytes(document: dict[str, Any]) -> int:
    """How much text a whole answer holds, in bytes."""
    size = 0
    choices = document.get("choices")
    for choice in cast("list[Any]", choices) if isinstance(choices, list) else ():
        message = cast("dict[str, Any]", choice).get("message", choice) if isinstance(choice, dict) else None
        if isinstance(message, dict):
            texts = (cast("dict[str, Any]", message).get(field) for field in ("content", "text", "reasoning_content"))
            size += sum(len(text.encode()) for text in texts if isinstance(text, str))
    return size


def usage_tokens(usage: dict[str, Any] | None) -> tuple[int, int, int] | None:
    """(prompt, completion, cached) of an OpenAI usage object; None when it cannot be believed."""
    if usage is None:
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    details = usage.get("prompt_tokens_details")
    cached = cast("dict[str, Any]", details).get("cached_tokens", 0) if isinstance(details, dict) else 0
    counts = (prompt, completion or 0, cached or 0)
    if not all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 1 << 40 for count in counts):
        return None
    return cast("tuple[int, int, int]", counts)
