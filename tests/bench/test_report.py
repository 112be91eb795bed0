"""What becomes of figures: medians, ratios and tables that never show what was not measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import report

ROUNDS = {
    "direct": [{"events_per_stream_and_s": 200.0, "ms_at_1000_per_s_p50": 0.1, "ms_at_1000_per_s_p99": 1.0}],
    "nginx": [
        {"cpu_us_per_request": 10.0, "cpu_us_per_event": 5.0, "ms_at_1000_per_s_p50": 0.3},
        {"cpu_us_per_request": 30.0, "cpu_us_per_event": 5.0, "ms_at_1000_per_s_p50": 0.3},
        {"cpu_us_per_request": 20.0, "cpu_us_per_event": math.nan},
    ],
    "ours": [{"cpu_us_per_request": 50.0, "valkey_cpu_us_per_request": 7.0, "postgres_cpu_us_per_request": 3.0}],
    "broken": [{"cpu_us_per_request": 100.0, "cpu_us_per_event": math.nan, "events_per_stream_and_s": 0.0}],
    "slow": [{"cpu_us_per_request": 90.0, "cpu_us_per_event": 800.0, "events_per_stream_and_s": 120.0}],
}
TITLES = {name: name.title() for name in ROUNDS}
FIGURES = report.medians(ROUNDS)


def cells(table: str, first: str) -> list[str]:
    """A row of a Markdown table by its first cell."""
    row = next(line for line in table.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


class TestMedians:
    def test_are_of_the_rounds_that_have_the_figure(self) -> None:
        assert FIGURES["nginx"] == {"cpu_us_per_request": 20, "cpu_us_per_event": 5, "ms_at_1000_per_s_p50": 0.3}
        assert "cpu_us_per_event" not in FIGURES["broken"]


class TestComparisons:
    def test_a_ratio_is_to_nginx(self) -> None:
        assert report.ratio(FIGURES, "ours", "cpu_us_per_request") == 2.5

    def test_added_latency_is_beyond_the_engine_s_own(self) -> None:
        assert report.added(FIGURES, "nginx", "ms_at_1000_per_s_p50") == pytest.approx(0.2)

    def test_what_was_not_measured_is_no_number(self) -> None:
        assert math.isnan(report.ratio(FIGURES, "ours", "cpu_us_per_event"))
        assert math.isnan(report.ratio({"ours": {"x": 1.0}}, "ours", "x"))
        assert math.isnan(report.added(FIGURES, "ours", "ms_at_1000_per_s_p50"))


class TestTables:
    def test_cost_is_sorted_and_shows_the_spread_of_rounds(self) -> None:
        table = report.cost_table(FIGURES, ROUNDS, TITLES)
        names = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
        assert names == ["Nginx", "Ours", "Slow", "Broken"]
        assert cells(table, "Nginx")[1:4] == ["20.0", "10.0–30.0", "1.0"]

    def test_a_system_that_falls_behind_is_marked_and_a_missing_figure_is_a_dash(self) -> None:
        table = report.cost_table(FIGURES, ROUNDS, TITLES)
        assert cells(table, "Slow")[5] == "800.0 (fell behind)"
        assert cells(table, "Broken")[5:] == ["–", "–", "–"]

    def test_latency_names_only_rates_that_were_measured(self) -> None:
        table = report.latency_table(FIGURES, TITLES)
        assert "1 000/s p99" in table
        assert "200/s" not in table
        assert cells(table, "Nginx")[1] == "0.20"

    def test_what_serves_ours_is_added_up(self) -> None:
        table = report.beside_table(FIGURES, TITLES)
        assert cells(table, "Ours: µs CPU/request")[1:] == ["50.0", "7.0", "3.0", "60.0"]
        assert "Nginx" not in table

    def test_digits_are_grouped(self) -> None:
        assert report.shown(1234567.89, 1) == "1 234 567.9"


class TestPlot:
    def test_is_a_picture_with_a_bar_for_each_figure(self, tmp_path: Path) -> None:
        report.plot(FIGURES, TITLES, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
