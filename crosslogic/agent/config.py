"""What an agent is told when it is started: the only module of the agent that reads the environment."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

PREFIX = "CROSSLOGIC_AGENT_"
ENGINES = ("vllm", "sglang", "llamacpp")

AWS_METADATA = "http://169.254.169.254"
GCP_METADATA = "metadata.google.internal"
AZURE_METADATA = "http://169.254.169.254"


class BadConfig(Exception):
    """The agent cannot start like this; the message says which variable to change."""


@dataclass(frozen=True)
class Config:
    """One agent's orders. Sizes are in megabytes, times in seconds."""

    control_url: str
    join_token: str
    node_id: str
    engine: str
    engine_command: str
    engine_port: int
    listen_host: str
    listen_port: int
    endpoint: str
    ca_sha256: str
    state_dir: str
    heartbeat_s: float = 5.0
    cache_dirs: tuple[str, ...] = ()
    cache_limit_mb: int = 20_000
    aws_metadata: str = AWS_METADATA
    gcp_metadata: str = GCP_METADATA
    azure_metadata: str = AZURE_METADATA

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Config:
        """The orders that an environment holds. Raises BadConfig for ones that cannot be carried out."""

        def get(name: str, default: str = "") -> str:
            return environment.get(PREFIX + name, "").strip() or default

        def need(name: str, example: str) -> str:
            value = get(name)
            if not value:
                raise BadConfig(f"{PREFIX}{name} is not set; give it a value such as {example}")
            return value

        engine = get("ENGINE", "vllm")
        if engine not in ENGINES:
            raise BadConfig(f"{PREFIX}ENGINE is {engine!r}; use one of: {', '.join(ENGINES)}")
        host, _, port = get("LISTEN", "0.0.0.0:8443").rpartition(":")
        home = environment.get("HOME") or "/"
        return cls(
            control_url=_checked_url(need("CONTROL_URL", "https://api.example.org")),
            join_token=get("JOIN_TOKEN"),
            node_id=need("NODE_ID", "node_01k5h2v9q3f4tbz7x8m6n0c1de"),
            engine=engine,
            engine_command=get("ENGINE_COMMAND"),
            engine_port=_number(get("ENGINE_PORT", "8000"), "ENGINE_PORT", 1, 65_535),
            listen_host=host.strip("[]") or "0.0.0.0",
            listen_port=_number(port, "LISTEN", 1, 65_535),
            endpoint=get("ENDPOINT"),
            ca_sha256=get("CA_SHA256").lower().replace(":", ""),
            state_dir=get("STATE_DIR", os.path.join(home, ".crosslogic-agent")),
            heartbeat_s=_number(get("HEARTBEAT_MS", "5000"), "HEARTBEAT_MS", 100, 60_000) / 1000,
            cache_dirs=tuple(
                get("CACHE_DIRS").split(":")
                if get("CACHE_DIRS")
                else [os.path.join(home, ".cache", "vllm"), os.path.join(home, ".triton", "cache")]
            ),
            cache_limit_mb=_number(get("CACHE_LIMIT_MB", "20000"), "CACHE_LIMIT_MB", 1, 100_000_000),
            # The names by which each cloud's own tools are told of another metadata server.
            aws_metadata=environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", AWS_METADATA).rstrip("/"),
            gcp_metadata=environment.get("GCE_METADATA_HOST", GCP_METADATA),
            azure_metadata=get("AZURE_METADATA", AZURE_METADATA).rstrip("/"),
        )

    @classmethod
    def of_process(cls) -> Config:
        """This process's orders. Raises BadConfig."""
        return cls.read(os.environ)


def engine_environment(credential: str, port: int) -> dict[str, str]:
    """The environment for an engine: ours without the agent's secrets, and the key that it must ask for.

    Engines take their key from here where they can, because others can see a command's arguments.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    inherited.update(VLLM_API_KEY=credential, LLAMA_API_KEY=credential, CROSSLOGIC_ENGINE_PORT=str(port))
    return inherited


def _number(text: str, name: str, least: int, most: int) -> int:
    if text.isdigit() and least <= int(text) <= most:
        return int(text)
    raise BadConfig(f"{PREFIX}{name} must hold a number from {least} to {most}")


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.query or parts.fragment:
        raise BadConfig(f"{PREFIX}CONTROL_URL is no URL; write https://HOST[:PORT]")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise BadConfig(f"{PREFIX}CONTROL_URL is plain http; that is for a control plane on this machine, use https")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
