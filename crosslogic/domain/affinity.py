"""Which node knows the beginning of a conversation: prefixes hashed in blocks, and who has served them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

BLOCK_BYTES = 256
MOST_BLOCKS = 64
_MOST_BYTES = BLOCK_BYTES * MOST_BLOCKS

Owner = TypeVar("Owner")


def prefix_blocks(body: Mapping[str, Any]) -> tuple[int, ...]:
    """A hash for each whole block of the prompt's text, each over everything up to its end.

    Two prompts that begin alike have the first hashes in common. The hashes hold within this process only: they are
    seeded at its start, so that nobody can write texts that collide.
    """
    messages = body.get("messages")
    parts: list[str] = []
    if isinstance(messages, list):
        left = _MOST_BYTES
        for message in cast("list[Any]", messages):
            content: Any = cast("dict[str, Any]", message).get("content") if isinstance(message, dict) else None
            if isinstance(content, list):
                content = "".join(_texts(cast("list[Any]", content)))
            if isinstance(content, str):
                # Without a mark between them, two messages could be mistaken for one.
                parts.append(content if len(content) <= left else content[:left])
                left -= len(content) + 1
                if left <= 0:
                    break
    else:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            parts.append(prompt[:_MOST_BYTES])
    # Half a character, which JSON can carry, must not stop the request.
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    blocks: list[int] = []
    digest = 0
    for end in range(BLOCK_BYTES, min(len(text), _MOST_BYTES) + 1, BLOCK_BYTES):
        digest = hash((digest, text[end - BLOCK_BYTES : end]))
        blocks.append(digest)
    return tuple(blocks)


def _texts(content: list[Any]) -> list[str]:
    found: list[str] = []
    for part in content:
        text: Any = cast("dict[str, Any]", part).get("text") if isinstance(part, dict) else None
        if isinstance(text, str):
            found.append(text)
    return found


class PrefixMap(Generic[Owner]):
    """Who served which prefix last, at most `most` prefixes; those unused for longest are forgotten.

    They live in two generations: what is learnt goes into the young one, and when that is half of all, it becomes the
    old one and the old one is dropped. So learning is one dictionary update, however many blocks there are.
    """

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, most: int) -> None:
        self._half = most // 2
        self._young: dict[int, Owner] = {}
        self._old: dict[int, Owner] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def find(self, blocks: tuple[int, ...]) -> Owner | None:
        """Who served the longest known prefix; None if none is known.

        A prefix's own beginnings were learnt with it, so the longest is found by halving.
        """
        young, old = self._young, self._old
        low, high = 0, len(blocks)
        found: Owner | None = None
        while low < high:
            middle = (low + high) // 2
            block = blocks[middle]
            owner = young.get(block) or old.get(block)
            if owner is None:
                high = middle
            else:
                found, low = owner, middle + 1
        return found

    def learn(self, blocks: tuple[int, ...], owner: Owner) -> None:
        """This one has served them now."""
        if len(self._young) + len(blocks) > self._half:
            self._old, self._young = self._young, {}
        self._young.update(dict.fromkeys(blocks, owner))
