"""An engine's events on their way to the client: whole events only, usage taken note of, `[DONE]` held back.

What has been relayed is remembered as the bytes that it was, and read only when somebody must know: how much a running
stream has told so far, what a client that hung up has got, where another node has to go on. Reading each event on its
way would cost more than relaying it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import msgspec

from api.inference.upstream import FailureKind, NodeFailure

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

LONGEST_EVENT_BYTES = 1 << 20
# Beyond this what was relayed is read into texts, so that a thousand open streams stay small.
MOST_UNREAD_BYTES = 16 * 1024
# No engine counts further; beyond it a usage is not believed.
MOST_TOKENS = 1 << 40
DONE = b"data: [DONE]\n\n"

# An event with one of these is looked at one by one; all others are passed on in the bunches they came in.
# Six searches for fixed bytes take a tenth of the time of one for a pattern.
_SPECIAL = (b'"usage":{', b'"usage": {', b"[DONE]", b'"error"', b'"timings"', b"error:")
_MODEL = re.compile(rb'"model":\s*"(?:[^"\\]|\\.)*"')
_TOKEN = re.compile(rb'"(?:content|text|reasoning_content|reasoning|arguments|name)":\s*"[^"]')

# Where a piece of an answer belongs: the choice, what of it (`content`, `name` …), and the tool call's number or -1.
Channel = tuple[int, str, int]


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    id: str = ""
    created: int = 0
    choices: list[_Choice] = []


_read_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class Told:
    """What a client has been told so far. `tokens` counts events that carry text: engines send one for each token."""

    id: str = ""
    created: int = 0
    texts: dict[Channel, list[str]] = field(default_factory=dict[Channel, list[str]])
    finish_reasons: dict[int, str] = field(default_factory=dict[int, str])
    tokens: int = 0
    is_readable: bool = True

    def text(self, channel: Channel) -> str:
        """All of one channel."""
        pieces = self.texts.get(channel)
        if pieces is None:
            return ""
        if len(pieces) > 1:
            pieces[:] = ["".join(pieces)]
        return pieces[0]

    def add(self, payload: bytes) -> None:
        """Read one event's JSON."""
        try:
            chunk = _read_chunk(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.is_readable = False
            return
        if not self.id:
            self.id, self.created = chunk.id, chunk.created
        has_text = False
        for choice in chunk.choices:
            number = choice.index
            if choice.finish_reason:
                self.finish_reasons[number] = choice.finish_reason
            for channel, text in pieces_of(choice):
                has_text = True
                self.texts.setdefault((number, *channel), []).append(text)
        self.tokens += has_text


def pieces_of(choice: _Choice) -> list[tuple[tuple[str, int], str]]:
    """The texts of one choice of one event, each with what of the choice it belongs to; empty ones left out."""
    found: list[tuple[tuple[str, int], str]] = []
    if choice.text:
        found.append((("text", -1), choice.text))
    delta = choice.delta
    if delta is not None:
        if delta.content:
            found.append((("content", -1), delta.content))
        for name in ("reasoning_content", "reasoning", "refusal"):
            text = getattr(delta, name)
            if text:
                found.append(((name, -1), text))
        for call in delta.tool_calls or ():
            function = call.function
            if function is not None:
                if function.name:
                    found.append((("name", call.index), function.name))
                if function.arguments:
                    found.append((("arguments", call.index), function.arguments))
    return found


class Seam(Protocol):
    """Joins another node's events to what the client has been told."""

    def join(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk as the client may see it, or None. Raises NodeFailure where it does not fit."""
        ...

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage of the whole answer, from that of the last node's part."""
        ...


class EventStream:
    """Reads the stream of one answer, though more than one engine may take turns at it."""

    __slots__ = (
        "_foreign_name",
        "_name",
        "_seam",
        "_tail",
        "_told",
        "_unread",
        "_unread_bytes",
        "_wants_usage",
        "has_token",
        "is_done",
        "told_before",
        "usage",
    )

    def __init__(self, model: str, *, wants_usage: bool) -> None:
        self._name = b'"model":"%b"' % model.encode()
        # What to write our name of the model over: None before the first event, b"" when the engine writes it already.
        self._foreign_name: bytes | None = None
        self._tail = b""
        self._wants_usage = wants_usage
        self._seam: Seam | None = None
        self._told = Told()
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        # How many tokens had been told when the engine that speaks now took over.
        self.told_before = 0
        self.has_token = False
        self.usage: dict[str, Any] | None = None
        self.is_done = False

    def go_on(self, seam: Seam | None) -> None:
        """Another engine takes over; what the last one left half-said is dropped."""
        self._seam = seam
        self.told_before = self.tokens
        self._foreign_name = None
        self._tail = b""
        self.has_token = False
        self.usage = None
        self.is_done = False

    @property
    def told(self) -> Told:
        """What has been relayed so far."""
        if self._unread:
            relayed = b"".join(self._unread)
            self._unread.clear()
            self._unread_bytes = 0
            add = self._told.add
            for event in relayed.split(b"\n\n"):
                if event.startswith(b"data:"):
                    add(event[5:])
        return self._told

    @property
    def tokens(self) -> int:
        """How many tokens have been relayed."""
        return self.told.tokens

    def feed(self, data: bytes) -> bytes:
        """What may be relayed now: b"" while an event is incomplete. Raises NodeFailure for an engine's error event."""
        if self._tail:
            data = self._tail + data
        if b"\r" in data:
            # JSON has no raw carriage return, so these end lines; one at the very end waits for what follows.
            data = data.replace(b"\r\n", b"\n")
        cut = data.rfind(b"\n\n") + 2
        if cut == 1:
            if len(data) > LONGEST_EVENT_BYTES:
                raise NodeFailure(FailureKind.GARBAGE, "endless event")
            self._tail = data
            return b""
        if cut == len(data):
            self._tail = b""
        else:
            self._tail = data[cut:]
            data = data[:cut]
            if len(self._tail) > LONGEST_EVENT_BYTES:
                raise NodeFailure(FailureKind.GARBAGE, "endless event")
        if self._foreign_name is None:
            found = _MODEL.search(data)
            if found is not None:
                self._foreign_name = b"" if found[0] == self._name else found[0]
        if self._foreign_name:
            data = data.replace(self._foreign_name, self._name)
        if self._seam is not None or _is_special(data):
            data = b"".join([self._inspect(event) for event in data.split(b"\n\n") if event.strip()])
        if not self.has_token and _TOKEN.search(data) is not None:
            self.has_token = True
        if data:
            self._unread.append(data)
            self._unread_bytes += len(data)
            if self._unread_bytes > MOST_UNREAD_BYTES:
                _ = self.told
        return data

    def _inspect(self, event: bytes) -> bytes:
        """One event as it may be relayed; what needs no change keeps its bytes."""
        if self._seam is None and not _is_special(event):
            return event + b"\n\n"
        name, _, payload = event.partition(b":")
        payload = payload.strip()
        if name == b"error":
            raise NodeFailure(FailureKind.ERROR, "error event")
        if name != b"data":
            return event + b"\n\n"
        if payload == b"[DONE]":
            self.is_done = True
            return b""
        try:
            chunk = _decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NodeFailure(FailureKind.GARBAGE, "an event that is not JSON") from error
        if not isinstance(chunk, dict):
            raise NodeFailure(FailureKind.GARBAGE, "an event that is no object")
        chunk = cast("dict[str, Any]", chunk)
        if chunk.get("error"):
            raise NodeFailure(FailureKind.ERROR, "error event")
        # How fast the machine is stays our business.
        is_changed = chunk.pop("timings", None) is not None
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            usage = cast("dict[str, Any]", usage)
            self.usage = usage
            if self._seam is not None:
                self.usage = chunk["usage"] = self._seam.usage(usage)
            if not self._wants_usage:
                if not chunk.get("choices"):
                    return b""
                del chunk["usage"]
                is_changed = True
        if self._seam is not None:
            joined = self._seam.join(chunk)
            return b"" if joined is None else b"data: " + _encode(joined) + b"\n\n"
        return (b"data: " + _encode(chunk) if is_changed else event) + b"\n\n"


def _is_special(data: bytes) -> bool:
    usage, spaced_usage, done, error, timings, error_field = _SPECIAL
    return (
        usage in data or done in data or error in data or timings in data or spaced_usage in data or error_field in data
    )


def answer_bytes(document: dict[str, Any]) -> int:
    """How much text a whole answer holds, in bytes."""
    size = 0
    choices = document.get("choices")
    for choice in cast("list[Any]", choices) if isinstance(choices, list) else ():
        message = cast("dict[str, Any]", choice).get("message", choice) if isinstance(choice, dict) else None
        if isinstance(message, dict):
            texts = (cast("dict[str, Any]", message).get(name) for name in ("content", "text", "reasoning_content"))
            size += sum(len(text.encode()) for text in texts if isinstance(text, str))
    return size


def usage_tokens(usage: dict[str, Any] | None) -> tuple[int, int, int] | None:
    """(prompt, completion, cached) of an OpenAI usage object; None when it cannot be believed."""
    if usage is None:
        return None
    prompt: Any = usage.get("prompt_tokens")
    completion: Any = usage.get("completion_tokens", 0)
    details = usage.get("prompt_tokens_details")
    cached: Any = cast("dict[str, Any]", details).get("cached_tokens", 0) if isinstance(details, dict) else 0
    if completion is None:
        completion = 0
    if cached is None:
        cached = 0
    # Exactly int: JSON knows true and 1.0 as well.
    if not (type(prompt) is type(completion) is type(cached) is int):
        return None
    if not (0 <= prompt < MOST_TOKENS and 0 <= completion < MOST_TOKENS and 0 <= cached < MOST_TOKENS):
        return None
    return prompt, completion, cached
