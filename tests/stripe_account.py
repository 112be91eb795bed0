"""Stripe's answer about an account, as its API reference documents it, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class _Account(BaseHTTPRequestHandler):
    """Answers as Stripe's API reference documents it: by the key that it is shown."""

    def do_GET(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        status, body = {
            "sk_test_good": (200, '{"object": "balance", "livemode": false, "available": [], "pending": []}'),
            "sk_live_good": (200, '{"object": "balance", "livemode": true, "available": [], "pending": []}'),
            "rk_live_narrow": (403, '{"error": {"type": "invalid_request_error", "message": "no permission"}}'),
            "sk_live_outage": (500, '{"error": {"type": "api_error", "message": "sorry"}}'),
        }.get(key, (401, '{"error": {"type": "invalid_request_error", "message": "Invalid API Key provided"}}'))
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("stripe-should-retry", "false")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def stripe_account() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Account)
    server.paths = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    assert set(server.paths) == {"/v1/balance"}  # type: ignore[attr-defined]
