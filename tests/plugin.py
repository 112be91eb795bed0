"""What every run of `./test` adds to pytest: no silent skips in CI, and an exit that nothing can spoil.

Loaded by `./test` with `-p tests.plugin`.
"""

from __future__ import annotations

import os
import re
import sys
from typing import cast

import pytest

# Reasons for which CI may leave a test out, each with why that is right. Anything else that is skipped there fails the
# run, because a test that never runs proves nothing. `xfail` counts as a skip.
ACCEPTED_SKIPS: tuple[str, ...] = (
    r"only root may mount a disk of its own",  # For others a limit on the size of files stands for the full disk.
    r"no Stripe test key",  # Stripe itself can be asked only by who has an account there; the double always is.
    r"only root has to become somebody else",  # Postgres refuses root; the detours around that need root to be walked.
)


class SkipLaw:
    """Fails a CI run in which a test was skipped for a reason that is not in ACCEPTED_SKIPS."""

    def __init__(self) -> None:
        self.refused: list[str] = []

    def _note(self, nodeid: str, longrepr: object) -> None:
        # pytest gives the reason alone, or (file, line, reason).
        reason = str(cast("tuple[str, int, str]", longrepr)[2] if isinstance(longrepr, tuple) else longrepr)
        if not any(re.search(accepted, reason) for accepted in ACCEPTED_SKIPS):
            self.refused.append(f"{nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self._note(report.nodeid, getattr(report, "wasxfail", "") or report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report.nodeid, report.longrepr)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.refused:
            terminalreporter.section("skipped without an accepted reason (tests/plugin.py)", red=True)
            for line in self.refused:
                terminalreporter.line(line)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="The one seed that `./test simulation` lives through and shows.")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") == "true":
        config.pluginmanager.register(SkipLaw(), "crosslogic-skip-law")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_EXIT_STATUS] = int(session.exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    # A process that used temporalio sometimes dies while the interpreter ends; the verdict is known by now. One that
    # runs tests for another process still has to hand in its own.
    status = config.stash.get(_EXIT_STATUS, None)
    if status is not None and not hasattr(config, "workerinput"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_EXIT_STATUS = pytest.StashKey[int]()
