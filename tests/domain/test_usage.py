"""The usage record: its list price, and what is charged after a crash."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.usage import (
    Intent,
    Outcome,
    Progress,
    TokenSource,
    Waste,
    WasteReason,
    interrupted,
    list_price_microdollars,
)

TOKENS = st.integers(0, 1 << 40)
INTENT = Intent(
    id=UUID(int=1),
    client_request_id="c",
    org_id=UUID(int=2),
    environment_id=UUID(int=3),
    key_id=UUID(int=4),
    home_region="in-mumbai",
    model="llama-3-70b",
    endpoint_kind="chat",
    is_streamed=True,
    estimated_prompt_tokens=1000,
    input_price_e10=6000,
    output_price_e10=6000,
    multiplier_bp=7000,
)


class TestListPrice:
    @given(TOKENS, TOKENS, st.integers(0, 100_000), st.integers(0, 100_000), st.integers(1, 30_000))
    def test_b11_is_the_exact_price_rounded_up_once(
        self, prompt: int, completion: int, input_price: int, output_price: int, multiplier_bp: int
    ) -> None:
        exact = Fraction(prompt * input_price + completion * output_price, 10**10) * Fraction(multiplier_bp, 10_000)
        assert list_price_microdollars(prompt, completion, input_price, output_price, multiplier_bp) == math.ceil(
            exact * 10**6
        )

    def test_a_million_tokens_cost_what_the_price_list_says(self) -> None:
        assert list_price_microdollars(1_000_000, 0, 500, 500, 10_000) == 50_000
        assert list_price_microdollars(0, 1_000_000, 6000, 6000, 7000) == 420_000


class TestInterrupted:
    def test_charges_the_prompt_and_what_was_last_recorded(self) -> None:
        record = interrupted(INTENT, Progress(INTENT.id, UUID(int=9), "us-east", 500))
        assert (record.outcome, record.token_source) == (Outcome.INTERRUPTED, TokenSource.CHUNKS)
        assert (record.prompt_tokens, record.completion_tokens) == (1000, 500)
        assert (record.served_region, record.node_id) == ("us-east", UUID(int=9))
        # 1 500 tokens × $0.60 a million × 0.7.
        assert record.list_price_microdollars == 630

    def test_charges_the_prompt_that_an_engine_has_counted(self) -> None:
        node, wasted = UUID(int=9), Waste(UUID(int=8), "us-east", WasteReason.REREAD_PREFIX, 1040, 0)
        progress = Progress(
            INTENT.id, node, "us-east", 500, 990, TokenSource.ENGINE, tries=2, continuations=1, waste=(wasted,)
        )
        reserved = replace(INTENT, reservation_id=UUID(int=7))
        record = interrupted(reserved, progress)
        assert (record.prompt_tokens, record.completion_tokens, record.token_source) == (990, 500, TokenSource.ENGINE)
        assert (record.tries, record.continuations, record.waste) == (2, 1, (wasted,))
        assert record.reservation_id == UUID(int=7)

    def test_charges_nothing_when_nothing_is_known_to_have_been_relayed(self) -> None:
        record = interrupted(INTENT, None)
        assert (record.prompt_tokens, record.completion_tokens, record.list_price_microdollars) == (0, 0, 0)
        assert (record.node_id, record.token_source) == (None, TokenSource.NONE)
