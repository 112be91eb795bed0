"""Bodies that were once valid: whatever became of them, the answer is in our shape and the account right (H8, A3)."""

from __future__ import annotations

import asyncio
import json
import re
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from api.errors import error_body
from api.inference.calls import ENGINE_PRIVATE, PATHS, check_fit, read_call
from crosslogic.domain.catalog import Model
from crosslogic.domain.errors import Rejected
from tests.api.inference.conftest import Api, Fleet, MakeApi
from tests.engines import Engine

MODEL = Model("llama-3-8b", "Llama", "chat", 8192, 500, 500)

VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": "llama-7b", "messages": [{"role": "user", "content": "hi"}]},
        {
            "model": "llama-3-8b@in-mumbai",
            "messages": [
                {"role": "system", "content": 'Say "a": 1.'},
                {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "x"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "3"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "auto",
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "max_tokens": 9,
            "n": 1,
        },
        {
            "model": "llama-7b",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "top_p": 1,
            "stop": ["a", "b"],
            "seed": 7,
            "logit_bias": {"5": -1},
            "guided_regex": "a+",
        },
    ],
    "/v1/completions": [
        {"model": "llama-7b", "prompt": "Once", "max_tokens": 5, "echo": False, "logprobs": 2},
        {"model": "llama-7b", "prompt": ["Once", "Twice"], "stream": False, "best_of": 1},
        {"model": "llama-7b", "prompt": [[1, 2], [3]], "suffix": None},
    ],
    "/v1/embeddings": [
        {"model": "bge-base-en", "input": "Once"},
        {"model": "bge-base-en", "input": ["Once", "Twice"], "encoding_format": "float", "dimensions": 3},
        {"model": "bge-base-en", "input": [[1, 2, 3]]},
    ],
}

ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**40,
    0.5,
    -0.0,
    1e308,
    "",
    " ",
    "\x00",
    "\u2028",
    "\U0001f9d0",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    [{}],
    {"": ""},
    {"type": "text"},
    {"role": "user"},
    {"include_usage": 1},
    [[[[[[[[1]]]]]]]],
)
TOKENS = (b'"', b"\\", b"\\u", b"\\ud800", b"{", b"}", b"[", b"]", b":", b",", b"NaN", b"1e999", b"-", b"\x00", b"\xff")


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in it."""
    found = [at] if at else []
    if isinstance(tree, dict):
        for key, value in cast("dict[str, Any]", tree).items():
            found += places(value, (*at, key))
    elif isinstance(tree, list):
        for index, value in enumerate(cast("list[Any]", tree)):
            found += places(value, (*at, index))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body of it, changed in up to three places."""
    path = draw(st.sampled_from(sorted(VALID)))
    body: Any = deepcopy(draw(st.sampled_from(VALID[path])))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.sampled_from(places(body) or [()]))
        if not at:
            break
        parent = reduce(getitem, at[:-1], body)
        if draw(st.booleans()):
            parent[at[-1]] = deepcopy(draw(st.sampled_from(ODD)))
        else:
            del parent[at[-1]]
    raw = json.dumps(body, ensure_ascii=draw(st.booleans())).encode()
    change = draw(st.sampled_from(["no", "no", "no", "double", "insert", "cut", "drop", "again"]))
    at = draw(st.integers(0, len(raw)))
    if change == "double":
        pairs = re.findall(rb'"\w+": (?:"[^"]*"|\d+|true|null)', raw)
        if pairs:
            pair = draw(st.sampled_from(pairs))
            raw = raw.replace(pair, pair + b", " + pair, 1)
    elif change == "insert":
        raw = raw[:at] + draw(st.sampled_from(TOKENS)) + raw[at:]
    elif change == "cut":
        raw = raw[:at]
    elif change == "drop":
        raw = raw[:at] + raw[at + 1 :]
    elif change == "again":
        raw = raw * 2
    return path, raw


def check_error(status: int, document: Any) -> None:
    """A client's mistake, told in OpenAI's shape."""
    assert 400 <= status < 500, (status, document)
    assert document.keys() == {"error"}
    error = document["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert len(error["message"]) < 700
    assert isinstance(error["code"], str)


class TestReadCall:
    @settings(max_examples=1500, deadline=None)
    @given(mutated())
    def test_h8_reads_it_or_says_what_is_wrong(self, asked: tuple[str, bytes]) -> None:
        path, raw = asked
        try:
            call = read_call(path, raw, b"", "")
        except Rejected as rejected:
            status, document, _ = error_body(rejected)
            check_error(status, document)
            return
        assert call.held_tokens(MODEL) >= 1
        sent = json.loads(call.engine_body(MODEL))
        # Python's parser, which some engines have, reads what we send as we read it.
        assert sent.keys().isdisjoint(ENGINE_PRIVATE)
        assert sent["model"] == MODEL.name
        if path != "/v1/embeddings":
            assert sent["max_tokens"] == call.completion_limit(MODEL)
        asked_for = json.loads(raw)
        assert {name: value for name, value in sent.items() if asked_for.get(name) == value}.keys() >= (
            asked_for.keys() - {"model", "max_tokens", "stream_options", *ENGINE_PRIVATE}
        )

    def test_what_it_starts_from_is_valid(self) -> None:
        models = {"/v1/embeddings": Model("bge-base-en", "BGE", "embedding", 512, 100, None)}
        assert VALID.keys() == PATHS.keys()
        for path, bodies in VALID.items():
            for body in bodies:
                check_fit(read_call(path, json.dumps(body).encode(), b"", ""), models.get(path, MODEL))


@dataclass
class Wire:
    """The running API, and how many answers it has given that cost something."""

    api: Api
    engine: Engine
    answered: int = 0


@pytest.fixture
async def wire(make_api: MakeApi, fleet: Fleet, engine: Engine) -> Wire:
    await fleet.add_node(engine, model="bge-base-en")
    return Wire(await make_api(engine), engine)


class TestOverTheWire:
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        # Each example waits for servers: show the first that fails instead of looking for the smallest.
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(
        batch=st.lists(
            st.tuples(
                mutated(),
                st.sampled_from(
                    ["", "", "region=ap-south-1", "region=%00", "model=%ff", "model=a&model=b", "=&&;=", "%"]
                ),
                st.sampled_from([{}, {}, {"x-crosslogic-region": "a;b"}, {"x-request-id": "\xff" * 300}]),
                st.sampled_from(["application/json", "text/plain", "multipart/form-data; boundary=x", "", "\xe9"]),
            ),
            min_size=12,
            max_size=12,
        )
    )
    async def test_h8_a3_every_answer_is_ours_and_each_that_succeeds_is_recorded_once(
        self, wire: Wire, batch: list[tuple[tuple[str, bytes], str, dict[str, str], str]]
    ) -> None:
        outcomes = await asyncio.gather(
            *(
                self._ask(wire.api, path, raw, query, {**headers, "content-type": kind})
                for (path, raw), query, headers, kind in batch
            )
        )
        wire.answered += sum(outcomes)
        assert len(await wire.api.fleet.records(wire.answered)) == len(wire.engine.requests) == wire.answered

    async def _ask(self, api: Api, path: str, raw: bytes, query: str, headers: dict[str, str]) -> bool:
        """Does it succeed? Fails for any answer that is not as it must be."""
        async with asyncio.timeout(8):
            answer = await api.http.post(
                f"{path}?{query}",
                content=raw,
                headers=[(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
            )
        assert answer.headers["x-request-id"].startswith("req_")
        shown = answer.text + str(answer.headers)
        for leak in (
            "Traceback",
            ".py",
            "127.0.0.1",
            "localhost",
            str(api.settings.state_dir),
            "postgres",
            api.fleet.secret,
        ):
            assert leak not in shown, shown
        if answer.status_code != 200:
            assert answer.headers["content-type"] == "application/json"
            check_error(answer.status_code, answer.json())
            return False
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            assert "error" not in answer.json()
        return True
