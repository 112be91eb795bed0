"""`./test`: the test suites and the checks, one named command each. Standard library only: it makes the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from crosslogic import bootstrap
from crosslogic.dev import locks

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests that run together. A long suite is a pytest mark of the same name and stays out of the default run.

    What needs more than a checkout (root, packages of the system), or is not stable yet, is not `in_ci`.
    """

    name: str
    summary: str
    paths: tuple[str, ...] = ()
    is_long: bool = False
    in_ci: bool = True
    arguments: tuple[str, ...] = ()  # pytest's, for the whole suite; further arguments of the caller replace them.


@dataclass(frozen=True, slots=True)
class Check:
    """Programs of the environment that all must succeed; further arguments go to each."""

    name: str
    summary: str
    commands: tuple[tuple[str, ...], ...]


SUITES = (
    Suite(
        "fast",
        "pure tests: the domain's decisions, the contracts, the architecture",
        ("tests/domain", "tests/contracts", "tests/architecture"),
    ),
    Suite("docs", "documentation: links, commands, JSON, generated pages", ("tests/docs",)),
    Suite("e2e", "the README's commands, literally, and what survives a kill", is_long=True),
    Suite(
        "simulation",
        "thousands of seeded lives of the fleet in virtual time; --seed N shows one",
        is_long=True,
        in_ci=False,
        arguments=("-n", "2"),
    ),
    Suite("chaos", "the fault matrix against real processes", is_long=True, in_ci=False),
    Suite("rigs", "unmodified SkyPilot on this machine (root; Debian packages)", is_long=True, in_ci=False),
)

CHECKS = (
    Check("lint", "ruff: format and rules", (("ruff", "format", "--check"), ("ruff", "check"))),
    Check("types", "pyright, strict", (("pyright", "--warnings"),)),
    Check("imports", "import-linter: who may import whom (.importlinter)", (("lint-imports", "--no-logo"),)),
    Check("reference", "write the generated pages of docs/reference", (("python", "-m", "crosslogic.dev.reference"),)),
    Check("bench", "the gateway beside its peers, by bench/README.md", (("python", "-m", "bench.gateways"),)),
)


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for and return its exit code; suites replace this process with pytest."""
    os.chdir(ROOT)
    name, extra = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if name in ("--list", "--help", "-h"):
        print(listing())
        return 0
    if name == "lock":
        return locks.recompile(ROOT, bootstrap.uv_command(), extra)
    check = next((check for check in CHECKS if check.name == name), None)
    selection = None if check else select(arguments)
    if check is None and selection is None:
        print(f"There is no suite or check named {name!r}.\n\n{listing()}", file=sys.stderr)
        return 2
    python = bootstrap.ensure(ROOT / "requirements" / "dev.lock")
    if check:
        return _run(check, python, extra)
    return _become_pytest(python, selection or [])


def select(arguments: Sequence[str]) -> list[str] | None:
    """pytest's arguments for `./test ARGUMENTS`, or None if the first is neither a suite, an option nor a path."""
    # Most of the time a test waits for a server: two processes, each with servers of its own, and whole files to each.
    default = ["-n", "2", "--dist", "loadfile", "-m", " and ".join(f"not {s.name}" for s in SUITES if s.is_long)]
    if not arguments or arguments[0].startswith("-"):
        return [*default, *arguments]
    name, *extra = arguments
    for suite in SUITES:
        if suite.name == name:
            chosen = ["-m", name] if suite.is_long else [path for path in suite.paths if Path(ROOT, path).is_dir()]
            return [*chosen, *(extra or suite.arguments)]
    if Path(ROOT, name.partition("::")[0]).exists():
        return list(arguments)
    return None


def listing() -> str:
    """Every name that `./test` knows, with what it does."""
    rows = [("", "the default suite: everything but the long ones")]
    rows += [(suite.name, suite.summary + (" (long)" if suite.is_long else "")) for suite in SUITES]
    rows += [(check.name, check.summary) for check in CHECKS]
    rows += [("lock", "compile requirements/*.lock again (asks the package index)")]
    lines = [f"  ./test {name:10} {summary}" for name, summary in rows]
    return "\n".join(
        [*lines, "", "A path runs that file or folder. Further arguments go on, e.g. ./test fast -k regions."]
    )


def _become_pytest(python: Path, selection: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(python, [str(python), "-m", "pytest", "-p", "tests.plugin", *selection])


def _run(check: Check, python: Path, extra: Sequence[str]) -> int:
    # Without it pyright asks a registry whether there is a newer one.
    os.putenv("PYRIGHT_PYTHON_IGNORE_WARNINGS", "1")
    for program, *arguments in check.commands:
        code = subprocess.call([python.with_name(program), *arguments, *extra])
        if code:
            print(f"./test {check.name} failed: {program} ended with {code}", file=sys.stderr)
            return code
    return 0
