from __future__ import annotations

import json
import time

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.stack import KEY, Stack, eventually


def client(stack: Stack, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0)


def say(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


class TestSDK:
    def test_chat_is_answered_by_a_real_model(self, stack: Stack, key: str) -> None:
        raw = client(stack, key).chat.completions.with_raw_response.create(
            model="llama-7b", messages=say("Name one colour."), max_tokens=16, temperature=0
        )
        answer = raw.parse()
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        assert answer.model == "llama-3-8b"
        assert raw.headers["x-request-id"].startswith("req_")
        assert raw.headers["x-crosslogic-node"].startswith("node_")
        assert raw.headers["x-crosslogic-region"] in ("in-mumbai", "us-east")
        assert "timings" not in raw.text

    def test_a_stream_is_a_stream(self, stack: Stack, key: str) -> None:
        began = time.monotonic()
        arrivals: list[float] = []
        pieces: list[str] = []
        usage = None
        stream = client(stack, key).chat.completions.create(
            model="llama-7b",
            messages=say("Write a long story about the sea."),
            max_tokens=200,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            arrivals.append(time.monotonic() - began)
            usage = chunk.usage or usage
            pieces.extend(choice.delta.content or "" for choice in chunk.choices)
        assert usage is not None
        assert usage.completion_tokens >= 20
        assert len(arrivals) > 20
        assert arrivals[0] < arrivals[-1] / 2, "the first piece must be there long before the last one"
        assert "".join(pieces).strip()

    async def test_async_stream_without_usage_shows_none(self, stack: Stack, key: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=key) as asynchronous:
            stream = await asynchronous.chat.completions.create(
                model="llama-3-8b", messages=say("hello"), max_tokens=8, stream=True
            )
            chunks = [chunk async for chunk in stream]
        assert all(chunk.usage is None for chunk in chunks)
        assert all(chunk.choices for chunk in chunks)

    def test_completions(self, stack: Stack, key: str) -> None:
        answer = client(stack, key).completions.create(model="llama-7b", prompt="Once upon a time", max_tokens=8)
        assert answer.choices[0].text
        streamed = client(stack, key).completions.create(
            model="llama-7b", prompt="Once upon a time", max_tokens=8, stream=True
        )
        assert "".join(choice.text for chunk in streamed for choice in chunk.choices)

    def test_embeddings_are_close_for_like_texts(self, stack: Stack, key: str) -> None:
        texts = ["The cat sat on the mat.", "A cat is sitting on a mat.", "Quarterly revenue grew by nine percent."]
        answer = client(stack, key).embeddings.create(model="bge-base-en", input=texts)
        cat, like, other = (item.embedding for item in answer.data)
        assert dot(cat, like) > dot(cat, other)
        assert answer.usage.prompt_tokens > 0

    def test_models_say_openly_what_serves_them(self, stack: Stack, key: str) -> None:
        models = client(stack, key).models
        names = {model.id for model in models.list()}
        assert {"llama-3-8b", "llama-7b", "mistral-7b", "bge-base-en"} <= names
        llama = models.retrieve("llama-7b")
        assert "SmolLM2" in str(llama.model_extra)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"model": "gpt-17"}, openai.NotFoundError),
            ({"messages": []}, openai.BadRequestError),
            ({"max_tokens": 0}, openai.BadRequestError),
            ({"model": "bge-base-en"}, openai.BadRequestError),
        ],
    )
    def test_errors_are_the_sdks(
        self, stack: Stack, key: str, change: dict[str, object], expected: type[openai.APIStatusError]
    ) -> None:
        fields: dict[str, object] = {"model": "llama-7b", "messages": say("hi"), "max_tokens": 4, **change}
        with pytest.raises(expected) as error:
            client(stack, key).post("/chat/completions", body=fields, cast_to=object)
        assert json.loads(error.value.response.text)["error"]["message"]

    def test_a_wrong_key_is_told_apart(self, stack: Stack) -> None:
        with pytest.raises(openai.AuthenticationError):
            client(stack, "sk_dev_nonsense").models.list()


class TestQueryForm:
    def test_the_newcomers_request(self, stack: Stack, key: str) -> None:
        answer = httpx.post(
            f"{stack.url}/v1/chat/completions?model=llama-7b&region=ap-south-1&prompt=hello&max_tokens=8",
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        document = answer.json()
        assert document["choices"][0]["message"]["content"]
        assert document["crosslogic"] == {
            "node": answer.headers["x-crosslogic-node"],
            "region": answer.headers["x-crosslogic-region"],
        }
        assert document["crosslogic"]["region"] == "in-mumbai"


class TestUsage:
    def test_every_request_is_counted_once(self, stack: Stack) -> None:
        from tests.e2e.conftest import make_key

        own = client(stack, make_key(stack))
        before = usage_of(own)
        total = 0
        for index in range(6):
            if index % 2:
                stream = own.chat.completions.create(
                    model="llama-7b",
                    messages=say("hi"),
                    max_tokens=5,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                total += next(chunk.usage.total_tokens for chunk in stream if chunk.usage)
            else:
                answer = own.chat.completions.create(model="llama-7b", messages=say("hi"), max_tokens=5)
                assert answer.usage is not None
                total += answer.usage.total_tokens

        def look() -> bool:
            after = usage_of(own)
            return (after[0] - before[0], after[1] - before[1]) == (6, total)

        eventually(look, within_s=10, what="six requests and their exact tokens in /v1/usage")


class TestKeys:
    def test_a_revoked_key_is_refused_within_a_second(self, stack: Stack) -> None:
        made = json.loads(stack.command("keys", "create", "--org", "demo", "--env", "dev", "--json").stdout)
        assert stack.ask("hi", key=made["secret"]).status_code == 200
        stack.admin("POST", f"/keys/{made['id']}/revoke")
        time.sleep(1)
        assert stack.ask("hi", key=made["secret"]).status_code == 401

    def test_limits_set_by_the_cli_act(self, stack: Stack) -> None:
        made = json.loads(stack.command("keys", "create", "--org", "demo", "--env", "prod", "--json").stdout)
        done = stack.command("limits", "set", "--key", made["id"], "--requests-per-min", "2")
        assert done.returncode == 0, done.stderr
        time.sleep(1)
        answers = [stack.ask("hi", key=made["secret"], max_tokens=2) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert int(answers[2].headers["retry-after"]) >= 1
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"

    def test_the_demo_key_is_limited_as_every_key_is(self, stack: Stack) -> None:
        assert stack.ask("hi", key=KEY).headers["x-ratelimit-limit-requests"] == "60"


def usage_of(own: openai.OpenAI) -> tuple[int, int]:
    """Requests and tokens of the key's environment."""
    document = own.get("/usage", cast_to=httpx.Response).json()
    return int(document["requests"]), int(document["total_tokens"])


def dot(one: list[float], other: list[float]) -> float:
    return sum(left * right for left, right in zip(one, other, strict=True))
