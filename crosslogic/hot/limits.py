"""The book of limits that all API processes share: in Valkey, one script call for each decision."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from crosslogic.domain.errors import Unavailable
from crosslogic.domain.limits import (
    DAY,
    HOLD_MS,
    MINUTE,
    Allowance,
    Book,
    LayerLimits,
    Limited,
    Month,
    Placed,
    Refusal,
    Standing,
    Subject,
    refuse,
)
from crosslogic.hot.pipeline import PipelinedRedis, Script

log = logging.getLogger(__name__)

_SCRIPT: Final = Script((Path(__file__).parent / "limits.lua").read_text(encoding="utf-8"))
_pack = msgspec.msgpack.Encoder().encode

# Amounts beyond this are beyond Lua's exact integers (2⁵³); nothing real comes near.
_MOST: Final = 1 << 52
# How long Valkey keeps what nobody touches: somewhat longer than it can count.
_MINUTE_TTL_MS: Final = 2 * MINUTE.bucket_ms * MINUTE.buckets
_DAY_TTL_MS: Final = DAY.bucket_ms * (DAY.buckets + 2)
_MONTH_TTL_MS: Final = 32 * 86_400_000
# Renewals that go into one call, so that no call keeps Valkey busy for long.
_RENEWED_AT_ONCE: Final = 200
# Sequences of subjects kept ready, one for each principal that is active.
_MOST_PREPARED: Final = 20_000
# Endings that wait for Valkey to come back; beyond that the oldest are left to expire.
_MOST_OWED: Final = 100_000


class LimitBook:
    """Places, settles, releases and renews holds; every decision is one atomic step over all layers, or none of it.

    Assumes a single Valkey primary, not a cluster: the keys of one call belong to several subjects, so they do not
    share a slot. A failover may lose the last instants: settling what it no longer knows has no effect.

    While Valkey cannot be reached each process decides alone, in a book of its own that starts from nothing and is kept
    from one outage to the next. Overshoot: with N processes at most (N + 1) × the limit is admitted within a window,
    once by Valkey and once by each process. Holds end where they were placed; endings that could not reach Valkey are
    owed, and paid by `renew` when it is back.
    """

    def __init__(self, pipeline: PipelinedRedis, prefix: str, *, hold_ms: int = HOLD_MS) -> None:
        self._pipeline = pipeline
        self._subject_prefix = f"{prefix}limits:"
        self._hold_prefix = f"{prefix}hold:"
        self._hold_ms = hold_ms
        self._alone = Book(hold_ms)
        self._is_alone = False
        self._month = Month.at(0)
        self._prepared: dict[int, tuple[Sequence[Limited], list[Limited], msgspec.Raw]] = {}
        self._open: set[str] = set()
        self._owed: dict[str, tuple[str, tuple[int, ...]]] = {}

    @property
    def is_alone(self) -> bool:
        """Whether the last decision was this process's own, because Valkey could not be reached."""
        return self._is_alone

    async def place(
        self, hold_id: str, subjects: Sequence[Limited], tokens: int, spend_microdollars: int, now_ms: int
    ) -> Placed | Refusal:
        """Hold an estimate at every layer, or at none and say why. Ids are never used twice.

        The hold expires unless it is renewed: then its tokens and spend are given back, and the request itself stays
        counted. Layers without any limit cost nothing. Pass a principal's `subjects` as one object that never changes:
        its form on the wire is kept.
        """
        limited, wire = self._prepare(subjects)
        if not limited:
            return Placed(Standing())
        month = self._month_at(now_ms)
        tokens, spend = min(max(tokens, 1), _MOST), min(max(spend_microdollars, 1), _MOST)
        given = (tokens, spend, month.number, month.ends_ms, now_ms + self._hold_ms, wire)
        try:
            reply: list[int] = await self._call("place", now_ms, [self._hold_prefix + hold_id], given)
        except Unavailable as error:
            self._note_alone(error)
            return self._alone.place(hold_id, limited, tokens, spend, now_ms)
        except asyncio.CancelledError:
            # It was sent, and commands stay in order: take it back behind it.
            self._forget_sent(hold_id, now_ms)
            raise
        self._note_together()
        if reply[0] == 1:
            self._open.add(hold_id)
            return Placed(Standing(_allowance(reply, 1), _allowance(reply, 4)))
        _, number, meter, limit, used, asked, wait_ms = reply
        subject, _ = limited[number - 1]
        return refuse(
            subject.layer,
            meter - 1,
            limit=limit,
            used=used,
            asked=asked,
            wait_ms=None if wait_ms < 0 else wait_ms,
        )

    async def settle(self, hold_id: str, tokens: int, spend_microdollars: int, now_ms: int) -> None:
        """End a hold: its tokens and spend become what was really used, in the minute, day and month it was placed in.

        Settling or releasing what has ended is without effect. Never raises Unavailable: the ending is then owed.
        """
        if hold_id in self._alone:
            self._alone.settle(hold_id, tokens, spend_microdollars)
        elif hold_id in self._open:
            self._open.discard(hold_id)
            await self._end(hold_id, "settle", (min(tokens, _MOST), min(spend_microdollars, _MOST)), now_ms)

    async def release(self, hold_id: str, now_ms: int) -> None:
        """End a hold as if it had never been: for requests that we refuse or fail before a node took them.

        Not even the request counts against requests/min, so that our own troubles cost a client nothing.
        """
        if hold_id in self._alone:
            self._alone.release(hold_id)
        elif hold_id in self._open:
            self._open.discard(hold_id)
            await self._end(hold_id, "release", (), now_ms)

    async def renew(self, hold_ids: Collection[str], now_ms: int) -> None:
        """Keep these holds for another minute, and pay endings that are owed. Call it every 20 s, with none as well.

        Raises Unavailable while Valkey is away.
        """
        self._alone.renew(hold_ids, now_ms)
        for hold_id, (operation, amounts) in list(self._owed.items()):
            await self._finish(hold_id, operation, amounts, now_ms)
            self._owed.pop(hold_id, None)
        keys = [self._hold_prefix + hold_id for hold_id in hold_ids if hold_id in self._open]
        for start in range(0, len(keys), _RENEWED_AT_ONCE):
            await self._call("renew", now_ms, keys[start : start + _RENEWED_AT_ONCE], (now_ms + self._hold_ms,))

    async def _end(self, hold_id: str, operation: str, amounts: tuple[int, ...], now_ms: int) -> None:
        try:
            await self._finish(hold_id, operation, amounts, now_ms)
        except Unavailable:
            if len(self._owed) >= _MOST_OWED:
                del self._owed[next(iter(self._owed))]
            self._owed[hold_id] = (operation, amounts)

    async def _finish(self, hold_id: str, operation: str, amounts: tuple[int, ...], now_ms: int) -> None:
        await self._call(operation, now_ms, [self._hold_prefix + hold_id], amounts)

    def _forget_sent(self, hold_id: str, now_ms: int) -> None:
        try:
            reply = self._pipeline.send(
                "EVALSHA", _SCRIPT.sha, 1, self._hold_prefix + hold_id, "release", now_ms, _pack(())
            )
        except Unavailable:
            return  # It expires.
        # Nobody waits for it; read the outcome, or asyncio complains that nobody did.
        reply.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _call(self, operation: str, now_ms: int, keys: Sequence[str], given: tuple[Any, ...]) -> Any:
        return await self._pipeline.evaluate(_SCRIPT, keys, (operation, now_ms, _pack(given)))

    def _prepare(self, subjects: Sequence[Limited]) -> tuple[list[Limited], msgspec.Raw]:
        """The subjects that have limits, and those as limits.lua reads them; made once for a sequence."""
        known = self._prepared.get(id(subjects))
        if known is None or known[0] is not subjects:
            limited = [pair for pair in subjects if pair[1].is_limited]
            wire = msgspec.Raw(_pack([self._wire(subject, limits) for subject, limits in limited]))
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            # The sequence is kept as well, so that no other can have its id.
            known = self._prepared[id(subjects)] = (subjects, limited, wire)
        return known[1], known[2]

    def _wire(self, subject: Subject, limits: LayerLimits) -> tuple[str | int, ...]:
        """A subject as limits.lua reads it."""
        numbers = [-1 if limit is None else limit for limit in limits.in_order()]
        ttl_ms = max(_MINUTE_TTL_MS, 2 * self._hold_ms)
        if limits.monthly_spend_microdollars is not None:
            ttl_ms = max(ttl_ms, _MONTH_TTL_MS)
        elif limits.tokens_per_day is not None:
            ttl_ms = max(ttl_ms, _DAY_TTL_MS)
        return (self._subject_prefix + subject.name, ttl_ms, *numbers)

    def _month_at(self, now_ms: int) -> Month:
        if not self._month.starts_ms <= now_ms < self._month.ends_ms:
            self._month = Month.at(now_ms)
        return self._month

    def _note_alone(self, error: Unavailable) -> None:
        if not self._is_alone:
            self._is_alone = True
            log.warning("limits are decided by this process alone until Valkey is back: %s", error)

    def _note_together(self) -> None:
        if self._is_alone:
            self._is_alone = False
            log.warning("limits are decided in Valkey again")


def _allowance(reply: Sequence[int], first: int) -> Allowance | None:
    limit, remaining, reset_ms = reply[first : first + 3]
    return None if limit < 0 else Allowance(limit, remaining, reset_ms)
