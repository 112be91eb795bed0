"""Processes that may outlive whoever started them: told from others with the same pid, and ended. Standard library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid with the moment its process started, because pids are used again."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of a running process; None if there is none (a zombie is none)."""
        started = _started(pid)
        return None if started is None else cls(pid, started)

    @classmethod
    def read(cls, stored: Any) -> ProcessId | None:
        """The inverse of `write`; None for anything else."""
        try:
            return cls(int(stored["pid"]), str(stored["started"]))
        except (KeyError, TypeError, ValueError):
            return None

    def write(self) -> dict[str, Any]:
        """As JSON, for a file that the next start reads."""
        return {"pid": self.pid, "started": self.started}

    @property
    def is_alive(self) -> bool:
        """Does this very process still run?"""
        return _started(self.pid) == self.started

    def signal(self, number: int) -> None:
        """Send a signal to this process alone, if it still runs."""
        if self.is_alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        """SIGKILL this process, if it still runs, and everything in the group that it leads."""
        if not self.is_alive:
            return
        try:
            if os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def end(processes: dict[ProcessId, int], grace_s: float) -> list[ProcessId]:
    """Send each process its stop signal, wait up to `grace_s` for all, and SIGKILL what is left, which is returned.

    A stop signal of SIGKILL ends the process at once. Blocks.
    """
    deadline = time.monotonic() + grace_s
    for process, number in processes.items():
        process.signal(number)
    while time.monotonic() < deadline and any(process.is_alive for process in processes):
        time.sleep(0.02)
    left = [process for process in processes if process.is_alive]
    for process in left:
        process.kill()
    return left


def command_of(pid: int) -> str:
    """A process's command line, for people and for telling what it is; empty if it is gone or not ours to see."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()


def _started(pid: int) -> str | None:
    """A text that is the same for as long as the process lives and different for any later one with its pid."""
    if sys.platform == "linux":
        try:
            # The name in parentheses may hold anything. Fields 3 and 22 of proc(5): the state, the start in ticks.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{_boot()}/{fields[19]}"
    answer = subprocess.run(["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = answer.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
