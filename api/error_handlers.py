"""FastAPI's errors in the shape of `api.errors`. Apart from it, because the hot path does without FastAPI."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from api.errors import error_body, error_object
from crosslogic.domain import ids
from crosslogic.domain.errors import CrossLogicError, Unavailable
from crosslogic.new_ids import new_id

log = logging.getLogger("crosslogic.api")


def install(app: FastAPI) -> None:
    """Answer every error of the app's routes in this shape, with an `x-request-id`."""
    app.add_exception_handler(CrossLogicError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_error)


def _request_id() -> str:
    return ids.REQUEST.show(new_id())


def _respond(status: int, body: Mapping[str, Any], headers: Mapping[str, str], request_id: str) -> JSONResponse:
    return JSONResponse(body, status, {**headers, "x-request-id": request_id})


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    request_id = _request_id()
    status, body, headers = error_body(error, request_id)
    # The route's pattern, not the path: what a client wrote there is not ours to log.
    route = getattr(request.scope.get("route"), "path", "")
    if isinstance(error, Unavailable):
        log.warning("%s %s %s: %s", request_id, request.method, route, error)
    elif status >= 500:
        # Errors of no family are raised again by the framework, and the server logs their stack trace.
        cause = error if isinstance(error, CrossLogicError) else None
        log.error("%s %s %s failed: %s", request_id, request.method, route, type(error).__name__, exc_info=cause)
    return _respond(status, body, headers, request_id)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """A body or parameter of the wrong shape is a 400; what was sent is never repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where, *path = first["loc"]
    param = ".".join(str(part) for part in path) if first["type"] != "json_invalid" else ""
    if first["type"] == "json_invalid":
        message = "The body is not valid JSON."
    elif not path:
        message = f"The {where} cannot be used: {first['msg']}."
    else:
        message = f"{param}: {first['msg']}."
    return _respond(400, error_object(400, message, "invalid_request", param or None), {}, _request_id())


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """The framework's own refusals: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: "There is nothing at this path. See /openapi.json for what there is.",
        405: f"{request.method} is not possible here. See /openapi.json for what is.",
    }
    message = messages.get(error.status_code, str(error.detail))
    body = error_object(error.status_code, message, None)
    headers = {"allow": _methods(request)} if error.status_code == 405 else error.headers or {}
    return _respond(error.status_code, body, headers, _request_id())


def _methods(request: Request) -> str:
    """What is possible at this path, whichever of its routes was found first."""
    paths: dict[str, Any] = request.app.openapi()["paths"]
    path = request.url.path
    templates = [path] if path in paths else [one for one in paths if compile_path(one)[0].match(path)]
    return ", ".join(sorted({method.upper() for template in templates for method in paths[template]}))
