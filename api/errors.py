"""Every error as the body that OpenAI's clients expect: `{"error": {"message", "type", "param", "code"}}`.

The official SDKs choose their exception class by status, so the status is the contract and `type` a hint for people.
Nothing of an error that is not ours to show (a stack trace, an address, a provider's words) leaves here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from crosslogic.domain import ids
from crosslogic.domain.errors import CrossLogicError, Rejected, Unavailable
from crosslogic.new_ids import new_id

log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


def error_body(error: BaseException, request_id: str = "") -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON body and headers for any error.

    Rejected and Unavailable are shown as they are; anything else is a 500 that gives only the request's id.
    """
    if isinstance(error, Rejected):
        return error.status, error_object(error.status, error.message, error.code, error.param), _headers(error)
    if isinstance(error, Unavailable):
        return error.status, error_object(error.status, error.message, error.code), _headers(error)
    quoted = f" Tell the operator this request's id: {request_id}." if request_id else ""
    return 500, error_object(500, f"Something is wrong on our side.{quoted}", "internal_error"), {}


def error_object(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The body alone, for a status of 400 or more."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Answer every error of the app's routes in this shape, with an `x-request-id`."""
    app.add_exception_handler(CrossLogicError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_error)


def _headers(error: Rejected | Unavailable) -> dict[str, str]:
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


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
        404: "There is nothing at this path. See /docs for what there is.",
        405: f"{request.method} is not possible here. See /docs for what is.",
    }
    message = messages.get(error.status_code, str(error.detail))
    body = error_object(error.status_code, message, None)
    return _respond(error.status_code, body, error.headers or {}, _request_id())
