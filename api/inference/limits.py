"""Limits on the way of a request: which layers apply to a principal, and the one decision among them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from crosslogic.domain.limits import LayerLimits, Refusal, Standing, Subject
from crosslogic.hot.limits import LimitBook

from crosslogic.domain.errors import Rejected
from crosslogic.domain.ids import encode
from crosslogic.domain.tenancy import Principal

log = logging.getLogger("crosslogic.limits")

RENEW_INTERVAL_S = 20.0

Subjects = Sequence[tuple[Subject, LayerLimits]]


@dataclass(slots=True)
class Hold:
    """One request's grab at every layer's budget, until it is settled."""

    id: str
    subjects: Subjects
    tokens: int
    spend_microdollars: int
    standing: Standing | None = field(default=None)


class Limits:
    """Places and settles holds; keeps those of long streams alive."""

    def __init__(self, book: LimitBook) -> None:
        self._book = book
        self._subjects: dict[UUID, tuple[Principal, Subjects]] = {}
        self._open: dict[str, Hold] = {}

    def _subjects_of(self, principal: Principal) -> Subjects:
        known = self._subjects.get(principal.key_id)
        if known is not None and known[0] is principal:
            return known[1]
        subjects = [(Subject(row.layer, encode(row.subject_id)), LayerLimits.of(row)) for row in principal.limits]
        if len(self._subjects) > 100_000:
            self._subjects.clear()
        self._subjects[principal.key_id] = (principal, subjects)
        return subjects

    async def place(self, request_id: str, principal: Principal, tokens: int, spend_microdollars: int) -> Hold:
        """Hold an estimate at all four layers or at none. Raises Rejected naming layer, limit and when to return."""
        hold = Hold(request_id, self._subjects_of(principal), tokens, spend_microdollars)
        answer = await self._book.place(request_id, hold.subjects, tokens, spend_microdollars, _now_ms())
        if isinstance(answer, Refusal):
            raise Rejected(answer.message, status=answer.status, code=answer.code, retry_after_s=answer.retry_after_s)
        hold.standing = answer.standing
        self._open[request_id] = hold
        return hold

    async def settle(self, hold: Hold, used_tokens: int, used_spend_microdollars: int) -> None:
        """Correct the hold to the truth and end it. A failure is logged: the hold then expires by itself."""
        self._open.pop(hold.id, None)
        try:
            await self._book.settle(
                hold.id,
                hold.subjects,
                hold.tokens,
                used_tokens,
                hold.spend_microdollars,
                used_spend_microdollars,
                _now_ms(),
            )
        except Exception as error:
            log.warning("the hold of %s was not settled and will expire: %r", hold.id, error)

    async def keep_renewing(self) -> None:
        """Run for the life of the process."""
        while True:
            await asyncio.sleep(RENEW_INTERVAL_S)
            try:
                await self._book.renew([(hold.id, hold.subjects) for hold in self._open.values()], _now_ms())
            except Exception as error:
                log.warning("holds were not renewed: %r", error)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
