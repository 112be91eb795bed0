"""The event splitter: whatever way a stream is cut by the network, clients, usage and counts are the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.inference.events import LONGEST_EVENT_BYTES, EventStream, answer_bytes, usage_tokens
from api.inference.upstream import FailureKind, NodeFailure
from tests.engines import chat_chunk, completion_chunk, sse, usage_of

TEXTS = st.text(alphabet=st.sampled_from('a"\\{}:\n\r é漢usage[DONE]error'), min_size=1, max_size=12)


def _spaced(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


EVENTS = st.one_of(
    TEXTS.map(lambda text: sse(chat_chunk(text))),
    TEXTS.map(lambda text: _spaced(chat_chunk(text))),
    TEXTS.map(lambda text: sse(completion_chunk(text))),
    st.just(sse(chat_chunk(None, role=True))),
    st.just(sse({**chat_chunk("x"), "timings": {"predicted_per_second": 3.5}})),
    st.just(sse({**chat_chunk("x"), "usage": usage_of(3, 1)})),
    st.just(_spaced({**chat_chunk(None), "choices": [], "usage": usage_of(9, 4, 2)})),
    st.just(b": ping\n\n"),
)


def _run(pieces: list[bytes], *, wants_usage: bool) -> tuple[bytes, Any, int, bool]:
    events = EventStream("llama-3-8b", wants_usage=wants_usage)
    relayed = b"".join(events.feed(piece) for piece in pieces)
    return relayed, events.usage, events.tokens, events.is_done


class TestEventStream:
    @given(st.lists(EVENTS, max_size=8), st.data(), st.booleans(), st.booleans())
    def test_any_split_gives_the_same(
        self, events: list[bytes], data: st.DataObject, wants_usage: bool, has_carriage_returns: bool
    ) -> None:
        stream = b"".join(events) + b"data: [DONE]\n\n"
        if has_carriage_returns:
            stream = stream.replace(b"\n", b"\r\n")
        cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=30)))
        pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        whole = _run([stream], wants_usage=wants_usage)
        assert _run(pieces, wants_usage=wants_usage) == whole
        assert _run([bytes([byte]) for byte in stream], wants_usage=wants_usage) == whole
        assert whole[3]
        assert b"[DONE]\n" not in whole[0]
        assert whole[2] == sum(b'"content":""' not in event and b'"finish_reason"' in event and (
            b'"content"' in event or b'"text"' in event) for event in events)  # fmt: skip

    @given(st.lists(EVENTS, max_size=6))
    def test_relays_every_text_and_no_usage_unless_asked(self, events: list[bytes]) -> None:
        relayed, _, _, _ = _run([*events, b"data: [DONE]\n\n"], wants_usage=False)
        sent = [json.loads(event[6:]) for event in events if event.startswith(b"data")]
        got = [json.loads(event[6:]) for event in relayed.split(b"\n\n") if event.startswith(b"data")]
        assert not any("usage" in item or "timings" in item for item in got)
        assert [item["choices"] for item in got] == [item["choices"] for item in sent if item["choices"]]

    def test_counts_a_token_for_each_text_and_none_for_an_empty_one(self) -> None:
        pieces = [sse(chat_chunk(None, role=True)), sse(chat_chunk("a")), _spaced(chat_chunk("b"))]
        assert _run(pieces, wants_usage=False)[2] == 2

    @pytest.mark.parametrize(
        ("piece", "kind"),
        [
            (sse({"error": {"message": "x"}}), FailureKind.ERROR),
            (b'error: {"code":500}\n\n', FailureKind.ERROR),
            (b'data: {"usage":{\n\n', FailureKind.GARBAGE),
            (b'data: ["usage":{]\n\n', FailureKind.GARBAGE),
            (b'data: ["error"]\n\n', FailureKind.GARBAGE),
            (b"x" * (LONGEST_EVENT_BYTES + 1), FailureKind.GARBAGE),
        ],
    )
    def test_an_engines_trouble_is_a_failure(self, piece: bytes, kind: FailureKind) -> None:
        with pytest.raises(NodeFailure) as caught:
            _run([piece], wants_usage=False)
        assert caught.value.kind is kind

    def test_text_that_looks_like_usage_is_text(self) -> None:
        text = '"usage":{"prompt_tokens":1} [DONE] "error"'
        relayed, usage, tokens, is_done = _run([sse(chat_chunk(text))], wants_usage=False)
        assert json.loads(relayed[6:])["choices"][0]["delta"]["content"] == text
        assert (usage, tokens, is_done) == (None, 1, False)

    def test_writes_our_name_of_the_model(self) -> None:
        foreign = {"model": "/srv/x.gguf"}
        relayed = _run([sse({**chat_chunk("a"), **foreign}), sse({**chat_chunk("b"), **foreign})], wants_usage=False)[0]
        assert relayed == sse(chat_chunk("a")) + sse(chat_chunk("b"))


class TestUsageTokens:
    @pytest.mark.parametrize(
        ("usage", "expected"),
        [
            (usage_of(3, 2, 1), (3, 2, 1)),
            ({"prompt_tokens": 3, "total_tokens": 3}, (3, 0, 0)),
            ({"prompt_tokens": 3, "completion_tokens": None, "prompt_tokens_details": None}, (3, 0, 0)),
            (None, None),
            ({}, None),
            ({"prompt_tokens": -1}, None),
            ({"prompt_tokens": True}, None),
            ({"prompt_tokens": 1.5}, None),
            ({"prompt_tokens": 1 << 50}, None),
            ({"prompt_tokens": 1, "completion_tokens": "2"}, None),
        ],
    )
    def test_reads_what_can_be_believed(self, usage: Any, expected: Any) -> None:
        assert usage_tokens(usage) == expected


class TestAnswerBytes:
    def test_counts_texts_in_any_shape_and_survives_others(self) -> None:
        assert answer_bytes({"choices": [{"message": {"content": "héé"}}, {"text": "ab"}]}) == 7
        for odd in ({}, {"choices": 3}, {"choices": [None, {"message": None}, {"message": {"content": None}}]}):
            assert answer_bytes(odd) == 0
