from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from crosslogic.clients import stripe
from crosslogic.domain.errors import Rejected, Unavailable


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
def account() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Account)
    server.paths = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    assert set(server.paths) == {"/v1/balance"}  # type: ignore[attr-defined]


class TestCheckAccount:
    @pytest.mark.parametrize(("key", "mode"), [("sk_test_good", "test"), ("sk_live_good", "live")])
    def test_tells_test_from_live(self, account: str, key: str, mode: str) -> None:
        said = stripe.check_account(stripe.connect(key, base_url=account))
        assert f"in {mode} mode" in said

    @pytest.mark.parametrize(("key", "status"), [("sk_test_wrong", 401), ("rk_live_narrow", 403)])
    def test_says_what_to_do_about_a_key_that_is_refused(self, account: str, key: str, status: int) -> None:
        with pytest.raises(Rejected, match="CROSSLOGIC_STRIPE_API_KEY") as refusal:
            stripe.check_account(stripe.connect(key, base_url=account))
        assert refusal.value.status == status
        assert key not in refusal.value.message

    def test_calls_an_outage_an_outage(self, account: str) -> None:
        with pytest.raises(Unavailable):
            stripe.check_account(stripe.connect("sk_live_outage", base_url=account))
