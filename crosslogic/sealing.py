"""Secrets that must be kept are kept encrypted, under a key that derives from the installation's root secret."""

from __future__ import annotations

import base64
import hashlib
import hmac

from cryptography.fernet import Fernet, InvalidToken

from crosslogic.domain.errors import Rejected

# A purpose: the signing secrets of Stripe's endpoints.
STRIPE_WEBHOOKS = "stripe webhooks"


def seal(root_secret: str, purpose: str, text: str) -> bytes:
    """Encrypt and authenticate a text; only the same secret and purpose open it."""
    return _cipher(root_secret, purpose).encrypt(text.encode())


def unseal(root_secret: str, purpose: str, sealed: bytes) -> str:
    """The inverse of `seal`. Raises Rejected when it was sealed under another secret."""
    try:
        return _cipher(root_secret, purpose).decrypt(sealed).decode()
    except InvalidToken:
        raise Rejected(
            f"What was sealed ({purpose}) cannot be opened: CROSSLOGIC_NODE_SECRET is another one now. Run "
            "`./run billing setup --renew-webhooks`.",
            status=409,
            code="sealed_under_another_secret",
        ) from None


def _cipher(root_secret: str, purpose: str) -> Fernet:
    key = hmac.new(root_secret.encode(), f"crosslogic seal: {purpose}".encode(), hashlib.sha256).digest()
    return Fernet(base64.urlsafe_b64encode(key))
