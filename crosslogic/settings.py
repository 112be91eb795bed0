"""All settings, from the environment (`CROSSLOGIC_…`). The only module that reads it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from crosslogic.domain.addresses import Network, read_networks, refusal
from crosslogic.domain.credentials import DEV_ADMIN_TOKEN
from crosslogic.domain.errors import Rejected


class Settings(BaseSettings):
    """One object for every process. Times are in seconds unless a name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="CROSSLOGIC_", env_file=None, extra="ignore")

    mode: Literal["dev", "production"] = Field(
        default="production",
        description="`dev` admits the well-known demo key and token, loopback nodes and plain HTTP.",
    )
    state_dir: Path = Field(
        default=Path(".crosslogic"), description="Logs, the usage log, and in dev mode every server's data."
    )

    database_url: SecretStr = Field(
        default=SecretStr("postgresql://127.0.0.1:5432/crosslogic"),
        description="Postgres 15 or later. TLS by `?sslmode=verify-full&sslrootcert=…`.",
    )
    database_is_pooled: bool = Field(
        default=False, description="True behind a pooler in transaction mode: no prepared statements are kept."
    )
    database_connections: int = Field(default=8, ge=2, le=200, description="Most connections of one process.")
    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), description="Valkey 8 or Redis 7 or later; `rediss://` for TLS."
    )
    redis_prefix: str = Field(
        default="cic:", max_length=64, description="In front of every key, so that installations can share a server."
    )

    temporal_address: str = Field(
        default="127.0.0.1:7233", description="HOST:PORT of the frontend, self-hosted or Temporal Cloud."
    )
    temporal_namespace: str = Field(default="default", description="The namespace all workflows live in.")
    temporal_tls: bool = Field(
        default=False, description="TLS to the frontend; implied by an API key or a client certificate."
    )
    temporal_api_key: SecretStr | None = Field(default=None, description="API key of Temporal Cloud.")
    temporal_tls_cert: Path | None = Field(
        default=None, description="Client certificate (PEM) for mTLS, with `temporal_tls_key`."
    )
    temporal_tls_key: Path | None = Field(default=None, description="Key (PEM) of the client certificate.")
    temporal_tls_ca: Path | None = Field(default=None, description="CA (PEM) that signed the server's certificate.")
    temporal_ui_url: str = Field(default="", description="Where operators open the Temporal UI; shown, never called.")
    fleet_task_queue: str = Field(default="fleet", description="Task queue of the fleet workflows.")

    api_host: str = Field(default="127.0.0.1", description="Address the API binds.")
    api_port: int = Field(default=8080, ge=1, le=65535, description="Port the API binds.")
    api_processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="How many processes `./run` and the files of `deploy/` start behind the API's one port.",
    )
    start_patience_s: float = Field(
        default=20.0,
        ge=0,
        le=600,
        description="A new API process takes no connection until it has read keys, models and nodes, or for so long.",
    )
    api_url: str = Field(
        default="",
        description="Where the command line finds the API; empty: where the state directory's `endpoints.json` says.",
    )
    admin_token: SecretStr | None = Field(
        default=None, description="Bearer token of the admin API; at least 24 characters."
    )
    node_secret: SecretStr | None = Field(
        default=None, description="Root secret from which every node's credential derives; at least 32 characters."
    )

    node_networks: str = Field(
        default="",
        max_length=2_000,
        description="Private networks in which nodes may be, such as `10.0.0.0/8,192.168.0.0/16`. A node's name that "
        "resolves to any other private address is not connected to.",
    )
    api_ca_file: Path | None = Field(
        default=None,
        description="CA (PEM) of the certificate by which nodes reach the API, where that is no public one: agents "
        "pin it.",
    )

    cloud_provider: Literal["local", "skypilot"] = Field(
        default="skypilot", description="Where nodes are launched by default."
    )
    local_cloud_url: str = Field(default="http://127.0.0.1:8790", description="The local cloud's API (dev mode).")
    local_cloud_token: SecretStr | None = Field(default=None, description="Bearer token of the local cloud's API.")
    skypilot_url: str = Field(default="http://127.0.0.1:46580", description="SkyPilot's API server.")
    skypilot_token: SecretStr | None = Field(
        default=None, description="Service account token of SkyPilot's API server, if it wants one."
    )
    skypilot_user: str = Field(
        default="crosslogic",
        min_length=1,
        max_length=64,
        description="As whom SkyPilot launches: part of every machine's name in its cloud, so it must stay the same.",
    )
    node_engine: Literal["vllm", "sglang", "llamacpp", "custom"] = Field(
        default="vllm",
        description="What serves on a rented node, unless its order says otherwise; `llamacpp` needs no GPU, `custom` "
        "is `node_engine_command`.",
    )
    node_engine_command: str = Field(
        default="",
        max_length=4000,
        description="Shell command of a `custom` engine: serves OpenAI's API on 127.0.0.1:8000 with "
        "$ENGINE_API_KEY as its API key.",
    )
    node_scheme: Literal["https", "http"] = Field(
        default="https", description="How rented nodes are reached; `http` is for loopback in dev mode."
    )
    vllm_version: str = Field(default="0.32.0", max_length=40, description="The vLLM that rented nodes install.")
    sglang_version: str = Field(default="0.5.5", max_length=40, description="The SGLang that rented nodes install.")
    agent_control_url: str = Field(
        default="", description="Where a rented node's agent finds this API, e.g. https://api.example.com."
    )
    hugging_face_token: SecretStr | None = Field(
        default=None, description="Token with which rented nodes fetch gated weights."
    )
    stripe_url: str = Field(default="", description="Where Stripe's API is, if not at Stripe; for tests.")
    stripe_api_key: SecretStr | None = Field(default=None, description="Stripe secret key; billing is off without one.")
    stripe_webhook_url: str = Field(
        default="", description="Where Stripe reaches `/stripe/webhooks` of our API; empty: nowhere."
    )

    notify_slack_url: SecretStr | None = Field(default=None, description="Slack's incoming webhook for alerts.")
    notify_discord_url: SecretStr | None = Field(default=None, description="Discord's webhook for alerts.")
    notify_webhook_url: SecretStr | None = Field(
        default=None, description="Alerts are posted there as JSON: `key` (the same in a repetition), `title`, `text`."
    )
    notify_smtp_url: SecretStr | None = Field(
        default=None, description="Mail server for alerts: `smtps://USER:PASSWORD@HOST:PORT`, `smtp+starttls://…`."
    )
    notify_email_to: str = Field(default="", description="Who gets alerts by e-mail.")

    probe_interval_s: float = Field(
        default=5.0, ge=0.2, le=300, description="Time between two polls of a node's engine."
    )
    probe_timeout_s: float = Field(
        default=3.0, ge=0.1, le=60, description="A poll without an answer by then has failed."
    )
    generation_interval_s: float = Field(
        default=20.0, ge=0.2, le=600, description="Time between two generations by which a node's engine is tried."
    )
    generation_timeout_s: float = Field(
        default=10.0,
        ge=0.1,
        le=15,
        description="One token that did not come by then is missed, unless the engine generates for others.",
    )
    silence_s: float = Field(default=15.0, ge=0.5, le=600, description="Silence after which a node counts as broken.")
    cloud_interval_s: float = Field(
        default=60.0, ge=0.5, le=3600, description="Time between two questions to the cloud."
    )

    connect_timeout_s: float = Field(default=2.0, gt=0, le=60, description="To open a connection to an engine.")
    first_byte_timeout_s: float = Field(
        default=120.0, gt=0, le=3600, description="From the request to the engine's first byte."
    )
    idle_timeout_s: float = Field(
        default=60.0, gt=0, le=3600, description="Longest silence between two chunks of a stream."
    )
    total_timeout_s: float = Field(default=900.0, gt=0, le=86400, description="Longest life of one request.")
    hold_timeout_s: float = Field(
        default=20.0, ge=0, le=600, description="How long a request waits for a node that is on its way."
    )
    full_load_s: float = Field(
        default=30.0, gt=0, le=3600, description="A node is full with so much work in flight, at its measured capacity."
    )
    slow_start_s: float = Field(
        default=30.0, ge=0, le=3600, description="How long a new node's share of the requests grows to a whole one."
    )
    ejected_share: float = Field(
        default=0.5, ge=0, le=1, description="At most this share of a pool's nodes (but one) is ejected at once."
    )
    queue_timeout_s: float = Field(
        default=5.0, ge=0, le=600, description="How long a request waits for room in a full region before its 429."
    )
    queue_requests: int = Field(
        default=1000, ge=0, le=1_000_000, description="Most requests that wait for one model in one region."
    )
    max_body_bytes: int = Field(
        default=10_000_000, ge=1_000, le=1_000_000_000, description="Larger bodies are refused with 413."
    )
    shutdown_grace_s: float = Field(
        default=30.0, ge=0, le=3600, description="After SIGTERM, running requests may take this long."
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe line that is logged."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="`json` writes one object a line, as Loki and its like want it."
    )
    metrics_host: str = Field(default="127.0.0.1", description="Address of `metrics_port`.")
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Each API process also answers `/metrics` on a port of its own, the first that is free from here "
        "on; 0: only where it answers everything.",
    )
    otlp_endpoint: str = Field(
        default="", description="Base URL of an OpenTelemetry collector (OTLP over HTTP); empty: no tracing."
    )
    trace_sample_share: float = Field(default=0.01, ge=0, le=1, description="Share of requests that are traced.")
    trace_asked_per_s: float = Field(
        default=5.0,
        ge=0,
        le=10_000,
        description="So many requests a second are traced beyond it because their clients' `traceparent` asks for it.",
    )

    _networks: tuple[Network, ...] | None = PrivateAttr(default=None)

    @field_validator("node_networks")
    @classmethod
    def _readable(cls, text: str) -> str:
        try:
            read_networks(text)
        except Rejected as error:
            raise ValueError(error.message) from error
        return text

    @model_validator(mode="after")
    def _complete(self) -> Settings:
        if self.mode == "dev":
            self.admin_token = self.admin_token or SecretStr(DEV_ADMIN_TOKEN)
            self.node_secret = self.node_secret or SecretStr("dev-node-secret-not-for-production")
            return self
        for name, least in (("admin_token", 24), ("node_secret", 32)):
            value: SecretStr | None = getattr(self, name)
            if value is None or len(value.get_secret_value()) < least:
                raise ValueError(
                    f"CROSSLOGIC_{name.upper()} must be set to at least {least} characters (or set "
                    "CROSSLOGIC_MODE=dev on your own machine); make one with: "
                    "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
        return self

    @property
    def is_dev(self) -> bool:
        """Dev mode: one developer's machine, well-known credentials allowed."""
        return self.mode == "dev"

    def refuse_address(self, address: str) -> str | None:
        """Why no connection to a node may go to this address, None if one may (H7)."""
        if self._networks is None:
            self._networks = read_networks(self.node_networks)
        return refusal(address, self._networks, is_loopback_allowed=self.is_dev)

    @property
    def usage_log_dir(self) -> Path:
        """Where API processes keep their durable usage logs."""
        return self.state_dir / "usage-log"


@cache
def settings() -> Settings:
    """This process's settings, read once."""
    return Settings()


def given_environment() -> dict[str, str]:
    """The `CROSSLOGIC_…` variables that this process was started with."""
    return {name: value for name, value in os.environ.items() if name.startswith("CROSSLOGIC_")}


def child_environment(**values: str) -> dict[str, str]:
    """The environment for a child process: ours without any `CROSSLOGIC_…`, plus `values`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CROSSLOGIC_")}
    return inherited | values
