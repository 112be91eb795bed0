"""Processes that are measured: started on the cores they are given, and what they have used, from `/proc`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
STOP_GRACE_S = 8.0


class BenchError(Exception):
    """Something cannot be measured as things are; the message says why and what to do next."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where things run: the gateway alone on `gateway`; the engine, the load and all servers on `rest`.

    `second` is the other core of a gateway of two processes: on a machine of two it is also the rest's.
    """

    gateway: int
    second: int
    rest: int

    @classmethod
    def choose(cls) -> Cores:
        """The first core that we may use for the gateway, the last for all else. Raises BenchError for one core."""
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < 2:
            raise BenchError("The protocol needs two cores: one for the gateway, one for the engine and the load.")
        return cls(allowed[0], allowed[1], allowed[-1])


@contextmanager
def on_cores(*cores: int) -> Generator[None]:
    """Run on these cores for a moment, so that a process started meanwhile inherits them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Program:
    """A process of ours with all its descendants."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        cores: Sequence[int],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: int | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log = log
        self._stop_signal = stop_signal
        self._is_stopped = False
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("ab") as output, on_cores(*cores):
                self._process = subprocess.Popen(
                    list(command),
                    env=None if environment is None else dict(environment),
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    user=user,
                    group=user,
                    extra_groups=None if user is None else [],
                    start_new_session=True,
                )
        except OSError as error:
            raise BenchError(f"{name} cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """Of the root of the tree."""
        return self._process.pid

    def wait_until(self, is_ready: Callable[[], bool], within_s: float) -> None:
        """Return when it does its job. Raises BenchError with the end of its log."""
        deadline = time.monotonic() + within_s
        while not is_ready():
            code = self._process.poll()
            if code is not None:
                raise BenchError(f"{self.name} ended with {code}:\n{self.last_words()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} was not ready within {within_s:.0f} s:\n{self.last_words()}")
            time.sleep(0.05)

    def last_words(self) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(f"    {line[:300]}" for line in text.splitlines()[-12:])

    def cpu_s(self) -> float:
        """User and system time of the whole tree so far, ended children included."""
        return sum(use.cpu_s for use in tree(self.pid))

    def rss_bytes(self) -> int:
        """Resident memory of the whole tree; pages that processes share are counted in each."""
        return sum(use.rss_bytes for use in tree(self.pid))

    def stop(self) -> None:
        """End it and its session, gently first. Once is enough: later its pid may be another's."""
        if self._is_stopped:
            return
        self._is_stopped = True
        if self._process.poll() is None:
            self._process.send_signal(self._stop_signal)
            try:
                self._process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        # Whatever it has started and left is in its session, which is ours alone.
        deadline = time.monotonic() + STOP_GRACE_S
        while left := _session(self.pid):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} has left processes that cannot be killed: {left}")
            time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Use:
    """What one process has used, by proc(5)."""

    pid: int
    parent: int
    session: int
    is_dead: bool  # and not collected by its parent yet
    cpu_s: float
    rss_bytes: int


def read_stat(text: str) -> Use:
    """Read one `/proc/PID/stat`."""
    # The name in parentheses may hold anything.
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    # From field 3 on: 3 state, 4 parent, 6 session, 14 to 17 times, of reaped children too, 24 pages.
    ticks = sum(int(field) for field in fields[11:15])
    return Use(
        int(head.split()[0]),
        int(fields[1]),
        int(fields[3]),
        fields[0] in "ZX",
        ticks * TICK_S,
        int(fields[21]) * PAGE_BYTES,
    )


def tree(root: int) -> list[Use]:
    """A process and all its living descendants."""
    children: dict[int, list[Use]] = {}
    found: list[Use] = []
    for use in _all():
        children.setdefault(use.parent, []).append(use)
        if use.pid == root:
            found.append(use)
    for use in found:  # Grows while it is walked.
        found.extend(children.get(use.pid, ()))
    return found


def _session(leader: int) -> list[int]:
    return [use.pid for use in _all() if use.session == leader and not use.is_dead]


def _all() -> list[Use]:
    found: list[Use] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                found.append(read_stat((folder / "stat").read_text()))
            except OSError:
                continue  # It has ended meanwhile.
    return found
