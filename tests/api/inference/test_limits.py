"""Which limits bind a principal, and what the relay is told: decided by a process that has no Valkey."""

from __future__ import annotations

import asyncio
import dataclasses
from uuid import UUID

import pytest

from api.inference.limits import Limits
from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.limits import Hold, LimitReached, Refusal, Reserved
from crosslogic.domain.tenancy import GLOBAL_SUBJECT, NO_LIMIT, LimitRow, Principal
from crosslogic.hot.limits import LimitBook
from crosslogic.hot.pipeline import PipelinedRedis

ORG, ENVIRONMENT, KEY = (UUID(int=number) for number in (1, 2, 3))
NO_LIMITS = dict.fromkeys(("requests_per_min", "tokens_per_min", "tokens_per_day", "concurrency"), NO_LIMIT)


def principal(**limits: int | frozenset[str]) -> Principal:
    """A principal whose key alone has limits, and these."""
    return Principal(
        key_id=KEY,
        environment_id=ENVIRONMENT,
        org_id=ORG,
        role="developer",
        org_state="active",
        environment_state="active",
        key_state="active",
        expires_at=None,
        region_preferences=(),
        allowed_models=None,
        plan="serverless",
        limits=(
            LimitRow("global", GLOBAL_SUBJECT),
            LimitRow("org", ORG),
            LimitRow("environment", ENVIRONMENT, **NO_LIMITS),
            dataclasses.replace(LimitRow("key", KEY, **NO_LIMITS), **limits),  # pyright: ignore[reportArgumentType]
        ),
    )


@pytest.fixture
async def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
async def limits(told: list[tuple[str, str]]) -> Limits:
    book = LimitBook(PipelinedRedis("redis://127.0.0.1:9"), "none:", "me")
    return Limits(book, lambda layer, limit: told.append((layer, limit)))


async def place(
    limits: Limits, id: str, asking: Principal, tokens: int, spend: int, reservation: Reserved | None = None
) -> Hold:
    decided: asyncio.Future[Hold | Refusal | InvariantViolated] = asyncio.get_running_loop().create_future()
    limits.ask(id, asking, tokens, spend, reservation, decided.set_result)
    return limits.granted(asking, await decided)


class TestPlace:
    async def test_a_refusal_is_an_error_that_carries_the_standing(self, limits: Limits) -> None:
        asking = principal(requests_per_min=1)
        hold = await place(limits, "a", asking, 10, 1)
        assert hold.standing.requests is not None
        assert hold.standing.requests[:2] == (1, 0)
        with pytest.raises(LimitReached) as caught:
            await place(limits, "b", asking, 10, 1)
        assert (caught.value.layer, caught.value.limit, caught.value.status) == ("key", "requests_per_min", 429)
        assert caught.value.standing.requests is not None
        assert caught.value.standing.requests.remaining == 0
        assert caught.value.retry_after_s == caught.value.standing.requests.reset_ms / 1000

    async def test_a_principal_read_anew_has_its_new_limits(self, limits: Limits) -> None:
        for number in range(1, 4):
            await place(limits, f"{number}", principal(requests_per_min=number), 1, 1)
        with pytest.raises(LimitReached):
            await place(limits, "last", principal(requests_per_min=3), 1, 1)

    async def test_what_a_dry_run_limit_would_refuse_is_told_and_kept(
        self, limits: Limits, told: list[tuple[str, str]]
    ) -> None:
        asking = principal(requests_per_min=1, dry_run=frozenset({"requests_per_min"}))
        first, second = await place(limits, "a", asking, 1, 1), await place(limits, "b", asking, 1, 1)
        assert (first.would_refuse, second.would_refuse) == ((), (("key", "requests_per_min"),))
        assert told == [("key", "requests_per_min")]

    async def test_a_reservation_takes_what_fits(self, limits: Limits) -> None:
        asking, reservation = principal(tokens_per_min=100), Reserved(UUID(int=5), 60)
        holds = [await place(limits, f"{number}", asking, 60, 1, reservation) for number in range(2)]
        assert [hold.is_reserved for hold in holds] == [True, False]
        limits.settle(holds[0], 10, 1)
        assert (await place(limits, "c", asking, 50, 1, reservation)).is_reserved


class TestEnd:
    async def test_gives_back_at_once(self, limits: Limits) -> None:
        asking = principal(concurrency=1, tokens_per_day=100)
        for number in range(4):
            hold = await place(limits, f"{number}", asking, 80, 1)
            if number % 2:
                limits.settle(hold, 10, 1)
            else:
                limits.release(hold)
            limits.release(hold)
        assert (await place(limits, "last", asking, 80, 1)).tokens == 80
