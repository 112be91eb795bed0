"""What `./run` does with its arguments. Standard library only until the environment is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from crosslogic import bootstrap
from crosslogic.dev import doctor
from crosslogic.dev.state import State

HELP = """\
./run [--state DIR] [--port N] [--fresh]
    Prepare the environment and start everything on this machine: Postgres, Valkey, Temporal with its UI, a local cloud
    with real engines, a double of Stripe, the worker and the API. Ctrl-C stops all of it; the next ./run goes on where
    it was.
      --state DIR   where everything is kept (default: .crosslogic, beside this file)
      --port N      the API's port on 127.0.0.1 (default: 8080)
      --fresh       delete the state and start over
    Settings in the environment act (docs/reference/settings.md); CROSSLOGIC_DATABASE_URL, CROSSLOGIC_REDIS_URL and
    CROSSLOGIC_TEMPORAL_ADDRESS take the place of the embedded servers.

./run [--state DIR] COMMAND …
    Administer the running stack, or any installation with --api URL. `./run COMMAND --help` explains each:
      orgs environments keys limits        who may do what
      nodes deployments models regions     what serves
      sweeps                               whether every machine was intended
      revisions rollouts                   what a deployment runs, and how that is replaced
      deadlines reservations               how long nodes are waited for; capacity that orgs have prepaid
      usage requests audit                 what was used, why it went there, and who changed what
      billing                              what months cost and would cost, prices, credits, the ledger
      setup                                bring schema, search attributes and seeds up to date
      billing                              make at Stripe what billing needs there

./run [--state DIR] temporal …          the Temporal command line, connected to the running stack
./run doctor [--state DIR] [--port N]   say what is wrong on this machine and how to mend it
./run skypilot [--port N]               install SkyPilot into .venv-skypilot and run its API server on 127.0.0.1
"""

_RUN_LOCK = bootstrap.ROOT / "requirements" / "run.lock"
_SKYPILOT_LOCK = bootstrap.ROOT / "requirements" / "skypilot.lock"
_SKYPILOT_PORT = "46580"


@dataclass(slots=True)
class Words:
    """The arguments, taken apart: options before the command, the command, and what belongs to it."""

    state: str | None = None
    options: list[str] = field(default_factory=list[str])
    command: str = ""
    rest: list[str] = field(default_factory=list[str])

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Words:
        """Take them apart. Exits with a message where a value is missing."""
        words, left = cls(), list(arguments)
        while left and left[0].startswith("-"):
            name, equals, value = left.pop(0).partition("=")
            if name in ("--state", "--port") and not equals:
                if not left:
                    sys.exit(f"{name} wants a value (see ./run --help)")
                value = left.pop(0)
            if name == "--state":
                words.state = value
            else:
                words.options += [name, value] if value else [name]
        if left:
            words.command, *words.rest = left
        return words


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say, mostly by becoming the program for it. The exit code."""
    words = Words.of(arguments)
    if words.command == "help" or {"-h", "--help"} & set(words.options):
        print(HELP, end="")
        return 0
    at = ["--state", words.state] if words.state else []
    if not words.command:
        _become_module("crosslogic.dev.stack", [*at, *words.options])
    if words.command == "doctor":
        return doctor.main([*at, *words.options, *words.rest])
    if words.options:
        sys.exit(f"Write {words.options[0]} after the command: ./run {words.command} … (see ./run --help)")
    if words.command == "temporal":
        _become_temporal(State.at(words.state), words.rest)
    if words.command == "skypilot":
        _become_skypilot(words.rest)
    return _become_module("crosslogic.cli", [*at, words.command, *words.rest])


def _become_module(module: str, arguments: Sequence[str]) -> NoReturn:
    """Become a module of the project, which finds the project wherever the user stands, and nothing that lies there."""
    python = bootstrap.ensure(_RUN_LOCK)
    path = [str(bootstrap.ROOT), os.environ.get("PYTHONPATH", "")]
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        # Compiling takes half of a start. Where nobody wants compiled files (images often say so), they lie in .venv.
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(bootstrap.environment_of(_RUN_LOCK) / "pycache"),
    }
    _become([str(python), "-P", "-m", module, *arguments], changes)


def _become_temporal(state: State, arguments: Sequence[str]) -> NoReturn:
    """Become the real Temporal command line, with the running stack's address unless the user names another."""
    program = bootstrap.ensure(_RUN_LOCK).with_name("temporal")
    address = state.read("endpoints.json").get("temporal")
    if address:
        _become([str(program), *arguments], {"TEMPORAL_ADDRESS": address, "TEMPORAL_NAMESPACE": "default"})
    if (
        "--address" not in arguments
        and "TEMPORAL_ADDRESS" not in os.environ
        and arguments
        and "--help" not in arguments
    ):
        sys.exit(f"There is no stack in {state.path}. Start one with ./run, or name a server with --address HOST:PORT.")
    _become([str(program), *arguments], {})


def _become_skypilot(arguments: Sequence[str]) -> NoReturn:
    """Become SkyPilot's API server. It calls its own programs by name, so they come first on PATH."""
    if arguments and (len(arguments) != 2 or arguments[0] != "--port" or not arguments[1].isdigit()):
        sys.exit("Write ./run skypilot, or ./run skypilot --port N")
    port = arguments[1] if arguments else _SKYPILOT_PORT
    python = bootstrap.ensure(_SKYPILOT_LOCK)
    print(f"SkyPilot's API server on http://127.0.0.1:{port} (Ctrl-C stops it)", flush=True)
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])
    command = [str(python), "-m", "sky.server.server", "--host", "127.0.0.1", "--port", port]
    _become(command, {"PATH": path, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"})


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    program = Path(command[0])
    if not program.exists():
        sys.exit(f"{program} is missing: ./run doctor says how to mend that.")
    os.execve(program, list(command), {**os.environ, **environment})
