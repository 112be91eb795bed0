"""Keys: how a secret is made and recognised, and what a role may do.

A secret is `sk_<environment>_` followed by 26 random base-62 characters (154 bits) and 6 more that are the CRC-32 of
everything before them, so that a typo or a string that only looks like a key is told apart without asking anyone. The
checksum protects nothing: secrecy comes from the random part alone, and only a SHA-256 of the whole is stored.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from enum import StrEnum

# The key that documentation and the first `curl` use. Anyone knows it, so only dev mode accepts it: see `is_demo`.
DEMO_SECRET = "sk_dev_demo"

# So much randomness is asked of `mint`: 192 bits, of which a 154-bit number is taken with a bias below 2⁻³⁷.
RANDOM_BYTES = 24

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_RANDOM_LENGTH = 26
_CHECKSUM_LENGTH = 6  # 62⁶ > 2³²
_HINT_LENGTH = 4
# What could be a secret or a part of one, wherever it turns up.
_TRACE = re.compile(r"(sk_(?:dev|staging|prod)_)[0-9A-Za-z]{6,}", re.ASCII)
_FORM = re.compile(r"sk_(?:dev|staging|prod)_[0-9A-Za-z]{32}", re.ASCII)


class Role(StrEnum):
    """What a key's holder may do; see `role_allows`."""

    ADMIN = "admin"
    DEVELOPER = "developer"
    READ_ONLY = "read-only"


class Action(StrEnum):
    """What a key can be used for on the OpenAI surface."""

    INFER = "infer"
    READ_MODELS = "read_models"
    READ_USAGE = "read_usage"


_ALLOWED: dict[Role, frozenset[Action]] = {
    Role.ADMIN: frozenset(Action),
    Role.DEVELOPER: frozenset(Action),
    Role.READ_ONLY: frozenset({Action.READ_MODELS, Action.READ_USAGE}),
}


def role_allows(role: str, action: str) -> bool:
    """May a key of this role do that? Unknown roles and actions are allowed nothing."""
    try:
        return Action(action) in _ALLOWED[Role(role)]
    except ValueError:
        return False


def mint(environment: str, random_bytes: bytes) -> str:
    """A new secret for an environment of that name. `random_bytes` are `RANDOM_BYTES` from the system's generator."""
    if len(random_bytes) != RANDOM_BYTES:
        raise ValueError(f"{RANDOM_BYTES} random bytes are needed, got {len(random_bytes)}")
    body = f"sk_{environment}_{_base62(int.from_bytes(random_bytes, 'big'), _RANDOM_LENGTH)}"
    secret = body + _checksum(body)
    if not is_well_formed(secret):
        raise ValueError(f"no key can be made for an environment named {environment!r}")
    return secret


def is_well_formed(secret: str) -> bool:
    """Could `mint` have made it? The demo key counts as well-formed, though it has no checksum."""
    if _FORM.fullmatch(secret) is None:
        return is_demo(secret)
    return secret[-_CHECKSUM_LENGTH:] == _checksum(secret[:-_CHECKSUM_LENGTH])


def is_demo(secret: str) -> bool:
    """Is it the well-known key? Refuse it outside dev mode, even where a database still has it."""
    return secret == DEMO_SECRET


def hash_secret(secret: str) -> bytes:
    """The 32 bytes under which a key is stored and found. Any text has one: look-ups need no check of the form."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def redact(text: str) -> str:
    """The text without any secret: an error repeats what it was sent, and people send secrets where ids belong (H9)."""
    return _TRACE.sub(r"\1…", text)


def hint_of(secret: str) -> str:
    """The last four characters, by which people tell their keys apart; they belong to the checksum, not the secret."""
    return secret[-_HINT_LENGTH:]


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECKSUM_LENGTH)


def _base62(value: int, length: int) -> str:
    """The lowest `length` base-62 digits of a number, most significant first."""
    digits: list[str] = []
    for _ in range(length):
        value, digit = divmod(value, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
