"""Figures of many rounds as one table for people and one document for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

Rounds = Mapping[str, Sequence[Mapping[str, float]]]

BASELINE = "nginx"
DIRECT = "direct"


def medians(rounds: Rounds) -> dict[str, dict[str, float]]:
    """The median of each figure of each system over its rounds; a round without the figure is left out."""
    found: dict[str, dict[str, float]] = {}
    for system, rows in rounds.items():
        names = dict.fromkeys(name for row in rows for name in row)
        found[system] = {}
        for name in names:
            values = [row[name] for row in rows if name in row and not math.isnan(row[name])]
            if values:
                found[system][name] = median(values)
    return found


def ratio(figures: Mapping[str, Mapping[str, float]], system: str, name: str, baseline: str = BASELINE) -> float:
    """How many times the baseline's figure; NaN where either is missing."""
    own, other = figures.get(system, {}).get(name), figures.get(baseline, {}).get(name)
    return own / other if own is not None and other else math.nan


def added(figures: Mapping[str, Mapping[str, float]], system: str, name: str) -> float:
    """What the system adds to the figure measured without any gateway; NaN where either is missing."""
    own, direct = figures.get(system, {}).get(name), figures.get(DIRECT, {}).get(name)
    return math.nan if own is None or direct is None else own - direct


def shown(value: float, digits: int = 0) -> str:
    """A figure in a table: grouped digits, a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}".replace(",", " ")


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def main_table(figures: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """What everybody asks first: CPU, throughput, latency, memory."""
    rows = [
        [
            "system",
            "µs CPU/request",
            f"× {BASELINE}",
            "requests/s",
            "µs CPU/event",
            f"× {BASELINE}",
            "first token +ms p50",
            "200/s: +ms p50 / p99 / p99.9",
            "1 000/s: +ms p50 / p99 / p99.9",
            "RSS MiB",
        ]
    ]
    for system, title in titles.items():
        of = figures.get(system, {})
        rows.append(
            [
                title,
                shown(of.get("cpu_us_per_request", math.nan), 1),
                shown(ratio(figures, system, "cpu_us_per_request"), 1),
                shown(of.get("requests_per_s", math.nan)),
                shown(of.get("cpu_us_per_event", math.nan), 1),
                shown(ratio(figures, system, "cpu_us_per_event"), 1),
                shown(added(figures, system, "first_token_ms_p50"), 2),
                _tails(figures, system, 200),
                _tails(figures, system, 1000),
                shown(of.get("rss_mib", math.nan)),
            ]
        )
    return table(rows)


def _tails(figures: Mapping[str, Mapping[str, float]], system: str, rate: int) -> str:
    names = [f"ms_at_{rate}_per_s_p{share}" for share in ("50", "99", "99.9")]
    if system == DIRECT:
        return " / ".join(f"({shown(figures.get(system, {}).get(name, math.nan), 2)})" for name in names)
    return " / ".join(shown(added(figures, system, name), 2) for name in names)
