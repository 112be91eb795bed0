"""Keeps the engine running: starts it, starts it again when it dies or hangs, and keeps its latest lines."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from crosslogic.agent import disk
from crosslogic.agent.config import engine_environment

# The ring that is sent on demand, and what is kept on disk.
KEPT_LINES = 2_000
LONGEST_LINE_BYTES = 4_000
LOG_BYTES = 16_000_000
KEPT_LOGS = 3

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# An engine that ran so long has recovered: its next death starts with a short pause again.
RECOVERED_S = 300.0
# One that answered once and then is silent for so many looks in a row hangs.
WEDGED_LOOKS = 6
LOOK_INTERVAL_S = 5.0
# Weights of hundreds of GB take a while; an engine that has not answered by then never will.
LOAD_TIMEOUT_S = 3_600.0
STOP_S = 10.0

# What engines and CUDA write when memory runs out.
OUT_OF_MEMORY = ("out of memory", "outofmemory", "failed to allocate", "cudamalloc failed")

# Looked up before there are threads: after a fork only one of them goes on.
_PR_SET_PDEATHSIG = 1
_PRCTL: Any = getattr(ctypes.CDLL(None), "prctl", None)


class Engine:
    """The engine process of this node. Counts restarts and the times that memory ran out."""

    def __init__(
        self,
        command: str,
        port: int,
        credential: str,
        state_dir: str,
        is_well: Callable[[], Awaitable[bool]],
        say: Callable[[str], None],
        look_interval_s: float = LOOK_INTERVAL_S,
    ) -> None:
        self._arguments = [
            word.replace("{port}", str(port)).replace("{credential}", credential) for word in shlex.split(command)
        ]
        self._port = port
        self._credential = credential
        self._is_well = is_well
        self._say = say
        self._look_interval_s = look_interval_s
        self._log = disk.Log(os.path.join(state_dir, "engine.log"), LOG_BYTES, KEPT_LOGS)
        self._process: asyncio.subprocess.Process | None = None
        self._killed_at = disk.kernel_kills()
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.restarts = 0
        self.out_of_memory = 0
        self.started_at = 0.0
        self.is_up = False

    async def keep_running(self) -> None:
        """Run for the life of the agent."""
        pause_s = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            why = await self._run_once()
            self.is_up = False
            self._note_kernel_kills()
            if time.monotonic() - began > RECOVERED_S:
                pause_s = FIRST_PAUSE_S
            self._say(f"the engine {why}; it is started again in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
            self.restarts += 1

    async def stop(self) -> None:
        """End the engine: SIGTERM, and SIGKILL for what is left of it after `STOP_S`."""
        process = self._process
        if process is None:
            return
        for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            try:
                await asyncio.wait_for(process.wait(), patience_s)
                break
            except Exception:
                continue
        # Its children share its group and may outlive it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    async def _run_once(self) -> str:
        """Start it and wait until it must be started again; why, in words."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=engine_environment(self._credential, self._port),
                start_new_session=True,
                preexec_fn=_die_with_the_agent,
            )
        except (OSError, ValueError) as error:
            return f"cannot be started ({error})"
        self.started_at = time.time()
        self._say(f"the engine runs as process {self._process.pid}")
        reading = asyncio.ensure_future(self._read(self._process))
        watching = asyncio.ensure_future(self._watch())
        exited = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({watching, exited}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                return f"ended with {exited.result()}"
            return watching.result()
        finally:
            watching.cancel()
            await self.stop()
            self._process = None
            reading.cancel()

    async def _watch(self) -> str:
        """Return when it hangs."""
        began = time.monotonic()
        has_answered = False
        silent = 0
        while True:
            await asyncio.sleep(self._look_interval_s if has_answered else min(1.0, self._look_interval_s))
            if await self._is_well():
                has_answered, silent, self.is_up = True, 0, True
                continue
            silent += 1
            if silent >= 2:
                self.is_up = False
            if has_answered and silent >= WEDGED_LOOKS:
                return f"has been silent for {silent} looks"
            if not has_answered and time.monotonic() - began > LOAD_TIMEOUT_S:
                return f"has not answered within {LOAD_TIMEOUT_S:.0f} s"

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        rest = b""
        while True:
            data = await process.stdout.read(65_536)
            if not data:
                return
            self._log.write(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            if len(rest) > LONGEST_LINE_BYTES:
                self._take(rest)
                rest = b""

    def _take(self, line: bytes) -> None:
        text = line[:LONGEST_LINE_BYTES].decode(errors="replace").rstrip()
        # Engines may print how they were started.
        text = text.replace(self._credential, "nc_…") if self._credential else text
        self.lines.append(text)
        lowered = text.lower()
        if any(word in lowered for word in OUT_OF_MEMORY):
            self.out_of_memory += 1

    def _note_kernel_kills(self) -> None:
        killed = disk.kernel_kills()
        if killed > self._killed_at:
            self.out_of_memory += killed - self._killed_at
        self._killed_at = killed


def _die_with_the_agent() -> None:
    """In the child, before the engine: an engine whose agent was killed must not hold the GPU against its successor."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
