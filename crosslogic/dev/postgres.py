"""Postgres of the embedded stack: a wheel's binaries under a launcher of our own.

Postgres refuses to run as root, and as a user without a name. For those it runs in a user namespace where our files
seem to be nobody's; where namespaces are forbidden (containers often forbid them) root lets it run as the real nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import asyncpg

from crosslogic.dev import binaries
from crosslogic.dev.parts import Launch, PartError
from crosslogic.dev.processes import ProcessId, command_of
from crosslogic.settings import child_environment

DATABASE = "crosslogic"
_ROLE = "crosslogic"

_NAMESPACE = "unshare"

# For one developer's machine: little memory, and nothing that only replicas or backups need.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "max_logical_replication_workers": "0",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "256MB",
    "io_method": "sync",  # Spares three workers; the data of a development machine is in memory anyway.
    "max_parallel_workers": "0",
    "jit": "off",
    "log_min_messages": "warning",
    "log_line_prefix": "%m ",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


@dataclass(frozen=True)
class Postgres:
    """One cluster on TCP 127.0.0.1 with password authentication, and the database `crosslogic` in it.

    `folder` is its place in the state directory; its parent exists. Data survives SIGKILL of every process.
    """

    folder: Path
    port: int
    password: str
    name: str = "postgres"
    stop_signal: signal.Signals = signal.SIGINT  # "Fast" shutdown: clients are disconnected, nothing is lost.

    @property
    def url(self) -> str:
        """Where clients connect, with the password."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """The URL of one database; the role may create others."""
        return f"postgresql://{_ROLE}:{self.password}@127.0.0.1:{self.port}/{database}"

    def prepare(self) -> Launch:
        """Create the cluster if there is none, and clear away what a kill has left."""
        self.folder.mkdir(exist_ok=True)
        runner = self._runner
        if not (runner.data / "PG_VERSION").exists():
            self._create(runner)
        runner.own(runner.data)
        _remove_stale_lock(runner.data)
        options = [
            word for name, value in (_SETTINGS | {"port": str(self.port)}).items() for word in ("-c", f"{name}={value}")
        ]
        command = [*runner.prefix, str(runner.programs / "postgres"), "-D", str(runner.data), *options]
        return Launch(command, _environment(runner.data), runner.data.parent, runner.user)

    async def is_ready(self) -> bool:
        """Can a client connect to our database? It is created if this is the first time."""
        try:
            connection = await asyncpg.connect(self.url_of("postgres"), timeout=2, statement_cache_size=0)
        except asyncpg.InvalidPasswordError as error:
            raise PartError(
                f"Postgres refuses the password in secrets.json: {self.folder} belongs to other secrets. Start over "
                "with ./run --fresh, or name another directory with --state DIR."
            ) from error
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f'CREATE DATABASE "{DATABASE}"')
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        finally:
            with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close(timeout=2)
        return True

    def forget(self) -> None:
        """Delete data that had to be put outside of the state directory."""
        elsewhere = _elsewhere(self.folder)
        if elsewhere.is_dir() and not elsewhere.is_symlink() and elsewhere.stat().st_uid == os.geteuid():
            shutil.rmtree(elsewhere)

    @cached_property
    def _runner(self) -> _Runner:
        return _runner(self.folder)

    def _create(self, runner: _Runner) -> None:
        """Make the cluster under another name first, so that an interrupted attempt is not taken for one."""
        unfinished = runner.data.with_name("data.unfinished")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(mode=0o700, parents=True)
        runner.own(unfinished)
        with tempfile.NamedTemporaryFile("w", dir=runner.data.parent) as file:
            file.write(self.password)
            file.flush()
            runner.own(Path(file.name))
            # Nothing is in it yet that a crash of the machine could lose: no sync.
            command = [*runner.prefix, str(runner.programs / "initdb"), "-D", str(unfinished), "-U", _ROLE, "-A"]
            command += ["scram-sha-256", "--pwfile", file.name, "-E", "UTF8", "--no-locale", "--no-sync"]
            made = subprocess.run(
                command, env=_environment(unfinished), cwd=runner.data.parent, capture_output=True, text=True,
                user=runner.user, group=runner.user, extra_groups=None if runner.user is None else [],
            )  # fmt: skip
        if made.returncode:
            raise PartError(f"initdb failed:\n{made.stderr.strip()}")
        unfinished.rename(runner.data)


@dataclass(frozen=True, slots=True)
class _Runner:
    """As whom Postgres runs, and where its files are then."""

    data: Path
    programs: Path
    prefix: Sequence[str] = ()
    user: int | None = None

    def own(self, path: Path) -> None:
        """Give a path and all in it to whom Postgres runs as: when it was made, that may have been somebody else."""
        if os.geteuid() != 0:
            return
        owner = self.user or 0
        if path.stat().st_uid == owner:
            return
        for parent, folders, files in os.walk(path):
            for name in (*folders, *files):
                os.chown(os.path.join(parent, name), owner, owner, follow_symlinks=False)
        os.chown(path, owner, owner)


def _runner(folder: Path) -> _Runner:
    programs = binaries.postgres_home() / "bin"
    if os.geteuid() != 0 and _has_name(os.geteuid()):
        return _Runner(folder / "data", programs)
    nobody = pwd.getpwnam("nobody").pw_uid
    if shutil.which(_NAMESPACE):
        prefix = (_NAMESPACE, "--user", f"--map-user={nobody}", f"--map-group={nobody}", "--")
        # The test is the program itself: it finds out about namespaces, security modules and file permissions at once.
        trial = subprocess.run([*prefix, programs / "postgres", "--version"], capture_output=True)
        if trial.returncode == 0:
            return _Runner(folder / "data", programs, prefix)
    if os.geteuid() != 0:
        raise PartError(
            f"Postgres does not run as a user without a name ({os.geteuid()}), and here not in a namespace either. "
            "Run this as a user that /etc/passwd knows."
        )
    elsewhere = _elsewhere(folder)
    if not _succeeds_as(nobody, [programs / "postgres", "--version"]):
        copy = _prepare_elsewhere(elsewhere) / "programs"
        if not copy.exists():
            unfinished = elsewhere / "programs.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(binaries.postgres_home(), unfinished, symlinks=True)
            unfinished.rename(copy)
        programs = copy / "bin"
    data = folder / "data"
    folder.chmod(0o711)
    if not _succeeds_as(nobody, ["test", "-x", str(folder)]):
        data = _prepare_elsewhere(elsewhere) / "data"
    if not _succeeds_as(nobody, [programs / "postgres", "--version"]):
        raise PartError(
            "Postgres does not run as root, and here neither in a user namespace nor as nobody. Run this as an "
            "ordinary user instead."
        )
    return _Runner(data, programs, user=nobody)


def _has_name(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def _elsewhere(folder: Path) -> Path:
    """Where `nobody` can enter, for a state directory that is closed to it (below /root, for example)."""
    return Path("/var/tmp") / f"crosslogic-postgres-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"


def _prepare_elsewhere(folder: Path) -> Path:
    """The folder in /var/tmp, ours for certain: anybody may create names there."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o711)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PartError(f"{folder} belongs to somebody else. Delete it, or name another directory with --state DIR.")
    folder.chmod(0o711)
    return folder


def _succeeds_as(user: int, command: Sequence[str | Path]) -> bool:
    try:
        ran = subprocess.run(command, cwd="/", user=user, group=user, extra_groups=[], capture_output=True)
    except OSError:
        return False
    return ran.returncode == 0


def _environment(home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in child_environment().items() if not name.startswith("PG")}
    return inherited | {"LC_ALL": "C", "HOME": str(home)}


def _remove_stale_lock(data: Path) -> None:
    """Remove a lock whose pid is another program's now (after a reboot, for example): Postgres would not start.

    Where the pid is nobody's the lock stays: Postgres reads in it which shared memory an orphan may still be using.
    """
    lock = data / "postmaster.pid"
    try:
        pid = int(lock.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return
    if ProcessId.of(pid) and str(data) not in command_of(pid):
        lock.unlink()
