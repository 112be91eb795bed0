"""OpenAI's requests, as far as we or an engine's parser look into them; OpenAPI documents them from here.

Fields that are not named here go to the engine unseen. Where an engine is more generous than OpenAI, OpenAI's ranges
hold, so that a request means the same whichever engine answers it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MOST_CHOICES = 16
MOST_STOPS = 64
# OpenAI's limit for the inputs of one embedding call; the prompts of one completion call have none of their own.
MOST_INPUTS = 2048
MOST_TOKENS = 10_000_000
LONGEST_NAME = 200

ModelName = Annotated[
    str,
    Meta(
        max_length=LONGEST_NAME,
        description="A model's name or alias, perhaps with a region: `llama-7b@in-mumbai`.",
        examples=["llama-7b"],
        extra_json_schema={"pattern": r"\S"},
    ),
]
Length = Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
Choices = Annotated[int, Meta(ge=1, le=MOST_CHOICES)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Stops = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=MOST_STOPS)]
Name = Annotated[str, Meta(min_length=1)]
Object = dict[str, Any]

_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
_TEXTS = {"type": "array", "minItems": 1, "maxItems": MOST_INPUTS, "items": {"type": "string", "minLength": 1}}
# What a list may hold is more than msgspec can say: `api.inference.calls` looks at it.
Inputs = (
    Annotated[str, Meta(min_length=1)]
    | Annotated[
        list[Any],
        Meta(
            min_length=1,
            extra_json_schema={
                "oneOf": [_TEXTS, _TOKENS, {"type": "array", "maxItems": MOST_INPUTS, "items": _TOKENS}]
            },
        ),
    ]
)


class FunctionCall(Struct, gc=False):
    """What a model wanted called."""

    name: Name
    arguments: str


class ToolCall(Struct, gc=False):
    """One of an assistant message's calls."""

    function: FunctionCall
    id: str | None = None
    type: str = "function"


class Part(Struct, gc=False):
    """A piece of a message's content."""

    type: Name
    text: str | None = None


class Message(Struct, gc=False):
    """One turn of a conversation. Only an assistant's may be without content."""

    role: Annotated[str, Meta(min_length=1, examples=["user"])]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Struct, gc=False):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Struct, gc=False):
    """What the model may use."""

    function: Function
    type: Literal["function"] = "function"


class NamedSchema(Struct, gc=False):
    """The schema that an answer must satisfy."""

    name: str | None = None
    schema: Object | None = None


class ResponseFormat(Struct, gc=False):
    """The form of the answer."""

    type: Annotated[str, Meta(min_length=1, examples=["json_object"])]
    json_schema: NamedSchema | None = None


class StreamOptions(Struct, gc=False):
    """Only with `stream: true`."""

    include_usage: bool | None = None


class Generation(Struct, gc=False):
    """What chat and text completions have in common."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    n: Choices | None = None
    best_of: Choices | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    stop: str | Stops | None = None
    seed: Seed | None = None
    user: str | None = None


class ChatRequest(Generation, kw_only=True, gc=False):
    """A conversation to continue."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Generation, kw_only=True, gc=False):
    """Texts to continue."""

    prompt: Inputs
    logprobs: Alternatives | None = None
    echo: bool | None = None
    suffix: str | None = None


class EmbeddingRequest(Struct, gc=False):
    """Texts to embed."""

    model: ModelName
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    user: str | None = None
