"""Prefixes in blocks, and the bounded memory of who served them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.affinity import MOST_BLOCKS, PrefixMap, prefix_blocks

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["content", "text", "role"]), inner, max_size=3)
    ),
    max_leaves=12,
)


def chat(*contents: Any) -> dict[str, Any]:
    """A body with these messages."""
    return {"messages": [{"role": "user", "content": content} for content in contents]}


class TestPrefixBlocks:
    def test_a_longer_conversation_begins_with_the_shorter_ones_blocks(self) -> None:
        first = prefix_blocks(chat("You are terse. " * 30, "Why? " * 100))
        second = prefix_blocks(chat("You are terse. " * 30, "Why? " * 100, "Because. " * 50, "And? " * 20))
        assert 3 <= len(first) < len(second)
        assert second[: len(first)] == first

    def test_a_change_in_the_beginning_changes_every_block(self) -> None:
        first, second = (prefix_blocks(chat(letter + "b" * 2_000)) for letter in "ac")
        assert len(first) == len(second) == 7
        assert not set(first) & set(second)

    def test_equal_blocks_in_other_places_are_other_hashes(self) -> None:
        assert len(set(prefix_blocks(chat("a" * 4_096)))) == 16

    def test_short_prompts_and_rests_of_a_block_have_none(self) -> None:
        assert prefix_blocks(chat("a" * 255)) == ()
        assert len(prefix_blocks(chat("a" * 511))) == 1

    def test_parts_count_like_text(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "data:"}}
        parts = chat([{"type": "text", "text": "a" * 600}, image])
        assert prefix_blocks(parts) == prefix_blocks(chat("a" * 600)) != ()

    def test_a_completions_prompt_counts(self) -> None:
        assert len(prefix_blocks({"prompt": "a" * 600})) == 2
        assert prefix_blocks({"prompt": ["a" * 600]}) == prefix_blocks({"input": "a" * 600}) == ()

    @pytest.mark.parametrize("body", [chat("a" * 99_999), chat(*["é" * 999] * 99), {"prompt": "a" * 99_999}])
    def test_are_no_more_than_the_most(self, body: dict[str, Any]) -> None:
        assert len(prefix_blocks(body)) == MOST_BLOCKS

    @given(JSON)
    def test_any_json_has_some_or_none(self, document: Any) -> None:
        for body in ({"messages": document}, {"prompt": document}, chat(document)):
            assert len(prefix_blocks(body)) <= MOST_BLOCKS

    def test_half_a_character_is_read(self) -> None:
        assert len(prefix_blocks(chat("\ud800" * 300))) == 3


class TestPrefixMap:
    def test_finds_who_served_the_longest_known_prefix(self) -> None:
        known: PrefixMap[str] = PrefixMap(100)
        known.learn((1, 2, 3), "a")
        known.learn((1, 9), "b")
        assert known.find((1, 2, 3, 4, 5)) == "a"
        assert known.find((1, 2, 7)) == "a"
        assert known.find((1, 9, 9)) == "b"
        # The beginning that both share was served last by the second.
        assert known.find((1,)) == known.find((1, 8)) == "b"
        assert known.find((5, 6)) is None
        assert known.find(()) is None

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
    def test_is_bounded_and_knows_the_newest(self, lengths: list[int]) -> None:
        known: PrefixMap[int] = PrefixMap(120)
        for number, length in enumerate(lengths):
            blocks = tuple(range(1000 * number, 1000 * number + length))
            known.learn(blocks, number + 1)
            assert len(known) <= 120
            assert known.find((*blocks, -1)) == number + 1

    def test_knows_the_last_half_of_the_most_at_least(self) -> None:
        known: PrefixMap[str] = PrefixMap(20)
        for number in range(100):
            known.learn((number,), str(number))
            assert all(known.find((earlier,)) == str(earlier) for earlier in range(max(0, number - 9), number + 1))

    def test_what_is_used_outlives_what_is_not(self) -> None:
        known: PrefixMap[str] = PrefixMap(20)
        for number in range(100):
            known.learn((7, 8), "used")
            known.learn((1000 + number,), "once")
        assert known.find((7, 8)) == "used"
        assert known.find((1001,)) is None
