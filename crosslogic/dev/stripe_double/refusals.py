"""Stripe's errors: one class for all of them, in the documented shape."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request is answered with an error. `is_kept`: it was executing, so that its idempotency key repeats this."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        is_kept: bool = True,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.is_kept = is_kept

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        error = {"type": self.kind, "message": self.message, "code": self.code, "param": self.param}
        return {"error": {name: value for name, value in error.items() if value is not None}}


def missing(kind: str, identifier: str, param: str = "id") -> Refusal:
    """No object of this kind has that id."""
    return Refusal(f"No such {kind}: '{identifier}'", status=404, code="resource_missing", param=param)


def unknown_path(method: str, path: str) -> Refusal:
    """Neither Stripe nor we know that URL, or only Stripe does."""
    return Refusal(f"Unrecognized request URL ({method}: {path}).", status=404, is_kept=False)
