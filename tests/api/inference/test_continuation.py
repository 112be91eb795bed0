"""An answer goes on when its node dies: one unbroken stream, paid for once (H2, A3)."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from tests.api.inference.conftest import MakeApi, tokens_in_flight
from tests.engines import (
    Engine,
    Exchange,
    Plan,
    chat_chunk,
    close,
    completion_chunk,
    fails,
    garbage,
    hang,
    reset,
    says,
    sse,
    streams_then,
    usage_of,
)

MakeEngine = Callable[..., Awaitable[Engine]]
SHORT = {"first_byte_timeout_s": 0.4, "idle_timeout_s": 0.3, "connect_timeout_s": 0.3}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ended as it should."""
    assert text.endswith("data: [DONE]\n\n"), text[-300:]
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event and "[DONE]" not in event]


def content_of(text: str) -> str:
    """What a client puts together."""
    return "".join(
        choice.get("delta", {}).get("content") or choice.get("text") or ""
        for event in events_of(text)
        for choice in event["choices"]
    )


def goes_on(*words: str, prompt: int = 11, finish: str = "stop") -> Plan:
    """Says these words, with the usage of an engine that was given all the rest as its prompt."""
    events = [sse(chat_chunk(None, role=True)), *(sse(chat_chunk(word)) for word in words)]
    events.append(sse(chat_chunk(None, finish=finish)))
    events.append(sse({**chat_chunk(None), "choices": [], "usage": usage_of(prompt, len(words))}))
    return says(*events, b"data: [DONE]\n\n")


async def _break_off(api: Any, first: Plan, then: Sequence[Plan], engines: Sequence[Engine], **fields: Any) -> Any:
    """Stream an answer whose first node ends like `first`, and whoever comes next like `then`, in turn."""
    plans = [first, *then]

    async def by_turn(exchange: Exchange) -> None:
        await plans.pop(0)(exchange)

    for engine in engines:
        engine.always = by_turn
    return await api.chat(stream=True, **fields)


def asked(engines: Sequence[Engine]) -> list[dict[str, Any]]:
    """The bodies of all requests, in the order in which they came."""
    exchanges = [exchange for engine in engines for exchange in engine.requests]
    return [exchange.body for exchange in sorted(exchanges, key=lambda exchange: exchange.came_at)]


class TestText:
    @pytest.mark.parametrize(
        "end",
        [
            reset,
            close,
            hang,
            garbage,
            b"",
            b'data: {"usage":{\n\n',
            b'data: {"choices":[{"delta":{"content":" hal',
            sse({"error": {"message": "CUDA out of memory on 10.0.0.7", "code": 500}}),
        ],
        ids=["reset", "closed", "stalled", "garbage", "early end", "broken event", "half an event", "error event"],
    )
    async def test_another_node_goes_on_with_the_answer(
        self, make_api: MakeApi, make_engine: MakeEngine, end: Plan | bytes
    ) -> None:
        async def then(exchange: Exchange) -> None:
            if not isinstance(end, bytes):
                await end(exchange)
                return
            if end:
                exchange.chunk(end)
            exchange.write(b"0\r\n\r\n")

        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines, **SHORT)
        first = streams_then(then, "Hé", "llo", " there")
        rest = goes_on(", how", " are", " you?", prompt=14)
        answer = await _break_off(api, first, [rest], engines, max_tokens=50, stream_options={"include_usage": True})
        assert content_of(answer.text) == "Héllo there, how are you?"
        events = events_of(answer.text)
        assert {event["id"] for event in events} == {"chatcmpl-1"}
        assert sum("role" in choice["delta"] for event in events for choice in event["choices"]) == 1
        assert [event["usage"] for event in events if event.get("usage")] == [
            {**usage_of(11, 6), "prompt_tokens_details": {"cached_tokens": 0}}
        ]
        assert "10.0.0.7" not in answer.text
        _, second = asked(engines)
        assert second["messages"][-1] == {"role": "assistant", "content": "Héllo there"}
        assert (second["continue_final_message"], second["add_generation_prompt"]) == (True, False)
        assert second["max_tokens"] == 47
        record = await api.fleet.record()
        assert (record["outcome"], record["prompt_tokens"], record["completion_tokens"]) == ("completed", 11, 6)
        assert tokens_in_flight(api) == [0, 0]

    async def test_the_seam_has_no_space_too_many_and_none_too_few(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        for told, rest in (
            (("One", " \n"), ("\n two",)),
            (("One", " "), (" two",)),
            (("One",), (" two",)),
            (("One", "\n\n"), ("\n", "\ntwo")),
            (("One", " "), ("two",)),
        ):
            answer = await _break_off(api, streams_then(reset, *told), [goes_on(*rest)], engines)
            expected = "".join(told).rstrip() + "".join(rest)
            if rest == ("two",):
                expected = "One two"
            if told == ("One", " \n"):
                expected = "One \n\n two"
            assert content_of(answer.text) == expected
            assert asked(engines)[-1]["messages"][-1]["content"] == "One"

    async def test_it_may_change_nodes_more_than_once(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engines = [await make_engine() for _ in range(3)]
        api = await make_api(*engines)
        plans = [streams_then(reset, " b", " c"), goes_on(" d", prompt=14)]
        answer = await _break_off(api, streams_then(close, "a"), plans, engines, max_tokens=20)
        assert content_of(answer.text) == "a b c d"
        assert [body["max_tokens"] for body in asked(engines)] == [20, 19, 17]
        record = await api.fleet.record()
        assert (record["prompt_tokens"], record["completion_tokens"]) == (11, 4)

    async def test_a_completion_goes_on_behind_its_prompt(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        begun = says(sse(completion_chunk("Once")), sse(completion_chunk(" upon")), pause_s=0.005, then=reset)
        usage: dict[str, Any] = {**completion_chunk(""), "choices": [], "usage": usage_of(6, 2)}
        rest = says(
            *(sse(completion_chunk(word)) for word in (" a", " time")),
            sse(completion_chunk("", "stop")),
            sse(usage),
            b"data: [DONE]\n\n",
        )
        plans = [begun, rest]

        async def by_turn(exchange: Exchange) -> None:
            await plans.pop(0)(exchange)

        for engine in engines:
            engine.always = by_turn
        body = {"model": "llama-7b", "prompt": "Tell: ", "stream": True, "max_tokens": 9}
        answer = await api.http.post("/v1/completions", json=body)
        assert content_of(answer.text) == "Once upon a time"
        assert (asked(engines)[1]["prompt"], asked(engines)[1]["max_tokens"]) == ("Tell: Once upon", 7)
        record = await api.fleet.record()
        assert (record["prompt_tokens"], record["completion_tokens"]) == (4, 4)

    async def test_nothing_told_yet_is_asked_anew(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        answer = await _break_off(api, streams_then(reset), [goes_on("all", " of", " it")], engines)
        assert content_of(answer.text) == "all of it"
        assert len(asked(engines)[1]["messages"]) == 1

    async def test_only_the_end_missing_needs_no_other_engine(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)

        async def finish_then_die(exchange: Exchange) -> None:
            exchange.event(chat_chunk(None, finish="stop"))
            exchange.reset()

        answer = await _break_off(
            api, streams_then(finish_then_die, "all", " told"), [], engines, stream_options={"include_usage": True}
        )
        assert content_of(answer.text) == "all told"
        assert events_of(answer.text)[-1]["usage"]["completion_tokens"] == 2
        record = await api.fleet.record()
        assert (record["outcome"], record["completion_tokens"]) == ("completed", 2)

    async def test_all_tokens_told_end_in_length(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        answer = await _break_off(api, streams_then(reset, "a", "b", "c"), [], engines, max_tokens=3)
        assert content_of(answer.text) == "abc"
        assert events_of(answer.text)[-1]["choices"][0]["finish_reason"] == "length"

    async def test_an_engine_that_cannot_extend_is_asked_to_repeat(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        refusal = fails(400, {"error": {"message": "continue_final_message is not supported"}})
        repeated = goes_on("Hel", "lo the", "re", ", you", prompt=11)
        answer = await _break_off(api, streams_then(reset, "Hello", " there"), [refusal, repeated], engines)
        assert content_of(answer.text) == "Hello there, you"
        record = await api.fleet.record()
        assert (record["prompt_tokens"], record["completion_tokens"]) == (11, 4)


def tool_chunk(index: int = 0, *, call_id: str = "", name: str = "", arguments: str = "") -> dict[str, Any]:
    """A piece of a tool call."""
    function: dict[str, Any] = {"arguments": arguments}
    call: dict[str, Any] = {"index": index, "function": function}
    if name:
        function["name"] = name
        call |= {"id": call_id, "type": "function"}
    return {**chat_chunk(None), "choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}


def says_events(*documents: dict[str, Any], then: Plan | None = None) -> Plan:
    """These events, properly ended unless something else comes then."""
    events = [sse(document) for document in documents]
    return says(*events, b"data: [DONE]\n\n") if then is None else says(*events, pause_s=0.005, then=then)


class TestForms:
    TOOLS: tuple[dict[str, Any], ...] = (
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}},
    )

    async def test_a_tool_call_that_is_repeated_goes_on(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        begun = says_events(
            chat_chunk(None, role=True),
            tool_chunk(call_id="call_a", name="weather"),
            tool_chunk(arguments='{"ci'),
            then=reset,
        )
        again = says_events(
            chat_chunk(None, role=True),
            tool_chunk(call_id="call_b", name="weather", arguments='{"'),
            tool_chunk(arguments='city":"Pu'),
            tool_chunk(arguments='ne"}'),
            chat_chunk(None, finish="tool_calls"),
        )
        answer = await _break_off(api, begun, [again], engines, tools=list(self.TOOLS), temperature=0)
        calls = [
            call
            for event in events_of(answer.text)
            for choice in event["choices"]
            for call in choice["delta"].get("tool_calls", ())
        ]
        assert "".join(call["function"].get("arguments", "") for call in calls) == '{"city":"Pune"}'
        assert [call["id"] for call in calls if "id" in call] == ["call_a"]
        assert [call["function"]["name"] for call in calls if "name" in call["function"]] == ["weather"]
        assert len(asked(engines)[1]["messages"]) == 1

    async def test_structured_output_is_held_against_what_was_told(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        form = {"type": "json_object"}
        again = goes_on('{"a": 1', ', "b"', ": 2}", prompt=11)
        answer = await _break_off(api, streams_then(reset, '{"a"', ": 1"), [again], engines, response_format=form)
        assert content_of(answer.text) == '{"a": 1, "b": 2}'
        record = await api.fleet.record()
        assert (record["outcome"], record["completion_tokens"]) == ("completed", 3)

    @pytest.mark.parametrize(
        "words", [('{"b"', ": 1}"), ('{"a"',), ('{"a": 1',)], ids=["other", "shorter", "shorter 2"]
    )
    async def test_h2_another_answer_is_never_sewn_on(
        self, make_api: MakeApi, make_engine: MakeEngine, words: tuple[str, ...]
    ) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        again = goes_on(*words)
        begun = streams_then(reset, '{"a"', ": 1,")
        answer = await _break_off(api, begun, [again, again], engines, response_format={"type": "json_object"})
        last = json.loads(answer.text.strip().rpartition("\n\n")[2].removeprefix("data: "))
        assert last["error"]["code"] == "stream_cut"
        told = [json.loads(event[6:]) for event in answer.text.split("\n\n") if event.startswith('data: {"id"')]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in told) == '{"a": 1,'
        record = await api.fleet.record()
        assert (record["outcome"], record["prompt_tokens"], record["completion_tokens"]) == ("cut", 0, 0)

    async def test_several_choices_end_in_a_clear_error(self, make_api: MakeApi, make_engine: MakeEngine) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        answer = await _break_off(api, streams_then(reset, "a"), [], engines, n=2)
        assert '"stream_cut"' in answer.text
        assert "[DONE]" not in answer.text


class TestWithoutAnother:
    async def test_h2_a_stream_that_nobody_can_continue_ends_in_an_error_event_and_costs_nothing(
        self, make_api: MakeApi, engine: Engine
    ) -> None:
        api = await make_api(engine, hold_timeout_s=0.2)
        answer = await _break_off(api, streams_then(reset, "Hello"), [], [engine])
        last = json.loads(answer.text.strip().rpartition("\n\n")[2].removeprefix("data: "))
        assert last["error"]["code"] == "stream_cut"
        record = await api.fleet.record()
        assert (record["outcome"], record["prompt_tokens"], record["completion_tokens"]) == ("cut", 0, 0)

    async def test_every_node_breaking_off_is_not_tried_for_ever(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        engines = [await make_engine() for _ in range(6)]
        for engine in engines:
            engine.always = streams_then(reset, " x")
        api = await make_api(*engines)
        answer = await api.chat(stream=True)
        assert '"stream_cut"' in answer.text
        assert sum(len(engine.requests) for engine in engines) == 4

    async def test_h1_a_client_that_leaves_during_the_change_pays_what_it_got(
        self, make_api: MakeApi, make_engine: MakeEngine
    ) -> None:
        engines = [await make_engine() for _ in range(2)]
        api = await make_api(*engines)
        plans: list[Plan] = [streams_then(reset, "a", "b"), hang]

        async def by_turn(exchange: Exchange) -> None:
            await plans.pop(0)(exchange)

        for engine in engines:
            engine.always = by_turn
        body = json.dumps({"model": "llama-7b", "messages": [{"role": "user", "content": "x"}], "stream": True})
        client = await api.open(body.encode())
        await client.read_until(b'"b"')

        async def second() -> Exchange | None:
            found = [exchange for engine in engines for exchange in engine.requests]
            return found[1] if len(found) == 2 and plans == [] else None

        await api.until(second)
        hanging = max((e for engine in engines for e in engine.requests), key=lambda exchange: exchange.came_at)
        left_at = client.hang_up()
        assert await hanging.closed() - left_at < 0.1
        record = await api.fleet.record()
        assert (record["outcome"], record["completion_tokens"]) == ("client_gone", 2)
