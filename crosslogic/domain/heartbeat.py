"""Heartbeats: what a node's agent says of its engine and its GPUs, every few seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The latest word of one node's agent. Counters count since the engine's start; a gauge that is not known is None.

    `received_at` is Unix seconds by the receiver's clock: a node's own clock is never believed.
    """

    node_id: str
    received_at: float
    is_engine_up: bool
    engine_started_at: float = 0.0  # By the node's clock: only a change means something, namely a restart.
    engine_restarts: int = 0
    running: int | None = None  # Requests being generated.
    waiting: int | None = None  # Requests in the engine's own queue.
    kv_cache_used: float | None = None  # 0 to 1.
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    preempted_requests: int = 0
    ttft_p50_ms: float | None = None  # Of the requests since the heartbeat before.
    inter_token_p50_ms: float | None = None
    gpu_temperature_c: float | None = None  # The hottest GPU's.
    gpu_memory_used_mb: int | None = None  # Of all GPUs together.
    gpu_memory_total_mb: int | None = None
    out_of_memory: int = 0  # Times the engine or the kernel ran out of memory.
    disk_free_mb: int | None = None
    notice: str = ""  # The cloud's word that it will take the machine, e.g. "aws: terminate"; empty: none.
    notice_left_s: float | None = None  # Seconds until it does, if the cloud says.
    agent_version: str = ""
