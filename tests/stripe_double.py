"""The Stripe double as tests have it: a process of its own, its control API, and clients of the real library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe

from crosslogic.bootstrap import ROOT
from crosslogic.clients.stripe import StripeAccount, connect
from crosslogic.dev.state import free_port
from crosslogic.settings import child_environment

KEY = "sk_test_double"
START_S = 60.0

# Where the clock of every test starts: in the middle of a month.
START = datetime(2026, 6, 10, 9, 30, tzinfo=UTC)


class Double:
    """One process of the double, its control API, and the library's client for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{free_port()}"
        self.control = httpx.Client(
            base_url=f"{self.url}/control",
            headers={"authorization": f"Bearer {KEY}"},
            timeout=30,
            trust_env=False,
        )
        self.client = stripe.StripeClient(KEY, base_addresses={"api": self.url}, max_network_retries=0)

    def start(self) -> None:
        """Start it and return when it answers."""
        environment = child_environment(
            CROSSLOGIC_MODE="dev",
            CROSSLOGIC_STATE_DIR=str(self._folder),
            CROSSLOGIC_STRIPE_URL=self.url,
            CROSSLOGIC_STRIPE_API_KEY=KEY,
        )
        with (self._folder / "double.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "crosslogic.dev.stripe_double"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until = time.monotonic() + START_S
        while True:
            try:
                self.control.get("/clock").raise_for_status()
                return
            except httpx.TransportError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise AssertionError(self.log()) from None
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL it."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def stop(self) -> None:
        """Stop it cleanly."""
        if self._process and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)
        self.control.close()

    def log(self) -> str:
        """What it has said so far."""
        return (self._folder / "double.log").read_text()

    def start_over(self) -> None:
        """Empty the account; the clock stands at START."""
        self.control.delete("/account").raise_for_status()
        self.set_time(START)

    def behave(self, **values: Any) -> None:
        """Order a behaviour; what is not named is as documented."""
        self.control.put("/behaviour", json=values).raise_for_status()

    def fail(self, operation: str, *kinds: str, **more: Any) -> None:
        """The next calls of an operation go wrong, one after the other in these ways."""
        self.behave(faults=[{"operation": operation, "kind": kind, **more} for kind in kinds])

    def set_time(self, at: datetime) -> None:
        """Let the clock stand at an instant; what is due until then happens."""
        self.control.put("/clock", json={"frozen_at": at.timestamp()}).raise_for_status()

    def advance(self, seconds: float) -> None:
        """Move the clock on."""
        self.control.put("/clock", json={"advance_s": seconds}).raise_for_status()

    def let_pay(self, customer: str, outcome: str) -> None:
        """What the customer's payments do from now on: `succeed` or `fail`."""
        self.control.put("/payments", json={"customer": customer, "outcome": outcome}).raise_for_status()

    def dispute(self, **order: str) -> dict[str, Any]:
        """Dispute what paid an invoice, or decide a dispute."""
        answer = self.control.post("/disputes", json=order).raise_for_status()
        return answer.json()

    def calls(self, after: int = 0) -> list[dict[str, Any]]:
        """Every call of Stripe's API since that one."""
        return self.control.get("/calls", params={"after": after}).raise_for_status().json()["calls"]

    def writes(self, after: int = 0) -> list[str]:
        """The paths of the calls since then that had or wanted an effect."""
        return [call["path"] for call in self.calls(after) if call["method"] != "GET"]

    def account(self) -> StripeAccount:
        """Our client for it, which does not really wait between its tries."""
        return StripeAccount(connect(KEY, base_url=self.url), sleep=_at_once, jitter=lambda: 0.0)


async def _at_once(_: float) -> None:
    pass


@pytest.fixture(scope="session")
def double_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Double]:
    """The run's one process of the double."""
    one = Double(tmp_path_factory.mktemp("stripe"))
    one.start()
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture
def double(double_process: Double) -> Double:
    """The double with an empty account and as documented, its clock stopped at START."""
    double_process.start_over()
    return double_process
