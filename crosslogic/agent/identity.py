"""The node's key and certificate, and what else the control plane gave it. The key never leaves this machine."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import ssl
import subprocess
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

_TIMEOUT_S = 20.0


class NoKey(Exception):
    """This machine has nothing that makes a key; the message says what to install."""


@dataclass(frozen=True)
class Identity:
    """What an agent keeps, so that a restart needs no token. `renew_at` is Unix seconds by this machine's clock."""

    node_id: str
    key: str
    certificate: str
    bundle: str
    bundle_id: str
    session: str
    credential: str
    renew_at: float

    def save(self, state_dir: str) -> None:
        """Write it down at once or not at all, for this user alone."""
        write_private(os.path.join(state_dir, "identity.json"), json.dumps(asdict(self)))

    @classmethod
    def load(cls, state_dir: str, node_id: str) -> Identity | None:
        """What was written down for this node; None if there is nothing that can be read."""
        try:
            with open(os.path.join(state_dir, "identity.json")) as file:
                kept: Any = json.load(file)
            found = cls(**{one.name: kept[one.name] for one in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.node_id == node_id else None

    def load_into(self, context: ssl.SSLContext, state_dir: str) -> None:
        """Show this certificate on connections to come, and believe callers whom its authorities certify."""
        path = os.path.join(state_dir, "identity.pem")
        write_private(path, self.certificate + self.key)
        context.load_cert_chain(path)
        context.load_verify_locations(cadata=self.bundle)


def make_context() -> ssl.SSLContext:
    """How the node's door is kept: nobody enters who cannot show a client certificate of our authorities."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def make_key(state_dir: str) -> str:
    """A new key on the curve P-256, as PEM. Raises NoKey."""
    openssl = shutil.which("openssl")
    if openssl is not None:
        return _run([openssl, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"], state_dir)
    try:
        ec: Any = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
        serialization: Any = importlib.import_module("cryptography.hazmat.primitives.serialization")
    except ImportError as error:
        raise NoKey("install the program openssl, or the Python package cryptography") from error
    made: Any = ec.generate_private_key(ec.SECP256R1())
    encoded: bytes = made.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return encoded.decode()


def make_request(key: str, node_id: str, state_dir: str) -> str:
    """A certificate signing request for this key, as PEM. Which names are certified is the control plane's choice."""
    openssl = shutil.which("openssl")
    if openssl is not None:
        path = os.path.join(state_dir, "request-key.pem")
        write_private(path, key)
        try:
            # Without a configuration of its own the program reads the machine's, which may ask for anything.
            command = [openssl, "req", "-new", "-key", path, "-subj", f"/CN={node_id}", "-config", os.devnull]
            return _run(command, state_dir)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
    x509: Any = importlib.import_module("cryptography.x509")
    serialization: Any = importlib.import_module("cryptography.hazmat.primitives.serialization")
    hashes: Any = importlib.import_module("cryptography.hazmat.primitives.hashes")
    name: Any = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, node_id)])
    signer: Any = serialization.load_pem_private_key(key.encode(), None)
    request: Any = x509.CertificateSigningRequestBuilder().subject_name(name).sign(signer, hashes.SHA256())
    encoded: bytes = request.public_bytes(serialization.Encoding.PEM)
    return encoded.decode()


def pending_key(state_dir: str) -> str:
    """The key to register with: the same after a restart, because a token belongs to the first key that used it."""
    path = os.path.join(state_dir, "pending-key.pem")
    try:
        with open(path) as file:
            kept = file.read()
        if "PRIVATE KEY" in kept:
            return kept
    except OSError:
        pass
    made = make_key(state_dir)
    write_private(path, made)
    return made


def forget_pending_key(state_dir: str) -> None:
    """The key is the node's now."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(state_dir, "pending-key.pem"))


def write_private(path: str, text: str) -> None:
    """Replace a file in one step; only this user may read it."""
    beside = f"{path}.new"
    with contextlib.suppress(OSError):
        os.unlink(beside)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def received(node_id: str, key: str, answer: dict[str, Any], before: Identity | None = None) -> Identity:
    """The identity that an answer to a registration or renewal makes. Raises ValueError for an answer that is none."""
    try:
        return Identity(
            node_id=node_id,
            key=key,
            certificate=str(answer["certificate"]),
            bundle=str(answer["bundle"]),
            bundle_id=str(answer["bundle_id"]),
            session=str(answer["session"]),
            credential=str(answer["credential"]) if before is None else before.credential,
            renew_at=time.time() + float(answer["renew_in_s"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the control plane's answer lacks {error}") from error


def _run(command: list[str], state_dir: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, cwd=state_dir, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKey(f"the program openssl does not run ({error})") from error
    if done.returncode != 0 or "-----BEGIN" not in done.stdout:
        raise NoKey(f"the program openssl failed: {done.stderr.strip()[:300]}")
    return done.stdout[done.stdout.index("-----BEGIN") :]
