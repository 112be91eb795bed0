"""Reading a call: what is understood, what is refused and with which field, and what the engine is sent."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.inference.calls import ENGINE_PRIVATE, PATHS, Call, check_fit, read_call
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
            (_chat(stream=True, stream_options={"include_usage": "x"}), "stream_options.include_usage"),
            (_chat(max_tokens=0), "max_tokens"),
            (_chat(max_tokens=1.5), "max_tokens"),
            (_chat(max_tokens=True), "max_tokens"),
            (_chat(max_completion_tokens="7"), "max_completion_tokens"),
            (_chat(n=17), "n"),
            (_chat(n=10**400), "n"),
            (_chat(temperature=2.1), "temperature"),
            (_chat(temperature=10**400), "temperature"),
            (_chat()[:-1] + b',"temperature":1e999}', None),
            (_chat()[:-1] + b',"x":-Infinity}', None),
            (_chat(top_p="1"), "top_p"),
            (_chat(presence_penalty=-3), "presence_penalty"),
            (_chat(logit_bias=[]), "logit_bias"),
            (_chat(logit_bias={"1": 101}), "logit_bias[...]"),
            (_chat(stop=1), "stop"),
            (_chat(stop=["a", 1]), "stop[1]"),
            (_chat(stop=[""]), "stop[0]"),
            (_chat(stop=["a"] * 65), "stop"),
            (_chat(seed=2**63), "seed"),
            (_chat(top_logprobs=21), "top_logprobs"),
            (_chat(response_format="json"), "response_format"),
            (_chat(response_format={}), "response_format.type"),
            (
                _chat(response_format={"type": "json_schema", "json_schema": {"schema": 1}}),
                "response_format.json_schema.schema",
            ),
            (_chat(tools={}), "tools"),
            (_chat(tools=[{"type": "function"}]), "tools[0].function"),
            (_chat(tools=[{"type": "shell", "function": {"name": "f"}}]), "tools[0].type"),
            (_chat(tools=[{"type": "x - at `$.y", "function": {"name": "f"}}]), "tools[0].type"),
            (_chat(tools=[{"function": {"name": "f", "parameters": []}}]), "tools[0].function.parameters"),
            (_chat(tool_choice=1), "tool_choice"),
            (_chat(messages=[{"role": "user"}]), "messages[0].content"),
            (_chat(messages=[{"role": "user", "content": 1}]), "messages[0].content"),
            (_chat(messages=[{"role": "user", "content": {}}]), "messages[0].content"),
            (_chat(messages=[{"role": "user", "content": ["a"]}]), "messages[0].content[0]"),
            (_chat(messages=[{"role": "user", "content": [{}]}]), "messages[0].content[0].type"),
            (_chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
            (_chat(messages=[{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0].function"),
            (
                _chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]),
                "messages[0].tool_calls[0].function.arguments",
            ),
            (_chat(messages={"role": "user", "content": "hi"}), "messages"),
            (b'{"model":"m"}', "messages"),
            (b'{"messages":[{"role":"user","content":""}]}', "model"),
        ],
    )
    def test_h8_refuses_with_400_and_names_the_field(self, raw: bytes, param: str | None) -> None:
        with pytest.raises(Rejected) as caught:
            read_call(CHAT, raw, b"", "")
        assert (caught.value.status, caught.value.param) == (400, param)

    @pytest.mark.parametrize(
        ("path", "field", "value", "param"),
        [
            ("/v1/completions", "prompt", [], "prompt"),
            ("/v1/completions", "prompt", "", "prompt"),
            ("/v1/completions", "prompt", None, "prompt"),
            ("/v1/completions", "prompt", ["a", ""], "prompt[1]"),
            ("/v1/completions", "prompt", ["a", 1], "prompt"),
            ("/v1/completions", "prompt", [[1.5]], "prompt[0]"),
            ("/v1/completions", "prompt", [[1], [True]], "prompt[1]"),
            ("/v1/completions", "prompt", [1, -1], "prompt"),
            ("/v1/completions", "prompt", [1, 2**31], "prompt"),
            ("/v1/completions", "prompt", [1, 2.0], "prompt"),
            ("/v1/completions", "logprobs", True, "logprobs"),
            ("/v1/completions", "echo", "yes", "echo"),
            ("/v1/embeddings", "input", {}, "input"),
            ("/v1/embeddings", "input", ["a"] * 2049, "input"),
            ("/v1/embeddings", "input", [[1], [-2]], "input[1]"),
            ("/v1/embeddings", "encoding_format", "hex", "encoding_format"),
            ("/v1/embeddings", "dimensions", 0, "dimensions"),
        ],
    )
    def test_h8_refuses_inputs_that_no_engine_can_read(self, path: str, field: str, value: Any, param: str) -> None:
        fields = {"prompt": "a", "input": "a", field: value}
        with pytest.raises(Rejected) as caught:
            read_call(path, _chat(**fields), b"", "")
        assert (caught.value.status, caught.value.param) == (400, param)

    @pytest.mark.parametrize(
        "fields",
        [
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}
                        ],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "x"},
                ]
            },
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": "data:"}},
                        ],
                    }
                ]
            },
            {"messages": [{"role": "user", "content": ""}], "temperature": 0, "top_p": 1, "seed": -1, "stop": "x"},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}}},
            {"logit_bias": {"50256": -100}, "logprobs": True, "top_logprobs": 20, "user": "u", "n": None, "stop": None},
            {"stream": None, "stream_options": None, "guided_json": {"a": [1, [2, {"b": None}]]}, "top_k": 40},
        ],
    )
    def test_what_openai_knows_and_what_only_engines_know_passes_unchanged(self, fields: dict[str, Any]) -> None:
        raw = _chat(**fields)
        call = read_call(CHAT, raw, b"", "")
        sent = json.loads(call.engine_body(LLAMA))
        assert sent == {**json.loads(raw), "model": "llama-3-8b", "max_tokens": 1024}

    @pytest.mark.parametrize(
        ("raw", "words"),
        [
            (b"", "is empty"),
            (b"{", "ends too early"),
            (b"[]", "must be a JSON object"),
            (b"\xef\xbb\xbf{}", "byte order mark"),
            ("{}".encode("utf-16"), "byte order mark"),
            (b'{"model":"\xed\xa0\x80"}', "UTF-8"),
            (b'{"a":"\\ud800"}', "half a character"),
            (b'{"a":1e999}', "too large"),
            (b"model=llama-7b&prompt=hi", "Invalid character"),
            (b"[" * 100_000 + b"]" * 100_000, "at most 128 levels"),
            (b'{"a":' * 300_000, "more than 100000 lists and objects"),
            (_chat(x=[[]] * 100_001), "more than 100000 lists and objects"),
        ],
    )
    def test_h8_says_why_a_body_cannot_be_read(self, raw: bytes, words: str) -> None:
        with pytest.raises(Rejected, match=words) as caught:
            read_call(CHAT, raw, b"", "")
        assert caught.value.status == 400

    @pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
    def test_a_compressed_body_is_415_and_told_what_to_do(self, pack: Callable[[bytes], bytes]) -> None:
        with pytest.raises(Rejected, match="without Content-Encoding") as caught:
            read_call(CHAT, pack(_chat()), b"", "")
        assert caught.value.status == 415

    @pytest.mark.parametrize("query", [b"model=a&model=b&prompt=x", b"region=a&region=b"])
    def test_h8_a_repeated_parameter_is_400(self, query: bytes) -> None:
        with pytest.raises(Rejected, match="2 times"):
            read_call(CHAT, b"", query, "")

    @given(st.sampled_from(sorted(PATHS)), st.binary(max_size=200), st.binary(max_size=60))
    def test_h8_never_fails_otherwise(self, path: str, raw: bytes, query: bytes) -> None:
        with contextlib.suppress(Rejected):
            read_call(path, raw, query, "")

    @pytest.mark.parametrize(
        ("before", "after", "levels"),
        [(b"[", b"]", 1), (b'{"a":', b"}", 1), (b'[{"a":[', b"]}]", 3), (b'{"a":1,"b":[[],', b",2]}", 2)],
    )
    @pytest.mark.parametrize("field", ["x", "messages", "tools", "logit_bias", "stop", "stream_options", "model"])
    def test_h8_128_levels_are_the_most_in_every_field(
        self, field: str, before: bytes, after: bytes, levels: int
    ) -> None:
        for repeats in (1, 42, 43, 63, 64, 127, 128, 400, 3000, 100_000):
            value = before * repeats + b"0" + after * repeats
            fields = {b"model": b'"m"', b"messages": b'[{"role":"user","content":"hi"}]', field.encode(): value}
            raw = b"{" + b",".join(b'"%b":%b' % pair for pair in fields.items()) + b"}"
            found = _read(raw)
            # The body itself is the first of them.
            if 1 + levels * repeats > 128:
                assert isinstance(found, Rejected)
                assert "too deeply" in found.message or "lists and objects" in found.message
            elif isinstance(found, Rejected):
                assert field != "x"
                assert (found.param or "").startswith(field)
            else:
                _deeper(300, partial(found.engine_body, LLAMA))

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


def _read(raw: bytes) -> Call | Rejected:
    try:
        return read_call(CHAT, raw, b"", "")
    except Rejected as error:
        return error


def _deeper(frames: int, run: Any) -> Any:
    return run() if frames == 0 else _deeper(frames - 1, run)


def _json(value: Any, escape: bool, separators: tuple[str, str], double: list[int]) -> str:
    """JSON of a tree whose objects are lists of pairs; `double` gets an item for each key that is there twice."""
    item, colon = separators
    if isinstance(value, list):
        value = cast("list[Any]", value)
        return "[" + item.join(_json(one, escape, separators, double) for one in value) + "]"
    if isinstance(value, tuple):
        value = cast("tuple[tuple[str, Any], ...]", value)
        keys = [key for key, _ in value]
        double.extend([1] * (len(keys) - len(set(keys))))
        return (
            "{"
            + item.join(_text(key, escape) + colon + _json(one, escape, separators, double) for key, one in value)
            + "}"
        )
    return _text(value, escape) if isinstance(value, str) else json.dumps(value)


def _text(text: str, escape: bool) -> str:
    return '"' + "".join(f"\\u{ord(letter):04x}" for letter in text) + '"' if escape else json.dumps(text)


# Texts made of what a count of pairs could stumble over.
TRICKY = st.text(alphabet='"\\: \n{}[],a', max_size=5)
TREES: Any = st.recursive(
    st.none() | st.integers() | TRICKY,
    lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(TRICKY, inner), max_size=4).map(tuple),
    max_leaves=20,
)


class TestRepeatedKeys:
    @pytest.mark.parametrize(
        "raw",
        [
            b'{"model":"a",' + _chat()[1:],
            _chat()[:-1] + b',"x":{"a":1,"a":1}}',
            _chat()[:-1] + b',"x":[[{"a":1,"b":2,"a":3}]]}',
            _chat()[:-1] + b',"x":{"a":1,"\\u0061":1}}',
            _chat()[:-1] + b',"x":{"a":1,"a" :1}}',
            _chat()[:-1] + b',"x":{"a\\\\":1,"a\\\\"\n:1}}',
            b'{"model":"m","messages":[{"role":"system","role":"user","content":"hi"}]}',
        ],
    )
    def test_h8_are_refused_at_any_depth(self, raw: bytes) -> None:
        with pytest.raises(Rejected, match="twice") as caught:
            read_call(CHAT, raw, b"", "")
        assert (caught.value.status, caught.value.code) == (400, "repeated_key")

    @settings(max_examples=600)
    @given(TREES, st.booleans(), st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : "), (",", "\t\r\n :")]))
    def test_h8_are_found_exactly(self, tree: Any, escape: bool, separators: tuple[str, str]) -> None:
        double: list[int] = []
        raw = _chat()[:-1] + b',"x":' + _json(tree, escape, separators, double).encode() + b"}"
        found = _read(raw)
        assert (isinstance(found, Rejected) and found.code == "repeated_key") == bool(double), raw

    def test_h8_do_not_hide_depth(self) -> None:
        raw = _chat()[:-1] + b',"x":' + b"[" * 700 + b"]" * 700 + b',"x":1}'
        with pytest.raises(Rejected):
            _deeper(400, lambda: read_call(CHAT, raw, b"", ""))

    def test_h8_brackets_within_a_text_are_no_crowd(self) -> None:
        text = '[{"a\\' * 100_000
        assert read_call(CHAT, _chat(messages=[{"role": "user", "content": text}]), b"", "").choices == 1

    def test_json_within_a_text_is_no_matter(self) -> None:
        text = json.dumps({"a": {"b": 'c"'}}) * 3 + '":' + json.dumps('"a":1,"a":1')
        assert read_call(CHAT, _chat(messages=[{"role": "user", "content": text}]), b"", "").choices == 1


class TestEngineBody:
    def test_holds_nothing_that_reaches_past_our_limits(self) -> None:
        private = dict.fromkeys(ENGINE_PRIVATE, 1)
        sent = json.loads(read_call(CHAT, _chat(**private, top_k=5), b"", "").engine_body(LLAMA))
        assert sent.keys() == {"model", "messages", "max_tokens", "top_k"}


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
