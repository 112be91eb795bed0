"""How long our certificates live, when they are renewed, and which names they carry."""

from __future__ import annotations

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from crosslogic.domain.errors import Rejected

# A node that was ended is forgotten by its route; what it still holds is worthless after this.
NODE_LIFE = timedelta(days=7)
# What the API and the worker show to nodes. Made when a process starts and again long before it ends.
CLIENT_LIFE = timedelta(days=2)
AUTHORITY_LIFE = timedelta(days=730)
# A new authority is trusted at once and issues from then on: by that time every agent has heard of it.
AUTHORITY_NOTICE = timedelta(days=2)
# Certificates are renewed with a third of their life left.
RENEWED_AT = 2 / 3
# The daily rotation tells agents that have not renewed by then; so much of the life is left.
OVERDUE_AT = 3 / 4
# Clocks of nodes differ from ours: a certificate is valid from a little before it was made.
BACKDATED = timedelta(minutes=10)

# Reserved for private use (ICANN, 2024): no public authority certifies a name below it.
NODE_DOMAIN = "node.crosslogic.internal"

_SESSION = re.compile(r"^as_([0-9a-z]{26})_([0-9]{1,12})_([A-Za-z0-9_-]{43})$")


def server_name(node_id: str) -> str:
    """The name in a node's certificate, which whoever connects to it checks: the node's id as a DNS name."""
    return f"{node_id.replace('_', '-')}.{NODE_DOMAIN}"


def names_of(node_id: str, endpoint: str) -> list[str]:
    """Every name that a node's certificate carries: its own, and its endpoint's host."""
    host = urlsplit(endpoint).hostname or ""
    return [server_name(node_id), *([host] if host else [])]


def renew_at(issued_at: datetime, expires_at: datetime, share: float = RENEWED_AT) -> datetime:
    """When so much of a certificate's life is over."""
    return issued_at + (expires_at - issued_at) * share


@dataclass(frozen=True, slots=True)
class Authority:
    """One certificate authority of ours. Its key is sealed: only a process with the node secret can use it."""

    id: int
    certificate: str  # PEM.
    sealed_key: bytes
    created_at: datetime
    issues_from: datetime
    expires_at: datetime

    def is_ageing(self, now: datetime) -> bool:
        """Is it time for a successor?"""
        return now >= renew_at(self.created_at, self.expires_at)


def trusted(authorities: Sequence[Authority], now: datetime) -> list[Authority]:
    """Those whose certificates are believed now, newest first: during a rotation two."""
    return sorted((one for one in authorities if one.expires_at > now), key=lambda one: one.id, reverse=True)


def issuer(authorities: Sequence[Authority], now: datetime) -> Authority | None:
    """The newest one that issues already, None where there is none."""
    return next((one for one in trusted(authorities, now) if one.issues_from <= now), None)


def join_token(secret: str, node_id: str) -> str:
    """What a node that we launch ourselves registers with, once: `jt_` and 43 characters of HMAC-SHA256 over its id.

    Derived, so that a launch which is repeated hands out the same one.
    """
    return "jt_" + _mac(secret, f"join-token/{node_id}")


def session_token(secret: str, node_id: str, issued_at: int) -> str:
    """What an agent shows with everything it sends: bound to the node, and to a moment in Unix seconds."""
    mac = _mac(secret, f"agent-session/{node_id}/{issued_at}")
    return f"as_{node_id.rpartition('_')[2]}_{issued_at}_{mac}"


def read_session(secret: str, token: str, now: float) -> str:
    """The id of the node whose session this is. Raises Rejected (401) for one that is not ours or too old.

    A session lives as long as the certificate that came with it; `now` is Unix seconds.
    """
    found = _SESSION.match(token)
    if found is not None:
        node_id, issued_at = f"node_{found[1]}", int(found[2])
        genuine = session_token(secret, node_id, issued_at)
        if hmac.compare_digest(genuine, token) and now < issued_at + NODE_LIFE.total_seconds():
            return node_id
    raise Rejected(
        "That is no agent's session, or it has expired. Register again with a new join token: `nodes invite`.",
        status=401,
        code="invalid_session",
    )


def _mac(secret: str, what: str) -> str:
    digest = hmac.new(secret.encode(), what.encode(), hashlib.sha256).digest()
    return urlsafe_b64encode(digest).rstrip(b"=").decode()
