"""What a new machine needs of the control plane: the agent's file and somebody to register with."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

AGENT = Path(__file__).with_name("stand_in_agent.py")


class ControlPlane:
    """Serves the agent as the API does, and keeps what agents say when they register."""

    def __init__(self) -> None:
        self.agent = AGENT.read_bytes()
        self.sha256 = hashlib.sha256(self.agent).hexdigest()
        self.registrations: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        plane = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                files = {
                    "/agent/crosslogic-agent.pyz": plane.agent,
                    "/agent/crosslogic-agent.pyz.sha256": f"{plane.sha256}\n".encode(),
                }
                self._answer(200 if self.path in files else 404, files.get(self.path, b""))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                plane.registrations.append(json.loads(body))
                self._answer(200, b"{}")

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        return Handler
