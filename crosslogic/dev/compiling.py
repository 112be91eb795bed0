"""`./run compile`: build the hot path for this machine. Runs in an environment of its own, which has mypyc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from crosslogic import bootstrap, compiled

_LOCK = bootstrap.ROOT / "requirements" / "compile.lock"
_SETUP = """\
import sys
from mypyc.build import mypycify
from setuptools import setup

group, python, *sources = sys.argv.pop(1).split("\\n")
options = ["--explicit-package-bases", "--follow-imports=silent", "--ignore-missing-imports"]
modules = mypycify([*options, "--python-executable", python, *sources], group_name=group)
setup(name="crosslogic-hot", packages=[], ext_modules=modules)
"""


def main() -> int:
    """Build unless there is a build that fits. The exit code."""
    target = compiled.folder()
    if compiled.is_built():
        print(f"The hot path is compiled already: {target}")
        return 0
    problem = what_is_missing()
    if problem:
        print(problem, file=sys.stderr)
        return 1
    python = bootstrap.ensure(bootstrap.ROOT / "requirements" / "run.lock")
    compiler = bootstrap.ensure(_LOCK)
    print("Compiling the hot path; this takes a minute or two …", flush=True)
    began = time.monotonic()
    compiled.BUILDS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=compiled.BUILDS, prefix=".building-") as scratch:
        code, log = _build(Path(scratch), python, compiler)
        if code:
            print(f"{log}\nCompiling failed; the API runs uncompiled, as before.", file=sys.stderr)
            return 1
        _keep(Path(scratch), target)
    print(f"Compiled in {time.monotonic() - began:.0f} s: {target}. The API uses it from its next start on.")
    return 0


def what_is_missing() -> str:
    """What a build needs and this machine lacks, and how to get it; empty when all is there."""
    program = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(program) is None:
        return (
            f"There is no C compiler ({program}). On Debian: apt-get install gcc. Without one the API runs uncompiled."
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return f"{header} is missing. On Debian: apt-get install python3-dev. Without it the API runs uncompiled."
    return ""


def _build(scratch: Path, python: Path, compiler: Path) -> tuple[int, str]:
    # All of the packages are copied: mypyc reads the types of what is imported, too.
    for package in ("api", "crosslogic"):
        shutil.copytree(bootstrap.ROOT / package, scratch / package, ignore=shutil.ignore_patterns("__pycache__"))
    (scratch / "setup.py").write_text(_SETUP)
    sources = [str(compiled.source_of(name).relative_to(bootstrap.ROOT)) for name in compiled.MODULES]
    words = "\n".join([compiled.GROUP, str(python), *sources])
    done = subprocess.run(
        [str(compiler), "setup.py", words, "build_ext", "--inplace"],
        cwd=scratch,
        env={**os.environ, "PATH": os.pathsep.join([str(compiler.parent), os.environ.get("PATH", os.defpath)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if "error" in line.lower() and not line.startswith("gcc ")]
    return done.returncode, "\n".join(lines[-20:] or done.stdout.splitlines()[-20:])


def _keep(scratch: Path, target: Path) -> None:
    """Put a finished build in place, and remove those that fit no more."""
    finished = scratch / "build-of-hot"
    for library in list(scratch.rglob("*.so")):
        relative = library.relative_to(scratch)
        if relative.parts[0] != "build":
            place = finished / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(library, place)
    (finished / compiled.FINISHED).touch()
    shutil.rmtree(target, ignore_errors=True)
    finished.rename(target)
    for old in compiled.BUILDS.iterdir():
        if old.is_dir() and old != target and not old.name.startswith("."):
            shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
