"""Figures of many rounds as tables and a plot for people, and one document for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import RATES

Rounds = Mapping[str, Sequence[Mapping[str, float]]]
Medians = Mapping[str, Mapping[str, float]]

BASELINE = "nginx"
DIRECT = "direct"
OURS = "ours"
# A stream that brings fewer events than this share of what the engine alone brings has fallen behind.
KEPT_PACE = 0.95
NONE = "–"


def medians(rounds: Rounds) -> dict[str, dict[str, float]]:
    """The median of each figure of each system over its rounds; a round without the figure is left out."""
    found: dict[str, dict[str, float]] = {}
    for system, rows in rounds.items():
        found[system] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row and not math.isnan(row[name])]
            if values:
                found[system][name] = median(values)
    return found


def of(figures: Medians, system: str, name: str) -> float:
    """One figure; NaN where it was not measured."""
    return figures.get(system, {}).get(name, math.nan)


def ratio(figures: Medians, system: str, name: str) -> float:
    """How many times the baseline's figure; NaN where either is missing or the baseline's is 0."""
    other = of(figures, BASELINE, name)
    return of(figures, system, name) / other if other else math.nan


def added(figures: Medians, system: str, name: str) -> float:
    """What the system adds to the figure measured without any gateway; NaN where either is missing."""
    return of(figures, system, name) - of(figures, DIRECT, name)


def fell_behind(figures: Medians, system: str) -> bool:
    """Did its streams bring fewer events a second than the engine's own?"""
    name = "events_per_stream_and_s"
    return of(figures, system, name) < KEPT_PACE * of(figures, DIRECT, name)


def shown(value: float, digits: int = 0) -> str:
    """A figure in a table: digits in groups, a dash where there is none."""
    return NONE if math.isnan(value) else f"{value:,.{digits}f}".replace(",", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cost_table(figures: Medians, rounds: Rounds, titles: Mapping[str, str]) -> str:
    """CPU, throughput and memory, cheapest first."""
    systems = sorted(
        (system for system in titles if system != DIRECT),
        key=lambda system: (
            math.isnan(of(figures, system, "cpu_us_per_request")),
            of(figures, system, "cpu_us_per_request"),
        ),
    )
    head = [
        "system",
        "µs CPU/request",
        "rounds",
        f"× {BASELINE}",
        "requests/s",
        "µs CPU/event",
        f"× {BASELINE}",
        "RSS MiB",
    ]
    rows: list[list[str]] = []
    for system in systems:
        seen = [row.get("cpu_us_per_request", math.nan) for row in rounds.get(system, ())]
        seen = [value for value in seen if not math.isnan(value)]
        events = shown(of(figures, system, "cpu_us_per_event"), 1)
        rows.append(
            [
                titles[system],
                shown(of(figures, system, "cpu_us_per_request"), 1),
                f"{shown(min(seen), 1)}–{shown(max(seen), 1)}" if seen else NONE,
                shown(ratio(figures, system, "cpu_us_per_request"), 1),
                shown(of(figures, system, "requests_per_s")),
                f"{events} (fell behind)" if fell_behind(figures, system) and events != NONE else events,
                shown(ratio(figures, system, "cpu_us_per_event"), 1),
                shown(of(figures, system, "rss_mib")),
            ]
        )
    return table(head, rows)


def latency_table(figures: Medians, titles: Mapping[str, str]) -> str:
    """What each system adds to the engine's own latency, in milliseconds; the first row is the engine's own."""
    rates = [rate for rate in RATES if not math.isnan(of(figures, DIRECT, f"ms_at_{rate}_per_s_p50"))]
    tails = ("p50", "p99", "p99.9")
    head = ["added ms", *(f"{rate:,}/s {tail}".replace(",", " ") for rate in rates for tail in tails)]
    head += [f"first token {tail}" for tail in tails[:2]]
    names = [f"ms_at_{rate}_per_s_{tail}" for rate in rates for tail in tails]
    names += [f"first_token_ms_{tail}" for tail in tails[:2]]
    rows = [["*the engine alone*", *(f"*{shown(of(figures, DIRECT, name), 2)}*" for name in names)]]
    rows += [
        [title, *(shown(added(figures, system, name), 2) for name in names)]
        for system, title in titles.items()
        if system != DIRECT
    ]
    return table(head, rows)


def crowd_table(crowds: Medians, titles: Mapping[str, str]) -> str:
    """Many connections and streams at a time."""
    head = ["system", "idle connections", "KiB each", "core used meanwhile", "open streams", "KiB each", "µs CPU/event"]
    head += ["first token ms p99"]
    rows = [
        [
            titles[system],
            shown(of(crowds, system, "idle_connections")),
            shown(of(crowds, system, "idle_kib_each"), 1),
            shown(100 * of(crowds, system, "idle_core_share"), 1) + " %",
            shown(of(crowds, system, "open_streams")),
            shown(of(crowds, system, "open_stream_kib_each"), 1),
            shown(of(crowds, system, "open_stream_cpu_us_per_event"), 1),
            shown(of(crowds, system, "open_stream_first_token_ms_p99"), 1),
        ]
        for system in crowds
    ]
    return table(head, rows)


def beside_table(figures: Medians, titles: Mapping[str, str]) -> str:
    """What serves our gateway on the other core: it is not free, so it is shown."""
    head = ["", "gateway", "Valkey", "Postgres", "all"]
    rows: list[list[str]] = []
    for system in titles:
        for unit in ("request", "event"):
            parts = [of(figures, system, f"{who}cpu_us_per_{unit}") for who in ("", "valkey_", "postgres_")]
            if not math.isnan(parts[1]):
                rows.append([f"{titles[system]}: µs CPU/{unit}", *(shown(part, 1) for part in (*parts, sum(parts)))])
    return table(head, rows)


def scale_table(figures: Medians, titles: Mapping[str, str]) -> str:
    """One process and two."""
    head = ["", "requests/s", "µs CPU/request", "ms p50", "ms p99"]
    rows = [
        [
            title,
            shown(of(figures, system, "requests_per_s")),
            shown(of(figures, system, "cpu_us_per_request"), 1),
            shown(of(figures, system, "closed_ms_p50"), 1),
            shown(of(figures, system, "closed_ms_p99"), 1),
        ]
        for system, title in titles.items()
    ]
    return table(head, rows)


def plot(figures: Medians, titles: Mapping[str, str], path: Path) -> None:
    """CPU of a request and of an event as bars on a logarithmic scale, cheapest on top."""
    import matplotlib

    matplotlib.use("Agg")
    # Its own annotations are partial.
    pyplot: Any = __import__("matplotlib.pyplot", fromlist=["pyplot"])
    panels = (("cpu_us_per_request", "µs CPU per request"), ("cpu_us_per_event", "µs CPU per streamed event"))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.45 * len(titles) + 1.2), layout="constrained")
    for axis, (name, label) in zip(axes, panels, strict=True):
        values = {system: of(figures, system, name) for system in titles if system != DIRECT}
        systems = sorted((s for s, value in values.items() if value > 0), key=values.__getitem__, reverse=True)
        colours = ["#d1495b" if system.startswith(OURS) else "#8d99ae" for system in systems]
        bars = axis.barh(
            [titles[system].replace("*", "") for system in systems], [values[s] for s in systems], color=colours
        )
        axis.bar_label(bars, [shown(values[system], 1 if values[system] < 100 else 0) for system in systems], padding=3)
        axis.set_xscale("log")
        axis.set_xlim(left=1, right=6 * max(values[system] for system in systems) if systems else 1)
        axis.set_xlabel(f"{label} (logarithmic)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
