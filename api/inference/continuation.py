"""Going on with an answer on another node: what to ask that node for, and how to join what it says to what was said.

Two ways. *Extend*: the node is given what was told as the beginning of its own answer (the last assistant message of a
chat, the end of a completion's prompt) and says the rest. *Repeat*: the node is asked the client's own question again,
and what it says is held against what was told, character by character; once all of that has come again, the rest is
relayed. Plain text is extended. Structured output, tool calls and reasoning are repeated, because an engine cannot
start in the middle of those: that works where it says the same again (temperature 0, or a seed that the engines
honour), and ends in a clear error where it does not. Either way the seam is exact: nothing is lost, doubled or cut in
half.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, cast

import msgspec

from api.inference.calls import Call
from api.inference.events import Channel, Told
from api.inference.upstream import FailureKind, NodeFailure
from crosslogic.domain.catalog import Model

_encode = msgspec.json.Encoder().encode

# With one of these an answer's text has a form that a second engine could not pick up in the middle.
FORMED = frozenset(
    {
        "response_format",
        "grammar",
        "json_schema",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_decoding_backend",
    }
)
# In a completion: the answer is not simply what follows the prompt.
UNLIKE_PROMPT = frozenset({"echo", "suffix", "logprobs"})


class Way(StrEnum):
    """How an answer that broke off goes on."""

    FINISH = "finish"  # All of it was told already; only its end is missing.
    RESTART = "restart"  # Nothing was told: the question is asked anew.
    EXTEND = "extend"
    REPEAT = "repeat"
    NONE = "none"


def way_for(call: Call, model: Model, told: Told) -> Way:
    """How this answer can go on after what was told."""
    if call.choices > 1 or not told.is_readable or any(number != 0 for number, _, _ in told.texts):
        return Way.NONE
    if told.finish_reasons:
        return Way.FINISH
    if not told.texts:
        return Way.RESTART
    if told.tokens >= call.completion_limit(model):
        return Way.FINISH
    return Way.EXTEND if _is_extensible(call, told) else Way.REPEAT


def _is_extensible(call: Call, told: Told) -> bool:
    body = call.body
    own = (0, "content", -1) if call.kind == "chat" else (0, "text", -1)
    if any(channel != own for channel in told.texts) or not told.text(own).strip():
        return False
    for field in FORMED:
        given = body.get(field)
        if given and not (isinstance(given, dict) and cast("dict[str, Any]", given).get("type") == "text"):
            return False
    if call.kind == "chat":
        last = cast("list[dict[str, Any]]", body["messages"])[-1]
        if last["role"] != "assistant":
            return not body.get("continue_final_message")
        # Whether an engine goes on with the client's own last words or begins a message of its own is up to it.
        return bool(body.get("continue_final_message")) and isinstance(last.get("content"), str)
    return not any(body.get(field) for field in UNLIKE_PROMPT) and _single_prompt(body) is not None


def _single_prompt(body: dict[str, Any]) -> str | None:
    prompt = body["prompt"]
    if isinstance(prompt, list) and len(cast("list[Any]", prompt)) == 1:
        prompt = cast("list[Any]", prompt)[0]
    return prompt if isinstance(prompt, str) else None


def body_for(call: Call, model: Model, told: Told) -> bytes:
    """The body that makes an engine extend what was told. `call.body` is the one that the first engine was sent."""
    body = dict(call.body)
    body["max_tokens"] = max(1, call.completion_limit(model) - told.tokens)
    # Some chat templates trim what they are given, and most tokenizers join a space to the word behind it.
    if call.kind == "chat":
        messages = list(cast("list[dict[str, Any]]", body["messages"]))
        said = told.text((0, "content", -1)).rstrip()
        if messages[-1]["role"] == "assistant":
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + said}
        else:
            messages.append({"role": "assistant", "content": said})
        body["messages"] = messages
        # One without the other is an error for some engines.
        body["continue_final_message"] = True
        body["add_generation_prompt"] = False
    else:
        body["prompt"] = (_single_prompt(body) or "") + told.text((0, "text", -1)).rstrip()
    return _encode(body)


class ExtendedAnswer:
    """Joins the rest of an answer to its beginning."""

    __slots__ = ("_created", "_id", "_missing", "_tokens_before")

    def __init__(self, told: Told, kind: str) -> None:
        self._id, self._created = told.id, told.created
        text = told.text((0, "content" if kind == "chat" else "text", -1))
        # The engine did not get this white space, so it may say it again.
        self._missing = text[len(text.rstrip()) :]
        self._tokens_before = told.tokens

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer's usage: the part that was told counts as completion and not as prompt."""
        before = self._tokens_before
        prompt = max(1, _count(usage, "prompt_tokens") - before)
        completion = _count(usage, "completion_tokens") + before
        return {
            **usage,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def join(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk under the answer's own id, without a second beginning."""
        chunk["id"], chunk["created"] = self._id, self._created
        choices = cast("list[dict[str, Any]]", chunk.get("choices") or [])
        if not choices:
            return chunk if chunk.get("usage") else None
        choice = choices[0]
        holder, name = (choice, "text") if "text" in choice else (_delta(choice), "content")
        holder.pop("role", None)
        text = holder.get(name)
        if isinstance(text, str) and text and self._missing:
            holder[name] = text = self._without_missing(text)
        if not text and name == "content":
            holder.pop("content", None)
        is_empty = not text and not any(value for key, value in holder.items() if key not in ("text", "index"))
        return None if is_empty and not choice.get("finish_reason") else chunk

    def _without_missing(self, text: str) -> str:
        while text and self._missing:
            if text[0] != self._missing[0]:
                self._missing = ""
                break
            text, self._missing = text[1:], self._missing[1:]
        return text


class RepeatedAnswer:
    """Holds an answer that is given again against what was told of it, and lets through what goes beyond."""

    __slots__ = ("_created", "_id", "_left", "_told")

    def __init__(self, told: Told) -> None:
        self._id, self._created = told.id, told.created
        self._told = told
        # What must still come again, by channel.
        self._left: dict[Channel, str] = {channel: told.text(channel) for channel in told.texts}

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """This engine has given the whole answer, so its usage is the answer's."""
        return usage

    def join(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """What of the chunk was not told yet. Raises NodeFailure as soon as anything differs from what was."""
        if self._id:
            chunk["id"], chunk["created"] = self._id, self._created
        choices = cast("list[dict[str, Any]]", chunk.get("choices") or [])
        if not choices:
            return chunk if chunk.get("usage") else None
        if not self._left:
            # A second beginning would look like another message.
            _delta(choices[0]).pop("role", None)
            return chunk
        choice = choices[0]
        delta = _delta(choice)
        delta.pop("role", None)
        is_new = False
        for name in ("content", "reasoning_content", "reasoning", "refusal"):
            text = delta.get(name)
            if isinstance(text, str) and text:
                delta[name] = rest = self._match((0, name, -1), text)
                is_new = is_new or bool(rest)
        if isinstance(choice.get("text"), str) and choice["text"]:
            choice["text"] = rest = self._match((0, "text", -1), choice["text"])
            is_new = is_new or bool(rest)
        kept: list[dict[str, Any]] = []
        for call in cast("list[dict[str, Any]]", delta.get("tool_calls") or []):
            if self._match_call(call):
                kept.append(call)
        if "tool_calls" in delta:
            delta["tool_calls"] = kept
            if not kept:
                del delta["tool_calls"]
            is_new = is_new or bool(kept)
        if choice.get("finish_reason"):
            if self._left:
                raise NodeFailure(FailureKind.GARBAGE, "the repeated answer is shorter than what was told")
            return chunk
        return chunk if is_new else None

    def _match_call(self, call: dict[str, Any]) -> bool:
        """Does the tool call hold anything new? What was told of it is taken out, its id with it."""
        index = cast(int, call.get("index", 0))
        function = cast("dict[str, Any]", call.get("function") or {})
        is_known = (0, "name", index) in self._told.texts
        is_new = False
        for name in ("name", "arguments"):
            text = function.get(name)
            if isinstance(text, str) and text:
                function[name] = rest = self._match((0, name, index), text)
                is_new = is_new or bool(rest)
                if not rest:
                    del function[name]
        if is_known:
            # The client knows the call under the first engine's id.
            call.pop("id", None)
            call.pop("type", None)
        return is_new

    def _match(self, channel: Channel, text: str) -> str:
        """The part of `text` that goes beyond what was told."""
        left = self._left.get(channel, "")
        both = min(len(left), len(text))
        if left[:both] != text[:both]:
            raise NodeFailure(FailureKind.GARBAGE, "the repeated answer differs from what was told")
        if len(left) > both:
            self._left[channel] = left[both:]
        else:
            self._left.pop(channel, None)
        if len(text) > both and self._left:
            # Something new before all that was told has come again: another order is another answer.
            raise NodeFailure(FailureKind.GARBAGE, "the repeated answer differs from what was told")
        return text[both:]


def _delta(choice: dict[str, Any]) -> dict[str, Any]:
    delta = choice.get("delta")
    return cast("dict[str, Any]", delta) if isinstance(delta, dict) else {}


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
