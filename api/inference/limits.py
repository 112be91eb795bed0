"""Limits on the way of a request: which layers apply to a principal, and the one decision among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.ids import encode
from crosslogic.domain.limits import Allowance, Hold, LayerLimits, Limited, Refusal, Reserved, Standing, Subject
from crosslogic.domain.tenancy import Principal
from crosslogic.hot.limits import LimitBook, OnDecided

__all__ = ["Hold", "Limits"]

MOST_PRINCIPALS = 100_000


def _ignore(layer: str, limit: str) -> None:
    pass


class Limits:
    """Places and settles holds. `on_would_refuse` is told layer and limit whenever a dry-run limit was in the way."""

    def __init__(self, book: LimitBook, on_would_refuse: Callable[[str, str], None] = _ignore) -> None:
        self._book = book
        self._on_would_refuse = on_would_refuse
        # By identity, with the principal beside it so that no other can have its id.
        self._subjects: dict[int, tuple[Principal, Sequence[Limited]]] = {}
        # What its last decision said, by principal.
        self._standings: dict[int, tuple[Principal, Standing]] = {}

    def _subjects_of(self, principal: Principal) -> Sequence[Limited]:
        subjects = [(Subject(row.layer, encode(row.subject_id)), LayerLimits.of(row)) for row in principal.limits]
        if len(self._subjects) >= MOST_PRINCIPALS:
            self._subjects.clear()
            self._standings.clear()
        self._subjects[id(principal)] = (principal, subjects)
        return subjects

    def ask(
        self,
        request_id: str,
        principal: Principal,
        tokens: int,
        spend_microdollars: int,
        reservation: Reserved | None,
        on_decided: OnDecided,
    ) -> None:
        """Hold an estimate at all four layers or at none, in the reservation where it has room.

        `on_decided` is called with what was decided, perhaps at once; `granted` reads it. It must not raise.
        """
        known = self._subjects.get(id(principal))
        subjects = self._subjects_of(principal) if known is None else known[1]
        self._book.ask(request_id, subjects, tokens, spend_microdollars, _now_ms(), reservation, on_decided)

    def standing_of(self, principal: Principal) -> Standing:
        """How a principal stood at its last decision; before the first one, as if it had used nothing."""
        known = self._standings.get(id(principal))
        if known is not None and known[0] is principal:
            return known[1]
        limits = [LayerLimits.of(row) for row in principal.limits]
        return Standing(_whole(limits, "requests_per_min"), _whole(limits, "tokens_per_min", "tokens_per_day"))

    def granted(self, principal: Principal, decision: Hold | Refusal | InvariantViolated) -> Hold:
        """The hold of a principal. Raises LimitReached naming layer, limit and when to return, or InvariantViolated."""
        if isinstance(decision, Refusal):
            raise decision.as_rejected()
        if isinstance(decision, InvariantViolated):
            raise decision
        self._standings[id(principal)] = (principal, decision.standing)
        for layer, limit in decision.would_refuse:
            self._on_would_refuse(layer, limit)
        return decision

    def settle(self, hold: Hold, used_tokens: int, used_spend_microdollars: int) -> None:
        """End a hold; what it held becomes what was used. Never waits, never raises."""
        self._book.settle(hold.id, used_tokens, used_spend_microdollars, _now_ms())

    def release(self, hold: Hold) -> None:
        """End a hold as if it had never been: the request was not our client's to pay for in any way."""
        self._book.release(hold.id)

    async def keep_renewing(self) -> None:
        """Run for the life of the process: take part in the decisions in Valkey, and show life."""
        await self._book.run(_now_ms)

    async def leave(self) -> None:
        """Take part no longer. Raises Unavailable."""
        await self._book.leave(_now_ms())


def _whole(limits: Sequence[LayerLimits], *meters: str) -> Allowance | None:
    """The tightest of these limits, untouched."""
    found = [getattr(one, meter) for one in limits for meter in meters if meter not in one.dry_run]
    least = min((limit for limit in found if limit is not None), default=None)
    return None if least is None else Allowance(least, least, 0)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
