"""The usage record: the immutable fact of one admitted request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID


class Outcome(StrEnum):
    """How a request ended. Only `completed`, `client_gone` and `interrupted` ones are charged."""

    COMPLETED = "completed"
    CLIENT_GONE = "client_gone"  # The client hung up: it pays the prompt and what it got.
    REJECTED = "rejected"  # The engine found the request at fault (4xx).
    FAILED = "failed"  # No node could answer: not charged.
    CUT = "cut"  # We broke a stream off: not charged.
    INTERRUPTED = "interrupted"  # The API process died: charged as last recorded.


class TokenSource(StrEnum):
    """Who counted the tokens."""

    ENGINE = "engine"  # The engine's usage.
    TOKENIZER = "tokenizer"  # The engine's tokenizer, asked about what was relayed.
    CHUNKS = "chunks"  # We, by the chunks that were relayed.
    COUNTED = "counted"  # What earlier versions wrote for CHUNKS.
    NONE = "none"


class WasteReason(StrEnum):
    """Why nobody pays for what a node did."""

    FAILED_TRY = "failed_try"  # The node failed before the client had a byte.
    CUT_STREAM = "cut_stream"  # The answer broke off and could not be continued.
    REREAD_PREFIX = "reread_prefix"  # Another node went on: it read the prompt and the answer so far once more.
    NOT_RELAYED = "not_relayed"  # Made beyond what the client was sent.


# The following are made once or more for each request. They are never changed, but not frozen: a frozen dataclass of
# this size takes three times as long to make.


@dataclass(slots=True)
class Waste:
    """Tokens that a node read and made for a request and that the client does not pay for: the internal account."""

    node_id: UUID
    region: str
    reason: WasteReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Intent:
    """What is known of a request when it is admitted; written before it is forwarded."""

    id: UUID
    client_request_id: str
    org_id: UUID
    environment_id: UUID
    key_id: UUID
    home_region: str
    model: str
    endpoint_kind: str
    is_streamed: bool
    estimated_prompt_tokens: int
    input_price_e10: int
    output_price_e10: int
    multiplier_bp: int
    reservation_id: UUID | None = None


@dataclass(slots=True)
class Progress:
    """What a running stream has relayed so far; written at least every second. The last one tells all of it.

    `prompt_tokens` is None while no engine has said it.
    """

    id: UUID
    node_id: UUID
    served_region: str
    completion_tokens: int
    prompt_tokens: int | None = None
    token_source: TokenSource = TokenSource.CHUNKS
    tries: int = 1
    continuations: int = 0
    waste: tuple[Waste, ...] = ()


@dataclass(slots=True)
class UsageRecord:
    """One request, as stored and billed. Tokens are what is charged; the list price is for display only.

    `tries` is how many nodes were asked, `continuations` how often another node went on with an answer. `decision` is a
    small JSON document for whoever asks why the request went where it went; it is kept for a week.
    """

    id: UUID
    client_request_id: str
    org_id: UUID
    environment_id: UUID
    key_id: UUID
    home_region: str
    model: str
    endpoint_kind: str
    is_streamed: bool
    served_region: str
    node_id: UUID | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    token_source: TokenSource
    latency_ms: int
    ttft_ms: int | None
    status: int
    outcome: Outcome
    list_price_microdollars: int
    reservation_id: UUID | None = None
    tries: int = 0
    continuations: int = 0
    waste: tuple[Waste, ...] = ()
    decision: Any | None = None


def list_price_microdollars(
    prompt_tokens: int, completion_tokens: int, input_price_e10: int, output_price_e10: int, multiplier_bp: int
) -> int:
    """The price before tiers and free tokens, in microdollars, rounded up. Prices are 10⁻¹⁰ USD a token."""
    exact = (prompt_tokens * input_price_e10 + completion_tokens * output_price_e10) * multiplier_bp
    return -(-exact // (10_000 * 10_000))


def interrupted(intent: Intent, progress: Progress | None) -> UsageRecord:
    """The record of a request whose API process died: what its log last recorded as relayed (A1).

    Without progress nothing reached the client as far as anyone knows, so nothing is charged.
    """
    if progress is None:
        prompt = completion = 0
    else:
        prompt = intent.estimated_prompt_tokens if progress.prompt_tokens is None else progress.prompt_tokens
        completion = progress.completion_tokens
    return UsageRecord(
        id=intent.id,
        client_request_id=intent.client_request_id,
        org_id=intent.org_id,
        environment_id=intent.environment_id,
        key_id=intent.key_id,
        home_region=intent.home_region,
        model=intent.model,
        endpoint_kind=intent.endpoint_kind,
        is_streamed=intent.is_streamed,
        served_region=progress.served_region if progress else "",
        node_id=progress.node_id if progress else None,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=0,
        token_source=progress.token_source if progress else TokenSource.NONE,
        latency_ms=0,
        ttft_ms=None,
        status=0,
        outcome=Outcome.INTERRUPTED,
        list_price_microdollars=list_price_microdollars(
            prompt, completion, intent.input_price_e10, intent.output_price_e10, intent.multiplier_bp
        ),
        reservation_id=intent.reservation_id,
        tries=progress.tries if progress else 0,
        continuations=progress.continuations if progress else 0,
        waste=progress.waste if progress else (),
    )
