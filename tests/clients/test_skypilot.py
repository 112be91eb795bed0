"""The SkyPilot client against a model of its API server; tests/rigs has the real one."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest

from crosslogic.clients.skypilot import LaunchSettings, SkyPilot, fetch_agent_sha256
from crosslogic.contracts.node import NodeSpec
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.launch_task import NODE_PORT, EnginePlan
from crosslogic.domain.placement import CPU, Gpus, Place
from tests.clients.cloud_contract import PREFIX, CloudContract

NO_CAPACITY = ("ResourcesUnavailableError", "✗ AWS (us-east-1a) — [spot](gpus=L4:1)\n  Failed to acquire")


@dataclass
class Request:
    """One of the server's own requests. It ends after `polls` questions, with `result` or `error`."""

    id: str
    name: str
    cluster: str | None
    polls: int
    finish: Callable[[], Any]
    status: str = "RUNNING"
    result: Any = None
    error: tuple[str, str] | None = None


@dataclass
class Cluster:
    status: str = "INIT"
    jobs: list[str] = field(default_factory=list[str])
    cloud: str = "AWS"
    is_set_up: bool = False


class Resources:
    """Pickled as the server pickles its own: attributes by name."""

    def __init__(self) -> None:
        self._cloud = "aws"
        self._region = "us-east-1"
        self._zone = "us-east-1a"
        self._instance_type = "g6.xlarge"
        self._use_spot = True


class SkyPilotModel(httpx.AsyncBaseTransport):
    """An API server: answers at once, carries out over the next questions, forgets all requests when it restarts."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.clusters: dict[str, Cluster] = {}
        self.launches: list[dict[str, Any]] = []
        self.launch_error: tuple[str, str] | None = None
        self.job_status = "RUNNING"
        self.is_losing = False
        self.refusal = 0
        self.seen: list[httpx.Request] = []

    def restart(self) -> None:
        """What was going on is broken off and forgotten. A machine that runs by then counts as up, set up or not."""
        self.requests.clear()
        for cluster in self.clusters.values():
            cluster.status = "UP"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        if self.refusal:
            return httpx.Response(self.refusal, json={"detail": "no"}, request=request)
        query = parse_qs(request.url.query.decode())
        if request.url.path == "/api/status":
            return httpx.Response(200, json=self._answer_status(query), request=request)
        if request.url.path == "/api/get":
            return self._answer_get(query["request_id"][0], request)
        body: dict[str, Any] = json.loads(request.content or b"{}")
        made = self._begin(request.url.path, body)
        if self.is_losing and request.url.path == "/launch":
            self.is_losing = False
            raise httpx.ReadError("the reply was lost", request=request)
        return httpx.Response(200, json=None, headers={"x-skypilot-request-id": made.id}, request=request)

    def _begin(self, path: str, body: dict[str, Any]) -> Request:
        cluster = body.get("cluster_name") or body.get("cluster")
        finish, polls = getattr(self, f"_{path.strip('/').replace('/', '_')}"), 0
        if path == "/launch":
            polls = 6
            self.launches.append(json.loads(body["task"]))
            if self.launch_error is None:
                self.clusters.setdefault(body["cluster_name"], Cluster())
        name = f"sky{path.replace('/', '.')}"
        made = Request(f"request-{len(self.seen)}", name, cluster, polls, lambda: finish(body))
        self.requests.append(made)
        return made

    def _answer_status(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        for request in self.requests:
            if request.status == "RUNNING":
                self._advance(request)
        wanted = set(query.get("request_ids", []))
        cluster = query.get("cluster_name", [None])[0]
        is_all = query.get("all_status") == ["true"]
        return [
            {"request_id": r.id, "name": r.name, "status": r.status, "cluster_name": r.cluster}
            for r in reversed(self.requests)
            if (r.id in wanted if wanted else (cluster in (None, r.cluster) and (is_all or r.status == "RUNNING")))
        ]

    def _advance(self, request: Request) -> None:
        request.polls -= 1
        if request.polls > 0:
            return
        try:
            request.result, request.status = request.finish(), "SUCCEEDED"
        except LookupError as error:
            request.error, request.status = error.args, "FAILED"

    def _answer_get(self, request_id: str, asked: httpx.Request) -> httpx.Response:
        request = next((r for r in self.requests if r.id == request_id), None)
        if request is None:
            return httpx.Response(404, json={"detail": "not found"}, request=asked)
        if request.error:
            error = json.dumps({"type": request.error[0], "message": request.error[1], "object": ""})
            return httpx.Response(500, json={"detail": {"error": error}}, request=asked)
        body = {"status": request.status, "return_value": json.dumps(request.result)}
        return httpx.Response(200, json=body, request=asked)

    def _launch(self, body: dict[str, Any]) -> None:
        if self.launch_error:
            raise LookupError(*self.launch_error)
        cluster = self.clusters.setdefault(body["cluster_name"], Cluster())
        cluster.status, cluster.is_set_up = "UP", True
        cluster.jobs.append(self.job_status)

    def _api_cancel(self, body: dict[str, Any]) -> None:
        for request in self.requests:
            if request.id in body["request_ids"]:
                request.status = "CANCELLED"

    def _down(self, body: dict[str, Any]) -> None:
        if any(r.name == "sky.launch" and r.status == "RUNNING" for r in self.requests):
            raise LookupError("ClusterDoesNotExist", "it is still being launched")
        if self.clusters.pop(body["cluster_name"], None) is None:
            raise LookupError("ClusterDoesNotExist", "it does not exist")

    def _status(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        wanted = body.get("cluster_names") or list(self.clusters)
        return [
            {"name": name, "status": cluster.status, "cloud": cluster.cloud, "region": "us-east-1"}
            for name, cluster in self.clusters.items()
            if name in wanted
        ]

    def _queue(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        cluster = self.clusters[body["cluster_name"]]
        if not cluster.is_set_up:
            raise LookupError("ClusterNotUpError", "it has been stopped or not properly set up")
        return [{"job_id": number, "status": status} for number, status in enumerate(cluster.jobs, 1)]

    def _endpoints(self, body: dict[str, Any]) -> dict[str, str]:
        return {str(body["port"]): f"203.0.113.7:{body['port']}"}

    def _enabled_clouds(self, _: dict[str, Any]) -> list[str]:
        return ["AWS", "slurm"]

    def _list_accelerators(self, body: dict[str, Any]) -> dict[str, list[list[Any]]]:
        assert body["clouds"] == ["aws"]
        return {
            "L4": [
                ["AWS", "g6.xlarge", "L4", 1.0, 4, None, 16, 0.8, 0.3, "us-east-1"],
                ["AWS", "g6f.large", "L4", 0.125, 2, None, 8, 0.2, None, "us-east-1"],
            ],
            "Radeon Pro V520": [["AWS", "g4ad.xlarge", "Radeon Pro V520", 1.0, 4, None, 16, 0.4, 0.1, "us-east-1"]],
            "H200": [["AWS", "p5en.48xlarge", "H200", 8.0, 192, None, 2048, 63.0, float("nan"), "us-east-1"]],
        }

    def _cost_report(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        # The class is found nowhere by whoever loads this, as the server's own is not.
        pickled = pickle.dumps(Resources(), protocol=4).replace(b"Resources", b"Unloadabl")
        rows = [
            {
                "name": name,
                "duration": 1800,
                "total_cost": 0.15,
                "status": "UP",
                "cloud": "AWS",
                "region": "us-east-1",
                "accelerators": "{'L4': 1}",
                "resources": base64.b64encode(pickled).decode(),
            }
            for name in self.clusters
        ]
        return [row for row in rows if row["name"] in body.get("cluster_names", self.clusters)]


def make_client(model: SkyPilotModel, *, control_url: str = "https://api.example.com", token: str = "") -> SkyPilot:
    async def agent_sha256() -> str:
        return "ab" * 32

    def join_token(node_id: str) -> str:
        return f"token-of-{node_id}"

    launch = LaunchSettings(control_url, EnginePlan("vllm"), {"vllm": "0.32.0"}, agent_sha256, join_token)
    return SkyPilot(
        "http://skypilot", node_secret="secret" * 8, launch=launch, token=token, poll_s=0.001, transport=model
    )


class ModelLandlord:
    patience_s = 20.0

    def __init__(self) -> None:
        self.model = SkyPilotModel()
        self.cloud = make_client(self.model)

    def spec(self, name: str) -> NodeSpec:
        places = [Place("aws", "us-east-1", gpu="L4", is_spot=True), Place("aws", "us-west-2", gpu="L4")]
        return NodeSpec(
            "node_1", "llama-3-8b", "us-east", provider="skypilot", cluster=f"{PREFIX}{name}", places=places
        )

    def count(self, cluster: str) -> int:
        return int(cluster in self.model.clusters)

    def lose_next_reply(self) -> None:
        self.model.is_losing = True

    def fill(self) -> None:
        self.model.launch_error = NO_CAPACITY

    def restart(self) -> None:
        self.model.restart()

    def take(self, cluster: str) -> None:
        del self.model.clusters[cluster]


@pytest.fixture
async def landlord() -> AsyncIterator[ModelLandlord]:
    made = ModelLandlord()
    yield made
    await made.cloud.close()


class TestContract(CloudContract):
    pass


async def run(landlord: ModelLandlord, name: str = "one") -> NodeSpec:
    """A machine that runs, or whatever became of it."""
    spec = landlord.spec(name)
    await landlord.cloud.ensure(spec)
    while (machine := await landlord.cloud.find(spec.cluster)) and machine.reason == "SkyPilot is launching it":
        pass
    return spec


class TestEnsure:
    async def test_returns_before_the_machine_runs_and_attaches_to_what_is_going_on(
        self, landlord: ModelLandlord
    ) -> None:
        spec = landlord.spec("one")
        for _ in range(3):
            await landlord.cloud.ensure(spec)
        assert len(landlord.model.launches) == 1
        machine = await landlord.cloud.find(spec.cluster)
        assert machine is not None
        assert machine.status == "starting"

    async def test_launches_nothing_where_it_runs_already(self, landlord: ModelLandlord) -> None:
        spec = await run(landlord)
        await landlord.cloud.ensure(spec)
        assert len(landlord.model.launches) == 1

    async def test_hands_over_the_places_and_keeps_the_secrets_apart(self, landlord: ModelLandlord) -> None:
        await landlord.cloud.ensure(landlord.spec("one"))
        task = landlord.model.launches[0]
        assert [place["infra"] for place in task["resources"]["ordered"]] == ["aws/us-east-1", "aws/us-west-2"]
        assert task["secrets"]["CROSSLOGIC_AGENT_JOIN_TOKEN"] == "token-of-node_1"
        assert task["secrets"]["ENGINE_API_KEY"].startswith("nc_")

    async def test_launches_as_the_same_user_from_every_worker(self, landlord: ModelLandlord) -> None:
        await landlord.cloud.ensure(landlord.spec("one"))
        again = make_client(landlord.model)
        await again.ensure(landlord.spec("two"))
        await again.close()
        users = {
            json.loads(request.content)["env_vars"]["SKYPILOT_USER_ID"]
            for request in landlord.model.seen
            if request.url.path == "/launch"
        }
        assert len(users) == 1
        assert len(users.pop()) == 8

    async def test_refuses_without_a_way_back(self, landlord: ModelLandlord) -> None:
        client = make_client(landlord.model, control_url="")
        with pytest.raises(Rejected, match="CROSSLOGIC_AGENT_CONTROL_URL"):
            await client.ensure(landlord.spec("one"))
        await client.close()


class TestFind:
    async def test_says_where_it_runs_and_what_that_costs(self, landlord: ModelLandlord) -> None:
        spec = await run(landlord)
        machine = await landlord.cloud.find(spec.cluster)
        assert machine is not None
        assert machine.endpoint == f"https://203.0.113.7:{NODE_PORT}"
        assert machine.place == Place("aws", "us-east-1", "us-east-1a", "L4", "g6.xlarge", True, 300_000)

    async def test_asks_a_machine_that_runs_no_more_than_whether_it_is_there(self, landlord: ModelLandlord) -> None:
        spec = await run(landlord)
        first = await landlord.cloud.find(spec.cluster)
        landlord.model.seen.clear()
        assert await landlord.cloud.find(spec.cluster) == first
        asked = {request.url.path for request in landlord.model.seen} - {"/api/status", "/api/get"}
        assert asked == {"/status"}
        await landlord.cloud.end(spec.cluster)
        assert await landlord.cloud.find(spec.cluster) is None

    @pytest.mark.parametrize(
        ("job", "failure", "is_running"),
        [
            ("SETTING_UP", "", False),
            ("RUNNING", "", True),
            ("FAILED_SETUP", "setup_failed", True),
            ("FAILED", "task_ended", True),
            ("SUCCEEDED", "task_ended", True),
        ],
    )
    async def test_believes_the_task_and_not_the_cluster(
        self, landlord: ModelLandlord, job: str, failure: str, is_running: bool
    ) -> None:
        landlord.model.job_status = job
        spec = await run(landlord)
        machine = await landlord.cloud.find(spec.cluster)
        assert machine is not None
        assert (machine.failure, machine.status == "running") == (failure, is_running)

    async def test_wants_an_order_again_whose_launch_was_broken_off(self, landlord: ModelLandlord) -> None:
        spec = landlord.spec("one")
        for half_way in (Cluster("INIT"), Cluster("UP"), Cluster("UP", is_set_up=True)):
            landlord.model.clusters[spec.cluster] = half_way
            machine = await landlord.cloud.find(spec.cluster)
            assert machine is not None
            assert machine.is_order_lost

    async def test_has_no_endpoint_on_machines_of_ones_own(self, landlord: ModelLandlord) -> None:
        await landlord.cloud.ensure(landlord.spec("one"))
        landlord.model.clusters[f"{PREFIX}one"].cloud = "Slurm"
        machine = await landlord.cloud.find((await run(landlord)).cluster)
        assert machine is not None
        assert not machine.has_endpoints

    @pytest.mark.parametrize(
        ("error", "code", "words"),
        [
            (NO_CAPACITY, "no_capacity", r"aws us-east-1a"),
            (("ResourcesUnavailableError", "Catalog does not contain any instances"), "no_offer", "other GPUs"),
            (("NoCloudAccessError", "account 123456789012"), "cloud_misconfigured", "sky check"),
        ],
    )
    async def test_says_why_a_launch_failed_in_words_of_ours(
        self, landlord: ModelLandlord, error: tuple[str, str], code: str, words: str
    ) -> None:
        landlord.model.launch_error = error
        machine = await landlord.cloud.find((await run(landlord)).cluster)
        assert machine is not None
        assert (machine.status, machine.failure) == ("gone", code)
        assert words in machine.reason
        assert "123456789012" not in machine.reason


class TestEnd:
    async def test_cancels_a_launch_and_waits_before_it_goes_down(self, landlord: ModelLandlord) -> None:
        """F1: cancelling alone leaks the machine, and a `down` beside a launch says that there is nothing."""
        spec = landlord.spec("one")
        await landlord.cloud.ensure(spec)
        assert spec.cluster in landlord.model.clusters
        await landlord.cloud.end(spec.cluster)
        assert landlord.model.clusters == {}
        asked = [request.url.path for request in landlord.model.seen if request.url.path in ("/api/cancel", "/down")]
        assert asked == ["/api/cancel", "/down"]


class TestServer:
    @pytest.mark.parametrize(("status", "words"), [(401, "TOKEN"), (403, "TOKEN"), (502, "502")])
    async def test_that_refuses_is_unavailable(self, landlord: ModelLandlord, status: int, words: str) -> None:
        landlord.model.refusal = status
        with pytest.raises(Unavailable, match=words):
            await landlord.cloud.find("cic-1")

    async def test_that_speaks_another_version_is_told_apart(self, landlord: ModelLandlord) -> None:
        landlord.model.refusal = 422
        with pytest.raises(Rejected, match="version"):
            await landlord.cloud.find("cic-1")

    async def test_is_shown_the_token(self, landlord: ModelLandlord) -> None:
        client = make_client(landlord.model, token="sky_token")
        await client.find("cic-1")
        await client.close()
        assert {request.headers["authorization"] for request in landlord.model.seen} == {"Bearer sky_token"}

    async def test_that_is_away_is_unavailable(self) -> None:
        def refuse(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("nobody there", request=request)

        client = SkyPilot(
            "http://skypilot",
            node_secret="s",
            launch=LaunchSettings("", EnginePlan("vllm"), {}, _never, _never_for),
            transport=httpx.MockTransport(refuse),
        )
        with pytest.raises(Unavailable, match="is it running"):
            await client.find("cic-1")
        await client.close()


async def _never() -> str:
    raise AssertionError


def _never_for(_: str) -> str:
    raise AssertionError


class TestOffers:
    async def test_are_whole_gpus_that_we_know_of_connected_clouds(self, landlord: ModelLandlord) -> None:
        offers = {offer.instance_type: offer for offer in await landlord.cloud.offers()}
        assert set(offers) == {"g6.xlarge", "p5en.48xlarge"}
        assert offers["g6.xlarge"].gpus == Gpus("L4")
        assert offers["p5en.48xlarge"].spot_microdollars_per_h is None
        before = len(landlord.model.seen)
        await landlord.cloud.offers()
        assert len(landlord.model.seen) == before


class TestCosts:
    async def test_are_read_without_loading_what_the_server_pickled(self, landlord: ModelLandlord) -> None:
        await run(landlord)
        (cost,) = await landlord.cloud.costs()
        assert (cost.cost_microdollars, cost.duration_s) == (150_000, 1800)
        assert cost.place.price_microdollars_per_h == 300_000
        assert (cost.place.zone, cost.place.instance_type, cost.place.is_spot) == ("us-east-1a", "g6.xlarge", True)
        assert cost.place.gpu != CPU


class TestAgentsHash:
    async def test_of_a_control_plane_that_is_away_is_unavailable(self) -> None:
        with pytest.raises(Unavailable, match="CROSSLOGIC_AGENT_CONTROL_URL"):
            await fetch_agent_sha256("http://127.0.0.1:1")
