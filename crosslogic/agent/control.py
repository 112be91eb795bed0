"""The agent's way to the control plane: JSON over HTTPS that is verified, or pinned. It blocks: call it in a thread."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
from typing import Any
from urllib.parse import urlsplit

from crosslogic.agent.identity import write_private

TIMEOUT_S = 10.0
MOST_BYTES = 1_000_000

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class Unreachable(Exception):
    """No answer, or one that says to try again later."""


class Refused(Exception):
    """The control plane's no, with its status and reason. Asking again in the same way is in vain."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Control:
    """Talks to one control plane. `session` is shown with every call once there is one."""

    def __init__(self, url: str, ca_sha256: str, state_dir: str) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._is_tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._base = parts.path.rstrip("/")
        self._pin = ca_sha256
        self._pinned_path = os.path.join(state_dir, "control-ca.pem")
        self._context: ssl.SSLContext | None = None
        self.session = ""

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that a POST is answered with. Raises Unreachable and Refused."""
        answer: Any = json.loads(self._ask("POST", path, json.dumps(body).encode()) or b"{}")
        if not isinstance(answer, dict):
            raise Unreachable("the answer is no JSON object")
        return answer  # pyright: ignore[reportUnknownVariableType]

    def get(self, path: str) -> str:
        """The text at a path. Raises Unreachable and Refused."""
        return self._ask("GET", path, None).decode()

    def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        status, content = self._exchange(method, path, body, self._tls())
        if status < 300:
            return content
        message = f"HTTP {status}"
        with contextlib.suppress(ValueError, KeyError, TypeError):
            message = str(json.loads(content)["error"]["message"])[:500]
        if status >= 500 or status in (408, 429):
            raise Unreachable(message)
        raise Refused(status, message)

    def _exchange(
        self, method: str, path: str, body: bytes | None, context: ssl.SSLContext | None
    ) -> tuple[int, bytes]:
        connection = (
            http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
            if context is None
            else http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=context)
        )
        headers = {"content-type": "application/json", "connection": "close"}
        if self.session:
            headers["authorization"] = f"Bearer {self.session}"
        try:
            connection.request(method, self._base + path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(MOST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            # ssl's errors are OSErrors: a wrong certificate today may be mended tomorrow.
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def _tls(self) -> ssl.SSLContext | None:
        if not self._is_tls:
            return None
        if self._context is None:
            self._context = self._pinned() if self._pin else ssl.create_default_context()
        return self._context

    def _pinned(self) -> ssl.SSLContext:
        """A context that believes the one authority whose fingerprint we were given, and no other."""
        found = self._read_pinned()
        if found is None:
            # Anybody may answer this; what counts is the fingerprint. Nothing of ours is sent.
            session, self.session = self.session, ""
            try:
                anybody = ssl.create_default_context()
                anybody.check_hostname = False
                anybody.verify_mode = ssl.CERT_NONE
                status, content = self._exchange("GET", "/agent/control-ca.pem", None, anybody)
            finally:
                self.session = session
            found = self._matching(content.decode(errors="replace")) if status == 200 else None
            if found is None:
                raise Unreachable("the control plane's authority is not the one that CA_SHA256 names")
            write_private(self._pinned_path, found)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=found)
        return context

    def _read_pinned(self) -> str | None:
        try:
            with open(self._pinned_path) as file:
                return self._matching(file.read())
        except OSError:
            return None

    def _matching(self, bundle: str) -> str | None:
        for pem in _CERTIFICATE.findall(bundle):
            try:
                encoded = ssl.PEM_cert_to_DER_cert(pem)
            except ValueError:
                continue
            if hashlib.sha256(encoded).hexdigest() == self._pin:
                return f"{pem}\n"
        return None
