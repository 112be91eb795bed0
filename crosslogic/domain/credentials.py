"""Node credentials and the marks of machines: derived, so that none is ever stored."""

from __future__ import annotations

import base64
import hashlib
import hmac

# The admin API's token in dev mode. Anyone knows it: settings refuse it elsewhere, where a token must be given.
DEV_ADMIN_TOKEN = "adm_dev_demo"

# Characters of a machine's mark, five bits each: enough that no other installation's machine bears ours by chance, few
# enough for the clouds' limits on names.
MARK_LENGTH = 5


def node_credential(secret: str, node_id: str) -> str:
    """What the API presents to one node's engine: `nc_` and 43 characters of HMAC-SHA256 over the node's id."""
    digest = hmac.new(secret.encode(), f"node-credential/{node_id}".encode(), hashlib.sha256).digest()
    return "nc_" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def machine_mark(secret: str, identity: str) -> str:
    """What tells our machines from those of other installations in the same cloud account, by their names alone.

    `MARK_LENGTH` lower-case letters and digits of HMAC-SHA256 over `identity`, the part of the name that is a node's.
    """
    digest = hmac.new(secret.encode(), f"machine-mark/{identity}".encode(), hashlib.sha256).digest()
    return base64.b32encode(digest).decode().lower()[:MARK_LENGTH]
