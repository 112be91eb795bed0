"""The peers that install from a package registry: how each is installed, started and asked.

`python -m bench.peers` compiles their locks again; it is the only step that asks for versions. Each lives in an
environment of its own, `.venv-bench-NAME`, installed from its lock the first time that it is measured.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.processes import BenchError
from crosslogic import bootstrap
from crosslogic.bootstrap import ROOT

# The same for all: round robin over the same engines, one worker, no log of requests.
MODEL = "llama-3-8b"

# Paced streams at a time.
STREAMS = 64

# What each Python peer's lock is compiled from.
REQUIREMENTS = {
    "sglang-router": "sglang-router",
    "vllm-router": "vllm-router",
    "litellm": "litellm[proxy]",
}
PORTKEY = Path(__file__).parent / "portkey"
_COMPILE = ("--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--no-emit-index-url")


@dataclass(frozen=True, slots=True)
class Start:
    """How to start a peer on a port in front of these engines, and what its requests need."""

    command: Sequence[str]
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Peer:
    """One of them. `title` has room for its version; `prepare` installs it and writes what it reads into the folder."""

    name: str
    title: str
    prepare: Callable[[int, Sequence[str], Path], Start]
    streams: int = STREAMS  # Fewer for what falls behind with more.


def _installed(name: str) -> Path:
    """The folder of a Python peer's programs. Raises BenchError when it cannot be installed."""
    lock = ROOT / "requirements" / f"bench-{name}.lock"
    try:
        return bootstrap.ensure(lock).parent
    except SystemExit as error:
        raise BenchError(f"{name} cannot be installed: {error}") from error


def _sglang(port: int, engines: Sequence[str], folder: Path) -> Start:
    program = _installed("sglang-router") / "sglang-router"
    return Start([str(program), "launch", *_router_options(port, engines, folder)])


def _vllm(port: int, engines: Sequence[str], folder: Path) -> Start:
    return Start([str(_installed("vllm-router") / "vllm-router"), *_router_options(port, engines, folder)])


def _router_options(port: int, engines: Sequence[str], folder: Path) -> list[str]:
    """What both take: they are of one family."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *engines, "--policy", "round_robin"]
    # Their metrics stay on, as ours do, on a port that nobody else has asked for.
    metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(port + 1)]
    limits = ["--max-concurrent-requests", "100000", "--request-timeout-secs", "900"]
    return [*options, *metrics, *limits, "--log-level", "error", "--log-dir", str(folder)]


def _litellm(port: int, engines: Sequence[str], folder: Path) -> Start:
    deployments = [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{engine}/v1", "api_key": "none"},
        }
        for engine in engines
    ]
    # YAML reads JSON.
    config = folder / "litellm.yaml"
    # It would fetch a tokenizer by the model's name from a hub to count what the engine has counted already.
    settings = {"telemetry": False, "disable_hf_tokenizer_download": True}
    config.write_text(json.dumps({"model_list": deployments, "litellm_settings": settings}))
    command = [str(_installed("litellm") / "litellm"), "--config", str(config), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1"]
    key = f"sk-{secrets.token_hex(16)}"
    # Its price list is otherwise fetched from the network at each start, and without a key it does not start.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": key}
    return Start(command, headers={"Authorization": f"Bearer {key}"}, environment=environment)


def _portkey(port: int, engines: Sequence[str], folder: Path) -> Start:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise BenchError("Portkey needs node and npm (Debian: apt-get install nodejs npm), Node 18 or later.")
    home = ROOT / ".venv-bench-portkey"
    server = home / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    lock = PORTKEY / "package-lock.json"
    if not server.is_file() or (home / lock.name).read_bytes() != lock.read_bytes():
        home.mkdir(exist_ok=True)
        for name in ("package.json", lock.name):
            shutil.copy(PORTKEY / name, home / name)
        command = [npm, "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"portkey cannot be installed: {done.stderr.strip()[-300:]}")
    targets = [{"provider": "openai", "api_key": "none", "custom_host": f"{engine}/v1"} for engine in engines]
    config = json.dumps({"strategy": {"mode": "loadbalance"}, "targets": targets}, separators=(",", ":"))
    return Start(
        [node, str(server), f"--port={port}", "--headless"],
        headers={"x-portkey-config": config},
        environment={"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1"},
    )


PEERS = (
    Peer("sglang-router", "sglang-router {}, round robin", _sglang),
    Peer("vllm-router", "vllm-router {}, round robin", _vllm),
    Peer("portkey", "Portkey gateway {}", _portkey),
    Peer("litellm", "LiteLLM proxy {}", _litellm, streams=2),
)


def version(name: str) -> str:
    """The version that a peer's lock names."""
    if name == "portkey":
        lock = json.loads((PORTKEY / "package-lock.json").read_text())
        return lock["packages"]["node_modules/@portkey-ai/gateway"]["version"]
    for line in (ROOT / "requirements" / f"bench-{name}.lock").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.removeprefix(f"{name}==").split()[0]
    raise BenchError(f"requirements/bench-{name}.lock does not pin {name}")


def recompile() -> int:
    """Compile every lock again, to the newest versions; the first failure's exit code."""
    uv = bootstrap.uv_command()
    for name, requirement in REQUIREMENTS.items():
        lock = f"requirements/bench-{name}.lock"
        command = [*uv, "pip", "compile", "-", *_COMPILE, "--no-annotate", "--quiet", "--upgrade", "-o", lock]
        done = subprocess.run(command, cwd=ROOT, input=requirement, text=True, stdout=subprocess.DEVNULL)
        if done.returncode:
            return done.returncode
        print(f"{lock}: {name} {version(name)}", flush=True)
    # No lock names a host: which registry it is stays the user's own choice.
    command = ["npm", "install", "--package-lock-only", "--omit-lockfile-registry-resolved", "--ignore-scripts"]
    code = subprocess.call([*command, "--no-audit", "--no-fund", "@portkey-ai/gateway@latest"], cwd=PORTKEY)
    if code == 0:
        lock = PORTKEY / "package-lock.json"
        document = json.loads(lock.read_text())
        for package in document["packages"].values():
            package.pop("funding", None)
        lock.write_text(json.dumps(document, indent=2) + "\n")
        print(f"bench/portkey/package-lock.json: portkey {version('portkey')}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(recompile())
