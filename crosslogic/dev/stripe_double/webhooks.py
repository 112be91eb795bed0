"""Deliveries to whoever wants events: signed, tried again with growing pauses, in the order that was asked for."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from typing import Any

import httpx

from crosslogic.dev.stripe_double.books import Body, Books
from crosslogic.dev.stripe_double.catalog import secret_of

_log = logging.getLogger(__name__)

_PAUSE_S = 0.05
_ANSWER_S = 10.0
_MOST_ATTEMPTS = 12


def sign(secret: str, payload: str, at: int) -> str:
    """The `Stripe-Signature` of a payload sent at an instant (Unix seconds)."""
    digest = hmac.new(secret.encode(), f"{at}.{payload}".encode(), hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class Postman:
    """Delivers what is due. The times here are the wall's: receivers compare signatures with it."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def run(self) -> None:
        """Deliver until cancelled."""
        # Receivers are on this machine: no proxy of the environment, no CAs.
        async with httpx.AsyncClient(timeout=_ANSWER_S, trust_env=False) as client:
            while True:
                await self.deliver_due(client)
                await asyncio.sleep(_PAUSE_S)

    async def deliver_due(self, client: httpx.AsyncClient) -> None:
        """One try at each delivery that is due."""
        behaviour = self._books.behaviour
        if not behaviour.webhook_copies:
            return
        due = self._books.database.execute(
            "SELECT * FROM deliveries WHERE NOT is_done AND due_at <= ? ORDER BY seq", (time.time(),)
        ).fetchall()
        for row in due[::-1] if behaviour.webhook_order == "reversed" else due:
            event, endpoint = self._books.find(row["event"]), self._books.find(row["endpoint"])
            is_done = event is None or endpoint is None or endpoint["status"] != "enabled"
            if event is not None and endpoint is not None and not is_done:
                answers = [await self._post(client, endpoint, event) for _ in range(behaviour.webhook_copies)]
                is_done = all(answers) or row["attempts"] + 1 >= _MOST_ATTEMPTS
            pause_s = behaviour.webhook_retry_s * 2 ** row["attempts"]
            self._books.database.execute(
                "UPDATE deliveries SET attempts = attempts + 1, is_done = ?, due_at = ? WHERE seq = ?",
                (is_done, time.time() + pause_s, row["seq"]),
            )

    async def _post(self, client: httpx.AsyncClient, endpoint: Body, event: Body) -> bool:
        url, payload = _url_of(endpoint), json.dumps(_payload(event))
        headers = {
            "content-type": "application/json; charset=utf-8",
            "stripe-signature": sign(secret_of(self._books, endpoint["id"]), payload, int(time.time())),
        }
        try:
            answer = await client.post(url, content=payload, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            _log.info("%s to %s: %s", event["type"], url, type(error).__name__)
            return False
        return answer.is_success


def _url_of(endpoint: Body) -> str:
    return str(endpoint.get("url") or endpoint["webhook_endpoint"]["url"])


def _payload(event: Body) -> dict[str, Any]:
    """What is sent: of a thin event all but its data."""
    if event["object"] == "v2.core.event":
        return {name: value for name, value in event.items() if name != "data"}
    return event
