"""Limits: four layers, one decision. What a request may take, what a refusal says, and the windows it is counted in.

A request is counted when it is admitted, with an estimate (a *hold*), and corrected to the truth when it ends.
Requests and tokens are counted in sliding windows made of small buckets; a bucket counts until its last instant is a
whole window old. So what is placed within any minute (or day) never exceeds the limit, and what was used comes back at
most one bucket late: 5 s of a minute, 1 h of a day. Only the truth can exceed it, where a request used more than its
hold. Spend is counted by calendar month, UTC. Amounts are kept apart from the limits they are held against, so that a
changed limit acts at once and forgets nothing; what has no limit is not counted.

`Book` is the decision in memory; `crosslogic/hot/limits.lua` is the same decision in Valkey, and a property test holds
the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from crosslogic.domain.errors import Rejected
from crosslogic.domain.tenancy import NO_LIMIT, LimitRow

# The order in which limits are checked and numbered, here and in limits.lua.
METERS: Final = (
    "requests_per_min",
    "tokens_per_min",
    "tokens_per_day",
    "monthly_spend_microdollars",
    "concurrency",
)
REQUESTS, MINUTE_TOKENS, DAY_TOKENS, SPEND, CONCURRENCY = range(5)

_TITLES: Final = (
    "requests per minute",
    "tokens per minute",
    "tokens per day",
    "spend per month",
    "concurrent requests",
)
_QUOTAS: Final = frozenset({DAY_TOKENS, SPEND})

# Nobody can know when a running request ends; a second is a polite time to ask again.
CONCURRENCY_WAIT_MS: Final = 1_000

# A hold that is not renewed for so long belonged to a process that died.
HOLD_MS: Final = 60_000

_FORGET_EVERY_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window of `buckets` × `bucket_ms`."""

    bucket_ms: int
    buckets: int

    def bucket(self, at_ms: int) -> int:
        """The number of the bucket that an instant falls into."""
        return at_ms // self.bucket_ms

    def oldest(self, now_ms: int) -> int:
        """The oldest bucket that still counts."""
        return now_ms // self.bucket_ms - self.buckets

    def leaves_at(self, bucket: int) -> int:
        """The instant at which a bucket stops counting."""
        return (bucket + self.buckets + 1) * self.bucket_ms


MINUTE: Final = Window(bucket_ms=5_000, buckets=12)
DAY: Final = Window(bucket_ms=3_600_000, buckets=24)
_WINDOWS: Final = (MINUTE, MINUTE, DAY)


@dataclass(frozen=True, slots=True)
class Month:
    """A calendar month, UTC: its number since year 0 and the instants it lies between (half-open)."""

    number: int
    starts_ms: int
    ends_ms: int

    @classmethod
    def at(cls, now_ms: int) -> Month:
        """The month of an instant."""
        now = datetime.fromtimestamp(now_ms // 1000, UTC)
        starts = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        ends = starts.replace(year=now.year + now.month // 12, month=now.month % 12 + 1)
        return cls(now.year * 12 + now.month - 1, int(starts.timestamp()) * 1000, int(ends.timestamp()) * 1000)


@dataclass(frozen=True, slots=True)
class LayerLimits:
    """What one layer allows; None is unlimited, 0 admits nothing."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    tokens_per_day: int | None = None
    concurrency: int | None = None
    monthly_spend_microdollars: int | None = None

    @classmethod
    def of(cls, row: LimitRow) -> LayerLimits:
        """What a stored row means: None is the layer's default, -1 no limit."""
        defaults = DEFAULTS[row.layer]
        return cls(
            requests_per_min=_meant(row.requests_per_min, defaults.requests_per_min),
            tokens_per_min=_meant(row.tokens_per_min, defaults.tokens_per_min),
            tokens_per_day=_meant(row.tokens_per_day, defaults.tokens_per_day),
            concurrency=_meant(row.concurrency, defaults.concurrency),
            monthly_spend_microdollars=_meant(row.monthly_spend_microdollars, defaults.monthly_spend_microdollars),
        )

    def in_order(self) -> tuple[int | None, int | None, int | None, int | None, int | None]:
        """The limits in the order of METERS."""
        return (
            self.requests_per_min,
            self.tokens_per_min,
            self.tokens_per_day,
            self.monthly_spend_microdollars,
            self.concurrency,
        )

    @property
    def is_limited(self) -> bool:
        """Whether anything has to be counted for this layer."""
        return not (
            self.requests_per_min is None
            and self.tokens_per_min is None
            and self.tokens_per_day is None
            and self.monthly_spend_microdollars is None
            and self.concurrency is None
        )

    @property
    def is_holding(self) -> bool:
        """Whether a running request takes something from this layer that it gives back when it ends."""
        return not (
            self.tokens_per_min is None
            and self.tokens_per_day is None
            and self.monthly_spend_microdollars is None
            and self.concurrency is None
        )


# What holds where nothing was set (PRD/requirements.md, Limits).
DEFAULTS: Final[Mapping[str, LayerLimits]] = {
    "global": LayerLimits(),
    "org": LayerLimits(),
    "environment": LayerLimits(tokens_per_min=10_000, tokens_per_day=1_000_000, concurrency=10),
    "key": LayerLimits(requests_per_min=60, concurrency=5),
}


def _meant(stored: int | None, default: int | None) -> int | None:
    if stored is None:
        return default
    return None if stored == NO_LIMIT else stored


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a layer's limits bind: an org, an environment, a key, or everybody."""

    layer: str
    id: str

    @property
    def name(self) -> str:
        """Unique over all layers."""
        return f"{self.layer}:{self.id}"


Limited = tuple[Subject, LayerLimits]


@dataclass(frozen=True, slots=True)
class Allowance:
    """How one limit stands: what is left of it, and in how many milliseconds all of it is back."""

    limit: int
    remaining: int
    reset_ms: int


@dataclass(frozen=True, slots=True)
class Standing:
    """The tightest limit on requests and the tightest on tokens, over all layers; None where there is none.

    Tokens are those per minute or per day, whichever leaves less.
    """

    requests: Allowance | None = None
    tokens: Allowance | None = None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*` response headers, in the form that ASGI sends."""
        found: list[tuple[bytes, bytes]] = []
        for noun, allowance in ((b"requests", self.requests), (b"tokens", self.tokens)):
            if allowance is not None:
                found.append((b"x-ratelimit-limit-" + noun, b"%d" % allowance.limit))
                found.append((b"x-ratelimit-remaining-" + noun, b"%d" % allowance.remaining))
                found.append((b"x-ratelimit-reset-" + noun, _duration(allowance.reset_ms).encode()))
        return found


@dataclass(frozen=True, slots=True)
class Placed:
    """The hold is placed: the request may run."""

    standing: Standing


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not run now. `limit` is one of METERS; `retry_after_s` is None where waiting cannot help."""

    layer: str
    limit: str
    status: int
    code: str
    message: str
    retry_after_s: float | None

    def as_rejected(self) -> Rejected:
        """The refusal as the error that the API answers with."""
        return Rejected(self.message, status=self.status, code=self.code, retry_after_s=self.retry_after_s)


def refuse(layer: str, meter: int, *, limit: int, used: int, asked: int, wait_ms: int | None) -> Refusal:
    """A refusal in words. `wait_ms` None: it can never fit, because it alone is larger than the limit."""
    is_quota = meter in _QUOTAS
    title = _TITLES[meter]
    if limit == 0:
        message = f"The {layer} layer's limit on {title} is 0: it admits nothing. Ask an administrator to raise it."
    elif wait_ms is None:
        message = (
            f"Request too large for the {layer} layer's limit on {title}: limit {_amount(meter, limit)}, "
            f"requested {_amount(meter, asked)}. It can never fit: shorten the prompt or lower max_tokens."
        )
    else:
        verb = "Quota exhausted" if is_quota else "Rate limit reached"
        message = (
            f"{verb} on {title} of the {layer} layer: limit {_amount(meter, limit)}, used {_amount(meter, used)}, "
            f"requested {_amount(meter, asked)}. Try again in {_duration(wait_ms)}."
        )
    return Refusal(
        layer=layer,
        limit=METERS[meter],
        status=403 if is_quota else 429,
        code="quota_exceeded" if is_quota else "rate_limit_exceeded",
        message=message,
        retry_after_s=None if wait_ms is None else wait_ms / 1000,
    )


def _amount(meter: int, amount: int) -> str:
    if meter != SPEND:
        return str(amount)
    dollars, microdollars = divmod(amount, 1_000_000)
    return f"${dollars}.{microdollars:06d}"


def _duration(ms: int) -> str:
    """`17ms`, `1s`, `6m0s`, `1h0m0s`: OpenAI's form, rounded up to whole seconds from one second on."""
    if ms < 1000:
        return f"{max(ms, 0)}ms"
    minutes, seconds = divmod(-(-ms // 1000), 60)
    if minutes == 0:
        return f"{seconds}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s"


@dataclass(slots=True)
class _Account:
    """What is counted for one subject: amounts by bucket for each of the first four meters, and its holds' expiries."""

    amounts: tuple[dict[int, int], dict[int, int], dict[int, int], dict[int, int]] = field(
        default_factory=lambda: ({}, {}, {}, {})
    )
    holds: dict[str, int] = field(default_factory=dict[str, int])

    def used(self, meter: int, oldest: int) -> int:
        amounts = self.amounts[meter]
        for bucket in [bucket for bucket in amounts if bucket < oldest]:
            del amounts[bucket]
        return sum(amounts.values())


@dataclass(slots=True)
class _Hold:
    """One request's grab of the budget. `buckets` are where its amounts were put, by meter."""

    limited: tuple[Limited, ...]
    buckets: tuple[int, int, int, int]
    tokens: int
    spend: int
    expires_ms: int


class Book:
    """The decision over counters in memory. Nothing here waits, so every call is atomic within its event loop."""

    def __init__(self, hold_ms: int = HOLD_MS) -> None:
        self._hold_ms = hold_ms
        self._accounts: dict[str, _Account] = {}
        self._holds: dict[str, _Hold] = {}
        self._forget_at_ms = 0

    def __len__(self) -> int:
        """How many subjects something is kept for."""
        return len(self._accounts)

    def __contains__(self, hold_id: object) -> bool:
        return hold_id in self._holds

    def place(
        self, hold_id: str, subjects: Sequence[Limited], tokens: int, spend_microdollars: int, now_ms: int
    ) -> Placed | Refusal:
        """Grab the budget of every subject, or of none. Hold ids are never used twice.

        Of several limits in the way the refusal names the one that opens last. A request counts as at least one token
        and one microdollar, so that a limit of 0 or one that is used up admits nothing.
        """
        if now_ms >= self._forget_at_ms:
            self._forget(now_ms)
        limited = tuple(pair for pair in subjects if pair[1].is_limited)
        for subject, limits in limited:
            if limits.is_holding:
                self._sweep(self._account(subject), now_ms)
        month = Month.at(now_ms)
        tokens, spend = max(tokens, 1), max(spend_microdollars, 1)
        asked = (1, tokens, tokens, spend)
        buckets = (MINUTE.bucket(now_ms), MINUTE.bucket(now_ms), DAY.bucket(now_ms), month.number)
        oldest = self._oldest(now_ms)

        # (instant it opens or None for never, layer, meter, limit, used, asked)
        worst: tuple[int | None, str, int, int, int, int] | None = None
        tightest: list[Allowance | None] = [None, None]
        for subject, limits in limited:
            account = self._account(subject)
            for meter, limit in enumerate(limits.in_order()):
                if limit is None:
                    continue
                if meter == CONCURRENCY:
                    used, wanted = sum(1 for expires_ms in account.holds.values() if expires_ms > now_ms), 1
                    opens_ms = now_ms + CONCURRENCY_WAIT_MS
                else:
                    used, wanted = account.used(meter, oldest[meter]), asked[meter]
                    opens_ms = month.ends_ms
                if used + wanted <= limit:
                    if meter < SPEND:
                        place = 0 if meter == REQUESTS else 1
                        remaining, best = limit - used - wanted, tightest[place]
                        if best is None or remaining < best.remaining:
                            reset_ms = _WINDOWS[meter].leaves_at(buckets[meter]) - now_ms
                            tightest[place] = Allowance(limit, remaining, reset_ms)
                    continue
                if wanted > limit:
                    at_ms = None
                elif meter < SPEND:
                    at_ms = _opens_at(account.amounts[meter], _WINDOWS[meter], used, limit - wanted)
                else:
                    at_ms = opens_ms
                if worst is None or (worst[0] is not None and (at_ms is None or at_ms > worst[0])):
                    worst = (at_ms, subject.layer, meter, limit, used, wanted)
        if worst is not None:
            at_ms, layer, meter, limit, used, wanted = worst
            wait_ms = None if at_ms is None else at_ms - now_ms
            return refuse(layer, meter, limit=limit, used=used, asked=wanted, wait_ms=wait_ms)

        hold = _Hold(limited, buckets, tokens, spend, now_ms + self._hold_ms)
        self._holds[hold_id] = hold
        for subject, limits in limited:
            account = self._account(subject)
            self._add(account, limits, hold, asked)
            if limits.is_holding:
                account.holds[hold_id] = hold.expires_ms
        return Placed(Standing(tightest[0], tightest[1]))

    def settle(self, hold_id: str, tokens: int, spend_microdollars: int) -> None:
        """End a hold: tokens and spend become what was really used. Without effect the second time."""
        self._adjust(hold_id, tokens, spend_microdollars)
        self._end(hold_id)

    def release(self, hold_id: str) -> None:
        """End a hold as if it had never been: not even the request counts. Without effect the second time."""
        self._adjust(hold_id, 0, 0, requests=-1)
        self._end(hold_id)

    def renew(self, hold_ids: Iterable[str], now_ms: int) -> None:
        """Keep holds for another `hold_ms`."""
        for hold_id in hold_ids:
            hold = self._holds.get(hold_id)
            if hold is not None:
                hold.expires_ms = now_ms + self._hold_ms
                for subject, limits in hold.limited:
                    if limits.is_holding:
                        self._account(subject).holds[hold_id] = hold.expires_ms

    def _account(self, subject: Subject) -> _Account:
        account = self._accounts.get(subject.name)
        if account is None:
            account = self._accounts[subject.name] = _Account()
        return account

    def _oldest(self, now_ms: int) -> tuple[int, int, int, int]:
        return MINUTE.oldest(now_ms), MINUTE.oldest(now_ms), DAY.oldest(now_ms), Month.at(now_ms).number

    def _sweep(self, account: _Account, now_ms: int) -> None:
        """Give back what expired holds had grabbed. They stay known, so that a late settling still books the truth."""
        for hold_id in [hold_id for hold_id, expires_ms in account.holds.items() if expires_ms <= now_ms]:
            self._adjust(hold_id, 0, 0)
            for subject, _ in self._holds[hold_id].limited:
                self._account(subject).holds.pop(hold_id, None)

    def _adjust(self, hold_id: str, tokens: int, spend: int, *, requests: int = 0) -> None:
        """Put amounts right where they were counted. What lands in a bucket that no longer counts is dropped later."""
        hold = self._holds.get(hold_id)
        if hold is None:
            return
        delta = (requests, tokens - hold.tokens, tokens - hold.tokens, spend - hold.spend)
        for subject, limits in hold.limited:
            self._add(self._account(subject), limits, hold, delta)
        hold.tokens, hold.spend = tokens, spend

    def _add(self, account: _Account, limits: LayerLimits, hold: _Hold, delta: Sequence[int]) -> None:
        for meter, limit in enumerate(limits.in_order()[:CONCURRENCY]):
            if limit is not None and delta[meter]:
                amounts, bucket = account.amounts[meter], hold.buckets[meter]
                amounts[bucket] = max(0, amounts.get(bucket, 0) + delta[meter])

    def _end(self, hold_id: str) -> None:
        hold = self._holds.pop(hold_id, None)
        if hold is not None:
            for subject, _ in hold.limited:
                self._account(subject).holds.pop(hold_id, None)

    def _forget(self, now_ms: int) -> None:
        """Drop what no longer counts, so that memory follows the traffic and not the history."""
        self._forget_at_ms = now_ms + _FORGET_EVERY_MS
        day_ms = DAY.bucket_ms * DAY.buckets
        for hold_id in [hold_id for hold_id, hold in self._holds.items() if hold.expires_ms + day_ms < now_ms]:
            self._adjust(hold_id, 0, 0)
            self._end(hold_id)
        oldest = self._oldest(now_ms)
        for name, account in list(self._accounts.items()):
            if not account.holds and not any(account.used(meter, oldest[meter]) for meter in range(CONCURRENCY)):
                del self._accounts[name]


def _opens_at(amounts: Mapping[int, int], window: Window, used: int, room: int) -> int:
    """The instant at which enough buckets have left for no more than `room` to be counted."""
    for bucket in sorted(amounts):
        used -= amounts[bucket]
        if used <= room:
            return window.leaves_at(bucket)
    raise AssertionError("an empty window has room for whatever is not larger than its limit")
