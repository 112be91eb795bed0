"""Reading a call: what is understood, what is refused and with which field, and what the engine is sent."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.inference.calls import PATHS, check_fit, read_call
from crosslogic.domain.catalog import Model
from crosslogic.domain.errors import Rejected

CHAT = "/v1/chat/completions"
LLAMA = Model("llama-3-8b", "Llama", "chat", 8192, 500, 500)
BGE = Model("bge-base-en", "BGE", "embedding", 512, 100, None)


def _chat(**fields: Any) -> bytes:
    return json.dumps({"model": "llama-7b", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


class TestReadCall:
    @pytest.mark.parametrize(
        ("raw", "param"),
        [
            (b"{", None),
            (b"[]", None),
            (b"null", None),
            (b'{"model":NaN}', None),
            (b'{"model":"a","messages":"\\ud800"}', None),
            (b"\xff\xfe", None),
            (b"[" * 100_000, None),
            (b'{"a":' * 100_000, None),
            (_chat(model=1), "model"),
            (_chat(model=" "), "model"),
            (_chat(model="x" * 201), "model"),
            (_chat(messages="hi"), "messages"),
            (_chat(messages=[]), "messages"),
            (_chat(messages=["hi"]), "messages[0]"),
            (_chat(messages=[{"content": "x"}]), "messages[0].role"),
            (_chat(stream="yes"), "stream"),
            (_chat(stream=1), "stream"),
            (_chat(stream_options={"include_usage": True}), "stream_options"),
            (_chat(stream=True, stream_options=1), "stream_options"),
            (_chat(stream=True, stream_options={"include_usage": "x"}), "include_usage"),
            (_chat(max_tokens=0), "max_tokens"),
            (_chat(max_tokens=1.5), "max_tokens"),
            (_chat(max_tokens=True), "max_tokens"),
            (_chat(max_completion_tokens="7"), "max_completion_tokens"),
            (_chat(n=17), "n"),
        ],
    )
    def test_h8_refuses_with_400_and_names_the_field(self, raw: bytes, param: str | None) -> None:
        with pytest.raises(Rejected) as caught:
            read_call(CHAT, raw, b"", "")
        assert (caught.value.status, caught.value.param) == (400, param)

    @given(st.sampled_from(sorted(PATHS)), st.binary(max_size=200), st.binary(max_size=60))
    def test_h8_never_fails_otherwise(self, path: str, raw: bytes, query: bytes) -> None:
        with contextlib.suppress(Rejected):
            read_call(path, raw, query, "")

    @pytest.mark.parametrize("depth", range(850, 1100, 2))
    def test_h8_depth_is_the_clients_fault_wherever_it_hurts(self, depth: int) -> None:
        raw = _chat()[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}"
        with contextlib.suppress(Rejected):
            call = read_call(CHAT, raw, b"", "")
            _deeper(30, lambda: call.engine_body(LLAMA))

    @pytest.mark.parametrize(
        ("header", "query", "model", "region"),
        [
            ("a", b"region=b", "m@c", "a"),
            ("", b"region=b", "m@c", "b"),
            ("", b"", "m@c;strict", "c;strict"),
            ("", b"", "m", ""),
        ],
    )
    def test_the_nearest_wish_of_a_region_counts(self, header: str, query: bytes, model: str, region: str) -> None:
        call = read_call(CHAT, _chat(model=model), query, header)
        assert (call.model, call.region) == ("m", region)


def _deeper(frames: int, run: Any) -> Any:
    return run() if frames == 0 else _deeper(frames - 1, run)


class TestHeldTokens:
    @pytest.mark.parametrize(
        ("path", "fields", "completion"),
        [
            (CHAT, {}, 1024),
            (CHAT, {"max_tokens": 7}, 7),
            (CHAT, {"max_tokens": None, "max_completion_tokens": 9}, 9),
            (CHAT, {"max_tokens": 7, "n": 3}, 21),
            ("/v1/completions", {"prompt": "a", "max_tokens": 7}, 7),
            ("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 7}, 21),
            ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 7}, 7),
            ("/v1/completions", {"prompt": [[1], [2]], "max_tokens": 7, "n": 2}, 28),
        ],
    )
    def test_is_the_prompt_and_the_longest_answer_to_each_prompt(
        self, path: str, fields: dict[str, Any], completion: int
    ) -> None:
        call = read_call(path, _chat(**fields), b"", "")
        assert call.held_tokens(LLAMA) == call.estimated_prompt_tokens + completion

    def test_an_embedding_has_no_completion(self) -> None:
        call = read_call("/v1/embeddings", b'{"model":"bge-base-en","input":"abcd"}', b"", "")
        assert call.held_tokens(BGE) == call.estimated_prompt_tokens


class TestCheckFit:
    def test_a_model_of_another_kind_is_refused_with_the_way_to_go(self) -> None:
        with pytest.raises(Rejected, match="/v1/embeddings"):
            check_fit(read_call(CHAT, _chat(), b"", ""), BGE)

    def test_more_than_the_context_is_refused(self) -> None:
        with pytest.raises(Rejected) as caught:
            check_fit(read_call(CHAT, _chat(max_tokens=8193), b"", ""), LLAMA)
        assert caught.value.code == "context_length_exceeded"
