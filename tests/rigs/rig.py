"""What both rigs stand on: Debian packages, SkyPilot's environment and API server, processes that end with us."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from crosslogic import bootstrap
from crosslogic.bootstrap import ROOT
from crosslogic.dev.state import free_port

PACKAGES = {"slurm-wlm": "slurmctld", "munge": "munged", "openssh-server": "sshd", "rsync": "rsync"}
START_S = 120.0
# Names, not secrets: what is emulated here takes any.
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def require_root_and_debian() -> None:
    """Fail, and say why, where namespaces, other users and Debian's packages cannot be had."""
    if os.geteuid() != 0:
        pytest.fail("The rigs need root: machines are namespaces, and Slurm runs jobs as another user.")
    if shutil.which("apt-get") is None:
        pytest.fail("The rigs install Debian packages (slurm-wlm, munge, openssh-server, rsync); this is no Debian.")


def install_packages() -> None:
    """Debian's packages, unless they are there."""
    missing = [package for package, program in PACKAGES.items() if not shutil.which(program, path=_EVERYWHERE)]
    if not missing:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "-q", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"apt-get {' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


_EVERYWHERE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def rig_python() -> Path:
    """The Python that has SkyPilot and the AWS emulator."""
    return bootstrap.ensure(ROOT / "requirements" / "rig.lock")


def uv_program() -> str:
    """uv, which SkyPilot wants on every machine; here it comes with the machine's image."""
    return bootstrap.uv_command()[0]


def write_uv(path: Path, real: str) -> None:
    """A uv that takes the machine's own Python where SkyPilot asks for one to be downloaded."""
    write_program(
        path,
        f"""
        export SSL_CERT_FILE=${{SSL_CERT_FILE:-{CERTIFICATES}}}
        words=(); for word in "$@"; do [ "$word" = 3.10 ] && word=/usr/bin/python3; words+=("$word"); done
        exec {real} "${{words[@]}}"
        """,
    )


def write_program(path: Path, body: str) -> None:
    """A small bash program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for line in body.strip().splitlines()]
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


def until(what: str, look: Callable[[], Any], within_s: float = START_S) -> Any:
    """The first true value of `look`; errors of connections count as not yet."""
    end, last = time.monotonic() + within_s, None
    while time.monotonic() < end:
        try:
            if last := look():
                return last
        except (httpx.HTTPError, OSError) as error:
            last = error
        time.sleep(0.2)
    raise AssertionError(f"not within {within_s} s: {what}; last seen: {last!r}")


class Processes:
    """Processes of a rig, each with a session and a log of its own; all end with the rig."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start one; its output goes to `NAME.log`."""
        with self.log(name).open("ab") as log:
            self._running[name] = _start(command, log, environment)

    def log(self, name: str) -> Path:
        """Where a process writes."""
        return self._folder / f"{name}.log"

    def check(self, name: str) -> None:
        """Raise AssertionError with its last words if a process has ended."""
        if self._running[name].poll() is not None:
            raise AssertionError(f"{name} has ended:\n{self.log(name).read_text(errors='replace')[-3000:]}")

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End one with everything it has started: first politely, then not."""
        process = self._running.pop(name)
        for step in (number, signal.SIGKILL):
            try:
                os.killpg(process.pid, step)
            except ProcessLookupError:
                break
            end = time.monotonic() + 10
            while time.monotonic() < end and (process.poll() is None or _group_lives(process.pid)):
                time.sleep(0.1)
        process.wait(10)

    def stop_all(self) -> None:
        """End all, the youngest first."""
        for name in reversed(list(self._running)):
            self.stop(name)


def _start(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
    )


def _group_lives(group: int) -> bool:
    """Does any process of the group still run? One that is dead and that nobody has asked about does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, found = stat.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state != "Z":
                return True
    return False


class ApiServer:
    """SkyPilot's API server with a home of its own: state in SQLite, no account, loopback only."""

    def __init__(self, processes: Processes, home: Path, config: str, environment: Mapping[str, str]) -> None:
        self._processes = processes
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.home = home
        self._environment = {
            "PATH": f"{rig_python().parent}:{_EVERYWHERE}",
            "HOME": str(home),
            "SSL_CERT_FILE": CERTIFICATES,
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            **environment,
        }
        (home / ".sky").mkdir(parents=True, exist_ok=True)
        (home / ".sky" / "config.yaml").write_text(config)

    def write_catalog(self, name: str, text: str) -> None:
        """A price list: one that lies there already is never fetched."""
        path = self.home / ".sky" / "catalogs" / "v8" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def start(self) -> None:
        """Start it and return when it answers."""
        command = [str(rig_python()), "-u", "-m", "sky.server.server", "--host", "127.0.0.1", "--port", str(self._port)]
        self._processes.start("api-server", command, self._environment)

        def look() -> bool:
            self._processes.check("api-server")
            return httpx.get(f"{self.url}/api/health", timeout=5).status_code == 200

        until("SkyPilot's API server answers", look)

    def kill(self) -> None:
        """End it with all that it was doing, as a crash of its machine does."""
        self._processes.stop("api-server", signal.SIGKILL)

    @property
    def log(self) -> str:
        """What it has said."""
        return self._processes.log("api-server").read_text(errors="replace")
