"""A revision of a deployment: which engine serves which weights, and by what answers one knows that it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from crosslogic.domain.errors import Rejected

MOST_GOLDEN_PROMPTS = 50
MOST_ARGUMENTS = 100
MOST_CHARACTERS = 20_000


class Match(StrEnum):
    """How an answer is compared with what is expected, both without the white space around them."""

    EXACT = "exact"
    CONTAINS = "contains"
    REGEX = "regex"  # Python's syntax, found anywhere in the answer.


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """A prompt with a known answer, asked at temperature 0. Of an embedding, `expected` is its number of dimensions."""

    prompt: str
    expected: str
    match: Match = Match.CONTAINS
    max_tokens: int = 64


@dataclass(frozen=True, slots=True)
class RevisionSpec:
    """What a node of this revision runs. Empty: the provider's default for the model.

    `engine` is vllm, sglang or llamacpp; `weights` are what the engine is told to load; `engine_args` are added to its
    command line; `gpus` are tried in order. `golden` is asked of each node before it serves.
    """

    engine: str = ""
    engine_version: str = ""
    weights: str = ""
    engine_args: list[str] = field(default_factory=list[str])
    gpus: list[str] = field(default_factory=list[str])
    golden: list[GoldenPrompt] = field(default_factory=list[GoldenPrompt])


DEFAULT_SPEC = RevisionSpec()
ENGINES = ("", "vllm", "sglang", "llamacpp")


def check_spec(spec: RevisionSpec) -> None:
    """Raise Rejected for a revision that no node could run or prove."""
    if spec.engine not in ENGINES:
        raise Rejected(
            f"Unknown engine {spec.engine[:64]!r}. Use vllm, sglang or llamacpp, or leave it out.",
            code="unknown_engine",
            param="engine",
        )
    if len(spec.engine_args) > MOST_ARGUMENTS or len(spec.gpus) > MOST_ARGUMENTS:
        raise Rejected(f"At most {MOST_ARGUMENTS} engine_args and gpus each.", code="too_many", param="engine_args")
    check_golden(spec.golden)


def check_golden(golden: Sequence[GoldenPrompt]) -> None:
    """Raise Rejected for prompts that cannot be asked, or whose pattern cannot be read."""
    if len(golden) > MOST_GOLDEN_PROMPTS:
        raise Rejected(f"At most {MOST_GOLDEN_PROMPTS} golden prompts.", code="too_many", param="golden")
    for one in golden:
        if not one.prompt or max(len(one.prompt), len(one.expected)) > MOST_CHARACTERS:
            raise Rejected(
                f"A golden prompt has from 1 to {MOST_CHARACTERS} characters, and so has its answer.",
                code="invalid_golden_prompt",
                param="golden",
            )
        if not 1 <= one.max_tokens <= 1024:
            raise Rejected(
                "max_tokens of a golden prompt is from 1 to 1024.", code="invalid_golden_prompt", param="golden"
            )
        if one.match is Match.REGEX:
            try:
                re.compile(one.expected)
            except re.error as error:
                raise Rejected(
                    f"The pattern {one.expected[:64]!r} cannot be read: {error}.",
                    code="invalid_golden_prompt",
                    param="golden",
                ) from error


def is_as_expected(golden: GoldenPrompt, answer: str) -> bool:
    """Is this the answer that a node of the revision must give?"""
    given, expected = answer.strip(), golden.expected.strip()
    if golden.match is Match.EXACT:
        return given == expected
    if golden.match is Match.REGEX:
        return re.search(expected, given) is not None
    return expected in given
