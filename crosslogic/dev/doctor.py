"""`./run doctor`: what is wrong on this machine, and how to mend it. Standard library only: nothing works yet then."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from crosslogic import bootstrap
from crosslogic.dev.processes import ProcessId, command_of
from crosslogic.dev.state import DEFAULT, State, is_port_free

_LEAST_DISK_BYTES = 2_000_000_000  # 0.9 GB of packages, the rest for data and logs.
_LEAST_MEMORY_BYTES = 2_000_000_000  # The whole stack takes up to 1.5 GB.
# Platforms for which every package of requirements/run.lock has a wheel (looked up when the lock was made).
_PLATFORMS = {("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "x86_64"), ("Darwin", "arm64")}
_RUN_LOCK = bootstrap.ROOT / "requirements" / "run.lock"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A finding with `mend` is a problem; what to do stands there."""

    what: str
    mend: str = ""


def examine(state: State, port: int | None) -> Iterator[Finding]:
    """Look at everything, cheapest first. Without a `port`, the one that the stack has or would have."""
    yield from _machine()
    yield from _packages()
    yield from _directory(state)
    api_port = port or _port_of(state.read("endpoints.json").get("api", "")) or 8080
    if state.is_held:
        yield from _running(state)
    else:
        yield from _leftovers(state)
    yield _port(state, api_port)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; exit code 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="./run doctor", description="Say what is wrong and how to mend it.")
    parser.add_argument("--state", default=str(DEFAULT), metavar="DIR", help="the state directory to look at")
    parser.add_argument("--port", type=int, help="the API's port")
    given = parser.parse_args(arguments)
    problems = 0
    for finding in examine(State.at(given.state), given.port):
        problems += bool(finding.mend)
        print(f"{'PROBLEM' if finding.mend else 'ok':<8} {finding.what}")
        if finding.mend:
            print(f"{'':<8} → {finding.mend}")
    print(f"\n{problems} problem{'s' if problems != 1 else ''} found." if problems else "\nNothing is wrong.")
    return 1 if problems else 0


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    is_new = sys.version_info >= (3, 11)
    yield Finding(f"Python {version}", "" if is_new else "install Python 3.11 or later and start ./run with it")
    system, machine = platform.system(), platform.machine()
    is_musl = system == "Linux" and any(Path("/lib").glob("ld-musl-*"))
    name = f"{system} {machine}{' with musl' if is_musl else ''}"
    if (system, machine) not in _PLATFORMS or is_musl:
        yield Finding(
            f"no packages for {name}: Postgres, Valkey, Temporal and llama.cpp come as wheels for Linux (glibc) and "
            "macOS on x86-64 and ARM",
            "use such a machine, or run docker compose (docs/operating/compose.md)",
        )
    else:
        yield Finding(f"platform {name}")
    if system == "Linux" and machine == "x86_64":
        has_avx2 = " avx2" in Path("/proc/cpuinfo").read_text()
        yield Finding(
            "the processor has AVX2" if has_avx2 else "the processor has no AVX2, which llama.cpp's build needs",
            ""
            if has_avx2
            else "use a machine with AVX2 (any x86-64 since 2015), or tell the virtual machine to show it",
        )
    if system == "Linux":
        available = _available_memory_bytes()
        yield Finding(
            f"{available / 1e9:.1f} GB of memory available",
            "" if available >= _LEAST_MEMORY_BYTES else "free some: the whole stack takes up to 1.5 GB",
        )


def _available_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _packages() -> Iterator[Finding]:
    environment = bootstrap.environment_of(_RUN_LOCK)
    if not bootstrap.is_installed(_RUN_LOCK):
        has_installer = bool(shutil.which("uv")) or _runs([sys.executable, "-m", "pip", "--version"])
        yield Finding(
            f"{environment.name} is not installed yet, or not from the present lock; ./run does it",
            "" if has_installer else "install uv or pip (Debian: apt install python3-pip), which ./run needs for that",
        )
    python = bootstrap.python_of(environment)
    if not python.exists():
        return
    checked = subprocess.run(
        [python, "-m", "crosslogic.dev.binaries"], cwd=bootstrap.ROOT, capture_output=True, text=True, timeout=60
    )
    missing = [line for line in (checked.stdout or checked.stderr).splitlines() if line.strip()]
    if checked.returncode == 0:
        yield Finding("Postgres, Valkey, Temporal, llama.cpp and the model are installed")
    for line in missing[-8:] if checked.returncode else []:
        yield Finding(f"missing: {line}", f"delete {environment.name} and start ./run, which installs it anew")


def _directory(state: State) -> Iterator[Finding]:
    foreign = state.foreign()
    if foreign:
        yield Finding(
            f"{state.path} holds other things ({', '.join(foreign[:3])})", "name another directory with --state DIR"
        )
    existing = next(folder for folder in (state.path, *state.path.parents) if folder.exists())
    is_writable = os.access(existing, os.W_OK | os.X_OK) and existing.is_dir()
    yield Finding(
        f"the state directory {state.path} is {'writable' if is_writable else 'not writable'}",
        "" if is_writable else f"give yourself the right to write in {existing}, or name another with --state DIR",
    )
    for folder in {os.stat(path).st_dev: path for path in (existing, bootstrap.ROOT)}.values():
        free = shutil.disk_usage(folder).free
        yield Finding(
            f"{free / 1e9:.1f} GB free on the disk of {folder}",
            "" if free >= _LEAST_DISK_BYTES else "free some space: packages and data want 2 GB",
        )


def _running(state: State) -> Iterator[Finding]:
    supervisor = state.supervisor()
    yield Finding(f"the stack runs{f' (pid {supervisor.pid})' if supervisor else ''}")
    for name, process in state.parts().items():
        if not process.is_alive:
            yield Finding(
                f"{name} does not run", f"./run starts it again; if it does not stay up, see {state.logs}/{name}.log"
            )
    for name, address in state.read("endpoints.json").items():
        problem = _problem_of(name, str(address))
        shown = {"postgres": "postgres", "redis": "valkey"}.get(name, f"{name} at {address}")
        part = {
            "redis": "valkey",
            "temporal_ui": "temporal",
            "local_cloud": "local-cloud",
            "stripe": "stripe-double",
        }.get(name, name)
        yield Finding(
            f"{shown} {problem or 'answers'}",
            f"look at {state.logs}/{part}.log; Ctrl-C and ./run again if it stays so" if problem else "",
        )


def _problem_of(name: str, address: str) -> str:
    """Why a part does not answer; empty if it does."""
    if name == "api":
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            opener.open(f"{address}/readyz", timeout=3).close()
        except urllib.error.HTTPError as error:
            return f"is not ready (HTTP {error.code})"
        except (OSError, ValueError):
            return "does not answer"
        return ""
    port = _port_of(address)
    try:
        socket.create_connection(("127.0.0.1", port or 0), timeout=3).close()
    except OSError:
        return "does not answer"
    return ""


def _leftovers(state: State) -> Iterator[Finding]:
    left = {name: process for name, process in state.parts().items() if process.is_alive}
    left |= {f"engine {cluster}": process for cluster, process in state.engines().items() if process.is_alive}
    if left:
        shown = ", ".join(f"{name} (pid {process.pid})" for name, process in left.items())
        yield Finding(
            f"an earlier run was killed and left {shown}",
            "start ./run again with this --state: it stops or takes over them",
        )
    else:
        yield Finding("the stack does not run, and no earlier one has left anything behind")


def _port(state: State, port: int) -> Finding:
    if is_port_free(port):
        return Finding(f"port {port} is free")
    api = state.parts().get("api")
    if api and api.is_alive and _port_of(state.read("endpoints.json").get("api", "")) == port:
        return Finding(f"port {port} is the stack's own")
    holder = _listener(port)
    who = f" by pid {holder.pid} ({command_of(holder.pid)[:100]})" if holder else ""
    return Finding(f"port {port} is taken{who}", "stop that program, or start with another port: ./run --port N")


def _listener(port: int) -> ProcessId | None:
    """Who listens on a port of this machine, as far as we may see it (Linux)."""
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            return None
        for row in rows:
            fields = row.split()
            # Source: proc_net_tcp(5): local address, state 0A (listen), inode.
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(descriptor) in inodes for descriptor in (process / "fd").iterdir()):
                return ProcessId.of(int(process.name))
        except OSError:
            continue
    return None


def _port_of(address: str) -> int | None:
    try:
        return urlsplit(address if "//" in address else f"//{address}").port
    except ValueError:
        return None


def _runs(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
