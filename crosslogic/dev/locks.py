"""The locks: how each is compiled, and whether they still are what pyproject.toml asks for. Standard library only."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What of pyproject.toml the locks were compiled from; written with them, so that a check needs no index.
STAMP = Path("requirements/pyproject.sha256")

_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Lock:
    """One file of exact versions with hashes. `constraint` is the lock whose versions it must repeat."""

    path: str
    purpose: str
    arguments: tuple[str, ...]
    constraint: str = ""


LOCKS = (
    Lock(
        "requirements/run.lock",
        "everything `./run` needs: the project and the embedded servers",
        ("pyproject.toml", "--group", "embedded"),
    ),
    Lock(
        "requirements/dev.lock",
        "run.lock and what the tests and checks need",
        ("pyproject.toml", "--group", "embedded", "--group", "dev"),
        constraint="requirements/run.lock",
    ),
    Lock(
        "requirements/server.lock",
        "the project alone: what a container or a managed machine needs",
        ("pyproject.toml",),
        constraint="requirements/run.lock",
    ),
    Lock("requirements/skypilot.lock", "SkyPilot's API server, in an environment of its own", ("--group", "skypilot")),
    Lock(
        "requirements/rig.lock",
        "SkyPilot and the emulated AWS that its contract tests run against, in an environment of their own",
        ("--group", "skypilot", "--group", "rig"),
        constraint="requirements/skypilot.lock",
    ),
    Lock("requirements/uv.lock", "uv itself, for machines without it", ("--group", "uv")),
)


def recompile(root: Path, uv: Sequence[str], extra: Sequence[str] = ()) -> int:
    """Compile every lock again and stamp them; the first failure's exit code. The only step that asks an index.

    Versions that still fit are kept; `--upgrade` or `--upgrade-package NAME` in `extra` moves them.
    """
    for lock in LOCKS:
        constraint = ["-c", lock.constraint] if lock.constraint else []
        options = ["--universal", "--generate-hashes", "--no-header", "--no-emit-index-url", "--quiet"]
        code = subprocess.call(
            [*uv, "pip", "compile", *lock.arguments, *options, *constraint, "-o", lock.path, *extra], cwd=root
        )
        if code:
            return code
        print(f"{lock.path}: {len(pins(root / lock.path))} packages", flush=True)
    (root / STAMP).write_text(digest(root) + "\n")
    return 0


def digest(root: Path) -> str:
    """A hash of everything in pyproject.toml that decides what the locks hold."""
    with (root / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)
    inputs = {
        "requires-python": project["project"]["requires-python"],
        "dependencies": project["project"]["dependencies"],
        "groups": project["dependency-groups"],
        "uv": project["tool"]["uv"],
        "locks": [[lock.path, lock.arguments, lock.constraint] for lock in LOCKS],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def pins(path: Path) -> dict[str, set[str]]:
    """The versions of each package in a lock; more than one where they depend on the platform."""
    found: dict[str, set[str]] = {}
    for name, version in _PIN.findall(path.read_text()):
        found.setdefault(name.lower(), set()).add(version)
    return found


def problems(root: Path) -> list[str]:
    """What is wrong with the locks, in words; empty when they are right. Asks nobody."""
    stamp = root / STAMP
    if not stamp.is_file() or stamp.read_text().strip() != digest(root):
        found = ["the dependencies in pyproject.toml changed after the locks were compiled: run ./test lock"]
    else:
        found: list[str] = []
    for lock in LOCKS:
        path = root / lock.path
        if not path.is_file():
            found.append(f"{lock.path} is missing: run ./test lock")
            continue
        found += _problems_of(lock, path, root)
    return found


def _problems_of(lock: Lock, path: Path, root: Path) -> list[str]:
    found: list[str] = []
    text = path.read_text()
    if "://" in text or re.search(r"^\s*(--(extra-)?index-url|--find-links|-i|-f)\b", text, re.MULTILINE):
        found.append(f"{lock.path} names a host or an index: locks hold names, versions and hashes only")
    for requirement in re.split(r"\n(?=\S)", text):
        pin = _PIN.match(requirement)
        if pin and "--hash=sha256:" not in requirement:
            found.append(f"{lock.path}: {pin[1]} has no hash")
        elif not pin and requirement.strip() and not requirement.startswith("#"):
            found.append(f"{lock.path}: cannot read {requirement.splitlines()[0][:80]!r}")
    if lock.constraint and (root / lock.constraint).is_file():
        wider = pins(root / lock.constraint)
        found += [
            f"{lock.path}: {name} {', '.join(sorted(versions))} is not what {lock.constraint} has"
            for name, versions in pins(path).items()
            if name in wider and versions != wider[name]
        ]
    return found
