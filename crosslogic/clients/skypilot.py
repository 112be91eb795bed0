"""SkyPilot as a cloud: one cluster per node, through its API server's REST interface. SkyPilot is never imported.

Every operation there is a request with an id that is polled, so that nothing here waits longer than one HTTP exchange.
Ids live as long as the server's process: whoever comes later finds what is going on by the cluster's name.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import pickletools
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import httpx

from crosslogic.contracts.node import Machine, NodeSpec
from crosslogic.domain import launch_task
from crosslogic.domain.credentials import node_credential
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.health import MachineStatus
from crosslogic.domain.placement import CPU, GPU_MEMORY_GB, Gpus, Offer, Place
from crosslogic.settings import Settings

log = logging.getLogger(__name__)

# The API that is spoken here; the server answers older clients down to 24. Source: SkyPilot 0.14.1.
API_VERSION = "62"
VERSION = "0.14.1"

_TIMEOUT_S = 30.0  # Of one exchange. The server answers at once, but for a moment after its start.
_SHORT_S = 90.0  # For a request that only asks; with many clusters the server asks their clouds one after the other.
_LONG_S = 110.0  # For one that ends a machine; a further call goes on where this one has left off.
_POLL_S = 0.5
_OFFERS_S = 600.0  # Prices change a few times a day.
_MOST_BYTES = 64_000_000
_MOST_SEEN = 10_000

LAUNCH, DOWN = "sky.launch", "sky.down"
_ACTIVE = frozenset({"PENDING", "RUNNING"})
_JOB_WAITS = frozenset({"INIT", "PENDING", "SETTING_UP"})
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

# The server's exceptions that mean "not now, not there": somebody else's machines are in the way.
_NO_CAPACITY = frozenset({"ResourcesUnavailableError"})
# And those that no repetition mends.
_MISCONFIGURED = frozenset(
    {
        "NoCloudAccessError",
        "CloudUserIdentityError",
        "ClusterOwnerIdentityMismatchError",
        "InvalidCloudConfigs",
        "InvalidCloudCredentials",
        "InvalidSkyPilotConfigError",
        "PermissionDeniedError",
        "NotSupportedError",
        "ResourcesMismatchError",
        "UserRequestRejectedByPolicy",
    }
)
_UNKNOWN_CLUSTER = frozenset({"ClusterDoesNotExist"})


class RequestFailed(Exception):
    """A request that the server has carried out and that went wrong: `type` is the exception's name there."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(f"{type}: {message}")
        self.type = type
        self.message = message


class RequestLost(Exception):
    """The server does not know the request: it was started anew since."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a cluster has cost by SkyPilot's own account, from its catalog's prices."""

    cluster: str
    duration_s: int
    cost_microdollars: int
    place: Place
    is_running: bool


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """What every task of this installation has in common. `agent_sha256` asks for the hash of the agent it fetches."""

    control_url: str
    engine: launch_task.EnginePlan
    engine_versions: Mapping[str, str]
    agent_sha256: Callable[[], Awaitable[str]]
    join_token: Callable[[str], str]
    weights_token: str = ""
    ca_sha256: str = ""


class SkyPilot:
    """The `Cloud` of `activities.cloud`. Every call is idempotent by the cluster's name.

    Raises Unavailable when the server does not answer, is starting, or its cloud does not answer it; Rejected for what
    only people can mend.
    """

    def __init__(
        self,
        url: str,
        *,
        node_secret: str,
        launch: LaunchSettings,
        token: str = "",
        user: str = "crosslogic",
        node_scheme: str = "https",
        poll_s: float = _POLL_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._node_secret = node_secret
        self._launch = launch
        self._node_scheme = node_scheme
        self._poll_s = poll_s
        # The user's id, 8 hexadecimal digits, becomes part of every machine's name in its cloud: it must never change.
        user_id = hashlib.sha256(user.encode()).hexdigest()[:8]
        self._identity: dict[str, Any] = {
            "env_vars": {"SKYPILOT_USER_ID": user_id, "SKYPILOT_USER": user},
            "entrypoint": user,
            "entrypoint_command": user,
        }
        headers = {"X-SkyPilot-API-Version": API_VERSION, "X-SkyPilot-Version": VERSION}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False, transport=transport
        )
        self._offers: tuple[float, list[Offer]] | None = None
        self._offers_lock = asyncio.Lock()
        # Machines whose task was seen running. Its state, address and place each cost the server an SSH session, and
        # whether the engine still answers is seen elsewhere.
        self._seen: dict[str, Machine] = {}

    @classmethod
    def of(cls, settings: Settings, join_token: Callable[[str], str]) -> SkyPilot:
        """The client that the settings describe. `join_token` issues a node's token for its agent."""
        secret, token, weights = settings.node_secret, settings.skypilot_token, settings.hugging_face_token
        control_url = settings.agent_control_url.rstrip("/")

        async def agent_sha256() -> str:
            return await fetch_agent_sha256(control_url)

        return cls(
            settings.skypilot_url,
            node_secret=secret.get_secret_value() if secret else "",
            launch=LaunchSettings(
                control_url=control_url,
                engine=launch_task.EnginePlan(settings.node_engine, command=settings.node_engine_command),
                engine_versions={"vllm": settings.vllm_version, "sglang": settings.sglang_version},
                agent_sha256=agent_sha256,
                join_token=join_token,
                weights_token=weights.get_secret_value() if weights else "",
            ),
            token=token.get_secret_value() if token else "",
            user=settings.skypilot_user,
            node_scheme=settings.node_scheme,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ensure(self, spec: NodeSpec) -> None:
        """Order the cluster `spec.cluster` unless it is being launched or serves already.

        Returns when the server has the order, long before the machine runs; `find` says what has become of it. Raises
        Rejected for an order that no server could carry out.
        """
        if await self._active(spec.cluster, LAUNCH):
            return
        machine = await self.find(spec.cluster)
        if machine is not None and machine.status != MachineStatus.GONE and not machine.is_order_lost:
            return
        task = launch_task.build(await self._plan(spec))
        # JSON is YAML, and needs no library.
        await self._post("/launch", {"task": json.dumps(task), "cluster_name": spec.cluster, "retry_until_up": False})

    async def find(self, cluster: str) -> Machine | None:
        """What SkyPilot and the cloud behind it say of a machine; None if they know none of that name."""
        if await self._active(cluster, LAUNCH):
            return Machine(cluster, MachineStatus.STARTING, reason="SkyPilot is launching it")
        if await self._active(cluster, DOWN):
            return Machine(cluster, MachineStatus.STARTING, reason="SkyPilot is ending it")
        record = await self._record(cluster)
        if record is None or record.get("status") != "UP":
            self._seen.pop(cluster, None)
        # A launch that began in the meantime is not in this reading of the table.
        if await self._active(cluster, LAUNCH):
            return Machine(cluster, MachineStatus.STARTING, reason="SkyPilot is launching it")
        if record is None:
            return await self._find_failure(cluster)
        status = str(record.get("status"))
        if status == "INIT":
            return Machine(
                cluster, MachineStatus.STARTING, reason="its launch was broken off half-way", is_order_lost=True
            )
        if status != "UP":
            return Machine(cluster, MachineStatus.UNKNOWN, reason=f"SkyPilot says {status}", failure="machine_stopped")
        if (seen := self._seen.get(cluster)) is not None:
            return seen
        machine = await self._find_running(cluster, record)
        if machine.status == MachineStatus.RUNNING and not machine.failure:
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen[cluster] = machine
        return machine

    async def list_all(self, prefix: str) -> list[Machine]:
        """Every machine whose name starts with `prefix`, in launch too. The list may lag behind the clouds."""
        launching = {
            request["cluster_name"]
            for request in await self._requests(None)
            if request["name"] == LAUNCH and (request["cluster_name"] or "").startswith(prefix)
        }
        machines: dict[str, Machine] = {}
        for record in await self._records(None, "AUTO"):
            name = record["name"]
            if name.startswith(prefix):
                status = MachineStatus.RUNNING if record["status"] == "UP" else MachineStatus.STARTING
                machines[name] = Machine(name, status)
        for name in launching:
            machines[name] = Machine(name, MachineStatus.STARTING, reason="SkyPilot is launching it")
        return list(machines.values())

    async def end(self, cluster: str) -> None:
        """End a machine, one that is being launched too; also of one that has ended or was never there.

        Cancelling a launch alone would leak what it has made so far, and a `down` beside a running launch ends nothing:
        so the launch is cancelled, waited for, and then the cluster goes down.
        """
        self._seen.pop(cluster, None)
        for request_id in await self._active(cluster, LAUNCH):
            await self._ask("/api/cancel", {"request_ids": [request_id]}, _SHORT_S)
        await self._until_idle(cluster, LAUNCH, "stop launching")
        if not await self._active(cluster, DOWN):
            try:
                await self._ask("/down", {"cluster_name": cluster}, _LONG_S)
            except RequestFailed as error:
                if error.type not in _UNKNOWN_CLUSTER:
                    raise _translate(error) from error
            return
        await self._until_idle(cluster, DOWN, "end")

    async def offers(self) -> list[Offer]:
        """What the connected clouds' catalogs rent out, GPUs only; read again every ten minutes."""
        async with self._offers_lock:
            now = asyncio.get_running_loop().time()
            if self._offers is None or now - self._offers[0] > _OFFERS_S:
                self._offers = (now, await self._read_offers())
            return self._offers[1]

    async def clouds(self) -> list[str]:
        """The clouds that the server has working credentials for, e.g. `aws`."""
        try:
            found = await self._ask_for("GET", "/enabled_clouds", {}, _SHORT_S)
        except RequestFailed as error:
            raise _translate(error) from error
        return [cloud.lower() for cloud in cast("list[str]", found or [])]

    async def costs(self, clusters: Sequence[str] | None = None, days: int = 30) -> list[Cost]:
        """What clusters have cost, ended ones too."""
        body: dict[str, Any] = {"days": days}
        if clusters is not None:
            body["cluster_names"] = list(clusters)
        return [_cost(row) for row in await self._query("/cost_report", body)]

    # --- What a cluster is doing.

    async def _find_running(self, cluster: str, record: Mapping[str, Any]) -> Machine:
        jobs: list[dict[str, Any]] = []
        try:
            jobs: list[dict[str, Any]] = await self._ask(
                "/queue", {"cluster_name": cluster, "skip_finished": False, "all_users": True}, _SHORT_S
            )
        except RequestFailed as error:
            if error.type != "ClusterNotUpError":
                raise _translate(error) from error
            # Its machine runs, so its status is UP; but the launch ended before SkyPilot could set it up.
        if not jobs:
            return Machine(
                cluster, MachineStatus.STARTING, reason="it is up, but its task was never started", is_order_lost=True
            )
        # A repeated launch adds a job; the newest is the one that counts.
        job = max(jobs, key=lambda one: int(one["job_id"]))
        status = str(job["status"]).rpartition(".")[2]
        if status in _JOB_WAITS:
            return Machine(cluster, MachineStatus.STARTING, reason="it is installing its engine")
        if status != "RUNNING":
            failure = "setup_failed" if status == "FAILED_SETUP" else "task_ended"
            return Machine(
                cluster,
                MachineStatus.RUNNING,
                reason=f"its task is {status}; read it with: sky logs {cluster}",
                failure=failure,
            )
        place = await self._place(cluster, record)
        if place.cloud in _WITHOUT_ENDPOINTS:
            return Machine(cluster, MachineStatus.RUNNING, has_endpoints=False, place=place)
        endpoint = await self._endpoint(cluster)
        if not endpoint:
            return Machine(cluster, MachineStatus.STARTING, reason="its cloud has not said its address yet")
        return Machine(cluster, MachineStatus.RUNNING, endpoint, place=place)

    async def _find_failure(self, cluster: str) -> Machine | None:
        """There is no cluster: was its launch the last that was heard of it?"""
        for request in await self._requests(cluster, is_all=True):
            if request["name"] == DOWN:
                return None
            if request["name"] != LAUNCH:
                continue
            if request["status"] != "FAILED":
                return None
            try:
                await self._result(request["request_id"], _SHORT_S)
            except RequestLost:
                return None
            except RequestFailed as error:
                rejected = _translate(error)
                failure = rejected.code if isinstance(rejected, Rejected) else "launch_failed"
                return Machine(cluster, MachineStatus.GONE, reason=rejected.message, failure=failure)
        return None

    async def _endpoint(self, cluster: str) -> str:
        try:
            found = await self._query("/endpoints", {"cluster": cluster, "port": launch_task.NODE_PORT})
        except Unavailable:
            return ""
        address = cast("dict[str, str]", found or {}).get(str(launch_task.NODE_PORT), "")
        return f"{self._node_scheme}://{address.rpartition('//')[2]}" if address else ""

    async def _place(self, cluster: str, record: Mapping[str, Any]) -> Place:
        cloud, region = str(record.get("cloud") or "").lower(), str(record.get("region") or "")
        costs = await self.costs([cluster], days=1)
        known = max(costs, key=lambda cost: cost.is_running, default=None)
        if known is None:
            return Place(cloud, region)
        place = replace(known.place, cloud=cloud, region=region)
        # The catalog's list has GPUs only; the account has every machine.
        return replace(place, price_microdollars_per_h=await self._price(place) or place.price_microdollars_per_h)

    async def _price(self, place: Place) -> int:
        for offer in await self.offers():
            if (offer.cloud, offer.region, offer.instance_type) == (place.cloud, place.region, place.instance_type):
                price = offer.spot_microdollars_per_h if place.is_spot else offer.on_demand_microdollars_per_h
                return price or 0
        return 0

    async def _record(self, cluster: str) -> dict[str, Any] | None:
        # FORCE: of on-demand machines the server otherwise repeats what it knew, even if the cloud has ended them.
        for record in await self._records([cluster], "FORCE"):
            if record["name"] == cluster:
                return record
        return None

    async def _records(self, clusters: list[str] | None, refresh: str) -> list[dict[str, Any]]:
        body: dict[str, Any] = {
            "refresh": refresh,
            "all_users": True,
            "include_credentials": False,
            "include_handle": False,
            "summary_response": True,
        }
        if clusters is not None:
            body["cluster_names"] = clusters
        return await self._query("/status", body)

    async def _read_offers(self) -> list[Offer]:
        # Only of clouds that are connected: the server would fetch the others' catalogs.
        clouds = [cloud for cloud in await self.clouds() if cloud not in _WITHOUT_CATALOG]
        if not clouds:
            return []
        found = await self._query(
            "/list_accelerators", {"clouds": clouds, "gpus_only": True, "all_regions": True, "require_price": False}
        )
        return [
            offer
            for name, rows in cast("dict[str, list[list[Any]]]", found).items()
            if name in GPU_MEMORY_GB
            for row in rows
            if (offer := _offer(row)) is not None
        ]

    # --- The plan of a task.

    async def _plan(self, spec: NodeSpec) -> launch_task.NodePlan:
        launch = self._launch
        if not launch.control_url:
            raise Rejected(
                "Nodes would not find their way back: set CROSSLOGIC_AGENT_CONTROL_URL to this API's public URL.",
                code="no_control_url",
            )
        name = spec.engine or launch.engine.name
        return launch_task.NodePlan(
            node_id=spec.node_id,
            model=spec.model,
            kind=spec.kind,
            places=spec.places,
            engine=launch_task.EnginePlan(name, launch.engine_versions.get(name, ""), launch.engine.command),
            control_url=launch.control_url,
            agent_sha256=await launch.agent_sha256(),
            join_token=launch.join_token(spec.node_id),
            credential=node_credential(self._node_secret, spec.node_id),
            ca_sha256=launch.ca_sha256,
            weights_token=launch.weights_token,
        )

    # --- The server's requests.

    async def _active(self, cluster: str, name: str) -> list[str]:
        """Ids of the cluster's requests of that name that have not ended."""
        return [request["request_id"] for request in await self._requests(cluster) if request["name"] == name]

    async def _until_idle(self, cluster: str, name: str, what: str) -> None:
        try:
            async with asyncio.timeout(_LONG_S):
                while await self._active(cluster, name):  # noqa: ASYNC110 (the server has no events to wait for)
                    await asyncio.sleep(self._poll_s)
        except TimeoutError:
            raise Unavailable(f"SkyPilot does not {what} {cluster} within {_LONG_S:.0f} s.") from None

    async def _requests(self, cluster: str | None, *, is_all: bool = False) -> list[dict[str, Any]]:
        """The server's requests, newest first: those that have not ended, or all that it remembers."""
        query: dict[str, Any] = {"fields": ["request_id", "name", "status", "created_at", "cluster_name"]}
        if cluster is not None:
            query["cluster_name"] = cluster
        if is_all:
            query |= {"all_status": True, "limit": 100}
        async with self._exchange("GET", "/api/status", params=query) as response:
            found = cast("list[dict[str, Any]]", response.json())
        return found if is_all else [request for request in found if request["status"] in _ACTIVE]

    async def _query(self, path: str, body: Mapping[str, Any]) -> Any:
        """The result of a request that only asks. Raises Unavailable or Rejected."""
        try:
            return await self._ask(path, body, _SHORT_S)
        except RequestFailed as error:
            raise _translate(error) from error

    async def _ask(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        """The result of a request. Raises RequestFailed, and Unavailable if it takes longer or the server forgot it."""
        return await self._ask_for("POST", path, body, timeout_s)

    async def _ask_for(self, method: str, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        request_id = await self._send(method, path, body)
        try:
            return await self._result(request_id, timeout_s)
        except RequestLost:
            raise Unavailable(f"SkyPilot's API server was started anew during {path}.") from None

    async def _post(self, path: str, body: Mapping[str, Any]) -> str:
        return await self._send("POST", path, body)

    async def _send(self, method: str, path: str, body: Mapping[str, Any]) -> str:
        options: dict[str, Any] = {} if method == "GET" else {"json": {**self._identity, **body}}
        async with self._exchange(method, path, **options) as response:
            request_id = response.headers.get("x-skypilot-request-id", "")
        if not request_id:
            raise Unavailable(f"SkyPilot's API server answered {path} without a request id.")
        return request_id

    async def _result(self, request_id: str, timeout_s: float) -> Any:
        """The result of a request that has ended. Raises RequestFailed, RequestLost, and Unavailable after a while."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            query = {"request_ids": request_id, "fields": "status"}
            async with self._exchange("GET", "/api/status", params=query) as response:
                found = cast("list[dict[str, Any]]", response.json())
            if not found:
                raise RequestLost(request_id)
            if found[0]["status"] not in _ACTIVE:
                break
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(f"SkyPilot's API server has not carried out a request for {timeout_s:.0f} s.")
            await asyncio.sleep(self._poll_s)
        async with self._exchange(
            "GET", "/api/get", params={"request_id": request_id}, accepted=(200, 404, 500)
        ) as answer:
            if answer.status_code == 404:
                raise RequestLost(request_id)
            if answer.status_code == 500:
                raise _failure(answer)
            body = cast("dict[str, Any]", answer.json())
        if body["status"] != "SUCCEEDED":
            raise RequestFailed("RequestCancelled", f"the request is {body['status']}")
        return json.loads(body["return_value"])

    @asynccontextmanager
    async def _exchange(
        self, method: str, path: str, *, accepted: Sequence[int] = (200,), **options: Any
    ) -> AsyncGenerator[httpx.Response]:
        """One HTTP exchange with an accepted status. Raises Unavailable or Rejected otherwise."""
        try:
            response = await self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"SkyPilot's API server did not answer {method} {path} ({type(error).__name__}); is it running?"
            ) from error
        if response.status_code in (401, 403):
            raise Unavailable(
                f"SkyPilot's API server refused us ({response.status_code}): set CROSSLOGIC_SKYPILOT_TOKEN to a token "
                "that it knows."
            )
        if response.status_code in (400, 422):
            raise Rejected(
                f"SkyPilot's API server does not understand {method} {path}: it must be version {VERSION} or later.",
                code="skypilot_version",
            )
        if response.status_code not in accepted or len(response.content) > _MOST_BYTES:
            raise Unavailable(f"SkyPilot's API server answered {response.status_code} to {method} {path}.")
        try:
            yield response
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Unavailable(f"SkyPilot's API server answered {method} {path} in a form unknown to us.") from error


def no_join_token(_node_id: str) -> str:
    """For whoever launches nothing."""
    return ""


async def fetch_agent_sha256(control_url: str) -> str:
    """The hash of the agent that the control plane serves. Raises Unavailable when it serves none."""
    url = f"{control_url}/agent/{launch_task.AGENT}.sha256"
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as http:
            answer = await http.get(url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(
            f"The agent's hash cannot be fetched from {url} ({type(error).__name__}); is CROSSLOGIC_AGENT_CONTROL_URL "
            "this API's URL?"
        ) from error
    found = re.fullmatch(r"([0-9a-f]{64})(\s.*)?", answer.text.strip()) if answer.status_code == 200 else None
    if found is None:
        raise Unavailable(f"{url} answered {answer.status_code} and no SHA-256; is it this API's?")
    return found[1]


# Machines there are reached through their own agents, or not at all.
_WITHOUT_ENDPOINTS = frozenset({"slurm", "ssh"})
# Machines of one's own have no price list.
_WITHOUT_CATALOG = frozenset({"slurm", "ssh", "kubernetes"})


def _failure(response: httpx.Response) -> RequestFailed:
    try:
        error = json.loads(response.json()["detail"]["error"])
        return RequestFailed(str(error["type"]), _COLOURS.sub("", str(error["message"])))
    except (ValueError, KeyError, TypeError):
        return RequestFailed("UnknownError", f"the server answered {response.status_code}")


def _translate(error: RequestFailed) -> Rejected | Unavailable:
    """A server's exception in our words. Its own, which may name accounts and addresses, go to the log only."""
    log.warning("SkyPilot: %s", error)
    if error.type in _NO_CAPACITY:
        if "does not contain any instances" in error.message:
            return Rejected(
                "No connected cloud rents such machines in that region; name other GPUs or clouds.", code="no_offer"
            )
        return Rejected(
            f"No place has capacity now{_tried(error.message)}; order again later, or name more GPUs or clouds.",
            code="no_capacity",
        )
    if error.type in _MISCONFIGURED:
        return Rejected(
            f"SkyPilot cannot use its cloud ({error.type}); run `sky check` on its API server and mend what it says.",
            code="cloud_misconfigured",
        )
    return Unavailable(f"SkyPilot could not do it ({error.type}); its API server's log says more.")


def _tried(message: str) -> str:
    places = re.findall(r"✗ (\w+) \(([\w.-]+)\)", message)
    return f" (tried {', '.join(f'{cloud.lower()} {zone}' for cloud, zone in places[:12])})" if places else ""


def _offer(row: list[Any]) -> Offer | None:
    """A row of SkyPilot's list: cloud, instance type, GPU, count, vCPUs, GPU memory, memory, prices, region."""
    cloud, instance_type, gpu, count, _, _, _, on_demand, spot, region = row
    if float(count) < 1 or float(count) != int(count):
        return None
    return Offer(
        str(cloud).lower(),
        str(region),
        Gpus(str(gpu), int(count)),
        str(instance_type or ""),
        _microdollars(on_demand),
        _microdollars(spot),
    )


def _microdollars(dollars: Any) -> int | None:
    # A price that is not known is a NaN there, which equals nothing.
    return round(float(dollars) * 1_000_000) if dollars is not None and float(dollars) > 0 else None


def _cost(row: Mapping[str, Any]) -> Cost:
    held = _texts_of(row.get("resources") or "")
    accelerators = re.match(r"\{'([^']+)': (\d+)", str(row.get("accelerators") or ""))
    gpu = str(Gpus(accelerators[1], int(accelerators[2]))) if accelerators else CPU
    duration_s, dollars = int(row.get("duration") or 0), float(row.get("total_cost") or 0)
    return Cost(
        cluster=str(row["name"]),
        duration_s=duration_s,
        cost_microdollars=round(dollars * 1_000_000),
        place=Place(
            cloud=str(row.get("cloud") or "").lower(),
            region=str(row.get("region") or ""),
            zone=str(held.get("_zone") or ""),
            gpu=gpu,
            instance_type=str(held.get("_instance_type") or ""),
            is_spot=held.get("_use_spot") is True,
            price_microdollars_per_h=round(dollars * 1_000_000 * 3600 / duration_s) if duration_s else 0,
        ),
        is_running=row.get("status") is not None,
    )


def _texts_of(pickled: str) -> dict[str, object]:
    """The texts and truth values that follow a text in a pickle: attributes by name.

    The server says where a machine is in pickled objects only. They are read as data and never loaded: loading a pickle
    runs whatever is in it.
    """
    found: dict[str, object] = {}
    memo: list[object] = []
    previous: object = None
    last: object = None
    constants = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
    try:
        for operation, argument, _ in pickletools.genops(base64.b64decode(pickled)):
            if operation.name == "MEMOIZE":
                memo.append(last)
                continue
            if "UNICODE" in operation.name:
                last = argument
            elif operation.name in ("BINGET", "LONG_BINGET"):
                last = memo[cast(int, argument)]
            else:
                last = constants.get(operation.name, ...)
            is_attribute = isinstance(previous, str) and previous.startswith("_")
            if is_attribute and (last is None or isinstance(last, str | bool)):
                found.setdefault(cast(str, previous), last)
                previous = None
            else:
                previous = last
    except (ValueError, IndexError):
        log.warning("SkyPilot's account of a machine cannot be read")
    return found
