from __future__ import annotations

import math
from pathlib import Path

import pytest

from crosslogic.agent.metrics import MOST_LINES, median_ms, parse

VLLM = (Path(__file__).parents[1] / "clients" / "vllm-0.32.0.prom").read_text()

SGLANG = """\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 7.0
sglang:num_queue_reqs{model_name="m"} 2.0
sglang:token_usage{model_name="m"} 0.28
sglang:prompt_tokens_total{model_name="m"} 8128902.0
sglang:generation_tokens_total{model_name="m"} 7557572.0
sglang:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 10.0
sglang:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 10.0
"""

LLAMACPP = """\
llamacpp:prompt_tokens_total 21
llamacpp:tokens_predicted_total 43
llamacpp:requests_processing 1
llamacpp:requests_deferred 3
"""


class TestParse:
    def test_reads_vllm(self) -> None:
        page = parse(VLLM)
        assert (page.number("running"), page.number("waiting")) == (3, 2)

    def test_reads_sglang(self) -> None:
        page = parse(SGLANG)
        assert (page.number("running"), page.number("waiting"), page.share("kv_cache_used")) == (7, 2, 0.28)
        assert (page.number("prompt_tokens"), page.number("completion_tokens")) == (8128902, 7557572)
        assert page.buckets["ttft_p50_ms"] == {0.1: 10.0, math.inf: 10.0}

    def test_reads_llamacpp_and_knows_what_it_does_not_say(self) -> None:
        page = parse(LLAMACPP)
        assert (page.number("running"), page.number("waiting")) == (1, 3)
        assert (page.number("prompt_tokens"), page.number("completion_tokens")) == (21, 43)
        assert page.share("kv_cache_used") is None
        assert page.number("cached_tokens") is None

    def test_sums_engines_and_takes_the_fullest_cache(self) -> None:
        page = parse(
            'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_running{engine="1"} 4\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.9\n'
        )
        assert (page.number("running"), page.share("kv_cache_used")) == (7, 0.9)

    @pytest.mark.parametrize(
        "line",
        [
            "vllm:num_requests_running",
            "vllm:num_requests_running{",
            "vllm:num_requests_running{} NaN",
            "vllm:num_requests_running{} +Inf",
            "vllm:num_requests_running x",
            'sglang:time_to_first_token_seconds_bucket{le="x"} 1',
            "\x00",
            "",
        ],
    )
    def test_skips_what_cannot_be_read(self, line: str) -> None:
        page = parse(f"{line}\nllamacpp:requests_deferred 1\n")
        assert page.number("running") is None
        assert page.number("waiting") == 1

    def test_stops_reading_at_its_bound(self) -> None:
        page = parse("x 1\n" * MOST_LINES + "llamacpp:requests_deferred 1\n")
        assert page.number("waiting") is None


class TestMedian:
    def test_is_interpolated_in_its_bucket(self) -> None:
        before = {0.1: 5.0, 0.2: 5.0, math.inf: 5.0}
        after = {0.1: 5.0, 0.2: 15.0, math.inf: 15.0}
        assert median_ms(before, after) == pytest.approx(150)

    def test_is_none_without_anything_new_and_after_a_restart(self) -> None:
        assert median_ms({0.1: 5.0, math.inf: 5.0}, {0.1: 5.0, math.inf: 5.0}) is None
        assert median_ms({0.1: 5.0, math.inf: 9.0}, {0.1: 1.0, math.inf: 12.0}) is None

    def test_beyond_the_last_bound_is_that_bound(self) -> None:
        assert median_ms({}, {0.1: 0.0, math.inf: 4.0}) == pytest.approx(100)
