"""Metadata servers of AWS, GCP and Azure, as their documentation describes them, on a port of this machine."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Metadata:
    """One server that is all three clouds' for whoever asks in that cloud's way. A test changes what it says."""

    def __init__(self) -> None:
        self.aws_action: dict[str, Any] | None = None
        self.aws_rebalance: dict[str, Any] | None = None
        self.aws_tokens = 0
        self.aws_valid_token = ""
        self.azure_events: list[dict[str, Any]] = []
        self.machine = "spot-vm_3"
        self.waiting = threading.Event()
        self._preempted = "FALSE"
        self._changed = threading.Condition()
        self._etag = 1
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                if self.path != "/latest/api/token" or "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
                    self._say(400, b"")
                    return
                outer.aws_tokens += 1
                outer.aws_valid_token = f"token-{outer.aws_tokens}"
                self._say(200, outer.aws_valid_token.encode())

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                if path.startswith("/latest/meta-data/"):
                    self._aws(path)
                elif path.startswith("/computeMetadata/"):
                    self._gcp()
                elif path.startswith("/metadata/"):
                    self._azure(path)
                else:
                    self._say(404, b"")

            def _aws(self, path: str) -> None:
                if self.headers.get("X-aws-ec2-metadata-token") != outer.aws_valid_token:
                    self._say(401, b"")
                    return
                found = {
                    "/latest/meta-data/spot/instance-action": outer.aws_action,
                    "/latest/meta-data/events/recommendations/rebalance": outer.aws_rebalance,
                }.get(path)
                self._say(404, b"") if found is None else self._say(200, json.dumps(found).encode())

            def _gcp(self) -> None:
                if self.headers.get("Metadata-Flavor") != "Google":
                    self._say(403, b"")
                    return
                asked = parse_qs(urlsplit(self.path).query)
                with outer._changed:
                    if asked.get("wait_for_change") == ["true"] and asked.get("last_etag") == [str(outer._etag)]:
                        outer.waiting.set()
                        outer._changed.wait(float(asked.get("timeout_sec", ["10"])[0]))
                    body, etag = outer._preempted, str(outer._etag)
                self._say(200, body.encode(), ("Metadata-Flavor", "Google"), ("ETag", etag))

            def _azure(self, path: str) -> None:
                if self.headers.get("Metadata") != "true":
                    self._say(400, b"")
                elif path == "/metadata/instance/compute/name":
                    self._say(200, outer.machine.encode())
                else:
                    document = {"DocumentIncarnation": 1, "Events": outer.azure_events}
                    self._say(200, json.dumps(document).encode())

            def _say(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                # Agents are ended while they wait.
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def preempt(self) -> None:
        """GCP takes the machine: whoever waits is answered at once."""
        with self._changed:
            self._preempted = "TRUE"
            self._etag += 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
