"""Every error as the body that OpenAI's clients expect: `{"error": {"message", "type", "param", "code"}}`.

The official SDKs choose their exception class by status, so the status is the contract and `type` a hint for people.
Nothing of an error that is not ours to show (a stack trace, an address, a provider's words) leaves here.
"""

from __future__ import annotations

import math
from typing import Any

from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.keys import redact

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
    shown = None if param is None else redact(param)
    return {"error": {"message": redact(message), "type": kind, "param": shown, "code": code}}


def _headers(error: Rejected | Unavailable) -> dict[str, str]:
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers
