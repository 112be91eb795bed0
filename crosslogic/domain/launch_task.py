"""The SkyPilot task that turns a rented machine into a node: its places, its engine, its agent."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosslogic.domain.errors import Rejected
from crosslogic.domain.placement import CPU, Place

ENGINES = ("vllm", "sglang", "llamacpp", "custom")

# The agent terminates TLS here; the engine itself listens on loopback only.
NODE_PORT = 8443
ENGINE_PORT = 8000
# A machine for an engine without a GPU.
CPU_RESOURCES: Mapping[str, str] = {"cpus": "2+", "memory": "8+"}

# What the models of the catalog are made of, on the Hugging Face hub. A spec that names its weights goes before.
WEIGHTS: Mapping[str, str] = {
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen-2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "gemma-7b": "google/gemma-7b-it",
    "bge-base-en": "BAAI/bge-base-en-v1.5",
}

_FOLDER = "$HOME/crosslogic"
# The agent, as the API serves it below /agent/ and as it lies on the node.
AGENT = "crosslogic-agent.pyz"


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What serves on the node. `command` is for `custom` alone; `version` pins the package of the others."""

    name: str
    version: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class NodePlan:
    """All that a task needs to know of one node. `join_token` and `credential` never leave the task's secrets."""

    node_id: str
    model: str
    kind: str
    places: Sequence[Place]
    engine: EnginePlan
    control_url: str
    agent_sha256: str
    join_token: str
    credential: str
    ca_sha256: str = ""
    weights: str = ""
    weights_token: str = ""
    context_tokens: int = 0  # 0: the model's own.


def build(plan: NodePlan) -> dict[str, Any]:
    """The task as SkyPilot reads it from YAML. Raises Rejected for a plan that cannot become a node."""
    if not plan.places:
        raise Rejected(f"Node {plan.node_id} has no place to be launched in.", code="no_place")
    secrets = {"CROSSLOGIC_AGENT_JOIN_TOKEN": plan.join_token, "ENGINE_API_KEY": plan.credential}
    if plan.weights_token:
        secrets["HF_TOKEN"] = plan.weights_token
    return {
        "name": plan.node_id,
        "resources": _resources(plan.places),
        "envs": {
            "CROSSLOGIC_AGENT_CONTROL_URL": plan.control_url,
            "CROSSLOGIC_AGENT_NODE_ID": plan.node_id,
            "CROSSLOGIC_AGENT_ENGINE": "llamacpp" if plan.engine.name == "custom" else plan.engine.name,
            "CROSSLOGIC_AGENT_ENGINE_COMMAND": engine_command(plan),
            "CROSSLOGIC_AGENT_ENGINE_PORT": str(ENGINE_PORT),
            "CROSSLOGIC_AGENT_LISTEN": f"0.0.0.0:{NODE_PORT}",
            "CROSSLOGIC_AGENT_ENDPOINT": "",
            "CROSSLOGIC_AGENT_CA_SHA256": plan.ca_sha256,
            "CROSSLOGIC_AGENT_SHA256": plan.agent_sha256,
        },
        "secrets": secrets,
        "setup": _setup(plan.engine),
        "run": _RUN,
    }


def engine_command(plan: NodePlan) -> str:
    """The command that the agent starts. Secrets stand in it as variables that a shell puts in. Raises Rejected."""
    return f"/bin/sh -c {shlex.quote(_shell_command(plan))}"


def _shell_command(plan: NodePlan) -> str:
    engine = plan.engine
    if engine.name == "custom":
        if not engine.command:
            raise Rejected("A custom engine needs its command (CROSSLOGIC_NODE_ENGINE_COMMAND).", code="no_engine")
        return engine.command
    if engine.name not in ENGINES:
        raise Rejected(f"Unknown engine {engine.name[:64]!r}. Use one of: {', '.join(ENGINES)}.", code="unknown_engine")
    weights = plan.weights or WEIGHTS.get(plan.model, "")
    if not weights:
        raise Rejected(
            f"Nobody has said which weights model {plan.model} has; roll out a revision that names them.",
            code="no_weights",
        )
    model, repository = shlex.quote(plan.model), shlex.quote(weights)
    context = f" {_CONTEXT_OPTION[engine.name]} {plan.context_tokens}" if plan.context_tokens else ""
    if engine.name == "vllm":
        task = " --runner pooling" if plan.kind == "embedding" else ""
        return (
            f'exec env VLLM_API_KEY="$ENGINE_API_KEY" {_FOLDER}/engine/bin/vllm serve {repository}'
            f" --served-model-name {model} --host 127.0.0.1 --port {ENGINE_PORT}"
            f" --tensor-parallel-size {_GPUS} --enable-prefix-caching{context}{task}"
        )
    if engine.name == "sglang":
        embedding = " --is-embedding" if plan.kind == "embedding" else ""
        return (
            f"exec {_FOLDER}/engine/bin/python -m sglang.launch_server --model-path {repository}"
            f" --served-model-name {model} --host 127.0.0.1 --port {ENGINE_PORT} --tp-size {_GPUS}"
            f' --api-key "$ENGINE_API_KEY" --enable-metrics{context}{embedding}'
        )
    embedding = " --embedding" if plan.kind == "embedding" else ""
    return (
        f'exec env LLAMA_API_KEY="$ENGINE_API_KEY" llama-server --hf-repo {repository} --alias {model}'
        f" --host 127.0.0.1 --port {ENGINE_PORT} --metrics{context}{embedding}"
    )


# SkyPilot says on the machine how many GPUs it got: places may differ in that.
_GPUS = '"$SKYPILOT_NUM_GPUS_PER_NODE"'
_CONTEXT_OPTION = {"vllm": "--max-model-len", "sglang": "--context-length", "llamacpp": "--ctx-size"}


def _resources(places: Sequence[Place]) -> dict[str, Any]:
    """`ordered`: SkyPilot tries the places as we ranked them, and the next one when one is full."""
    candidates: list[dict[str, Any]] = []
    for place in places:
        candidate: dict[str, Any] = {"infra": place.infra, "use_spot": place.is_spot}
        candidate |= CPU_RESOURCES if place.gpu == CPU else {"accelerators": place.gpu}
        if place.cloud not in _WITHOUT_PORTS:
            candidate["ports"] = [NODE_PORT]
        candidates.append(candidate)
    return candidates[0] if len(candidates) == 1 else {"ordered": candidates}


# Machines that are reached where they are: SkyPilot refuses to open ports there.
_WITHOUT_PORTS = frozenset({"slurm", "ssh"})


def _setup(engine: EnginePlan) -> str:
    lines = ["set -euo pipefail", f'mkdir -p "{_FOLDER}"', f'cd "{_FOLDER}"']
    if engine.name in ("vllm", "sglang"):
        package = f"vllm=={engine.version}" if engine.name == "vllm" else f"sglang[all]=={engine.version}"
        lines += [
            'uv="$HOME/.local/bin/uv"',
            '[ -x engine/bin/python ] || "$uv" venv --quiet --python 3.12 engine',
            f'"$uv" pip install --quiet --python engine/bin/python {shlex.quote(package)}',
        ]
    elif engine.name == "llamacpp":
        lines += ["command -v llama-server >/dev/null || { echo 'the image lacks llama-server' >&2; exit 1; }"]
    # What is fetched must be what the control plane that ordered this machine serves.
    lines += [
        f'curl -fsS --retry 5 --retry-connrefused -o {AGENT}.new "$CROSSLOGIC_AGENT_CONTROL_URL/agent/{AGENT}"',
        f'echo "$CROSSLOGIC_AGENT_SHA256  {AGENT}.new" | sha256sum --check --quiet',
        f"mv {AGENT}.new {AGENT}",
    ]
    return "\n".join(lines) + "\n"


_RUN = f"""\
cd "{_FOLDER}"
export CROSSLOGIC_AGENT_STATE_DIR="{_FOLDER}/agent"
exec python3 {AGENT}
"""
