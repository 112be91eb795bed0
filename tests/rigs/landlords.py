"""SkyPilot as the cloud's contract sees it: the client under test, and the hands that move what is behind it."""

from __future__ import annotations

import httpx

from crosslogic.clients.skypilot import LaunchSettings, SkyPilot
from crosslogic.contracts.node import NodeSpec
from crosslogic.domain.ids import NODE
from crosslogic.domain.launch_task import EnginePlan
from crosslogic.domain.placement import CPU, Place
from crosslogic.new_ids import new_id
from tests.clients.cloud_contract import PREFIX
from tests.rigs.aws import AwsRig
from tests.rigs.control_plane import ControlPlane
from tests.rigs.rig import ApiServer, until
from tests.rigs.slurm import CLUSTER, SlurmRig

# Answers like an engine that is well; nobody generates here.
ENGINE = "python3 -m http.server --bind 127.0.0.1 8000"


class LossyTransport(httpx.AsyncHTTPTransport):
    """Delivers requests; the reply to the next launch gets lost if it is to."""

    is_losing = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if self.is_losing and request.url.path == "/launch":
            self.is_losing = False
            await response.aread()
            raise httpx.ReadError("the reply was lost", request=request)
        return response


def make_client(
    server: ApiServer, plane: ControlPlane, transport: httpx.AsyncBaseTransport, *, sha256: str = ""
) -> SkyPilot:
    """The client as a worker has it."""

    async def agent_sha256() -> str:
        return sha256 or plane.sha256

    def join_token(node_id: str) -> str:
        return f"token-of-{node_id}"

    launch = LaunchSettings(plane.url, EnginePlan("custom", command=ENGINE), {}, agent_sha256, join_token)
    return SkyPilot(
        server.url, node_secret="secret-of-the-rigs" * 2, launch=launch, node_scheme="http", transport=transport
    )


class AwsLandlord:
    patience_s = 400.0

    def __init__(self, rig: AwsRig, plane: ControlPlane) -> None:
        self.rig = rig
        self._transport = LossyTransport()
        self.cloud = make_client(rig.server, plane, self._transport)
        self._ordered = ""
        self._gpu = CPU
        rig.sell()

    def spec(self, name: str) -> NodeSpec:
        self._ordered = f"{PREFIX}{name}"
        places = [Place("aws", "us-east-1", gpu=self._gpu, is_spot=True)]
        if self._gpu != CPU:
            places.append(Place("aws", "us-west-2", gpu=self._gpu, is_spot=False))
        return make_spec(self._ordered, places)

    def count(self, cluster: str) -> int:
        return len(self.rig.instances(cluster))

    def lose_next_reply(self) -> None:
        self._transport.is_losing = True

    def fill(self) -> None:
        self._gpu = "H100:8"
        self.rig.sell_out("p5.48xlarge")

    def restart(self) -> None:
        until("there is an instance", lambda: self.rig.instances(self._ordered))
        self.rig.server.kill()
        self.rig.server.start()

    def take(self, cluster: str) -> None:
        self.rig.take(cluster)


class SlurmLandlord:
    patience_s = 400.0

    def __init__(self, rig: SlurmRig, plane: ControlPlane) -> None:
        self.rig = rig
        self._transport = LossyTransport()
        self.cloud = make_client(rig.server, plane, self._transport)
        self._ordered = ""
        rig.free()

    def spec(self, name: str) -> NodeSpec:
        self._ordered = f"{PREFIX}{name}"
        return make_spec(self._ordered, [Place("slurm", CLUSTER, gpu="H100:2")])

    def count(self, cluster: str) -> int:
        return len([name for name in self.rig.jobs() if name.startswith(cluster)])

    def lose_next_reply(self) -> None:
        self._transport.is_losing = True

    def fill(self) -> None:
        self.rig.occupy()

    def restart(self) -> None:
        until("there is a job", lambda: self.count(self._ordered))
        self.rig.server.kill()
        self.rig.server.start()

    def take(self, cluster: str) -> None:
        self.rig.take(cluster)


def make_spec(cluster: str, places: list[Place]) -> NodeSpec:
    """An order for a node of a cluster's name."""
    return NodeSpec(
        NODE.show(new_id()), "mistral-7b", "us-east", provider="skypilot", cluster=cluster, spot=True, places=places
    )
