from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.limits import (
    CONCURRENCY,
    DAY,
    DAY_TOKENS,
    DEFAULTS,
    METERS,
    MINUTE,
    MINUTE_TOKENS,
    REQUESTS,
    SPEND,
    Allowance,
    Book,
    Hold,
    LayerLimits,
    Limited,
    LimitReached,
    Month,
    Refusal,
    Reserved,
    Standing,
    Subject,
    refuse,
)
from crosslogic.domain.tenancy import LAYERS, LimitRow

NOW_MS = int(datetime(2026, 11, 30, 23, 30, tzinfo=UTC).timestamp() * 1000)
ORG = Subject("org", "o")
ENVIRONMENT = Subject("environment", "e")
KEY = Subject("key", "k")


def only(name: str, limit: int) -> LayerLimits:
    """One limit and no other."""
    return LayerLimits(**{name: limit})  # pyright: ignore[reportArgumentType]


def refused(answer: Hold | Refusal) -> Refusal:
    assert isinstance(answer, Refusal), answer
    return answer


def placed(answer: Hold | Refusal) -> Standing:
    assert isinstance(answer, Hold), answer
    return answer.standing


class TestLayerLimits:
    def test_defaults_are_the_products(self) -> None:
        assert set(DEFAULTS) == set(LAYERS)
        assert DEFAULTS["key"] == LayerLimits(requests_per_min=60, concurrency=5)
        assert DEFAULTS["environment"] == LayerLimits(tokens_per_min=10_000, tokens_per_day=1_000_000, concurrency=10)
        assert not DEFAULTS["org"].is_limited
        assert not DEFAULTS["global"].is_limited

    def test_a_stored_null_is_the_default_and_minus_one_is_no_limit(self) -> None:
        row = LimitRow("key", UUID(int=1), requests_per_min=None, concurrency=-1, tokens_per_day=7)
        assert LayerLimits.of(row) == LayerLimits(requests_per_min=60, concurrency=None, tokens_per_day=7)

    def test_zero_is_a_limit(self) -> None:
        row = LimitRow("org", UUID(int=1), monthly_spend_microdollars=0)
        assert LayerLimits.of(row) == LayerLimits(monthly_spend_microdollars=0)
        assert LayerLimits.of(row).is_limited

    def test_dry_run_is_kept(self) -> None:
        row = LimitRow("org", UUID(int=1), requests_per_min=5, dry_run=frozenset({"requests_per_min"}))
        assert LayerLimits.of(row).dry_run == {"requests_per_min"}

    @pytest.mark.parametrize("name", METERS)
    def test_any_limit_counts_as_one(self, name: str) -> None:
        assert only(name, 1).is_limited
        assert only(name, 1).in_order()[METERS.index(name)] == 1


class TestMonth:
    @pytest.mark.parametrize(
        ("at", "starts", "ends"),
        [
            (datetime(2026, 11, 30, 23, 59, 59, 999000, UTC), (2026, 11), (2026, 12)),
            (datetime(2026, 12, 1, tzinfo=UTC), (2026, 12), (2027, 1)),
            (datetime(2028, 2, 29, 12, tzinfo=UTC), (2028, 2), (2028, 3)),
        ],
    )
    def test_is_the_calendars_in_utc(self, at: datetime, starts: tuple[int, int], ends: tuple[int, int]) -> None:
        month = Month.at(int(at.timestamp() * 1000))
        assert month.starts_ms == int(datetime(*starts, 1, tzinfo=UTC).timestamp() * 1000)
        assert month.ends_ms == int(datetime(*ends, 1, tzinfo=UTC).timestamp() * 1000)
        assert Month.at(month.ends_ms).number == month.number + 1


class TestRefusal:
    @pytest.mark.parametrize(
        ("meter", "status", "code"),
        [
            (REQUESTS, 429, "rate_limit_exceeded"),
            (MINUTE_TOKENS, 429, "rate_limit_exceeded"),
            (CONCURRENCY, 429, "rate_limit_exceeded"),
            (DAY_TOKENS, 403, "quota_exceeded"),
            (SPEND, 403, "quota_exceeded"),
        ],
    )
    def test_rates_are_429_and_quotas_are_403(self, meter: int, status: int, code: str) -> None:
        refusal = refuse("org", meter, limit=10, used=9, asked=2, wait_ms=2500)
        assert (refusal.status, refusal.code, refusal.retry_after_s) == (status, code, 2.5)
        assert (refusal.layer, refusal.limit) == ("org", METERS[meter])
        assert "org layer" in refusal.message
        assert "Try again in 3s." in refusal.message
        rejected = refusal.as_rejected()
        assert (rejected.status, rejected.code, rejected.retry_after_s) == (status, code, 2.5)
        assert rejected.message == refusal.message

    def test_the_error_carries_the_standing(self) -> None:
        standing = Standing(requests=Allowance(10, 0, 2500))
        rejected = refuse("key", REQUESTS, limit=10, used=10, asked=1, wait_ms=2500, standing=standing).as_rejected()
        assert isinstance(rejected, LimitReached)
        assert (rejected.layer, rejected.limit, rejected.standing) == ("key", "requests_per_min", standing)

    def test_spend_is_said_in_dollars(self) -> None:
        refusal = refuse("org", SPEND, limit=10_000_000, used=9_999_999, asked=1_500, wait_ms=86_400_000)
        assert "limit $10.000000, used $9.999999, requested $0.001500. Try again in 24h0m0s." in refusal.message

    def test_what_can_never_fit_says_so(self) -> None:
        refusal = refuse("environment", MINUTE_TOKENS, limit=10, used=0, asked=11, wait_ms=None)
        assert refusal.retry_after_s is None
        assert refusal.message.startswith("Request too large for the environment layer's limit on tokens per minute")


class TestStanding:
    @pytest.mark.parametrize(
        ("reset_ms", "shown"),
        [
            (0, b"0ms"),
            (17, b"17ms"),
            (1000, b"1s"),
            (1001, b"2s"),
            (59_001, b"1m0s"),
            (360_000, b"6m0s"),
            (3_600_000, b"1h0m0s"),
            (90_061_000, b"25h1m1s"),
        ],
    )
    def test_headers_have_openais_names_and_forms(self, reset_ms: int, shown: bytes) -> None:
        standing = Standing(requests=Allowance(60, 59, reset_ms), tokens=Allowance(10_000, 8_976, 61_000))
        assert standing.headers() == [
            (b"x-ratelimit-limit-requests", b"60"),
            (b"x-ratelimit-remaining-requests", b"59"),
            (b"x-ratelimit-reset-requests", shown),
            (b"x-ratelimit-limit-tokens", b"10000"),
            (b"x-ratelimit-remaining-tokens", b"8976"),
            (b"x-ratelimit-reset-tokens", b"1m1s"),
        ]

        lines = b"".join(b"%b: %b\r\n" % header for header in standing.headers())
        assert standing.lines() == lines

    @pytest.mark.parametrize("noun", ["requests", "tokens"])
    def test_one_kind_alone_has_its_three(self, noun: str) -> None:
        standing = Standing(**{noun: Allowance(3, 2, 1000)})
        assert [name for name, _ in standing.headers()] == [
            f"x-ratelimit-{what}-{noun}".encode() for what in ("limit", "remaining", "reset")
        ]
        assert standing.lines() == b"".join(b"%b: %b\r\n" % header for header in standing.headers())

    def test_without_limits_there_are_no_headers(self) -> None:
        assert Standing().headers() == []
        assert Standing().lines() == b""


class TestBook:
    def test_standing_is_the_tightest_layers(self) -> None:
        subjects: list[Limited] = [
            (ORG, LayerLimits(requests_per_min=5, tokens_per_min=1000)),
            (KEY, LayerLimits(requests_per_min=60, tokens_per_day=500)),
        ]
        standing = placed(Book().place("a", subjects, 100, 0, NOW_MS))
        assert standing.requests == Allowance(5, 4, 65_000)
        assert standing.tokens is not None
        assert (standing.tokens.limit, standing.tokens.remaining) == (500, 400)

    def test_of_several_refusals_the_one_that_opens_last_is_told(self) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(requests_per_min=1, tokens_per_day=100, concurrency=1))]
        book = Book()
        placed(book.place("a", subjects, 100, 0, NOW_MS))
        assert refused(book.place("b", subjects, 1, 0, NOW_MS)).limit == "tokens_per_day"

    def test_a_spend_cap_opens_with_the_month(self) -> None:
        subjects: list[Limited] = [(ORG, LayerLimits(monthly_spend_microdollars=1000))]
        book = Book()
        placed(book.place("a", subjects, 10, 1000, NOW_MS))
        book.settle("a", 10, 1000)
        refusal = refused(book.place("b", subjects, 10, 0, NOW_MS))
        assert refusal.limit == "monthly_spend_microdollars"
        assert refusal.retry_after_s == 1800.0  # It is 23:30 on the month's last day.
        placed(book.place("c", subjects, 10, 1000, NOW_MS + 1_800_000))

    def test_a_hold_that_ends_in_the_next_month_changes_the_month_it_was_placed_in(self) -> None:
        subjects: list[Limited] = [(ORG, LayerLimits(monthly_spend_microdollars=1000))]
        book = Book()
        placed(book.place("a", subjects, 10, 400, NOW_MS))
        book.settle("a", 10, 999)
        placed(book.place("b", subjects, 10, 1000, NOW_MS + 1_900_000))

    def test_forgets_what_no_longer_counts(self) -> None:
        book = Book()
        for number in range(100):
            subject = Subject("key", str(number))
            placed(book.place(f"hold-{number}", [(subject, LayerLimits(requests_per_min=1))], 1, 0, NOW_MS))
            book.settle(f"hold-{number}", 1, 0)
        later_ms = NOW_MS + DAY.bucket_ms * DAY.buckets
        placed(book.place("last", [(KEY, LayerLimits(concurrency=2))], 1, 0, later_ms))
        assert len(book) == 1
        assert "last" in book

    def test_a_refusal_says_how_the_limits_stand(self) -> None:
        limits = LayerLimits(requests_per_min=5, tokens_per_min=100)
        book = Book()
        placed(book.place("a", [(KEY, limits)], 60, 0, NOW_MS))
        tokens = refused(book.place("b", [(KEY, limits)], 50, 0, NOW_MS + 5_000))
        assert tokens.standing == Standing(Allowance(5, 4, 60_000), Allowance(100, 40, 60_000))
        assert tokens.retry_after_s == 60.0
        large = refused(book.place("c", [(KEY, limits)], 101, 0, NOW_MS + 5_000))
        assert large.standing.tokens == Allowance(100, 40, 60_000)
        for number in range(4):
            placed(book.place(f"{number}", [(KEY, limits)], 1, 0, NOW_MS + 10_000))
        requests = refused(book.place("d", [(KEY, limits)], 1, 0, NOW_MS + 10_000))
        # The refused limit's reset is when there is room; the other's when all of it is back.
        assert requests.standing == Standing(Allowance(5, 0, 55_000), Allowance(100, 36, 65_000))

    def test_a_refused_limit_stands_before_a_tighter_one(self) -> None:
        subjects: list[Limited] = [
            (ORG, LayerLimits(tokens_per_day=1000)),
            (KEY, LayerLimits(tokens_per_min=100, requests_per_min=9)),
        ]
        book = Book()
        placed(book.place("a", subjects, 95, 0, NOW_MS))
        for number in range(5):
            book.settle("a", 95, 0)
            placed(book.place(f"{number}", subjects, 95, 0, NOW_MS + 66_000 * (number + 1)))
        refusal = refused(book.place("b", subjects, 500, 0, NOW_MS + 66_000 * 9))
        assert (refusal.layer, refusal.limit) == ("key", "tokens_per_min")
        assert refusal.standing.tokens == Allowance(100, 100, 0)

    def test_concurrency_and_spend_leave_the_standing_to_the_others(self) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(concurrency=1, requests_per_min=9))]
        book = Book()
        placed(book.place("a", subjects, 1, 0, NOW_MS))
        refusal = refused(book.place("b", subjects, 1, 0, NOW_MS))
        assert refusal.standing == Standing(requests=Allowance(9, 8, 65_000))


class TestReservation:
    LAYERS: tuple[Limited, ...] = (
        (ORG, LayerLimits(tokens_per_min=100, monthly_spend_microdollars=100)),
        (KEY, LayerLimits(requests_per_min=3, tokens_per_day=100, concurrency=2)),
    )
    RESERVED = Reserved(UUID(int=9), tokens_per_min=60)

    def place(self, book: Book, hold_id: str, tokens: int, now_ms: int = NOW_MS) -> Hold | Refusal:
        return book.place(hold_id, self.LAYERS, tokens, tokens, now_ms, self.RESERVED)

    def test_what_fits_is_not_held_against_tokens_and_spend(self) -> None:
        book = Book()
        reserved = self.place(book, "a", 60)
        assert isinstance(reserved, Hold)
        assert reserved.is_reserved
        assert reserved.standing.tokens == Allowance(60, 0, 65_000)
        # All four layers have their tokens and spend still.
        serverless = self.place(book, "b", 100)
        assert isinstance(serverless, Hold)
        assert not serverless.is_reserved
        assert serverless.standing.tokens == Allowance(100, 0, 65_000)

    def test_requests_and_concurrency_bind_all_the_same(self) -> None:
        book = Book()
        for hold_id in ("a", "b"):
            placed(self.place(book, hold_id, 1))
        assert refused(self.place(book, "c", 1)).limit == "concurrency"
        book.settle("b", 1, 0)
        placed(self.place(book, "d", 1))
        book.settle("d", 1, 0)
        assert refused(self.place(book, "e", 1)).limit == "requests_per_min"

    def test_a_refused_request_takes_nothing_of_it(self) -> None:
        book = Book()
        none: list[Limited] = [(KEY, LayerLimits(requests_per_min=0))]
        refused(book.place("a", none, 60, 0, NOW_MS, self.RESERVED))
        answer = self.place(book, "b", 60)
        assert isinstance(answer, Hold)
        assert answer.is_reserved

    def test_settling_corrects_its_minute(self) -> None:
        book = Book()
        placed(self.place(book, "a", 60))
        book.settle("a", 20, 60)
        answers = self.place(book, "b", 41), self.place(book, "c", 40)
        assert [isinstance(answer, Hold) and answer.is_reserved for answer in answers] == [False, True]

    def test_beyond_it_the_layers_bind_as_usual(self) -> None:
        book = Book()
        placed(self.place(book, "a", 61))
        assert refused(self.place(book, "b", 62)).layer == "key"


class TestDryRun:
    @pytest.mark.parametrize("name", METERS)
    def test_counts_and_reports_and_refuses_nothing(self, name: str) -> None:
        limits = replace(only(name, 1), dry_run=frozenset({name}))
        book = Book()
        first = book.place("a", [(KEY, limits)], 1, 1, NOW_MS)
        second = book.place("b", [(KEY, limits)], 1, 1, NOW_MS)
        assert isinstance(first, Hold)
        assert isinstance(second, Hold)
        assert (first.would_refuse, second.would_refuse) == ((), (("key", name),))
        assert second.standing == Standing()
        # What was counted meanwhile is held against the limit once it binds.
        assert refused(book.place("c", [(KEY, only(name, 2))], 1, 1, NOW_MS)).limit == name

    def test_leaves_the_other_limits_as_they_are(self) -> None:
        limits = LayerLimits(requests_per_min=1, tokens_per_min=1, dry_run=frozenset({"requests_per_min"}))
        book = Book()
        placed(book.place("a", [(KEY, limits)], 1, 0, NOW_MS))
        assert refused(book.place("b", [(KEY, limits)], 1, 0, NOW_MS)).limit == "tokens_per_min"


class TestAlone:
    SUBJECTS: tuple[Limited, ...] = ((KEY, LayerLimits(tokens_per_min=100, concurrency=4)),)

    def book(self, sharers: int, used: int) -> Book:
        book = Book(sharers)
        minute = MINUTE.bucket(NOW_MS)
        book.know(KEY.name, ({}, {minute: used}, {}, {}))
        return book

    def test_takes_its_share_of_what_was_left_rounded_up(self) -> None:
        book = self.book(sharers=4, used=39)
        placed(book.place("a", self.SUBJECTS, 16, 0, NOW_MS))
        assert refused(book.place("b", [(KEY, LayerLimits(concurrency=4))], 1, 0, NOW_MS)).limit == "concurrency"
        book.settle("a", 16, 0)
        refusal = refused(book.place("c", self.SUBJECTS, 1, 0, NOW_MS))
        assert (refusal.limit, refusal.retry_after_s) == ("tokens_per_min", 5.0)
        assert "used 55" in refusal.message

    def test_what_was_used_before_leaves_its_window(self) -> None:
        book = self.book(sharers=1, used=100)
        refusal = refused(book.place("a", self.SUBJECTS, 1, 0, NOW_MS))
        assert refusal.retry_after_s is not None
        placed(book.place("b", self.SUBJECTS, 100, 0, NOW_MS + round(refusal.retry_after_s * 1000)))

    def test_a_hold_from_before_gives_back_what_it_held(self) -> None:
        book = self.book(sharers=1, used=100)
        book.adopt(Hold("before", self.SUBJECTS, 80, 1, NOW_MS))
        refused(book.place("a", self.SUBJECTS, 1, 0, NOW_MS))
        book.settle("before", 50, 0)
        placed(book.place("b", self.SUBJECTS, 30, 0, NOW_MS))
        refused(book.place("c", self.SUBJECTS, 1, 0, NOW_MS))


class TestWindows:
    @given(
        steps=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 40)), max_size=80),
        limit=st.integers(1, 100),
    )
    def test_no_minute_ever_holds_more_than_the_limit_and_a_refusals_time_is_true(
        self, steps: list[tuple[int, int]], limit: int
    ) -> None:
        subjects: list[Limited] = [(KEY, LayerLimits(tokens_per_min=limit))]
        book = Book()
        now_ms = NOW_MS
        admitted: list[tuple[int, int]] = []
        for number, (passed_ms, tokens) in enumerate(steps):
            now_ms += passed_ms
            answer = book.place(str(number), subjects, tokens, 0, now_ms)
            if isinstance(answer, Hold):
                book.settle(str(number), tokens, 0)
                admitted.append((now_ms, tokens))
                window = [used for at, used in admitted if at > now_ms - MINUTE.bucket_ms * MINUTE.buckets]
                assert sum(window) <= limit
            elif answer.retry_after_s is None:
                assert tokens > limit
            else:
                # One bucket late at most: what an exact window would admit is admitted 5 s later.
                exact = [used for at, used in admitted if at > now_ms - 60_000 - MINUTE.bucket_ms]
                assert sum(exact) + tokens > limit
                now_ms += round(answer.retry_after_s * 1000) - 1
                refused(book.place(f"{number}-early", subjects, tokens, 0, now_ms))
                now_ms += 1
                placed(book.place(f"{number}-again", subjects, tokens, 0, now_ms))
                book.settle(f"{number}-again", tokens, 0)
                admitted.append((now_ms, tokens))
