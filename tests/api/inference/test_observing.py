"""What the API shows to Prometheus: counted right, named by the conventions, and never too many series."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from api.inference.observing import MOST_SERIES, Observer
from crosslogic.dev.state import free_port
from crosslogic.domain.usage import Outcome, TokenSource, UsageRecord
from crosslogic.settings import Settings
from tests.api.inference.conftest import Fleet, MakeApi, serving
from tests.engines import Engine

ROOT = Path(__file__).resolve().parents[3]
CHAT = {
    "crosslogic_outcome": "completed",
    "crosslogic_region": "in-mumbai",
    "gen_ai_operation_name": "chat",
    "gen_ai_provider_name": "crosslogic",
    "gen_ai_request_model": "llama-3-8b",
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: bytes | str) -> Samples:
    """Every sample of a page by its name and labels; fails when Prometheus could not read it or has it twice."""
    text = page if isinstance(page, str) else page.decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(page: bytes | str, name: str, **labels: str) -> float | None:
    """The one sample of that name with exactly these labels."""
    return samples(page).get((name, frozenset(labels.items())))


def total(page: bytes | str, name: str) -> float:
    """The sum over all series of a name."""
    return sum(amount for (found, _), amount in samples(page).items() if found == name)


def record(**changes: Any) -> UsageRecord:
    """A streamed chat of 100 + 11 tokens: the first after 200 ms, the others 30 ms apart."""
    given: dict[str, Any] = {
        "id": UUID(int=1),
        "client_request_id": "",
        "org_id": UUID(int=2),
        "environment_id": UUID(int=3),
        "key_id": UUID(int=4),
        "home_region": "in-mumbai",
        "model": "llama-3-8b",
        "endpoint_kind": "chat",
        "is_streamed": True,
        "served_region": "in-mumbai",
        "node_id": UUID(int=5),
        "prompt_tokens": 100,
        "completion_tokens": 11,
        "cached_tokens": 64,
        "token_source": TokenSource.ENGINE,
        "latency_ms": 500,
        "ttft_ms": 200,
        "status": 200,
        "outcome": Outcome.COMPLETED,
        "list_price_microdollars": 7,
    }
    return UsageRecord(**given | changes)


class TestFinished:
    def test_times_a_stream_by_the_conventions(self) -> None:
        observer = Observer()
        observer.finished(record())
        page = observer.page()
        for name, seconds, below, from_ in (
            ("gen_ai_server_request_duration_seconds", 0.5, "0.32", "0.64"),
            ("gen_ai_server_time_to_first_token_seconds", 0.2, "0.1", "0.25"),
            ("gen_ai_server_time_per_output_token_seconds", 0.03, "0.025", "0.05"),
        ):
            assert value(page, f"{name}_sum", **CHAT) == seconds
            assert value(page, f"{name}_count", **CHAT) == 1
            assert value(page, f"{name}_bucket", le=below, **CHAT) == 0
            assert value(page, f"{name}_bucket", le=from_, **CHAT) == 1
            assert value(page, f"{name}_bucket", le="+Inf", **CHAT) == 1

    def test_a_value_on_a_bound_is_within_it_and_one_beyond_all_is_in_the_last(self) -> None:
        observer = Observer()
        observer.finished(record(latency_ms=640))
        observer.finished(record(latency_ms=200_000))
        name = "gen_ai_server_request_duration_seconds_bucket"
        assert value(observer.page(), name, le="0.64", **CHAT) == 1
        assert value(observer.page(), name, le="81.92", **CHAT) == 1
        assert value(observer.page(), name, le="+Inf", **CHAT) == 2

    def test_counts_what_was_charged(self) -> None:
        observer = Observer()
        observer.finished(record())
        observer.finished(record(completion_tokens=40), is_reserved=True)
        page = observer.page()
        assert value(page, "gen_ai_client_token_usage_sum", gen_ai_token_type="input", **CHAT) == 200
        assert value(page, "gen_ai_client_token_usage_sum", gen_ai_token_type="output", **CHAT) == 51
        assert value(page, "gen_ai_client_token_usage_bucket", le="16.0", gen_ai_token_type="output", **CHAT) == 1
        assert value(page, "crosslogic_cached_tokens_total", model="llama-3-8b", region="in-mumbai") == 128
        assert value(page, "crosslogic_reserved_requests_total", model="llama-3-8b", region="in-mumbai") == 1

    def test_a_whole_answer_says_nothing_of_its_first_token(self) -> None:
        observer = Observer()
        observer.finished(record(is_streamed=False))
        assert total(observer.page(), "gen_ai_server_time_to_first_token_seconds_count") == 0
        assert total(observer.page(), "gen_ai_server_time_per_output_token_seconds_count") == 0
        assert total(observer.page(), "gen_ai_server_request_duration_seconds_count") == 1

    @pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CUT, Outcome.REJECTED])
    def test_errors_are_told_apart_and_have_no_tokens(self, outcome: Outcome) -> None:
        observer = Observer()
        observer.finished(record(outcome=outcome))
        page = observer.page()
        labels = CHAT | {"crosslogic_outcome": outcome.value, "error_type": outcome.value}
        assert value(page, "gen_ai_server_request_duration_seconds_count", **labels) == 1
        assert total(page, "gen_ai_client_token_usage_count") == 0
        assert total(page, "gen_ai_server_time_to_first_token_seconds_count") == 0

    def test_kinds_of_endpoint_add_up(self) -> None:
        observer = Observer()
        for kind in ("chat", "completion", "embedding"):
            observer.finished(record(endpoint_kind=kind))
        page = observer.page()
        assert (
            value(page, "crosslogic_requests_total", model="llama-3-8b", region="in-mumbai", outcome="completed") == 3
        )
        operations = set(re.findall(r'gen_ai_operation_name="(\w+)"', page.decode()))
        assert operations == {"chat", "text_completion", "embeddings"}


class TestPage:
    def test_shows_everything_that_is_told(self) -> None:
        observer = Observer()
        place = {"model": "m", "region": "r"}
        observer.refused("rate_limit_exceeded")
        observer.hold_placed()
        observer.hold_refused("key", "requests_per_min")
        observer.would_refuse("org", "concurrency")
        observer.decided("m", "r", "only", "least-load")
        observer.node_failed("m", "r", "connect")
        observer.ejected("m", "r")
        observer.returned("m", "r")
        observer.retried("reset")
        observer.continued("seamless")
        observer.wasted(10, 3)
        observer.shed("m", "r")
        observer.queued("m", "r", 0.2)
        observer.queue_length.set(4, "m", "r")
        page = observer.page()
        for name, labels, expected in (
            ("crosslogic_refused_total", {"code": "rate_limit_exceeded"}, 1),
            ("crosslogic_holds_placed_total", {}, 1),
            ("crosslogic_holds_refused_total", {"layer": "key", "limit": "requests_per_min"}, 1),
            ("crosslogic_would_refuse_total", {"layer": "org", "limit": "concurrency"}, 1),
            ("crosslogic_decisions_total", place | {"strategy": "least-load", "reason": "only"}, 1),
            ("crosslogic_node_failures_total", place | {"kind": "connect"}, 1),
            ("crosslogic_ejections_total", place, 1),
            ("crosslogic_returns_total", place, 1),
            ("crosslogic_retries_total", {"kind": "reset"}, 1),
            ("crosslogic_continuations_total", {"result": "seamless"}, 1),
            ("crosslogic_waste_tokens_total", {"token_type": "input"}, 10),
            ("crosslogic_waste_tokens_total", {"token_type": "output"}, 3),
            ("crosslogic_shed_total", place, 1),
            ("crosslogic_queue_wait_seconds_sum", place, 0.2),
            ("crosslogic_queue_wait_seconds_bucket", place | {"le": "0.25"}, 1),
            ("crosslogic_queue_length", place, 4),
            ("crosslogic_process_info", {"pid": str(os.getpid())}, 1),
        ):
            assert value(page, name, **labels) == expected, name

    def test_every_metric_is_declared_once_and_with_its_labels(self) -> None:
        observer = Observer()
        observer.finished(record())
        observer.node_failed("m", "r", "connect")
        declared = {metric.name: {*metric.labels, "le"} for metric in observer.metrics}
        assert len(declared) == len(observer.metrics)
        for name, labels in samples(observer.page()):
            base = name if name in declared else re.sub(r"_(bucket|count|sum)$", "", name)
            assert name.startswith("process_") or {label for label, _ in labels} <= declared[base], name

    def test_a_label_may_hold_anything(self) -> None:
        observer = Observer()
        name = 'a"b\\c\nd'
        observer.finished(record(model=name))
        assert (
            value(observer.page(), "crosslogic_requests_total", model=name, region="in-mumbai", outcome="completed")
            == 1
        )

    def test_what_nobody_set_is_not_shown(self) -> None:
        observer = Observer()
        assert value(observer.page(), "crosslogic_idle_connections") is None
        observer.idle_connections.set(0)
        assert value(observer.page(), "crosslogic_idle_connections") == 0


class TestBounds:
    def test_series_end_somewhere_and_nothing_is_lost(self) -> None:
        observer = Observer()
        count = 3 * MOST_SERIES
        for number in range(count):
            name = f"model-{number}"
            observer.finished(record(model=name))
            observer.node_failed(name, "r", "connect")
            observer.queued(name, "r", 1)
            observer.queue_length.set(1, name, "r")
        lines = observer.page().decode().splitlines()
        for name in (
            "crosslogic_requests_total",
            "crosslogic_node_failures_total",
            "crosslogic_queue_wait_seconds_count",
            "crosslogic_queue_length",
        ):
            series = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{")]
            assert len(series) == MOST_SERIES + 1
            # A level is not added up: only the last one is known.
            assert sum(series) == (MOST_SERIES + 1 if name == "crosslogic_queue_length" else count)

    async def test_no_client_can_make_a_series(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)

        async def hammer(round_number: int) -> str:
            for number in range(20):
                word = f"canary{round_number}x{number}"
                await api.chat(model=word)
                await api.chat(model=f"llama-7b@{word}")
                await api.chat(key=f"sk_dev_{word}")
                await api.chat(user=word, headers={"x-request-id": word, "x-crosslogic-region": word})
                await api.chat(user=word, headers={"x-request-id": word, "traceparent": word})
                await api.http.get(f"/v1/models/{word}")
                await api.http.get(f"/v1/{word}?{word}={word}")
            return (await api.http.get("/metrics")).text

        first, second = await hammer(1), await hammer(2)
        assert "canary" not in second
        assert set(samples(first)) == set(samples(second))
        assert total(second, "crosslogic_refused_total") == 2 * total(first, "crosslogic_refused_total") > 200


class TestMetrics:
    async def test_h6_names_no_tenant(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine)
        assert (await api.chat()).status_code == 200
        page = (await api.http.get("/metrics")).text
        assert total(page, "crosslogic_requests_total") == 1
        for id in (api.fleet.org_id, api.fleet.environment_id, api.fleet.key_id):
            assert str(id) not in page
        assert "acme" not in page

    async def test_a_pool_without_nodes_is_shown_as_empty(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api()
        node = await api.fleet.add_node(engine)

        async def routable() -> float | None:
            page = (await api.http.get("/metrics")).text
            return value(page, "crosslogic_routable_nodes", model="llama-3-8b", region="in-mumbai")

        async def is_one() -> bool:
            return await routable() == 1

        async def is_none() -> bool:
            return await routable() == 0

        await api.until(is_one)
        await api.fleet.set_state(node, "terminated")
        await api.until(is_none)

    async def test_the_event_loop_is_watched(self, make_api: MakeApi) -> None:
        api = await make_api()

        async def is_measured() -> bool:
            return total((await api.http.get("/metrics")).text, "crosslogic_event_loop_lag_seconds_count") > 0

        await api.until(is_measured)

    async def test_valkey_away_is_seen(self, make_api: MakeApi, engine: Engine) -> None:
        api = await make_api(engine, redis_url="redis://127.0.0.1:1/0")
        await api.fleet.limit("key", api.fleet.key_id, concurrency=5)

        async def is_alone() -> bool:
            await api.chat()
            return value((await api.http.get("/metrics")).text, "crosslogic_limits_alone") == 1

        await api.until(is_alone)


class TestPorts:
    async def test_each_process_answers_for_itself_and_sums_are_right(
        self, make_api: MakeApi, engine: Engine, fleet: Fleet, settings_of: Callable[..., Settings], tmp_path: Path
    ) -> None:
        port = free_port()
        first = await make_api(engine, metrics_port=port)
        async with serving(settings_of(metrics_port=port, state_dir=tmp_path / "second"), fleet) as second:
            for api, requests in ((first, 1), (second, 2)):
                for _ in range(requests):
                    assert (await api.chat()).status_code == 200
            pages = [await scrape(port), await scrape(port + 1)]
            assert [total(page, "crosslogic_requests_total") for page in pages] == [1, 2]
        # A process that comes later takes the port that is free, and counts from nothing.
        async with serving(settings_of(metrics_port=port, state_dir=tmp_path / "third"), fleet):
            assert total(await scrape(port + 1), "crosslogic_requests_total") == 0
            assert total(await scrape(port), "crosslogic_requests_total") == 1

    async def test_wants_the_admin_token_outside_dev_mode(self, make_api: MakeApi) -> None:
        port, token = free_port(), "t" * 24
        await make_api(mode="production", admin_token=token, node_secret="s" * 32, metrics_port=port)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert (await client.get("/metrics")).status_code == 401
            assert (await client.get("/metrics", headers={"Authorization": "Bearer wrong"})).status_code == 401
            answer = await client.get("/metrics", headers={"Authorization": f"Bearer {token}"})
            assert "crosslogic_process_info" in answer.text
            assert (await client.get("/admin/orgs")).status_code == 404
            assert (await client.post("/metrics")).status_code == 404


async def scrape(port: int) -> str:
    """The page at a port of its own."""
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://127.0.0.1:{port}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return answer.text


class TestAlerts:
    def test_ask_for_metrics_and_labels_that_exist(self) -> None:
        groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
        metrics = {metric.name: metric for metric in Observer().metrics}
        guide = (ROOT / "docs" / "observability.md").read_text()
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) >= 8
        for rule in rules:
            named = re.findall(
                r"\b(?:crosslogic|gen_ai)_\w+_(?:total|seconds|bytes|nodes|alone|machines)(?:_bucket)?\b", rule["expr"]
            )
            assert named, rule["alert"]
            labels: set[str] = {"instance"}
            for name in named:
                labels |= {*metrics[name.removesuffix("_bucket")].labels, "le"}
            shown = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
            grouped = ",".join(re.findall(r"by \(([\w, ]+)\)", rule["expr"])).replace(" ", "")
            assert {*shown, *filter(None, grouped.split(","))} <= labels, rule["alert"]
            assert f"`{rule['alert']}`" in guide
