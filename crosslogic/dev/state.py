"""The state directory: what lies where, and how its small files are written. Standard library only."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from crosslogic.bootstrap import ROOT
from crosslogic.dev.processes import ProcessId

DEFAULT = ROOT / ".crosslogic"

# Everything the stack, its parts and its users put at the top of the directory: `--fresh` deletes nothing else.
_NAMES = frozenset(
    {
        "logs", "postgres", "temporal", "valkey", "cloud", "stripe", "usage-log",
        "secrets.json", "endpoints.json", "ports.json", "stack.json", "lock",
    }
)  # fmt: skip


# Of a file that is being written; one that a crash has left is ours too.
_TEMPORARY = ".new"


class StateError(Exception):
    """The directory cannot be used; the message says why and what to do next."""


@dataclass(frozen=True, slots=True)
class State:
    """One state directory, by its absolute path."""

    path: Path

    @classmethod
    def at(cls, path: str | Path | None) -> State:
        """The directory that a user named, or the default one."""
        return cls(Path(path).expanduser().resolve() if path else DEFAULT)

    @property
    def logs(self) -> Path:
        """One log a part."""
        return self.path / "logs"

    @property
    def cloud(self) -> Path:
        """The local cloud's tables and its machines' logs."""
        return self.path / "cloud"

    def foreign(self) -> list[str]:
        """Names in the directory that are not ours."""
        if not self.path.is_dir():
            return []
        names = (entry.name for entry in self.path.iterdir())
        return sorted(name for name in names if name.removesuffix(_TEMPORARY) not in _NAMES)

    def make(self) -> None:
        """Create the directory. Raises StateError if it holds anything that is not ours, or cannot be written."""
        foreign = self.foreign()
        if foreign:
            raise StateError(
                f"{self.path} holds things that are not a CrossLogic state directory's ({', '.join(foreign[:3])}): "
                "name another one with --state DIR."
            )
        try:
            for folder in (self.path, self.logs, self.cloud, self.path / "usage-log"):
                folder.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        except OSError as error:
            raise StateError(
                f"{self.path} cannot be written ({error.strerror}): name another one with --state DIR."
            ) from error

    def clear(self) -> None:
        """Delete everything in the directory but the lock. Raises StateError if anything in it is not ours."""
        self.make()
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
        self.make()

    def read(self, name: str) -> dict[str, Any]:
        """One of the JSON files at the top; empty if it is not there or was cut short."""
        return read_json(self.path / name)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replace one of the JSON files at the top."""
        write_json(self.path / name, content)

    def supervisor(self) -> ProcessId | None:
        """The supervisor that last wrote here, whether it lives or not."""
        return ProcessId.read(self.read("stack.json").get("supervisor"))

    def parts(self) -> dict[str, ProcessId]:
        """The processes that it had started, by part, whether they live or not."""
        stored = self.read("stack.json").get("parts", {})
        found = {name: ProcessId.read(process) for name, process in stored.items()}
        return {name: process for name, process in found.items() if process}

    def record(self, part: str, process: ProcessId | None) -> None:
        """Note a part's process, for whoever comes after a kill."""
        stored = self.read("stack.json")
        stored.setdefault("parts", {})[part] = process.write() if process else None
        self.write("stack.json", stored)

    def engines(self) -> dict[str, ProcessId]:
        """The local cloud's engine processes by cluster, whether they live or not."""
        stored = read_json(self.cloud / "machines.json").get("machines", {})
        found = {cluster: ProcessId.read(machine.get("process")) for cluster, machine in stored.items()}
        return {cluster: process for cluster, process in found.items() if process}

    def acquire(self) -> int | None:
        """Hold the directory while this process lives: the lock's file descriptor, or None if another one holds it."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    @property
    def is_held(self) -> bool:
        """Does a supervisor run on this directory?"""
        if not (self.path / "lock").exists():
            return False
        descriptor = self.acquire()
        if descriptor is None:
            return True
        os.close(descriptor)
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none or it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], content) if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one step, readable by its owner only."""
    write_private(path, json.dumps(content, indent=1))


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner only: these files hold passwords and addresses."""
    temporary = path.with_name(path.name + _TEMPORARY)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_port_free(port: int) -> bool:
    """Could a server listen on this port of 127.0.0.1 now?"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
