"""An engine's metrics page in Prometheus' text format, read into the words of a heartbeat. Pure, and bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# vLLM's page has 50 kB, with histograms for each of its models more; what is beyond is not read.
MOST_BYTES = 2_000_000
MOST_LINES = 20_000

# Our word → each engine's names, summed over their labels. Sources: the pages of vLLM 0.32 and of llama.cpp's server,
# and SGLang's production-metrics documentation (0.5).
GAUGES = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred"),
}
# Shares of 0 to 1: with several engines on one node the fullest counts.
SHARES = {"kv_cache_used": ("vllm:kv_cache_usage_perc", "sglang:token_usage", "llamacpp:kv_cache_usage_ratio")}
COUNTERS = {
    "prompt_tokens": ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total", "llamacpp:prompt_tokens_total"),
    "completion_tokens": (
        "vllm:generation_tokens_total",
        "sglang:generation_tokens_total",
        "llamacpp:tokens_predicted_total",
    ),
    "cached_tokens": ("vllm:prompt_tokens_cached_total", "sglang:cached_tokens_total"),
    "preempted_requests": ("vllm:num_preemptions_total", "sglang:num_retracted_reqs_total"),
}
HISTOGRAMS = {
    "ttft_p50_ms": ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "inter_token_p50_ms": (
        "vllm:inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds",
        "sglang:inter_token_latency_seconds",
    ),
}


def _invert(words: Mapping[str, tuple[str, ...]], suffix: str = "") -> dict[str, str]:
    return {name + suffix: word for word, names in words.items() for name in names}


_SUMMED = {**_invert(GAUGES), **_invert(COUNTERS)}
_HIGHEST = _invert(SHARES)
_BUCKETS = _invert(HISTOGRAMS, "_bucket")


@dataclass(frozen=True)
class EnginePage:
    """What a page says. `buckets` holds each histogram's cumulative counts by upper bound in seconds."""

    values: Mapping[str, float]
    buckets: Mapping[str, Mapping[float, float]] = field(default_factory=dict)  # pyright: ignore[reportUnknownVariableType]

    def number(self, word: str) -> int | None:
        """A count, None where the engine has no such metric."""
        value = self.values.get(word)
        return None if value is None else max(0, round(value))

    def share(self, word: str) -> float | None:
        """A share, kept between 0 and 1; None where the engine has no such metric."""
        value = self.values.get(word)
        return None if value is None else min(1.0, max(0.0, value))


def parse(page: str) -> EnginePage:
    """Read a page. Lines that cannot be read, and all that we have no word for, are skipped."""
    values: dict[str, float] = {}
    # Two names of one histogram may be on one page: the first one counts.
    found: dict[str, dict[str, dict[float, float]]] = {}
    for line in page[:MOST_BYTES].split("\n", MOST_LINES)[:MOST_LINES]:
        if line.startswith("#"):
            continue
        name = line[: min((at for at in (line.find("{"), line.find(" ")) if at >= 0), default=0)]
        if name in _SUMMED or name in _HIGHEST:
            value = _value(line)
            if value is not None and name in _SUMMED:
                values[_SUMMED[name]] = values.get(_SUMMED[name], 0.0) + value
            elif value is not None:
                values[_HIGHEST[name]] = max(values.get(_HIGHEST[name], 0.0), value)
        elif name in _BUCKETS:
            bound, value = _bound(line), _value(line)
            if bound is not None and value is not None:
                counts = found.setdefault(_BUCKETS[name], {}).setdefault(name, {})
                counts[bound] = counts.get(bound, 0.0) + value
    return EnginePage(values, {word: next(iter(by_name.values())) for word, by_name in found.items()})


def median_ms(before: Mapping[float, float], after: Mapping[float, float]) -> float | None:
    """The median of what a histogram took between two readings, in milliseconds; None when it took nothing.

    Interpolated inside its bucket as Prometheus' histogram_quantile does; beyond the last bound, that bound.
    """
    counts = sorted((bound, count - before.get(bound, 0.0)) for bound, count in after.items())
    if not counts or counts[-1][1] <= 0 or any(count < 0 for _, count in counts):
        return None
    rank = counts[-1][1] / 2
    lower, below = 0.0, 0.0
    for bound, count in counts:
        if count >= rank:
            if math.isinf(bound):
                return lower * 1000
            inside = count - below
            return (lower + (bound - lower) * ((rank - below) / inside if inside else 1.0)) * 1000
        lower, below = bound, count
    return lower * 1000


def _value(line: str) -> float | None:
    parts = line[line.rfind("}") + 1 :].split() if "}" in line else line.split()[1:]
    try:
        value = float(parts[0])
    except (IndexError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _bound(line: str) -> float | None:
    _, found, rest = line.partition('le="')
    try:
        bound = float(rest.partition('"')[0])
    except ValueError:
        return None
    return bound if found and not math.isnan(bound) else None
