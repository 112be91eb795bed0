"""Who pays, who asks, and what they may ask: org → environment → key."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

# From the widest layer to the narrowest; a request must fit all four.
LAYERS: Final = ("global", "org", "environment", "key")
ENVIRONMENT_NAMES: Final = ("dev", "staging", "prod")
PLANS: Final = ("serverless", "reserved", "enterprise")

# The one subject of the global layer.
GLOBAL_SUBJECT: Final = UUID(int=0)

# What a layer can limit; `monthly_spend_microdollars` for orgs only.
LIMITS: Final = ("requests_per_min", "tokens_per_min", "tokens_per_day", "concurrency", "monthly_spend_microdollars")

# How the absence of a limit is written, as opposed to None: the layer's default.
NO_LIMIT: Final = -1


@dataclass(frozen=True, slots=True)
class LimitRow:
    """What is set for one subject of one layer, as stored: None means the layer's default, -1 no limit at all.

    Limits named in `dry_run` count and report but refuse nothing.
    """

    layer: str
    subject_id: UUID
    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    tokens_per_day: int | None = None
    concurrency: int | None = None
    monthly_spend_microdollars: int | None = None
    dry_run: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Principal:
    """Everything that a key's holder is, from one look-up. States are shown as they are; the caller decides.

    `region_preferences` are the environment's home region first, then the org's. `allowed_models` is None where all are
    allowed. `limits` has one row for each of LAYERS, in that order. An operator's keys are shown why a node was chosen.
    """

    key_id: UUID
    environment_id: UUID
    org_id: UUID
    role: str
    org_state: str
    environment_state: str
    key_state: str
    expires_at: datetime | None
    region_preferences: tuple[str, ...]
    allowed_models: frozenset[str] | None
    plan: str
    limits: tuple[LimitRow, ...]
    is_operator: bool = False


@dataclass(frozen=True, slots=True)
class Org:
    """Owns and pays. An operator's is one of our own."""

    id: UUID
    name: str
    state: str
    plan: str
    region_preferences: tuple[str, ...]
    created_at: datetime
    is_operator: bool = False


@dataclass(frozen=True, slots=True)
class Environment:
    """A partition of an org, with keys and limits of its own. `allowed_models` is None where all are allowed."""

    id: UUID
    org_id: UUID
    org_name: str
    name: str
    state: str
    home_region: str | None
    allowed_models: tuple[str, ...] | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Key:
    """A credential without its secret. `hint` is the secret's last four characters."""

    id: UUID
    environment_id: UUID
    environment_name: str
    org_id: UUID
    org_name: str
    name: str
    role: str
    state: str
    hint: str
    expires_at: datetime | None
    created_at: datetime
