"""Spot notices: what AWS, GCP and Azure tell a machine before they take it. Each watcher blocks: run it in a thread.

Sources: the providers' documentation of IMDSv2 (spot/instance-action, events/recommendations/rebalance), of GCP's
metadata server (instance/preempted, wait_for_change) and of Azure's scheduled events (Preempt).
"""

from __future__ import annotations

import calendar
import http.client
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlsplit

TIMEOUT_S = 2.0
MOST_BYTES = 100_000
# GCP answers a waiting question after so long even if nothing changed.
GCP_WAIT_S = 30
AWS_TOKEN_S = 21_600
LONGEST_NOTICE_S = 86_400.0


@dataclass(frozen=True)
class Notice:
    """A cloud's word. `is_final`: it takes the machine; otherwise it only says that this is likelier than usual."""

    text: str
    left_s: float | None
    is_final: bool = True


class Away(Exception):
    """The metadata server does not answer, or is not this cloud's."""


class Watcher(ABC):
    """One cloud's metadata server. `pause_s` is the time between two questions."""

    name = ""
    pause_s = 1.0

    @abstractmethod
    def check(self) -> None:
        """Return when this cloud's server answers. Raises Away."""

    @abstractmethod
    def poll(self) -> Notice | None:
        """What it says now, None for nothing. Raises Away."""


class Aws(Watcher):
    """EC2, by IMDSv2 only: version 1 may be switched off."""

    name = "aws"

    def __init__(self, url: str) -> None:
        self._url = url
        self._token = ""

    def check(self) -> None:
        """Return when EC2's server gives a token. Raises Away."""
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_S)}
        status, body, _ = ask("PUT", f"{self._url}/latest/api/token", headers)
        if status != 200 or not body:
            raise Away(f"a token was refused with {status}")
        self._token = body.decode("latin-1").strip()

    def poll(self) -> Notice | None:
        """The instance action, else the recommendation to rebalance. Raises Away."""
        found = self._read("/latest/meta-data/spot/instance-action")
        if found is not None:
            return Notice(f"aws: {str(found.get('action', 'terminate'))[:32]}", _left(_iso(found.get("time"))))
        if self._read("/latest/meta-data/events/recommendations/rebalance") is not None:
            return Notice("aws: rebalance", None, is_final=False)
        return None

    def _read(self, path: str) -> Mapping[str, Any] | None:
        status, body, _ = ask("GET", self._url + path, {"X-aws-ec2-metadata-token": self._token})
        if status == 401:
            # Tokens expire, and a stopped machine that is started again has lost them.
            self.check()
            status, body, _ = ask("GET", self._url + path, {"X-aws-ec2-metadata-token": self._token})
        if status == 404:
            return None
        if status != 200:
            raise Away(f"{path} is answered with {status}")
        return _object(body)


class Gcp(Watcher):
    """Compute Engine: the question waits for a change, so the answer comes at once."""

    name = "gcp"
    pause_s = 0.2

    def __init__(self, host: str) -> None:
        self._url = f"http://{host}/computeMetadata/v1/instance/preempted"
        self._etag = ""

    def check(self) -> None:
        """Return when GCP's server answers. Raises Away."""
        self._ask(self._url, TIMEOUT_S)

    def poll(self) -> Notice | None:
        """Whether the machine is being preempted, as soon as that changes. Raises Away."""
        url = self._url
        if self._etag:
            # What changed between two questions is answered at once, because the last answer's tag is sent along.
            url += f"?wait_for_change=true&timeout_sec={GCP_WAIT_S}&last_etag={quote(self._etag)}"
        body, self._etag = self._ask(url, GCP_WAIT_S + 5)
        # Compute Engine leaves 30 s.
        return Notice("gcp: preempted", 30.0) if body.strip().upper() == b"TRUE" else None

    @staticmethod
    def _ask(url: str, timeout_s: float) -> tuple[bytes, str]:
        status, body, headers = ask("GET", url, {"Metadata-Flavor": "Google"}, timeout_s)
        if status != 200 or headers.get("metadata-flavor") != "Google":
            raise Away(f"answered with {status}, perhaps by another server")
        return body, headers.get("etag", "")


class Azure(Watcher):
    """Azure's scheduled events. They are the whole scale set's: only those that name this machine count."""

    name = "azure"

    def __init__(self, url: str) -> None:
        self._url = url
        self._machine = ""

    def check(self) -> None:
        """Return when Azure's server says this machine's name. Raises Away."""
        status, body, _ = ask(
            "GET",
            f"{self._url}/metadata/instance/compute/name?api-version=2021-02-01&format=text",
            {"Metadata": "true"},
        )
        if status != 200 or not body.strip():
            raise Away(f"the machine's name was answered with {status}")
        self._machine = body.decode(errors="replace").strip()

    def poll(self) -> Notice | None:
        """Whether this machine is being preempted. Raises Away."""
        # The first question after a while may take minutes; a later one finds the events ready.
        status, body, _ = ask(
            "GET", f"{self._url}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"}, 10.0
        )
        if status != 200:
            raise Away(f"scheduled events are answered with {status}")
        events: Any = (_object(body) or {}).get("Events")
        for event in events if isinstance(events, list) else []:  # pyright: ignore[reportUnknownVariableType]
            if not isinstance(event, dict) or event.get("EventType") != "Preempt":  # pyright: ignore[reportUnknownMemberType]
                continue
            if self._machine in (event.get("Resources") or []):  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
                return Notice("azure: preempt", _left(_rfc1123(event.get("NotBefore"))))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        return None


def ask(
    method: str, url: str, headers: Mapping[str, str], timeout_s: float = TIMEOUT_S
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers (names in lower case) of one exchange, never through a proxy. Raises Away."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_s)
    try:
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(MOST_BYTES), {name.lower(): value for name, value in answer.getheaders()}
    except (OSError, http.client.HTTPException) as error:
        raise Away(type(error).__name__) from error
    finally:
        connection.close()


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        value: Any = json.loads(body)
    except ValueError as error:
        raise Away("the answer is no JSON") from error
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _iso(text: Any) -> float | None:
    """Unix seconds of AWS' `2026-11-24T19:00:00Z`."""
    try:
        return float(calendar.timegm(time.strptime(str(text), "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def _rfc1123(text: Any) -> float | None:
    """Unix seconds of Azure's `Mon, 19 Sep 2016 18:29:47 GMT`; empty once the event has started."""
    try:
        return parsedate_to_datetime(str(text)).timestamp()
    except (ValueError, TypeError):
        return None


def _left(at: float | None) -> float | None:
    # A machine's clock may be off by years.
    return None if at is None else min(LONGEST_NOTICE_S, max(0.0, at - time.time()))
