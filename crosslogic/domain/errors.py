"""The three families of errors; every error that leaves a room belongs to one of them.

A message says what is wrong, with which id, and what to do next. It never holds a secret, a node's address or a
provider's own words, because it may be shown to a client.
"""

from __future__ import annotations


class CrossLogicError(Exception):
    """Base of the three families. Raise one of them, never this."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Rejected(CrossLogicError):
    """The caller's fault: answered with `status` (400–429), never retried."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class Unavailable(CrossLogicError):
    """The world's fault: the API answers 503 with `Retry-After`, workflows retry."""

    def __init__(
        self, message: str, *, code: str = "unavailable", retry_after_s: float = 1.0, status: int = 503
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class InvariantViolated(CrossLogicError):
    """Our fault: answered with 500, never swallowed, pages someone."""
