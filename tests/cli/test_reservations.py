"""Reservations on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.cli.conftest import Run

Ok = Callable[..., str]
Read = Callable[..., Any]


class TestReservations:
    def test_from_the_first_unit_to_the_end(self, ok: Ok, read: Read, run: Run) -> None:
        ok("orgs", "create", "acme")
        words = ("reservations", "add", "--org", "acme", "--model", "llama-7b", "--region", "in-mumbai")
        added = read(*words, "--units", "100", "--starts-at", "2099-01-01T00:00:00Z", "--no-overage")
        assert (added["capacity_units"], added["overage"], added["model"]) == (100, False, "llama-3-8b")
        assert added["id"] in ok("reservations", "list", "--org", "acme")
        assert "ends at 2099-06-01T00:00:00Z" in ok("reservations", "end", added["id"], "--at", "2099-06-01T00:00:00Z")
        ok("reservations", "end", added["id"])
        refused = run(*words, "--units", "1", "--starts-at", "2099-01-01T00:30:00Z")
        assert refused.returncode == 1
        assert "must be a full hour (UTC)" in refused.stderr
