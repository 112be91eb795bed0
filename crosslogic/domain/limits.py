"""Limits: four layers, one decision. What a request may take, what a refusal says, and the windows it is counted in.

A request is counted when it is admitted, with an estimate (a *hold*), and corrected to the truth when it ends.
Requests and tokens are counted in sliding windows made of small buckets; a bucket counts until its last instant is a
whole window old. So what is placed within any minute (or day) never exceeds the limit, and what was used comes back at
most one bucket late: 5 s of a minute, 1 h of a day. Only the truth can exceed it, where a request used more than its
hold. Spend is counted by calendar month, UTC. Amounts are kept apart from the limits they are held against, so that a
changed limit acts at once and forgets nothing; what has no limit is not counted.

A reservation is a soft layer: a request that fits into its minute is counted there instead of against the layers'
tokens and spend; one that does not fit is a request like any other. A dry-run limit counts and reports, and refuses
nothing.

`Book` is the decision in memory; `crosslogic/hot/limits.lua` is the same decision in Valkey, and a property test holds
the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, NamedTuple
from uuid import UUID

from crosslogic.domain.errors import Rejected
from crosslogic.domain.ids import encode
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
# What a reservation has paid for: neither checked nor counted for requests that fit into it.
_PAID_FLAT: Final = frozenset({MINUTE_TOKENS, DAY_TOKENS, SPEND})

# Nobody can know when a running request ends; a second is a polite time to ask again.
CONCURRENCY_WAIT_MS: Final = 1_000

# Where a process that decides alone has used up its share, but nobody the limit: its being alone may be over by then.
SHARE_WAIT_MS: Final = 5_000

# A process that gives no sign of life for so long has died; what it held is given back.
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
    """What one layer allows; None is unlimited, 0 admits nothing. Limits named in `dry_run` only report."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    tokens_per_day: int | None = None
    concurrency: int | None = None
    monthly_spend_microdollars: int | None = None
    dry_run: frozenset[str] = frozenset()

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
            dry_run=row.dry_run,
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
class Reserved:
    """A reservation as the limits see it: 60 tokens a minute for each of its capacity units."""

    id: UUID
    tokens_per_min: int
    # Its subject's name; made once, for it is needed with every request.
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"reservation:{encode(self.id)}")


class Sum(NamedTuple):
    """What was used of one meter by one subject in one bucket, summed from usage records."""

    name: str
    meter: int
    bucket: int
    amount: int


class Allowance(NamedTuple):
    """How one limit stands: what is left of it, and in how many milliseconds all of it is back."""

    limit: int
    remaining: int
    reset_ms: int


class Standing(NamedTuple):
    """The tightest limit on requests and the tightest on tokens, over all layers; None where there is none.

    Tokens are those per minute or per day, whichever leaves less; for reserved requests those of the reservation. In a
    refusal the limit that it names stands before tighter ones, and its reset is when there is room.
    """

    requests: Allowance | None = None
    tokens: Allowance | None = None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*` response headers, in the form that ASGI sends."""
        found: list[tuple[bytes, bytes]] = []
        requests, tokens = self
        if requests is not None:
            limit, remaining, reset_ms = requests
            found.append((b"x-ratelimit-limit-requests", b"%d" % limit))
            found.append((b"x-ratelimit-remaining-requests", b"%d" % remaining))
            found.append((b"x-ratelimit-reset-requests", _duration(reset_ms)))
        if tokens is not None:
            limit, remaining, reset_ms = tokens
            found.append((b"x-ratelimit-limit-tokens", b"%d" % limit))
            found.append((b"x-ratelimit-remaining-tokens", b"%d" % remaining))
            found.append((b"x-ratelimit-reset-tokens", _duration(reset_ms)))
        return found

    def lines(self) -> bytes:
        """The same headers as lines of HTTP/1.1."""
        requests, tokens = self
        shown = b""
        if requests is not None:
            shown = _REQUESTS_LINES % (requests[0], requests[1], _duration(requests[2]))
        if tokens is not None:
            shown += _TOKENS_LINES % (tokens[0], tokens[1], _duration(tokens[2]))
        return shown


_REQUESTS_LINES: Final = (
    b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\nx-ratelimit-reset-requests: %b\r\n"
)
_TOKENS_LINES: Final = _REQUESTS_LINES.replace(b"-requests:", b"-tokens:")

NO_STANDING: Final = Standing()


class Hold:
    """One request's grab of the budget: the request may run.

    `tokens` and `spend` are what was held. `would_refuse` names the dry-run limits (layer, limit) that were in the way.
    """

    __slots__ = (
        "at_ms",
        "id",
        "is_alone",
        "is_reserved",
        "limited",
        "reservation",
        "spend",
        "standing",
        "tokens",
        "would_refuse",
    )

    def __init__(
        self,
        id: str,
        limited: Sequence[Limited],
        tokens: int,
        spend: int,
        at_ms: int,
        reservation: Reserved | None = None,
    ) -> None:
        self.id = id
        self.limited = limited
        self.tokens = tokens
        self.spend = spend
        self.at_ms = at_ms
        self.reservation = reservation
        self.standing = NO_STANDING
        self.is_reserved = False
        self.would_refuse: tuple[tuple[str, str], ...] = ()
        # Whether one process alone placed it, so that nobody else knows of it.
        self.is_alone = False

    def buckets(self) -> tuple[int, int, int, int]:
        """Where its amounts are counted, by meter."""
        return buckets_at(self.at_ms)


def buckets_at(at_ms: int) -> tuple[int, int, int, int]:
    """The buckets of an instant, by meter."""
    minute = at_ms // MINUTE.bucket_ms
    return minute, minute, at_ms // DAY.bucket_ms, Month.at(at_ms).number


class LimitReached(Rejected):
    """A limit is in the way; `standing` is for the answer's headers."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message, status=refusal.status, code=refusal.code, retry_after_s=refusal.retry_after_s)
        self.layer = refusal.layer
        self.limit = refusal.limit
        self.standing = refusal.standing


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not run now. `limit` is one of METERS; `retry_after_s` is None where waiting cannot help."""

    layer: str
    limit: str
    status: int
    code: str
    message: str
    retry_after_s: float | None
    standing: Standing = NO_STANDING

    def as_rejected(self) -> LimitReached:
        """The refusal as the error that the API answers with."""
        return LimitReached(self)


def refuse(
    layer: str,
    meter: int,
    *,
    limit: int,
    used: int,
    asked: int,
    wait_ms: int | None,
    standing: Standing = NO_STANDING,
) -> Refusal:
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
            f"requested {_amount(meter, asked)}. Try again in {_duration(wait_ms).decode()}."
        )
    return Refusal(
        layer=layer,
        limit=METERS[meter],
        status=403 if is_quota else 429,
        code="quota_exceeded" if is_quota else "rate_limit_exceeded",
        message=message,
        retry_after_s=None if wait_ms is None else wait_ms / 1000,
        standing=standing,
    )


def _amount(meter: int, amount: int) -> str:
    if meter != SPEND:
        return str(amount)
    dollars, microdollars = divmod(amount, 1_000_000)
    return f"${dollars}.{microdollars:06d}"


def _duration(ms: int) -> bytes:
    """`17ms`, `1s`, `6m0s`, `1h0m0s`: OpenAI's form, rounded up to whole seconds from one second on."""
    return b"%dms" % max(ms, 0) if ms < 1000 else _shown_seconds(-(-ms // 1000))


@lru_cache(maxsize=8192)
def _shown_seconds(seconds: int) -> bytes:
    minutes, seconds = divmod(seconds, 60)
    if minutes == 0:
        return b"%ds" % seconds
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%ds" % (hours, minutes, seconds) if hours else b"%dm%ds" % (minutes, seconds)


Amounts = tuple[dict[int, int], dict[int, int], dict[int, int], dict[int, int]]


def no_amounts() -> Amounts:
    """Amounts by bucket for each of the first four meters, with nothing in them."""
    return {}, {}, {}, {}


@dataclass(slots=True)
class _Account:
    """What is counted for one subject: by this book, before it (or elsewhere), and how many requests run."""

    own: Amounts = field(default_factory=no_amounts)
    before: Amounts = field(default_factory=no_amounts)
    running: int = 0


class Book:
    """The decision over counters in memory. Nothing here waits, so every call is atomic within its event loop.

    A process that decides alone begins with what it last knew (`know`, `adopt`) and takes no more than its share of
    what was left: one part of `sharers`, rounded up.
    """

    def __init__(self, sharers: int = 1) -> None:
        self._sharers = sharers
        self._accounts: dict[str, _Account] = {}
        self._holds: dict[str, tuple[Hold, bool]] = {}
        self._forget_at_ms = 0

    def __len__(self) -> int:
        """How many subjects something is kept for."""
        return len(self._accounts)

    def __contains__(self, hold_id: object) -> bool:
        return hold_id in self._holds

    def knows(self, name: str) -> bool:
        """Whether anything is kept for the subject of that name."""
        return name in self._accounts

    def know(self, name: str, before: Amounts) -> None:
        """Begin a subject's account with what was used before, or elsewhere."""
        self._accounts[name] = _Account(before=before)

    def adopt(self, hold: Hold) -> None:
        """Take over a running hold whose amounts are among those that were used before."""
        self._holds[hold.id] = hold, True
        for subject, limits in hold.limited:
            if limits.concurrency is not None:
                self._account(subject.name).running += 1

    def place(
        self,
        hold_id: str,
        subjects: Sequence[Limited],
        tokens: int,
        spend_microdollars: int,
        now_ms: int,
        reservation: Reserved | None = None,
    ) -> Hold | Refusal:
        """Grab the budget of every subject, or of none. Hold ids are never used twice.

        Of several limits in the way the refusal names the one that opens last. A request counts as at least one token
        and one microdollar, so that a limit of 0 or one that is used up admits nothing.
        """
        if now_ms >= self._forget_at_ms:
            self._forget(now_ms)
        limited = tuple(pair for pair in subjects if pair[1].is_limited)
        tokens, spend = max(tokens, 1), max(spend_microdollars, 1)
        hold = Hold(hold_id, limited, tokens, spend, now_ms, reservation)
        month = Month.at(now_ms)
        asked = (1, tokens, tokens, spend)
        buckets = hold.buckets()
        oldest = self._oldest(now_ms)
        tightest: list[Allowance | None] = [None, None]
        if reservation is not None:
            before, own = _used(self._account(reservation.name), MINUTE_TOKENS, oldest[MINUTE_TOKENS])
            remaining = self._share(reservation.tokens_per_min - before) - own - tokens
            if remaining >= 0:
                hold.is_reserved = True
                reset_ms = MINUTE.leaves_at(buckets[MINUTE_TOKENS]) - now_ms
                tightest[1] = Allowance(reservation.tokens_per_min, remaining, reset_ms)

        # (instant it opens or None for never, layer, meter, limit, used, asked, account)
        worst: tuple[int | None, str, int, int, int, int, _Account] | None = None
        would_refuse: list[tuple[str, str]] = []
        for subject, limits in limited:
            account = self._account(subject.name)
            for meter, limit in enumerate(limits.in_order()):
                if limit is None or (hold.is_reserved and meter in _PAID_FLAT):
                    continue
                if meter == CONCURRENCY:
                    before, own, wanted = 0, account.running, 1
                else:
                    before, own = _used(account, meter, oldest[meter])
                    wanted = asked[meter]
                remaining = self._share(limit - before) - own - wanted
                is_dry_run = METERS[meter] in limits.dry_run
                if remaining >= 0:
                    if meter < SPEND and not is_dry_run:
                        place = 0 if meter == REQUESTS else 1
                        best = tightest[place]
                        if best is None or remaining < best.remaining:
                            reset_ms = _WINDOWS[meter].leaves_at(buckets[meter]) - now_ms
                            tightest[place] = Allowance(limit, remaining, reset_ms)
                    continue
                if is_dry_run:
                    would_refuse.append((subject.layer, METERS[meter]))
                    continue
                used = before + own
                if wanted > limit:
                    at_ms = None
                elif meter == CONCURRENCY:
                    at_ms = now_ms + CONCURRENCY_WAIT_MS
                elif used + wanted <= limit:
                    at_ms = now_ms + SHARE_WAIT_MS
                elif meter == SPEND:
                    at_ms = month.ends_ms
                else:
                    at_ms = _opens_at(account, meter, used, limit - wanted)
                if worst is None or (worst[0] is not None and (at_ms is None or at_ms > worst[0])):
                    worst = (at_ms, subject.layer, meter, limit, used, wanted, account)
        if worst is not None:
            at_ms, layer, meter, limit, used, wanted, account = worst
            wait_ms = None if at_ms is None else at_ms - now_ms
            standing = self._standing(hold, oldest)
            if meter < SPEND:
                reset_ms = _all_back_ms(account, meter, now_ms) if wait_ms is None else wait_ms
                told = Allowance(limit, max(0, limit - used), reset_ms)
                standing = Standing(told, standing.tokens) if meter == REQUESTS else Standing(standing.requests, told)
            return refuse(layer, meter, limit=limit, used=used, asked=wanted, wait_ms=wait_ms, standing=standing)

        hold.standing = Standing(tightest[0], tightest[1])
        hold.would_refuse = tuple(would_refuse)
        self._holds[hold_id] = hold, False
        self._count(hold, False, 1, tokens, spend, 1)
        return hold

    def settle(self, hold_id: str, tokens: int, spend_microdollars: int) -> None:
        """End a hold: tokens and spend become what was really used. Without effect the second time."""
        self._end(hold_id, 0, tokens, spend_microdollars)

    def release(self, hold_id: str) -> None:
        """End a hold as if it had never been: not even the request counts. Without effect the second time."""
        self._end(hold_id, -1, 0, 0)

    def _end(self, hold_id: str, requests: int, tokens: int, spend: int) -> None:
        hold, is_before = self._holds.pop(hold_id, (None, False))
        if hold is not None:
            self._count(hold, is_before, requests, tokens - hold.tokens, spend - hold.spend, -1)

    def _count(self, hold: Hold, is_before: bool, requests: int, tokens: int, spend: int, running: int) -> None:
        """Count these for a hold. What lands in a bucket that no longer counts is dropped at the next look."""
        buckets = hold.buckets()
        more = (requests, 0, 0, 0) if hold.is_reserved else (requests, tokens, tokens, spend)
        for subject, limits in hold.limited:
            account = self._account(subject.name)
            amounts = account.before if is_before else account.own
            for meter, limit in enumerate(limits.in_order()[:CONCURRENCY]):
                if limit is not None and more[meter]:
                    add_to(amounts[meter], buckets[meter], more[meter])
            if limits.concurrency is not None:
                account.running = max(0, account.running + running)
        if hold.is_reserved and hold.reservation is not None:
            account = self._account(hold.reservation.name)
            amounts = account.before if is_before else account.own
            add_to(amounts[MINUTE_TOKENS], buckets[MINUTE_TOKENS], tokens)

    def _standing(self, hold: Hold, oldest: Sequence[int]) -> Standing:
        """How the limits stand where nothing is taken from them."""
        tightest: list[Allowance | None] = [None, None]
        for subject, limits in hold.limited:
            account = self._account(subject.name)
            for meter, limit in enumerate(limits.in_order()[:SPEND]):
                if limit is None or (hold.is_reserved and meter in _PAID_FLAT) or METERS[meter] in limits.dry_run:
                    continue
                before, own = _used(account, meter, oldest[meter])
                remaining = max(0, self._share(limit - before) - own)
                place = 0 if meter == REQUESTS else 1
                best = tightest[place]
                if best is None or remaining < best.remaining:
                    tightest[place] = Allowance(limit, remaining, _all_back_ms(account, meter, hold.at_ms))
        return Standing(tightest[0], tightest[1])

    def _share(self, left: int) -> int:
        return -(-max(0, left) // self._sharers)

    def _account(self, name: str) -> _Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = _Account()
        return account

    def _oldest(self, now_ms: int) -> tuple[int, int, int, int]:
        return MINUTE.oldest(now_ms), MINUTE.oldest(now_ms), DAY.oldest(now_ms), Month.at(now_ms).number

    def _forget(self, now_ms: int) -> None:
        """Drop what no longer counts, so that memory follows the traffic and not the history."""
        self._forget_at_ms = now_ms + _FORGET_EVERY_MS
        oldest = self._oldest(now_ms)
        for name, account in list(self._accounts.items()):
            if not account.running and not any(any(_used(account, meter, oldest[meter])) for meter in range(4)):
                del self._accounts[name]


def add_to(amounts: dict[int, int], bucket: int, more: int) -> None:
    """Count more (or less) in a bucket; never below nothing."""
    amounts[bucket] = max(0, amounts.get(bucket, 0) + more)


def _used(account: _Account, meter: int, oldest: int) -> tuple[int, int]:
    """What counts of an account: used before, and by this book. Drops what no longer counts."""
    for amounts in (account.before[meter], account.own[meter]):
        for bucket in [bucket for bucket in amounts if bucket < oldest or not amounts[bucket]]:
            del amounts[bucket]
    return sum(account.before[meter].values()), sum(account.own[meter].values())


def _all_back_ms(account: _Account, meter: int, now_ms: int) -> int:
    """In how long the last of what is used has left its window."""
    buckets = account.before[meter].keys() | account.own[meter].keys()
    return _WINDOWS[meter].leaves_at(max(buckets)) - now_ms if buckets else 0


def _opens_at(account: _Account, meter: int, used: int, room: int) -> int:
    """The instant at which enough buckets have left for no more than `room` to be counted."""
    before, own = account.before[meter], account.own[meter]
    for bucket in sorted(before.keys() | own.keys()):
        used -= before.get(bucket, 0) + own.get(bucket, 0)
        if used <= room:
            return _WINDOWS[meter].leaves_at(bucket)
    raise AssertionError("an empty window has room for whatever is not larger than its limit")
