"""The hot path, compiled: the same modules as machine code, where somebody has built them (`./run compile`).

mypyc turns typed Python into C; that takes a quarter off a request (docs/performance.md). The sources stay what is
read, tested and edited, and what runs wherever nothing was built: a build is found by a hash of the sources, the Python
and the recipe, so one that does not fit any more is not used. Standard library only, and imported before anything else.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ROOT / ".crosslogic-compiled"
# Written last, so that a build that was killed is none.
FINISHED = "finished"
GROUP = "crosslogic_hot"

# All that runs for each request or chunk. They know each other's classes by their layout, so all of them or none.
MODULES = (
    "api.inference.admission",
    "api.inference.auth",
    "api.inference.calls",
    "api.inference.events",
    "api.inference.limits",
    "api.inference.metering",
    "api.inference.observing",
    "api.inference.proxy",
    "api.inference.relayed",
    "api.inference.router",
    "api.inference.routes",
    "api.inference.server",
    "api.inference.upstream",
    "crosslogic.domain.affinity",
    "crosslogic.domain.errors",
    "crosslogic.domain.fairness",
    "crosslogic.domain.ids",
    "crosslogic.domain.keys",
    "crosslogic.domain.limits",
    "crosslogic.domain.regions",
    "crosslogic.domain.scheduling",
    "crosslogic.domain.spill",
    "crosslogic.domain.usage",
    "crosslogic.hot.limits",
    "crosslogic.hot.pipeline",
)
# Where the recipe is, which is part of what a build is made of.
_RECIPE = (ROOT / "crosslogic" / "dev" / "compiling.py", ROOT / "requirements" / "compile.lock")


def source_of(module: str) -> Path:
    """The file of a module."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def folder() -> Path:
    """Where a build of the sources as they are now is, or would be."""
    digest = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()} {sysconfig.get_config_var('SOABI')}".encode())
    for path in (*_RECIPE, *map(source_of, MODULES)):
        if path.is_file():
            digest.update(path.read_bytes())
    return BUILDS / digest.hexdigest()[:16]


def is_built() -> bool:
    """Is there a build that fits?"""
    return BUILDS.is_dir() and (folder() / FINISHED).is_file()


class _Finder(MetaPathFinder):
    """Finds the compiled modules, and what mypyc puts beside them."""

    def __init__(self, build: Path) -> None:
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        self._files = {name: build.joinpath(*name.split(".")).with_name(_last(name) + suffix) for name in MODULES}
        shared = f"{GROUP}__mypyc"
        self._files[shared] = build / (shared + suffix)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Called by the import system."""
        file = self._files.get(fullname)
        if file is None:
            return None
        loader = importlib.machinery.ExtensionFileLoader(fullname, str(file))
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


def use() -> bool:
    """Import the compiled modules from here on, if there is a build that fits; whether there is.

    Raises RuntimeError when one of the modules was imported before.
    """
    if not is_built():
        return False
    early = sorted(sys.modules.keys() & set(MODULES))
    if early:
        raise RuntimeError(f"{', '.join(early)} must not be imported before crosslogic.compiled is used")
    sys.meta_path.insert(0, _Finder(folder()))
    return True


def _last(name: str) -> str:
    return name.rpartition(".")[2]
