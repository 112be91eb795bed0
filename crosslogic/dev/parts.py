"""A part of the stack: one server process, as whoever keeps it running sees it."""

from __future__ import annotations

import asyncio
import signal
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from crosslogic.bootstrap import ROOT
from crosslogic.settings import child_environment

_ANSWER_S = 2.0  # A server that takes longer to say that it is well is not.


class PartError(Exception):
    """A part cannot run as things are; the message says why and what to do next. Trying again would not help."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the process. `user` is a numeric user to become first; None for ours."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=child_environment)
    cwd: Path = ROOT
    user: int | None = None


class Part(Protocol):
    """What every part can say of itself."""

    @property
    def name(self) -> str:
        """Its name on the screen, and of its log."""
        ...

    @property
    def stop_signal(self) -> signal.Signals:
        """The signal that stops it cleanly."""
        ...

    def prepare(self) -> Launch:
        """Make ready what a start needs, also after a kill, and say how to start. Blocks. Raises PartError."""
        ...

    async def is_ready(self) -> bool:
        """Does it do its job now? Raises PartError if it never will."""
        ...


@dataclass(frozen=True, slots=True)
class PythonPart:
    """A process of ours. With an empty `health_url` it counts as ready once it has started."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    python: str
    health_url: str = ""
    token: str = ""
    stop_signal: signal.Signals = signal.SIGTERM

    def prepare(self) -> Launch:
        """Nothing to make ready."""
        return Launch([self.python, *self.arguments], self.environment)

    async def is_ready(self) -> bool:
        """Does its health URL answer 200?"""
        return not self.health_url or await answers(self.health_url, self.token)


async def answers(url: str, token: str = "") -> bool:
    """Is a GET of this URL on our own machine answered with 200?"""
    return await asyncio.to_thread(_get, url, token) is not None


async def get(url: str, token: str = "") -> bytes | None:
    """The body of a GET on our own machine; None if it was not answered with 200."""
    return await asyncio.to_thread(_get, url, token)


def _get(url: str, token: str) -> bytes | None:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    # Without the environment's proxies: they are for the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=_ANSWER_S) as answer:
            return answer.read() if answer.status == 200 else None
    except (OSError, urllib.error.URLError, ValueError):
        return None
