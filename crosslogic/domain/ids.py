"""Ids: UUIDv7 inside, a readable prefix at the edge (`node_01k…`, the TypeID form).

The text form is the prefix, an underscore and the 128 bits as 26 characters of Crockford's base 32, lower case, so that
ids of one noun sort by time in either form. Source of the form: the TypeID specification 0.3; of the bits: RFC 9562.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType
from uuid import UUID

from crosslogic.domain.errors import Rejected

OrgId = NewType("OrgId", UUID)
EnvironmentId = NewType("EnvironmentId", UUID)
KeyId = NewType("KeyId", UUID)
NodeId = NewType("NodeId", UUID)
RequestId = NewType("RequestId", UUID)

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]
_VALUES = {character: value for value, character in enumerate(_ALPHABET)}
_TEXT_LENGTH = 26


def uuid7(unix_ms: int, random_80_bits: int) -> UUID:
    """Build a UUIDv7 from a Unix time in milliseconds and 80 random bits (74 of them are used)."""
    if not 0 <= unix_ms < 1 << 48:
        raise ValueError(f"unix_ms must fit 48 bits, got {unix_ms}")
    value = unix_ms << 80
    value |= 0x7 << 76 | (random_80_bits >> 68 & 0xFFF) << 64
    value |= 0b10 << 62 | random_80_bits & (1 << 62) - 1
    return UUID(int=value)


def unix_ms_of(uuid: UUID) -> int:
    """The creation time that a UUIDv7 carries, in Unix milliseconds."""
    return uuid.int >> 80


def encode(uuid: UUID) -> str:
    """The 26 characters of an id, without a prefix."""
    value = uuid.int
    pairs = _PAIRS
    return "".join(
        [
            pairs[value >> 120],
            pairs[value >> 110 & 1023],
            pairs[value >> 100 & 1023],
            pairs[value >> 90 & 1023],
            pairs[value >> 80 & 1023],
            pairs[value >> 70 & 1023],
            pairs[value >> 60 & 1023],
            pairs[value >> 50 & 1023],
            pairs[value >> 40 & 1023],
            pairs[value >> 30 & 1023],
            pairs[value >> 20 & 1023],
            pairs[value >> 10 & 1023],
            pairs[value & 1023],
        ]
    )


def decode(text: str) -> UUID:
    """The inverse of `encode`. Raises ValueError for anything `encode` cannot have made."""
    if len(text) != _TEXT_LENGTH or text[0] > "7":
        raise ValueError("an id has 26 characters and starts with 0–7")
    value = 0
    for character in text:
        digit = _VALUES.get(character)
        if digit is None:
            raise ValueError(f"{character!r} is not in the id alphabet")
        value = value << 5 | digit
    return UUID(int=value)


@dataclass(frozen=True, slots=True)
class Kind:
    """One noun's ids: how they are shown and read at the edge."""

    prefix: str

    def show(self, uuid: UUID) -> str:
        """`node_01k…` for a UUID."""
        return f"{self.prefix}_{encode(uuid)}"

    def parse(self, text: str) -> UUID:
        """The UUID of a shown id. Raises Rejected with what was expected."""
        prefix, _, tail = text.rpartition("_")
        try:
            if prefix != self.prefix:
                raise ValueError(f"it must start with {self.prefix}_")
            return decode(tail)
        except ValueError as error:
            raise Rejected(
                f"{text[:80]!r} is not a {self.prefix} id ({error}); it looks like {self.prefix}_01k5…",
                code="invalid_id",
            ) from error


ORG = Kind("org")
ENVIRONMENT = Kind("env")
KEY = Kind("key")
NODE = Kind("node")
REQUEST = Kind("req")
RESERVATION = Kind("res")
SWEEP = Kind("sweep")
CREDIT = Kind("credit")
