from __future__ import annotations

import contextlib
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.errors import Rejected
from crosslogic.domain.ids import ENVIRONMENT, KEY, NODE, ORG, REQUEST, decode, encode, unix_ms_of, uuid7

UUIDS = st.uuids()


class TestUuid7:
    @given(st.integers(0, 2**48 - 1), st.integers(0, 2**80 - 1))
    def test_is_one_by_the_standard(self, unix_ms: int, random_bits: int) -> None:
        made = uuid7(unix_ms, random_bits)
        assert made.version == 7
        assert made.variant == "specified in RFC 4122"
        assert unix_ms_of(made) == unix_ms

    @given(st.integers(0, 2**48 - 2), st.integers(0, 2**80 - 1), st.integers(0, 2**80 - 1))
    def test_sorts_by_time_in_every_form(self, unix_ms: int, one: int, other: int) -> None:
        earlier, later = uuid7(unix_ms, one), uuid7(unix_ms + 1, other)
        assert earlier < later
        assert NODE.show(earlier) < NODE.show(later)

    def test_uses_74_random_bits(self) -> None:
        free = uuid7(0, 0).int ^ uuid7(0, 2**80 - 1).int
        assert free.bit_count() == 74

    @pytest.mark.parametrize("unix_ms", [-1, 2**48])
    def test_refuses_a_time_that_does_not_fit(self, unix_ms: int) -> None:
        with pytest.raises(ValueError, match="48 bits"):
            uuid7(unix_ms, 0)


class TestText:
    @given(UUIDS)
    def test_comes_back(self, uuid: UUID) -> None:
        assert decode(encode(uuid)) == uuid
        assert len(encode(uuid)) == 26

    def test_known_values(self) -> None:
        # From the TypeID specification's table of valid values.
        assert encode(UUID("00000000-0000-0000-0000-00000000000a")) == "0000000000000000000000000a"
        assert encode(UUID("01890a5d-ac96-774b-bcce-b302099a8057")) == "01h455vb4pex5vsknk084sn02q"
        assert encode(UUID(int=2**128 - 1)) == "7zzzzzzzzzzzzzzzzzzzzzzzzz"

    @pytest.mark.parametrize(
        "text", ["", "0" * 25, "0" * 27, "8" + "0" * 25, "0" * 25 + "i", "0" * 25 + "l", "0" * 25 + "u", "A" + "0" * 25]
    )
    def test_refuses_what_was_never_shown(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"26 characters|alphabet"):
            decode(text)

    @given(st.text(max_size=40))
    def test_any_text_is_answered(self, text: str) -> None:
        with contextlib.suppress(ValueError):
            assert encode(decode(text)) == text


class TestKind:
    @given(UUIDS)
    def test_each_noun_reads_its_own(self, uuid: UUID) -> None:
        for kind in (ORG, ENVIRONMENT, KEY, NODE, REQUEST):
            assert kind.parse(kind.show(uuid)) == uuid

    @given(UUIDS)
    def test_no_noun_reads_another_ones(self, uuid: UUID) -> None:
        with pytest.raises(Rejected, match="is not a key id"):
            KEY.parse(NODE.show(uuid))

    def test_says_what_an_id_looks_like(self) -> None:
        with pytest.raises(Rejected, match="it looks like node_01k5") as caught:
            NODE.parse("7")
        assert caught.value.code == "invalid_id"
