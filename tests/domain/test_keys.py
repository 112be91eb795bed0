from __future__ import annotations

import hashlib
import re
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.keys import (
    DEMO_SECRET,
    RANDOM_BYTES,
    Action,
    Role,
    hash_secret,
    hint_of,
    is_demo,
    is_well_formed,
    mint,
    redact,
    role_allows,
)

BASE_62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ENVIRONMENTS = st.sampled_from(["dev", "staging", "prod"])
RANDOM = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)
ALLOWED = {
    (Role.ADMIN, Action.INFER),
    (Role.ADMIN, Action.READ_MODELS),
    (Role.ADMIN, Action.READ_USAGE),
    (Role.DEVELOPER, Action.INFER),
    (Role.DEVELOPER, Action.READ_MODELS),
    (Role.DEVELOPER, Action.READ_USAGE),
    (Role.READ_ONLY, Action.READ_MODELS),
    (Role.READ_ONLY, Action.READ_USAGE),
}


class TestMint:
    @given(ENVIRONMENTS, RANDOM)
    def test_has_the_documented_form(self, environment: str, random_bytes: bytes) -> None:
        assert re.fullmatch(rf"sk_{environment}_[0-9A-Za-z]{{32}}", mint(environment, random_bytes))

    @given(ENVIRONMENTS, RANDOM)
    def test_ends_in_the_crc_32_of_all_before(self, environment: str, random_bytes: bytes) -> None:
        secret = mint(environment, random_bytes)
        value = 0
        for character in secret[-6:]:
            value = value * 62 + BASE_62.index(character)
        assert value == zlib.crc32(secret[:-6].encode())

    @given(RANDOM, RANDOM)
    def test_differs_where_154_random_bits_differ(self, one: bytes, other: bytes) -> None:
        same_number = int.from_bytes(one, "big") % 62**26 == int.from_bytes(other, "big") % 62**26
        assert (mint("dev", one) == mint("dev", other)) == same_number

    @pytest.mark.parametrize("count", [0, 16, RANDOM_BYTES - 1, RANDOM_BYTES + 1])
    def test_refuses_another_amount_of_randomness(self, count: int) -> None:
        with pytest.raises(ValueError, match="24 random bytes"):
            mint("dev", bytes(count))

    @pytest.mark.parametrize("environment", ["", "production", "DEV", "dev_"])
    def test_refuses_an_environment_that_there_is_not(self, environment: str) -> None:
        with pytest.raises(ValueError, match="no key can be made"):
            mint(environment, bytes(RANDOM_BYTES))


class TestIsWellFormed:
    @given(ENVIRONMENTS, RANDOM)
    def test_knows_what_was_minted(self, environment: str, random_bytes: bytes) -> None:
        assert is_well_formed(mint(environment, random_bytes))

    @given(ENVIRONMENTS, RANDOM, st.data())
    def test_sees_every_single_typo(self, environment: str, random_bytes: bytes, data: st.DataObject) -> None:
        secret = mint(environment, random_bytes)
        at = data.draw(st.integers(0, len(secret) - 1))
        wrong = data.draw(st.sampled_from(BASE_62).filter(lambda character: character != secret[at]))
        assert not is_well_formed(secret[:at] + wrong + secret[at + 1 :])

    @given(st.text())
    def test_any_text_is_answered(self, text: str) -> None:
        assert is_well_formed(text) == (text == DEMO_SECRET)

    @pytest.mark.parametrize("around", [(" ", ""), ("", "\n"), ("", "\x00"), ("x", "")])
    def test_takes_nothing_around_it(self, around: tuple[str, str]) -> None:
        secret = mint("prod", bytes(range(RANDOM_BYTES)))
        assert not is_well_formed(secret.join(around))

    def test_digits_of_other_scripts_are_none(self) -> None:
        assert not is_well_formed("sk_dev_" + "٣" * 32)

    def test_the_demo_key_is_an_exception(self) -> None:
        assert is_well_formed(DEMO_SECRET)
        assert is_demo(DEMO_SECRET)
        assert not is_demo(mint("dev", bytes(RANDOM_BYTES)))


class TestHashSecret:
    def test_is_sha_256(self) -> None:
        assert hash_secret("sk_dev_demo") == hashlib.sha256(b"sk_dev_demo").digest()

    @given(st.text())
    def test_any_text_has_one(self, text: str) -> None:
        assert len(hash_secret(text + "\ud800")) == 32


class TestHint:
    @given(RANDOM)
    def test_tells_nothing_of_the_random_part(self, random_bytes: bytes) -> None:
        secret = mint("dev", random_bytes)
        assert hint_of(secret) == secret[-4:]
        assert hint_of(secret) in secret[-6:]


class TestRedact:
    @given(ENVIRONMENTS, RANDOM, st.integers(12, 45))
    def test_cuts_secrets_and_their_beginnings(self, environment: str, random_bytes: bytes, length: int) -> None:
        part = mint(environment, random_bytes)[: length + len(environment)]
        shown = redact(f"There is no org {part!r}, nor {part}.")
        assert shown == f"There is no org 'sk_{environment}_…', nor sk_{environment}_…."

    def test_leaves_the_rest_alone(self) -> None:
        text = "sk_dev_demo, sk_<env>_<random> and key_01h455vb4pex5vsknk084sn02q"
        assert redact(text) == text


class TestRoleAllows:
    @pytest.mark.parametrize("role", list(Role))
    @pytest.mark.parametrize("action", list(Action))
    def test_every_pair(self, role: Role, action: Action) -> None:
        assert role_allows(role, action) == ((role, action) in ALLOWED)

    @pytest.mark.parametrize(("role", "action"), [("root", "infer"), ("admin", "fly"), ("", "")])
    def test_what_is_unknown_is_allowed_nothing(self, role: str, action: str) -> None:
        assert not role_allows(role, action)
