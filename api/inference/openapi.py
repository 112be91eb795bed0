"""The `/v1` part of our OpenAPI document. The handler is plain ASGI, so its description is written by hand."""

from __future__ import annotations

from typing import Any

_ERRORS = {
    "400": "The request cannot be read, or does not fit the model.",
    "401": "No key, or not a valid one.",
    "403": "Suspended, not allowed, or a quota is used up.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "A rate limit; come back after Retry-After.",
    "503": "No node can answer now; come back after Retry-After.",
}


def _answers(description: str, content: dict[str, Any]) -> dict[str, Any]:
    errors = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}},
        }
        for status, text in _ERRORS.items()
    }
    return {"200": {"description": description, "content": content, "headers": _HEADERS}, **errors}


_HEADERS = {
    name: {"description": text, "schema": {"type": "string"}}
    for name, text in {
        "x-request-id": "Our id of this request; usage is recorded under it.",
        "x-crosslogic-node": "The node that answered, an opaque id.",
        "x-crosslogic-region": "The region it is in.",
    }.items()
}
_JSON = {"application/json": {"schema": {"type": "object"}}}
_JSON_OR_STREAM = {**_JSON, "text/event-stream": {"schema": {"type": "string"}}}
_REGION = {
    "name": "x-crosslogic-region",
    "in": "header",
    "required": False,
    "description": "REGION, or REGION;strict never to leave it. Also as query parameter `region` or as suffix of the "
    "model: `llama-7b@in-mumbai`.",
    "schema": {"type": "string"},
}


def _call(summary: str, schema: str, content: dict[str, Any], parameters: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "post": {
            "tags": ["inference"],
            "summary": summary,
            "security": [{"key": []}],
            "parameters": [_REGION, *parameters],
            "requestBody": {
                "required": not parameters,
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
            },
            "responses": _answers(
                "The answer, in OpenAI's shape; unknown fields are passed on to the engine.", content
            ),
        }
    }


def _look_up(summary: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "get": {
            "tags": ["inference"],
            "summary": summary,
            "security": [{"key": []}],
            "parameters": parameters,
            "responses": _answers("What was asked for.", _JSON),
        }
    }


def _query(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": {"type": "string"}}


_INSTANT = "An instant in ISO 8601 with its offset, e.g. 2026-11-01T00:00:00Z."
_GENERATION = {
    "model": {"type": "string", "examples": ["llama-7b"]},
    "stream": {"type": ["boolean", "null"]},
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": {"type": "boolean"}}},
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1},
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 16},
}

PATHS: dict[str, Any] = {
    "/v1/chat/completions": _call(
        "Continue a conversation",
        "ChatRequest",
        _JSON_OR_STREAM,
        [
            _query("model", "For a request without a body: the model."),
            _query("region", "Where to serve it."),
            _query("prompt", "For a request without a body: what the user says."),
        ],
    ),
    "/v1/completions": _call("Continue a text", "CompletionRequest", _JSON_OR_STREAM, []),
    "/v1/embeddings": _call("Embed texts", "EmbeddingRequest", _JSON, []),
    "/v1/models": _look_up("List the models", []),
    "/v1/models/{model}": _look_up(
        "Show one model",
        [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
    ),
    "/v1/usage": _look_up(
        "Sum the usage of the key's environment",
        [_query("start", f"{_INSTANT} Default: the start of this month."), _query("end", f"{_INSTANT} Default: now.")],
    ),
}

SCHEMAS: dict[str, Any] = {
    "ChatRequest": {
        "type": "object",
        "required": ["model", "messages"],
        "properties": {
            **_GENERATION,
            "messages": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "object", "required": ["role"], "properties": {"role": {"type": "string"}}},
            },
        },
    },
    "CompletionRequest": {
        "type": "object",
        "required": ["model", "prompt"],
        "properties": {**_GENERATION, "prompt": {"type": ["string", "array"]}},
    },
    "EmbeddingRequest": {
        "type": "object",
        "required": ["model", "input"],
        "properties": {
            "model": {"type": "string", "examples": ["bge-base-en"]},
            "input": {"type": ["string", "array"]},
        },
    },
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
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
