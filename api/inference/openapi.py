"""The `/v1` part of our OpenAPI document. No framework serves it, so its description is written by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from api.inference.schemas import ChatRequest, CompletionRequest, EmbeddingRequest

_ERRORS = {
    "400": "The request cannot be read, or does not fit the model.",
    "401": "No key, or not a valid one.",
    "402": "The org's plan or payment does not cover it.",
    "403": "Suspended, not allowed, or a quota is used up.",
    "404": "No such model.",
    "405": "Another method is needed.",
    "408": "The body did not arrive in time.",
    "409": "It does not fit what is there.",
    "413": "The body is too large.",
    "415": "The body is compressed.",
    "429": "A rate limit; come back after Retry-After.",
    "500": "Our mistake.",
    "503": "No node can answer now; come back after Retry-After.",
}
_LOOK_UP_ERRORS = ("400", "401", "403", "404", "405", "500", "503")


def _answers(description: str, content: dict[str, Any], errors: Iterable[str]) -> dict[str, Any]:
    described = {
        status: {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}},
        }
        for status in errors
    }
    return {"200": {"description": description, "content": content, "headers": _HEADERS}, **described}


_HEADERS = {
    name: {"description": text, "schema": {"type": "string"}}
    for name, text in {
        "x-request-id": "Our id of this request; usage is recorded under it.",
        "x-crosslogic-node": "The node that answered, an opaque id.",
        "x-crosslogic-region": "The region it is in.",
    }.items()
}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


_STREAM = {"text/event-stream": {"schema": {"description": "Server-sent events; the last is `[DONE]`."}}}
_REGION = {
    "name": "x-crosslogic-region",
    "in": "header",
    "required": False,
    "description": "REGION, or REGION;strict never to leave it. Also as query parameter `region` or as suffix of the "
    "model: `llama-7b@in-mumbai`.",
    "schema": {"type": "string"},
}


def _call(
    summary: str, request: type[Struct], content: dict[str, Any], parameters: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "post": {
            "tags": ["inference"],
            "summary": summary,
            "security": [{"key": []}],
            "parameters": [_REGION, *parameters],
            "requestBody": {"required": not parameters, "content": _json(request.__name__)},
            "responses": _answers(
                "The answer, in OpenAI's shape; unknown fields are passed on to the engine.", content, _ERRORS
            ),
        }
    }


def _look_up(summary: str, schema: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "get": {
            "tags": ["inference"],
            "summary": summary,
            "security": [{"key": []}],
            "parameters": parameters,
            "responses": _answers("What was asked for.", _json(schema), _LOOK_UP_ERRORS),
        }
    }


def _query(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": {"type": "string"}}


_INSTANT = "An instant in ISO 8601 with its offset, e.g. 2026-11-01T00:00:00Z."

PATHS: dict[str, Any] = {
    "/v1/chat/completions": _call(
        "Continue a conversation",
        ChatRequest,
        {**_json("ChatCompletion"), **_STREAM},
        [
            _query("model", "For a request without a body: the model."),
            _query("region", "Where to serve it."),
            _query("prompt", "For a request without a body: what the user says."),
        ],
    ),
    "/v1/completions": _call("Continue a text", CompletionRequest, {**_json("TextCompletion"), **_STREAM}, []),
    "/v1/embeddings": _call("Embed texts", EmbeddingRequest, _json("Embeddings"), []),
    "/v1/models": _look_up("List the models", "ModelCards", []),
    "/v1/models/{model}": _look_up(
        "Show one model",
        "ModelCard",
        [{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "examples": ["llama-7b"]}}],
    ),
    "/v1/usage": _look_up(
        "Sum the usage of the key's environment",
        "Usage",
        [_query("start", f"{_INSTANT} Default: the start of this month."), _query("end", f"{_INSTANT} Default: now.")],
    ),
}

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_COUNTS = dict.fromkeys(("requests", "prompt_tokens", "completion_tokens", "cached_tokens"), _COUNT)


def _object(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": [name for name in properties if name not in optional],
        "properties": properties,
    }


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _completion(kind: str) -> dict[str, Any]:
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": _TEXT,
            "choices": _list_of({"type": "object"}),
            "usage": {"type": ["object", "null"]},
            "crosslogic": {
                **_object({"node": _TEXT, "region": _TEXT}),
                "description": "Who answered; only in the query form.",
            },
        },
        "usage",
        "crosslogic",
    )


SCHEMAS: dict[str, Any] = {
    **msgspec.json.schema_components(
        [ChatRequest, CompletionRequest, EmbeddingRequest], ref_template="#/components/schemas/{name}"
    )[1],
    "ChatCompletion": _completion("chat.completion"),
    "TextCompletion": _completion("text_completion"),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "model": _TEXT,
            "data": _list_of(
                _object({"object": {"const": "embedding"}, "index": _COUNT, "embedding": {"type": ["array", "string"]}})
            ),
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "ModelCard": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": _TEXT,
            "canonical": {**_TEXT, "description": "The model's name, where `id` is an alias."},
            "family": _TEXT,
            "type": {"enum": ["chat", "completion", "embedding"]},
            "context_length": _COUNT,
            "price": {
                **_object({"input": _TEXT, "output": {"type": ["string", "null"]}}),
                "description": "USD for 1M tokens, before the region's multiplier.",
            },
            "regions": {**_list_of(_TEXT), "description": "Where nodes serve it now."},
            "metadata": {"type": "object"},
        }
    ),
    "ModelCards": _object({"object": {"const": "list"}, "data": _list_of({"$ref": "#/components/schemas/ModelCard"})}),
    "Usage": _object(
        {
            "object": {"const": "usage"},
            "environment": _TEXT,
            "start": {"type": "string", "format": "date-time"},
            "end": {"type": "string", "format": "date-time"},
            **_COUNTS,
            "total_tokens": _COUNT,
            "models": _list_of(_object({"model": _TEXT, **_COUNTS})),
        }
    ),
    "OpenAIError": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                }
            )
        }
    ),
}


def add_to(document: dict[str, Any]) -> dict[str, Any]:
    """Our paths, schemas and security scheme, added to the document that FastAPI made of its own routes."""
    document.setdefault("paths", {}).update(PATHS)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(SCHEMAS)
    components.setdefault("securitySchemes", {})["key"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, `sk_<env>_…`.",
    }
    return document
