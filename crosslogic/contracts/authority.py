"""Input and result of the rotation of certificates. Fields are only ever added, with defaults."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CertificateRotationInput:
    """Nothing is needed; with `new_authority` a successor is made although the newest authority is young."""

    new_authority: bool = False


@dataclass(frozen=True)
class AuthorityReport:
    """The authorities that are trusted now, newest first, in words."""

    trusted: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class CertificateReport:
    """Node ids: who was told to renew, and who has no valid certificate any more (a hundred of those at most)."""

    told: list[str] = field(default_factory=list[str])
    expired: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class CertificateRotationResult:
    """What a rotation found and did."""

    trusted: list[str]
    told: list[str]
    expired: list[str]
