"""From a bare Python to the project's environment. Standard library only: nothing is installed yet when this runs.

`pip` and `uv` are called with the user's own configuration untouched: mirrors, proxies and certificates are theirs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A lock's environment is .venv, but for the locks that do not agree with it.
_OWN_ENVIRONMENTS = {
    "skypilot": ".venv-skypilot",
    "rig": ".venv-rig",
    "uv": ".venv-uv",
    "bench-sglang-router": ".venv-bench-sglang-router",
    "bench-vllm-router": ".venv-bench-vllm-router",
    "bench-litellm": ".venv-bench-litellm",
}
# Whoever has installed the wider lock has installed the narrower one too.
_WIDER = {"run": ("dev",), "server": ("run", "dev")}

_STAMP = "crosslogic-locks.json"  # Which locks are installed, by the hash of their text.
_UNFINISHED = "crosslogic-unfinished"  # There while an installation runs; found later, it was killed.
_HEARTBEAT_S = 5.0  # Nobody should wonder for longer than this whether anything happens.


class BootstrapError(Exception):
    """The environment cannot be prepared; the message says why and what to do next."""


def ensure(lock: Path) -> Path:
    """The Python of an environment that has everything in `lock` (a file in requirements/), installed if need be.

    Says on stderr what it does and how long that took, and nothing when there is nothing to do. Two at once wait for
    one another; what a killed one has left half-made is made anew. Exits with a message if it cannot be done.
    """
    try:
        return _ensure(lock)
    except BootstrapError as error:
        sys.exit(f"{error}")


def environment_of(lock: Path) -> Path:
    """The folder of the environment that a lock is installed into."""
    return ROOT / _OWN_ENVIRONMENTS.get(lock.stem, ".venv")


def python_of(environment: Path) -> Path:
    """The Python of an environment, whether it is there or not."""
    return environment / "bin" / "python"


def is_installed(lock: Path) -> bool:
    """Is this very lock, or one that holds all of it, completely installed?"""
    environment = environment_of(lock)
    if not python_of(environment).exists() or (environment / _UNFINISHED).exists():
        return False
    installed = _read_stamp(environment)
    candidates = [lock, *(lock.with_name(f"{name}.lock") for name in _WIDER.get(lock.stem, ()))]
    return any(path.is_file() and installed.get(path.stem) == _digest(path) for path in candidates)


def uv_command() -> list[str]:
    """uv as a command: the one on PATH, else our own, which is installed first if need be."""
    found = shutil.which("uv")
    if found:
        return [found]
    python = ensure(ROOT / "requirements" / "uv.lock")
    return [str(python.with_name("uv"))]


def _ensure(lock: Path) -> Path:
    lock = ROOT / lock
    environment = environment_of(lock)
    python = python_of(environment)
    if is_installed(lock):
        return python
    if not lock.is_file():
        raise BootstrapError(f"{lock} is missing; check out the repository again.")
    with _only_one(environment):
        if is_installed(lock):
            return python
        began = time.monotonic()
        _say(f"Preparing {environment.name} from requirements/{lock.name} (once; later starts skip this)")
        _make_environment(environment)
        (environment / _UNFINISHED).touch()
        if lock.stem == "uv":
            _install_with_pip(python, lock)
        else:
            _install(python, lock)
        _write_stamp(environment, _read_stamp(environment) | {lock.stem: _digest(lock)})
        (environment / _UNFINISHED).unlink()
        _say(f"  {environment.name} is ready  {time.monotonic() - began:.1f} s")
    return python


@contextmanager
def _only_one(environment: Path) -> Generator[None]:
    """Hold this environment's bootstrap lock: a flock on a file that is always there, so nothing needs cleaning up."""
    own = {folder: name for name, folder in _OWN_ENVIRONMENTS.items()}
    with (ROOT / "requirements" / f"{own.get(environment.name, 'run')}.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"Waiting for another process that is preparing {environment.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_environment(environment: Path) -> None:
    """A usable virtual environment, kept if it is there; one that a killed installation has left is deleted first."""
    if (environment / _UNFINISHED).exists() or (environment.exists() and not _works(python_of(environment))):
        _say(f"  {environment.name} is half-made (an installation was interrupted): making it anew")
        shutil.rmtree(environment)
    if environment.exists():
        return
    # Without pip, because Debian's Python cannot put it in; environments are filled from outside.
    _run(f"python {sys.version.split()[0]}", [sys.executable, "-m", "venv", "--without-pip", str(environment)])


def _works(python: Path) -> bool:
    return python.exists() and _succeeds([str(python), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"])


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _install(python: Path, lock: Path) -> None:
    """Install with uv, which takes seconds; where uv cannot, with pip, which may know a mirror that uv does not."""
    options = ["--no-deps", "--require-hashes", "-r", str(lock)]
    command = [*uv_command(), "pip", "install", "--quiet", "--python", str(python), *options]
    try:
        _run(f"{_count(lock)} packages", command)
    except BootstrapError as error:
        _say(f"{error}\n  uv could not install them; trying pip, which has a configuration of its own")
        _install_with_pip(python, lock)


def _install_with_pip(python: Path, lock: Path) -> None:
    """Install with the pip of the Python that runs this, else with one put into the environment."""
    if _succeeds([sys.executable, "-m", "pip", "--version"]):
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
    else:
        _run("pip", [str(python), "-m", "ensurepip"])
        pip = [str(python), "-m", "pip"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "-r", str(lock)]
    _run(f"{_count(lock)} packages by pip", [*pip, "install", *options])


def _run(title: str, command: Sequence[str]) -> None:
    """Run one step; say what it is and how long it took. Raises BootstrapError with its last words."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=_HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                _say(f"  {title} …  {time.monotonic() - began:.0f} s")
            except BaseException:
                process.terminate()
                raise
    if process.returncode:
        last_words = "\n".join(f"    {line}" for line in output.strip().splitlines()[-15:])
        raise BootstrapError(
            f"  {title}: failed after {time.monotonic() - began:.1f} s\n{last_words}\n"
            "  Mend what it says and run the command again (./run doctor looks for the usual causes)."
        )
    _say(f"  {title}  {time.monotonic() - began:.1f} s")


def _say(line: str) -> None:
    """Progress goes to stderr: the output of the command that follows belongs to the user."""
    print(line, file=sys.stderr, flush=True)


def _count(lock: Path) -> int:
    return sum("==" in line and not line.startswith((" ", "#")) for line in lock.read_text().splitlines())


def _digest(lock: Path) -> str:
    return hashlib.sha256(lock.read_bytes()).hexdigest()


def _read_stamp(environment: Path) -> dict[str, str]:
    try:
        return json.loads((environment / _STAMP).read_text())
    except (OSError, ValueError):
        return {}


def _write_stamp(environment: Path, installed: dict[str, str]) -> None:
    temporary = environment / f"{_STAMP}.new"
    temporary.write_text(json.dumps(installed))
    temporary.replace(environment / _STAMP)
