"""A node from end to end: ordered by the Temporal CLI, launched by SkyPilot, asked through our API, then taken."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.stack import ROOT, Stack, eventually, free_port
from tests.rigs.aws import AwsRig
from tests.rigs.control_plane import ControlPlane

pytestmark = [pytest.mark.rigs, pytest.mark.timeout(900)]

# A small real engine, as a machine's image would bring it: the machine's disk is this computer's.
ENGINE = f"cd {shlex.quote(str(ROOT))} && exec {shlex.quote(sys.executable)} -m tests.e2e.plain_engine 8000"
ORDER = {
    "model": "mistral-7b",
    "region": "us-east",
    "provider": "skypilot",
    "gpus": ["cpu"],
    "engine": "custom",
    "launch_timeout_s": 500,
}


@pytest.fixture(scope="module")
def stack(aws_rig: AwsRig, control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    settings = {
        "CROSSLOGIC_SKYPILOT_URL": aws_rig.server.url,
        "CROSSLOGIC_AGENT_CONTROL_URL": control_plane.url,
        "CROSSLOGIC_NODE_ENGINE_COMMAND": ENGINE,
        "CROSSLOGIC_NODE_SCHEME": "http",
    }
    running = Stack(tmp_path_factory.mktemp("stack"), free_port(), settings=settings)
    try:
        running.wait_until_serving()
        yield running
    finally:
        running.stop()
        aws_rig.take_all()


class TestNode:
    def test_serves_and_is_lost_when_its_cloud_takes_it(self, stack: Stack, aws_rig: AwsRig) -> None:
        words = ["workflow", "execute", "--type", "NodeProvisioning", "--task-queue", "fleet", "-o", "json"]
        ordered = stack.temporal(*words, "--workflow-id", "rig/1", "--input", json.dumps(ORDER), timeout_s=600)
        assert ordered.returncode == 0, ordered.stderr + ordered.stdout
        result: dict[str, Any] = json.loads(ordered.stdout)["result"]
        assert result["state"] == "ready"

        answer = stack.ask_until_answered(within_s=20, model="mistral-7b")
        assert answer.headers["x-crosslogic-node"] == result["node_id"]
        assert answer.headers["x-crosslogic-region"] == "us-east"
        assert answer.json()["choices"][0]["message"]["content"]

        node = node_of(stack, result["node_id"])
        assert node["price_microdollars_per_h"] == 35_000
        cost = stack.command("nodes", "cost", "--json")
        assert cost.returncode == 0, cost.stderr
        assert [row["place"] for row in json.loads(cost.stdout)] == ["aws/us-east-1/us-east-1a"]
        (machine,) = aws_rig.instances()
        aws_rig.take_all()
        eventually(
            lambda: node_of(stack, result["node_id"])["state"] in ("lost", "failed"), within_s=120, what="it is lost"
        )
        assert machine not in aws_rig.instances()


def node_of(stack: Stack, node_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = stack.admin("GET", f"/nodes/{node_id}")
    return shown
