"""The double's memory: one SQLite file. What was answered is in it, so that a SIGKILL loses nothing."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from crosslogic.dev.stripe_double.behaviour import Behaviour
from crosslogic.dev.stripe_double.refusals import Refusal, missing

Body: TypeAlias = dict[str, Any]

IDEMPOTENCY_S = 86_400  # Stripe forgets a key after at least this long.
_MOST_CALLS = 20_000

_TABLES = """
    CREATE TABLE IF NOT EXISTS objects (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, kind TEXT NOT NULL, customer TEXT,
        created INTEGER NOT NULL, body TEXT NOT NULL
    );
    CREATE INDEX IF NOT EXISTS objects_of ON objects (kind, customer, seq);
    CREATE TABLE IF NOT EXISTS meter_events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, meter TEXT NOT NULL, customer TEXT NOT NULL, identifier TEXT NOT NULL,
        at INTEGER NOT NULL, window INTEGER NOT NULL, value INTEGER NOT NULL, received_at REAL NOT NULL,
        place REAL NOT NULL, is_void INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX IF NOT EXISTS meter_events_of ON meter_events (meter, customer, at);
    CREATE INDEX IF NOT EXISTS meter_events_by ON meter_events (identifier);
    CREATE TABLE IF NOT EXISTS replies (
        key TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, status INTEGER NOT NULL, body TEXT NOT NULL, at REAL NOT NULL
    );
    CREATE TABLE IF NOT EXISTS deliveries (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL, endpoint TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0, due_at REAL NOT NULL, is_done INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (is_done, due_at);
    CREATE TABLE IF NOT EXISTS calls (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, method TEXT NOT NULL, path TEXT NOT NULL, key TEXT NOT NULL,
        status INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, body TEXT NOT NULL);
"""


class Books:
    """All objects of the account, its clock and its behaviour. Writes belong into a `transaction`."""

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.row_factory = sqlite3.Row
        # Synced at checkpoints only: a killed process loses nothing, and a double need not survive its machine.
        self.database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _TABLES)
        self.behaviour = Behaviour.model_validate(self.note("behaviour"))
        self._clock = self.note("clock")

    @contextmanager
    def transaction(self) -> Generator[None]:
        """All or nothing."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")

    def forget(self) -> None:
        """Start over with an empty account that behaves as documented."""
        with self.transaction():
            for table in ("objects", "meter_events", "replies", "deliveries", "calls", "notes"):
                self.database.execute(f"DELETE FROM {table}")  # noqa: S608  # A name of ours.
            self.behaviour, self._clock = Behaviour(), {}
            self.save_behaviour()

    # The clock.

    @property
    def now(self) -> float:
        """Unix seconds of the double's clock: the wall's unless it was set."""
        frozen = self._clock.get("frozen_at")
        return self._wall() if frozen is None else float(frozen)

    @property
    def second(self) -> int:
        """`now`, in whole seconds, as Stripe shows times."""
        return int(self.now)

    @property
    def is_frozen(self) -> bool:
        """Does the clock move only when it is told to?"""
        return self._clock.get("frozen_at") is not None

    def set_clock(self, frozen_at: float | None) -> None:
        """Stop the clock at an instant, or let it go on with the wall's (None)."""
        self._clock = {"frozen_at": frozen_at}
        self.write_note("clock", self._clock)

    # Objects.

    def add(self, kind: str, prefix: str, body: Mapping[str, Any], *, identifier: str = "", name: str = "") -> Body:
        """Keep a new object. `name` is what Stripe calls its kind in `object`, if not `kind` itself."""
        (last,) = self.database.execute("SELECT coalesce(max(seq), 0) FROM objects").fetchone()
        made = {
            "id": identifier or f"{prefix}_double{last + 1:08d}",
            "object": name or kind,
            "created": self.second,
            "livemode": False,
            **body,
        }
        customer = made.get("customer")
        try:
            self.database.execute(
                "INSERT INTO objects (id, kind, customer, created, body) VALUES (?, ?, ?, ?, ?)",
                (made["id"], kind, customer, made["created"], json.dumps(made)),
            )
        except sqlite3.IntegrityError:
            raise Refusal(f"{kind} already exists.", code="resource_already_exists", param="id") from None
        return made

    def save(self, body: Body) -> Body:
        """Write an object's new content."""
        self.database.execute("UPDATE objects SET body = ? WHERE id = ?", (json.dumps(body), body["id"]))
        return body

    def get(self, kind: str, identifier: str, param: str = "id") -> Body:
        """One object. Raises Refusal (resource_missing)."""
        row = self.database.execute("SELECT body FROM objects WHERE id = ? AND kind = ?", (identifier, kind)).fetchone()
        if row is None:
            raise missing(kind, identifier, param)
        return json.loads(row["body"])

    def find(self, identifier: str) -> Body | None:
        """One object of any kind."""
        row = self.database.execute("SELECT body FROM objects WHERE id = ?", (identifier,)).fetchone()
        return None if row is None else json.loads(row["body"])

    def all(self, kind: str, customer: str | None = None) -> list[Body]:
        """Every object of a kind, oldest first."""
        rows = self.database.execute(
            "SELECT body FROM objects WHERE kind = ? AND (? IS NULL OR customer = ?) ORDER BY seq",
            (kind, customer, customer),
        )
        return [json.loads(row["body"]) for row in rows]

    # Events.

    def emit(self, kind: str, subject: Body) -> Body:
        """An event with a snapshot of its subject, on its way to every endpoint that wants it."""
        event = self.add(
            "event",
            "evt",
            {"type": kind, "api_version": None, "data": {"object": subject}, "pending_webhooks": 0, "request": None},
        )
        self._send(event, "webhook_endpoint")
        return event

    def emit_thin(self, kind: str, related: Body, data: Body) -> Body:
        """A thin event: who is told of it must fetch it."""
        event = self.add(
            "v2.core.event",
            "evt_v2",
            {
                "type": kind,
                "created": iso(self.now),
                "data": data,
                "reason": None,
                "context": None,
                "related_object": {
                    "id": related["id"],
                    "type": related["object"],
                    "url": f"/v1/billing/meters/{related['id']}",
                },
            },
        )
        self._send(event, "v2.core.event_destination")
        return event

    def _send(self, event: Body, endpoints: str) -> None:
        for endpoint in self.all(endpoints):
            wanted: list[str] = endpoint["enabled_events"]
            if endpoint["status"] == "enabled" and ("*" in wanted or event["type"] in wanted):
                self.database.execute(
                    "INSERT INTO deliveries (event, endpoint, due_at) VALUES (?, ?, ?)",
                    (event["id"], endpoint["id"], self._wall()),
                )

    # Idempotency keys, and what was called.

    def reply_of(self, key: str) -> sqlite3.Row | None:
        """What a key was answered, while Stripe still knows."""
        return self.database.execute(
            "SELECT * FROM replies WHERE key = ? AND at > ?", (key, self.now - IDEMPOTENCY_S)
        ).fetchone()

    def keep_reply(self, key: str, fingerprint: str, status: int, body: Body) -> None:
        """Remember what a key was answered."""
        self.database.execute(
            "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)",
            (key, fingerprint, status, json.dumps(body), self.now),
        )

    def note_call(self, method: str, path: str, key: str, status: int) -> None:
        """Remember that a call was made, for whoever proves that none was made."""
        cursor = self.database.execute(
            "INSERT INTO calls (method, path, key, status) VALUES (?, ?, ?, ?)", (method, path, key, status)
        )
        self.database.execute("DELETE FROM calls WHERE seq <= ?", ((cursor.lastrowid or 0) - _MOST_CALLS,))

    def calls(self, after: int) -> list[Body]:
        """The calls since one of them."""
        rows: Iterable[sqlite3.Row] = self.database.execute("SELECT * FROM calls WHERE seq > ? ORDER BY seq", (after,))
        return [dict(row) for row in rows]

    # Small things.

    def note(self, name: str) -> Body:
        """One of the small documents; empty if nobody has written it."""
        row = self.database.execute("SELECT body FROM notes WHERE name = ?", (name,)).fetchone()
        return {} if row is None else json.loads(row["body"])

    def write_note(self, name: str, body: Body) -> None:
        """Replace one of the small documents."""
        self.database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(body)))

    def save_behaviour(self) -> None:
        """Write down how often each fault is still due."""
        self.write_note("behaviour", self.behaviour.model_dump())


def part(body: Body, name: str) -> Body:
    """An object inside an object; empty if it is not there."""
    return body.get(name) or {}


def iso(at: float) -> str:
    """An instant as the v2 API shows it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
