"""Who is asking: the bearer secret's hash, looked up in this process's cache and behind it in Postgres.

The cache holds principals that were asked for, and for a moment secrets that nobody owns. When tenancy changes anywhere
the whole cache is read again in one query, so that a revoked key is refused within a second (H10).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.keys import is_demo, is_well_formed
from crosslogic.domain.tenancy import Principal

FindPrincipals = Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, Principal]]]

MOST_PRINCIPALS = 100_000
MOST_STRANGERS = 10_000
# Keys that nobody has asked for yet wait so long for Postgres.
LOOK_UP_TIMEOUT_S = 3.0


T = TypeVar("T")


async def within(timeout_s: float, asked: Awaitable[T]) -> T:
    """The answer, or TimeoutError after `timeout_s` whatever becomes of the question.

    `asyncio.timeout` waits for what it cancels, and a cancelled query waits for the server, be it frozen.
    """
    task = asyncio.ensure_future(asked)
    try:
        await asyncio.wait((task,), timeout=timeout_s)
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        raise TimeoutError
    return task.result()


class Clock(Protocol):
    """The current time, aware and in UTC."""

    def __call__(self) -> datetime:
        """Now."""
        ...


class KeyRing:
    """Principals by the hash of their secret."""

    def __init__(self, find: FindPrincipals, now: Clock, *, is_demo_allowed: bool) -> None:
        self._find = find
        self._now = now
        self._is_demo_allowed = is_demo_allowed
        self._principals: dict[bytes, Principal] = {}
        self._strangers: set[bytes] = set()
        self._epoch = 0

    def known(self, authorization: bytes) -> Principal | None:
        """The principal of an `Authorization` header; None if Postgres must be asked. Raises Rejected (401, 403)."""
        principal = self._principals.get(hashlib.sha256(_secret_of(authorization)).digest())
        if principal is not None:
            self._admit(principal)
        return principal

    async def authenticate(self, authorization: bytes) -> Principal:
        """The principal of an `Authorization` header.

        Raises Rejected (401, 403), or Unavailable when Postgres must be asked and does not answer.
        """
        secret = _secret_of(authorization)
        digest = hashlib.sha256(secret).digest()
        principal = self._principals.get(digest)
        if principal is None:
            principal = await self._look_up(digest, secret)
        self._admit(principal)
        return principal

    async def _look_up(self, digest: bytes, secret: bytes) -> Principal:
        text = secret.decode("latin-1")
        if not is_well_formed(text):
            raise Rejected(
                "This is not an API key: it is mistyped or cut off. Keys look like sk_<env>_… and are shown once.",
                status=401,
                code="invalid_api_key",
            )
        if is_demo(text) and not self._is_demo_allowed:
            raise Rejected("The demo key works in dev mode only.", status=401, code="invalid_api_key")
        while digest not in self._strangers:
            epoch = self._epoch
            try:
                found = await within(LOOK_UP_TIMEOUT_S, self._find([digest]))
            except Exception as error:
                raise Unavailable("Keys cannot be checked at the moment; try again.", retry_after_s=2) from error
            if epoch != self._epoch:
                # Tenancy changed while we read: what we read may be from before, and must not be cached.
                continue
            principal = found.get(digest)
            if principal is not None:
                if len(self._principals) >= MOST_PRINCIPALS:
                    self._principals.clear()
                self._principals[digest] = principal
                return principal
            if len(self._strangers) >= MOST_STRANGERS:
                self._strangers.clear()
            self._strangers.add(digest)
        raise Rejected(
            "Unknown API key. Check for a typing error, or make a new one.", status=401, code="invalid_api_key"
        )

    def _admit(self, principal: Principal) -> None:
        if principal.key_state == "revoked":
            raise Rejected("This API key was revoked. Use another one.", status=401, code="revoked_api_key")
        if principal.expires_at is not None and principal.expires_at <= self._now():
            raise Rejected("This API key has expired. Use another one.", status=401, code="expired_api_key")
        for state, noun in (
            (principal.org_state, "organisation"),
            (principal.environment_state, "environment"),
            (principal.key_state, "API key"),
        ):
            if state != "active":
                raise Rejected(
                    f"This {noun} is suspended. Ask its administrator, or support, to resume it.",
                    status=403,
                    code="suspended",
                )

    async def refresh(self) -> None:
        """Read everything again that is cached; keys that are gone drop out. Raises what `find` raises."""
        self._epoch += 1
        self._strangers.clear()
        known = list(self._principals)
        fresh: dict[bytes, Principal] = {}
        for start in range(0, len(known), 1000):
            fresh.update(await self._find(known[start : start + 1000]))
        for digest in known:
            if digest not in fresh:
                self._principals.pop(digest, None)
        self._principals.update(fresh)


def _secret_of(authorization: bytes) -> bytes:
    scheme, _, secret = authorization.partition(b" ")
    secret = secret.strip()
    if scheme.lower() != b"bearer" or not secret:
        raise Rejected(
            "No API key was given. Send it as a header: Authorization: Bearer sk_…",
            status=401,
            code="missing_api_key",
        )
    return secret
