"""Limits on the way of a request: which layers apply to a principal, and the one decision among them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.ids import encode
from crosslogic.domain.limits import LayerLimits, Limited, Refusal, Standing, Subject
from crosslogic.domain.tenancy import Principal
from crosslogic.hot.limits import LimitBook

log = logging.getLogger("crosslogic.limits")

RENEW_INTERVAL_S = 20.0
MOST_PRINCIPALS = 100_000


@dataclass(frozen=True, slots=True)
class Hold:
    """One request's grab at every layer's budget, until it is settled."""

    id: str
    tokens: int
    standing: Standing

    @property
    def lines(self) -> bytes:
        """The header lines that tell a client how its limits stand."""
        return b"".join([b"%b: %b\r\n" % header for header in self.standing.headers()])


class Limits:
    """Places and settles holds; keeps those of long streams alive."""

    def __init__(self, book: LimitBook) -> None:
        self._book = book
        self._subjects: dict[UUID, tuple[Principal, Sequence[Limited]]] = {}
        self._open: set[str] = set()
        self._endings: set[asyncio.Future[None]] = set()

    def _subjects_of(self, principal: Principal) -> Sequence[Limited]:
        known = self._subjects.get(principal.key_id)
        if known is not None and known[0] is principal:
            return known[1]
        subjects = [(Subject(row.layer, encode(row.subject_id)), LayerLimits.of(row)) for row in principal.limits]
        if len(self._subjects) >= MOST_PRINCIPALS:
            self._subjects.clear()
        self._subjects[principal.key_id] = (principal, subjects)
        return subjects

    async def place(self, request_id: str, principal: Principal, tokens: int, spend_microdollars: int) -> Hold:
        """Hold an estimate at all four layers or at none. Raises Rejected naming layer, limit and when to return."""
        answer = await self._book.place(request_id, self._subjects_of(principal), tokens, spend_microdollars, _now_ms())
        if isinstance(answer, Refusal):
            raise answer.as_rejected()
        self._open.add(request_id)
        return Hold(request_id, tokens, answer.standing)

    def settle(self, hold: Hold, used_tokens: int, used_spend_microdollars: int) -> None:
        """End a hold; what it held becomes what was used."""
        self._open.discard(hold.id)
        self._end(self._book.settle(hold.id, used_tokens, used_spend_microdollars, _now_ms()))

    def release(self, hold: Hold) -> None:
        """End a hold as if it had never been: the request was not our client's to pay for in any way."""
        self._open.discard(hold.id)
        self._end(self._book.release(hold.id, _now_ms()))

    def _end(self, ending: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def keep_renewing(self) -> None:
        """Run for the life of the process."""
        while True:
            await asyncio.sleep(RENEW_INTERVAL_S)
            try:
                await self._book.renew(tuple(self._open), _now_ms())
            except Unavailable as error:
                log.warning("holds were not renewed: %s", error)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
