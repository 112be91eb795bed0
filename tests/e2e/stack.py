"""A whole stack as its user has it: `./run` as a process, watched and hurt from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk_dev_demo"
ADMIN = "adm_dev_demo"

T = TypeVar("T")


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(look: Callable[[], T], *, within_s: float, what: str) -> T:
    """The first true value that `look` returns; errors on the way count as not yet."""
    until = time.monotonic() + within_s
    last: object = None
    while time.monotonic() < until:
        try:
            found = look()
            if found:
                return found
            last = found
        except (httpx.HTTPError, OSError, LookupError, ValueError, psutil.Error) as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"not within {within_s} s: {what}; last seen: {last!r}")


class Stack:
    """One running `./run`. Its screen is kept in `lines`."""

    def __init__(
        self,
        state: Path,
        port: int,
        *,
        root: Path = ROOT,
        arguments: tuple[str, ...] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.state = state
        self.port = port
        self.root = root
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        given = ("--state", str(state), "--port", str(port)) if arguments is None else arguments
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            [str(root / "run"), *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=root,
            env=without_our_environment() | dict(settings or {}),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def screen(self) -> str:
        """What `./run` has printed."""
        return "\n".join(self.lines)

    def wait_until_serving(self, within_s: float = 120) -> float:
        """Wait for the first answer of a real model; seconds since the start."""

        def look() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"./run ended with {self.process.returncode}:\n{self.screen}")
            return self.ask("hi").status_code == 200

        eventually(look, within_s=within_s, what="a first answer")
        return time.monotonic() - self.started_at

    def wait_for_nodes(self, count: int, within_s: float = 90, **filters: str) -> list[dict[str, Any]]:
        """The ready nodes, once there are exactly `count` that match."""
        return eventually(
            lambda: found if len(found := self.nodes(state="ready", **filters)) == count else [],
            within_s=within_s,
            what=f"{count} ready nodes with {filters}",
        )

    @property
    def endpoints(self) -> dict[str, str]:
        """What `endpoints.json` says."""
        return json.loads((self.state / "endpoints.json").read_text())

    def ask(self, text: str, *, key: str = KEY, timeout_s: float = 60, **fields: Any) -> httpx.Response:
        """A chat completion, not streamed."""
        body = {"model": "llama-7b", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        return httpx.post(
            f"{self.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=timeout_s
        )

    def ask_until_answered(self, *, within_s: float, **fields: Any) -> httpx.Response:
        """The first answer with status 200."""
        answers: list[httpx.Response] = []

        def look() -> bool:
            answers.append(self.ask("hi", **fields))
            return answers[-1].status_code == 200

        eventually(look, within_s=within_s, what=f"an answer with {fields}")
        return answers[-1]

    def admin(self, method: str, path: str, **options: Any) -> Any:
        """An admin call's JSON."""
        answer = httpx.request(
            method, f"{self.url}/admin{path}", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30, **options
        )
        answer.raise_for_status()
        return answer.json()

    def nodes(self, **filters: str) -> list[dict[str, Any]]:
        """Nodes as the admin API lists them."""
        listed: dict[str, list[dict[str, Any]]] = self.admin("GET", "/nodes", params=filters)
        return listed["data"]

    def command(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """`./run COMMAND …` against this stack."""
        return subprocess.run(
            [str(self.root / "run"), "--state", str(self.state), *words],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self.root,
        )

    def temporal(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """The real Temporal CLI."""
        return self.command("temporal", *words, timeout_s=timeout_s)

    def machines(self) -> list[dict[str, Any]]:
        """The local cloud's machines, through the admin's eyes only: by their processes."""
        return [
            {"pid": process.pid, "command": process.info["cmdline"]}
            for process in self._descendants_and_engines()
            if "crosslogic.dev.engine" in " ".join(process.info["cmdline"] or [])
        ]

    def _descendants_and_engines(self) -> list[psutil.Process]:
        state = str(self.state)
        found: list[psutil.Process] = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            environment: dict[str, str] = process.info["environ"] or {}
            if state in " ".join([*(process.info["cmdline"] or []), *environment.values()]):
                found.append(process)
        return found

    def part(self, *marks: str) -> psutil.Process:
        """The process of one part, found by words of its command line."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with_marks = " ".join(process.cmdline())
            if all(mark in with_marks for mark in marks):
                return process
        raise LookupError(f"no process with {marks}")

    def kill(self, *marks: str) -> int:
        """SIGKILL one part; its pid."""
        process = self.part(*marks)
        process.send_signal(signal.SIGKILL)
        return process.pid

    def stop(self) -> float:
        """SIGTERM, as Ctrl-C does it; seconds until everything was gone."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(20)
        self._reader.join(5)
        return time.monotonic() - began

    def memory_mib(self) -> dict[str, float]:
        """PSS of every process of the stack, in MiB."""
        sizes: dict[str, float] = {}
        supervisor = psutil.Process(self.process.pid)
        processes = {process.pid: process for process in [supervisor, *supervisor.children(recursive=True)]}
        processes |= {process.pid: process for process in self._descendants_and_engines()}
        for process in processes.values():
            try:
                pss = next(
                    line
                    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                    if line.startswith("Pss:")
                )
                sizes[f"{process.pid} {' '.join(process.cmdline())[:80]}"] = int(pss.split()[1]) / 1024
            except (OSError, psutil.Error, StopIteration):
                continue
        return sizes


def is_gone(pid: int) -> bool:
    """Has the process ended?"""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def python() -> str:
    """The interpreter of the project's environment."""
    return sys.executable


def without_our_environment() -> dict[str, str]:
    """The environment without what this test run has set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("CROSSLOGIC_", "TEMPORAL_"))}
