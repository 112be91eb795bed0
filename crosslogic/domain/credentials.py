"""Node credentials: derived, so that none is ever stored."""

from __future__ import annotations

import base64
import hashlib
import hmac

# The admin API's token in dev mode. Anyone knows it: settings refuse it elsewhere, where a token must be given.
DEV_ADMIN_TOKEN = "adm_dev_demo"


def node_credential(secret: str, node_id: str) -> str:
    """What the API presents to one node's engine: `nc_` and 43 characters of HMAC-SHA256 over the node's id."""
    digest = hmac.new(secret.encode(), f"node-credential/{node_id}".encode(), hashlib.sha256).digest()
    return "nc_" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
