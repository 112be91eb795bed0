"""One inference call as the client asked for it: read from the body or from the query, checked once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs

import msgspec

from api.inference.schemas import MOST_INPUTS, ChatRequest, CompletionRequest, EmbeddingRequest
from crosslogic.domain.catalog import Model
from crosslogic.domain.errors import Rejected

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_convert = msgspec.convert
# `type` with a type: what JSON made is anything.
_type_of: Callable[[Any], object] = type

# Four bytes of JSON to a token is what English text needs; the estimate is settled to the truth in the end.
BYTES_PER_TOKEN = 4

# What would reach past the limits that we set: a length under another name, another client's slot, request or place in
# the queue, and addresses that an engine would connect to.
ENGINE_PRIVATE = frozenset({"n_predict", "id_slot", "slot_id", "request_id", "priority", "kv_transfer_params"})
# Deeper than any schema of a tool, and less than half of what Python's own JSON parser, which engines use, can take.
MOST_LEVELS = 128
# The loop stands still while they are made and looked through: a tenth of a second for so many.
MOST_CONTAINERS = 100_000

PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completion", "/v1/embeddings": "embedding"}
_SHAPES = {"chat": ChatRequest, "completion": CompletionRequest, "embedding": EmbeddingRequest}
_MODEL_KINDS = {"chat": ("chat",), "completion": ("chat", "completion"), "embedding": ("embedding",)}

# A key of JSON ends like this; a quote after exactly one backslash is inside a text.
_KEY_ENDS = re.compile(rb'"(?<![^\\]\\")[ \t\r\n]*:')
_TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_SCALARS = frozenset({str, int, float, bool, type(None)})

_MISSING = re.compile(r"Object missing required field `(\w+)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_EXPECTED = re.compile(r"Expected `([^`]+)`(.*?)(?:, got `(\w+)`)?(?: - at `(?:key` in `)?\$\.?(.*)`)?", re.DOTALL)
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "null": "null",
    "object": "an object",
    "str": "a text",
}


@dataclass(slots=True)
class Call:
    """What to do. `model` is what the client wrote, without the region suffix; `region` is "" when it gave none."""

    kind: str
    path: str
    model: str
    region: str
    body: dict[str, Any]
    is_streamed: bool
    wants_usage_chunk: bool
    max_tokens: int | None
    choices: int
    estimated_prompt_tokens: int
    is_query_form: bool

    def held_tokens(self, model: Model) -> int:
        """The most this call can cost: the prompt, and for each choice the longest completion."""
        if self.kind == "embedding":
            return self.estimated_prompt_tokens
        return self.estimated_prompt_tokens + self.choices * self.completion_limit(model)

    def completion_limit(self, model: Model) -> int:
        """The longest completion of one choice, in tokens."""
        return self.max_tokens or model.default_max_tokens

    def engine_body(self, model: Model) -> bytes:
        """The body for the engine: the client's, with our name of the model, a length limit and usage asked for."""
        body = self.body
        body["model"] = model.name
        if not ENGINE_PRIVATE.isdisjoint(body):
            for field in ENGINE_PRIVATE:
                body.pop(field, None)
        if self.kind != "embedding":
            # Always under this name: not every engine knows `max_completion_tokens`.
            body["max_tokens"] = self.completion_limit(model)
            if self.is_streamed and not self.wants_usage_chunk:
                body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return _encode(body)


def check_fit(call: Call, model: Model) -> None:
    """Raises Rejected when the model is of another kind or cannot give an answer that long."""
    if model.kind not in _MODEL_KINDS[call.kind]:
        path = next(path for path, kind in PATHS.items() if model.kind in _MODEL_KINDS[kind])
        raise Rejected(
            f"{model.name} is a model for {model.kind}: use POST {path}.", code="model_kind_mismatch", param="model"
        )
    if call.max_tokens is not None and call.max_tokens > model.context_tokens:
        raise Rejected(
            f"max_tokens is {call.max_tokens}, but {model.name} has a context of {model.context_tokens} tokens.",
            code="context_length_exceeded",
            param="max_tokens",
        )


def read_call(path: str, raw: bytes, query: bytes, region_header: str) -> Call:
    """Read a call. Raises Rejected (400, 415) naming the field and what it must be."""
    kind = PATHS[path]
    options = _query(query) if query else _NO_OPTIONS
    is_query_form = kind == "chat" and (not raw or raw.isspace())
    body = _from_query(options) if is_query_form else _from_json(raw)
    if "model" not in body and "model" in options:
        body["model"] = options["model"]
    try:
        asked = _convert(body, _SHAPES[kind])
    except msgspec.ValidationError as error:
        raise _misshapen(str(error)) from error
    model, _, suffix = asked.model.partition("@")
    model = model.strip()
    if not model:
        raise _wrong("model", "must be the name of a model, e.g. llama-7b; GET /v1/models lists them")
    is_streamed = wants_usage_chunk = False
    max_tokens: int | None = None
    choices = 1
    if isinstance(asked, EmbeddingRequest):
        _count_inputs("input", asked.input)
    else:
        is_streamed = asked.stream is True
        if asked.stream_options is not None:
            if not is_streamed:
                raise _wrong("stream_options", "goes only with stream: true")
            wants_usage_chunk = asked.stream_options.include_usage is True
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        choices = max(asked.n or 1, asked.best_of or 1)
        if isinstance(asked, ChatRequest):
            _check_messages(asked)
        else:
            choices *= _count_inputs("prompt", asked.prompt)
    return Call(
        kind,
        path,
        model,
        region_header or options.get("region", "") or suffix,
        body,
        is_streamed,
        wants_usage_chunk,
        max_tokens,
        choices,
        1 + len(raw or options.get("prompt", "").encode()) // BYTES_PER_TOKEN,
        is_query_form,
    )


_NO_OPTIONS: Mapping[str, str] = {}


def _query(query: bytes) -> Mapping[str, str]:
    try:
        values = parse_qs(query.decode("ascii"), keep_blank_values=True, max_num_fields=32, errors="strict")
    except (ValueError, UnicodeError) as error:
        raise Rejected("The query string cannot be read: percent-encode it as UTF-8.", code="invalid_query") from error
    for name, found in values.items():
        if len(found) > 1:
            raise Rejected(
                f"The query string gives {name[:100]!r} {len(found)} times; give it once.",
                code="invalid_query",
                param=name[:100],
            )
    return {name: found[0] for name, found in values.items()}


def _from_query(options: Mapping[str, str]) -> dict[str, Any]:
    prompt = options.get("prompt", "")
    if not prompt:
        raise Rejected(
            "The body is empty. Send JSON with model and messages, or the query form ?model=…&region=…&prompt=….",
            code="invalid_body",
            param="messages",
        )
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if "stream" in options:
        if options["stream"] not in ("true", "false"):
            raise _wrong("stream", "must be true or false")
        body["stream"] = options["stream"] == "true"
    if "max_tokens" in options:
        if not options["max_tokens"].isascii() or not options["max_tokens"].isdigit():
            raise _wrong("max_tokens", "must be a whole number")
        body["max_tokens"] = int(options["max_tokens"][:9])
    return body


def _from_json(raw: bytes) -> dict[str, Any]:
    if len(raw) > MOST_CONTAINERS:
        _refuse_a_crowd(raw)
    try:
        body = _decode(raw)
    except RecursionError as error:
        raise _too_deep() from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(raw, error) from error
    if type(body) is not dict:
        raise Rejected("The body must be a JSON object, { … }.", code="invalid_body")
    body = cast("dict[str, Any]", body)
    keys = _count_keys(body)
    # Each pair has a colon, and where a key came twice fewer keys than pairs are left. Texts have colons, too: then
    # those after a quote are counted, and only if those are too many is every pair looked at.
    if raw.count(b":") != keys and len(_KEY_ENDS.findall(raw)) != keys:
        _refuse_repeated_keys(raw)
    return body


def _count_keys(body: dict[str, Any]) -> int:
    """The keys of all objects in it. Raises Rejected for too many levels."""
    keys = 0
    level: list[Any] = [body]
    for _ in range(MOST_LEVELS):
        below: list[Any] = []
        for item in level:
            values: Any = item
            shape = _type_of(item)
            if shape is dict:
                keys += len(item)
                values = item.values()
            if len(item) > 32 and _SCALARS.issuperset(map(type, values)):
                continue
            for value in values:
                shape = _type_of(value)
                if shape is dict or shape is list:
                    below.append(value)
        if not below:
            return keys
        level = below
    raise _too_deep()


def _refuse_a_crowd(raw: bytes) -> None:
    """Raises Rejected for too many lists and objects, before one of them is made."""
    if raw.count(b"[") + raw.count(b"{") > MOST_CONTAINERS:
        # Texts have brackets, too.
        raw = _TEXTS.sub(b"", raw)
        if raw.count(b"[") + raw.count(b"{") > MOST_CONTAINERS:
            raise Rejected(
                f"The body holds more than {MOST_CONTAINERS} lists and objects; send several smaller requests.",
                code="invalid_body",
            )


def _refuse_repeated_keys(raw: bytes) -> None:
    """Look at every pair, slowly. Raises Rejected for a key that an object has twice."""

    def look(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Rejected(
                    f"The key {key[:100]!r} is given twice in one object of the body; give it once.",
                    code="repeated_key",
                    param=key[:100],
                )
            seen.add(key)

    try:
        json.loads(raw, object_pairs_hook=look, parse_int=str, parse_float=str)
    except RecursionError as error:
        raise _too_deep() from error


def _check_messages(asked: ChatRequest) -> None:
    for index, message in enumerate(asked.messages):
        content = message.content
        if content is None:
            if message.role != "assistant":
                raise _wrong(f"messages[{index}].content", "must be a text or a list of parts")
        elif type(content) is list:
            for place, part in enumerate(content):
                if part.type == "text" and part.text is None:
                    raise _wrong(f"messages[{index}].content[{place}].text", "must be a text")


def _count_inputs(field: str, given: str | list[Any]) -> int:
    """How many inputs a call has: a list of texts or of lists of tokens is answered one by one."""
    if isinstance(given, str):
        return 1
    kinds = set(map(type, given))
    if kinds == {int}:
        _check_tokens(field, given)
        return 1
    if len(given) > MOST_INPUTS:
        raise _wrong(field, f"must hold at most {MOST_INPUTS} texts; it holds {len(given)}")
    if kinds == {list}:
        for index, tokens in enumerate(cast("list[list[Any]]", given)):
            if set(map(type, tokens)) != {int}:
                raise _wrong(f"{field}[{index}]", "must be a list of tokens that is not empty")
            _check_tokens(f"{field}[{index}]", tokens)
    elif kinds == {str}:
        if "" in given:
            raise _wrong(f"{field}[{given.index('')}]", "must be a text that is not empty")
    else:
        raise _wrong(field, "must be a text, a list of texts, or one or more lists of tokens, not a mixture")
    return len(given)


def _check_tokens(field: str, tokens: list[int]) -> None:
    if min(tokens) < 0 or max(tokens) >= 2**31:
        raise _wrong(field, "must be tokens: whole numbers from 0 to 2147483647")


def _too_deep() -> Rejected:
    return Rejected(f"The body is nested too deeply; at most {MOST_LEVELS} levels can be read.", code="invalid_json")


def _unreadable(raw: bytes, error: msgspec.DecodeError | UnicodeDecodeError) -> Rejected:
    """Why these bytes are not JSON, and what to send instead."""
    if raw.startswith(_COMPRESSED):
        return Rejected(
            "The body is compressed. Send it as it is, without Content-Encoding.",
            status=415,
            code="unsupported_encoding",
        )
    if raw.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")) or isinstance(error, UnicodeDecodeError):
        reason = "It must be UTF-8 without a byte order mark"
    elif isinstance(error, msgspec.ValidationError):
        reason = "A number in it is too large"
    elif str(error) == "Input data was truncated":
        reason = "It ends too early, or holds half a character"
    else:
        reason = str(error).removeprefix("JSON is malformed: ").capitalize()
    return Rejected(f"The body is not valid JSON. {reason}.", code="invalid_json")


def _misshapen(words: str) -> Rejected:
    """What msgspec says of a body of the wrong shape, in our words."""
    found = _MISSING.fullmatch(words)
    if found:
        field = f"{found[2]}.{found[1]}" if found[2] else found[1]
        if field == "model":
            return _wrong("model", "must be the name of a model, e.g. llama-7b; GET /v1/models lists them")
        return _wrong(field, "is missing")
    found = _EXPECTED.fullmatch(words)
    if found is None:
        field = words.rpartition(" - at `$.")[2].rstrip("`")
        return _wrong(field, "is not one of the values that it may have")
    kinds, constraint, got, field = found.groups()
    expected = " or ".join(_WORDS.get(kind, kind) for kind in kinds.split(" | "))
    return _wrong(field, f"must be {expected}{constraint}" + (f", not {_WORDS.get(got, got)}" if got else ""))


def _wrong(field: str, expectation: str) -> Rejected:
    return Rejected(f"{field} {expectation}.", code="invalid_request", param=field)
