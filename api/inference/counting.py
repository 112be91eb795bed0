"""What an engine's own tokenizer counts: for answers whose usage the engine could not tell any more."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec

from api.inference.calls import Call
from api.inference.upstream import FailureKind, NodeFailure, Upstream

# Nobody waits for the figure but the usage record; without one by then the estimate stands.
COUNT_TIMEOUT_S = 0.5
LONGEST_COUNT_BYTES = 16 * 1024 * 1024

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


async def count_tokens(upstream: Upstream, call: Call, told: str) -> tuple[int, int] | None:
    """(prompt, completion) tokens of a call and of the text that was told, or None where the engine cannot say.

    vLLM counts a chat itself; llama.cpp renders it first and counts the text.
    """
    try:
        async with asyncio.timeout(COUNT_TIMEOUT_S):
            prompt = await _count_prompt(upstream, call)
            if prompt is None:
                return None
            completion = await _count_text(upstream, call.body["model"], told, with_special=False) if told else 0
            return None if completion is None else (prompt, completion)
    except (OSError, TimeoutError, NodeFailure):
        return None


async def _count_prompt(upstream: Upstream, call: Call) -> int | None:
    model = call.body["model"]
    if call.kind != "chat":
        prompt = call.body["prompt"]
        return await _count_text(upstream, model, prompt, with_special=True) if isinstance(prompt, str) else None
    asked: dict[str, Any] = {"messages": call.body["messages"]}
    if "tools" in call.body:
        asked["tools"] = call.body["tools"]
    answer = await _ask(upstream, b"/tokenize", {"model": model, **asked})
    if answer is not None and isinstance(answer.get("count"), int):
        return answer["count"]
    answer = await _ask(upstream, b"/apply-template", asked)
    rendered = None if answer is None else answer.get("prompt")
    return await _count_text(upstream, model, rendered, with_special=True) if isinstance(rendered, str) else None


async def _count_text(upstream: Upstream, model: str, text: str, *, with_special: bool) -> int | None:
    # Each engine reads its own names of these and ignores the other's.
    asked = {
        "model": model,
        "prompt": text,
        "content": text,
        "add_special_tokens": with_special,
        "add_special": with_special,
        "parse_special": True,
    }
    answer = await _ask(upstream, b"/tokenize", asked)
    if answer is None:
        return None
    tokens = answer.get("tokens")
    count = answer.get("count", len(cast("list[Any]", tokens)) if isinstance(tokens, list) else None)
    return count if isinstance(count, int) and count > 0 else None


async def _ask(upstream: Upstream, path: bytes, document: dict[str, Any]) -> dict[str, Any] | None:
    loop = asyncio.get_running_loop()
    connection = upstream.idle() or await upstream.connect()
    try:
        connection.send(upstream.request(path, _encode(document), b""))
        until = loop.time() + COUNT_TIMEOUT_S
        answer = await connection.read_all(until, until, LONGEST_COUNT_BYTES)
        if connection.status != 200:
            return None
    except BaseException:
        connection.fail(NodeFailure(FailureKind.RESET, "given up"))
        raise
    finally:
        upstream.release(connection)
    try:
        found = _decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None
