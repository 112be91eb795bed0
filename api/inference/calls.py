"""One inference call as the client asked for it: read from the body or from the query, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs

import msgspec

from crosslogic.domain.catalog import Model
from crosslogic.domain.errors import Rejected

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

# Four bytes of JSON to a token is what English text needs; the estimate is settled to the truth in the end.
BYTES_PER_TOKEN = 4

# What would reach past the limits that we set: a length under another name, and another client's slot.
ENGINE_PRIVATE = ("n_predict", "id_slot", "slot_id")
MOST_CHOICES = 16

PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completion", "/v1/embeddings": "embedding"}
_REQUIRED = {"chat": "messages", "completion": "prompt", "embedding": "input"}
_MODEL_KINDS = {"chat": ("chat",), "completion": ("chat", "completion"), "embedding": ("embedding",)}


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
        for field in ENGINE_PRIVATE:
            body.pop(field, None)
        if self.kind != "embedding":
            # Always under this name: not every engine knows `max_completion_tokens`.
            body["max_tokens"] = self.completion_limit(model)
            if self.is_streamed and not self.wants_usage_chunk:
                body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        try:
            return _encode(body)
        except (RecursionError, UnicodeEncodeError) as error:
            raise Rejected("The body is nested too deeply, or holds half a character.", code="invalid_json") from error


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
    """Read a call. Raises Rejected (400) naming the field and what it must be."""
    kind = PATHS[path]
    options = _query(query)
    is_query_form = not raw.strip() and kind == "chat"
    body = _from_query(options) if is_query_form else _from_json(raw)
    if "model" not in body and "model" in options:
        body["model"] = options["model"]
    name = body.get("model")
    if not isinstance(name, str) or not name.strip() or len(name) > 200:
        raise _wrong("model", "must be the name of a model, e.g. llama-7b; GET /v1/models lists them")
    model, _, suffix = name.partition("@")
    region = region_header or options.get("region", "") or suffix
    required = _REQUIRED[kind]
    _check_input(kind, body.get(required))
    is_streamed = _flag(body, "stream") and kind != "embedding"
    wants_usage_chunk = False
    stream_options = body.get("stream_options")
    if stream_options is not None:
        if not isinstance(stream_options, dict):
            raise _wrong("stream_options", "must be an object")
        if not is_streamed:
            raise _wrong("stream_options", "goes only with stream: true")
        wants_usage_chunk = _flag(cast("dict[str, Any]", stream_options), "include_usage")
    limits = [_count(body, field, 1, 10_000_000) for field in ("max_completion_tokens", "max_tokens")]
    choices = max(_count(body, "n", 1, MOST_CHOICES) or 1, _count(body, "best_of", 1, MOST_CHOICES) or 1)
    if kind == "completion":
        choices *= _prompts(body["prompt"])
    return Call(
        kind=kind,
        path=path,
        model=model.strip(),
        region=region,
        body=body,
        is_streamed=is_streamed,
        wants_usage_chunk=wants_usage_chunk,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        choices=choices,
        estimated_prompt_tokens=1 + len(raw or options.get("prompt", "").encode()) // BYTES_PER_TOKEN,
        is_query_form=is_query_form,
    )


def _query(query: bytes) -> dict[str, str]:
    if not query:
        return {}
    try:
        values = parse_qs(query.decode("ascii"), keep_blank_values=True, max_num_fields=32, errors="strict")
    except (ValueError, UnicodeError) as error:
        raise Rejected("The query string cannot be read: percent-encode it as UTF-8.", code="invalid_query") from error
    return {name: found[-1] for name, found in values.items()}


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
    try:
        body = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"The body is not valid JSON: {str(error)[:200]}.", code="invalid_json") from error
    if not isinstance(body, dict):
        raise Rejected("The body must be a JSON object.", code="invalid_body")
    return cast("dict[str, Any]", body)


def _check_input(kind: str, value: Any) -> None:
    if kind == "chat":
        if not isinstance(value, list) or not value:
            raise _wrong("messages", "must be a list of at least one message")
        for index, message in enumerate(cast("list[Any]", value)):
            if not isinstance(message, dict):
                raise _wrong(f"messages[{index}]", "must be an object with role and content")
            if not isinstance(cast("dict[str, Any]", message).get("role"), str):
                raise _wrong(f"messages[{index}].role", "must be a string such as user")
    elif not isinstance(value, str | list) or not value:
        raise _wrong(_REQUIRED[kind], "must be a text or a list that is not empty")


def _prompts(prompt: Any) -> int:
    """How many prompts one completion call has: a list of texts or of token lists is answered one by one."""
    return len(cast("list[Any]", prompt)) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def _flag(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _wrong(field, "must be true or false")


def _count(body: Mapping[str, Any], field: str, least: int, most: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _wrong(field, f"must be a whole number from {least} to {most}")
    return value


def _wrong(field: str, expectation: str) -> Rejected:
    return Rejected(f"{field} {expectation}.", code="invalid_request", param=field)
