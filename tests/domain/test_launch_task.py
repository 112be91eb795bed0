from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from crosslogic.domain.errors import Rejected
from crosslogic.domain.launch_task import ENGINE_PORT, NODE_PORT, EnginePlan, NodePlan, build, engine_command
from crosslogic.domain.placement import Place

SPOT = Place("aws", "us-east-1", "us-east-1a", "L4", is_spot=True)
FALLBACK = Place("gcp", "us-east4", gpu="L40S:2")
PLAN = NodePlan(
    node_id="node_1",
    model="llama-3-8b",
    kind="chat",
    places=[SPOT, FALLBACK],
    engine=EnginePlan("vllm", "0.32.0"),
    control_url="https://api.example.com",
    agent_sha256="ab" * 32,
    join_token="jt_secret",
    credential="nc_secret",
    weights_token="hf_secret",
)


class TestBuild:
    def test_tries_the_places_in_their_order(self) -> None:
        assert build(PLAN)["resources"] == {
            "ordered": [
                {"infra": "aws/us-east-1/us-east-1a", "use_spot": True, "accelerators": "L4", "ports": [NODE_PORT]},
                {"infra": "gcp/us-east4", "use_spot": False, "accelerators": "L40S:2", "ports": [NODE_PORT]},
            ]
        }

    def test_asks_for_processors_where_there_is_no_gpu(self) -> None:
        task = build(replace(PLAN, places=[Place("aws", "us-east-1")]))
        assert task["resources"] == {
            "infra": "aws/us-east-1", "use_spot": False, "cpus": "2+", "memory": "8+", "ports": [NODE_PORT]
        }  # fmt: skip

    def test_opens_no_ports_on_machines_of_ones_own(self) -> None:
        task = build(replace(PLAN, places=[Place("slurm", "rig", gpu="H100")]))
        assert task["resources"] == {"infra": "slurm/rig", "use_spot": False, "accelerators": "H100"}

    def test_keeps_secrets_where_skypilot_redacts_them(self) -> None:
        """H9: nowhere but in `secrets`, which SkyPilot does not store with the cluster."""
        task = build(PLAN)
        assert set(task["secrets"].values()) == {"jt_secret", "nc_secret", "hf_secret"}
        public = json.dumps({name: value for name, value in task.items() if name != "secrets"})
        for secret in task["secrets"].values():
            assert secret not in public

    def test_tells_the_agent_everything_by_its_environment(self) -> None:
        environment = build(PLAN)["envs"]
        assert environment["CROSSLOGIC_AGENT_CONTROL_URL"] == "https://api.example.com"
        assert environment["CROSSLOGIC_AGENT_NODE_ID"] == "node_1"
        assert environment["CROSSLOGIC_AGENT_ENGINE"] == "vllm"
        assert environment["CROSSLOGIC_AGENT_LISTEN"] == f"0.0.0.0:{NODE_PORT}"
        assert environment["CROSSLOGIC_AGENT_ENGINE_PORT"] == str(ENGINE_PORT)

    def test_pins_the_engine(self) -> None:
        assert "engine/bin/python vllm==0.32.0\n" in build(PLAN)["setup"]
        assert (
            "engine/bin/python 'sglang[all]==0.5.5'\n"
            in build(replace(PLAN, engine=EnginePlan("sglang", "0.5.5")))["setup"]
        )

    def test_refuses_a_plan_without_a_place(self) -> None:
        with pytest.raises(Rejected) as caught:
            build(replace(PLAN, places=[]))
        assert caught.value.code == "no_place"


class TestSetup:
    """The script itself, run."""

    @pytest.mark.parametrize("is_ours", [True, False])
    def test_takes_only_the_agent_that_the_control_plane_serves(self, tmp_path: Path, is_ours: bool) -> None:
        served = tmp_path / "served" / "agent"
        served.mkdir(parents=True)
        (served / "crosslogic-agent.pyz").write_text("print('hi')")
        digest = subprocess.check_output(["sha256sum", str(served / "crosslogic-agent.pyz")], text=True).split()[0]
        home = tmp_path / "home"
        home.mkdir()
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(home),
            "CROSSLOGIC_AGENT_CONTROL_URL": f"file://{served.parent}",
            "CROSSLOGIC_AGENT_SHA256": digest if is_ours else "0" * 64,
        }
        script = build(replace(PLAN, engine=EnginePlan("custom", command="true")))["setup"]
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) is is_ours, done.stderr
        assert (home / "crosslogic" / "crosslogic-agent.pyz").exists() is is_ours


class TestEngineCommand:
    @pytest.mark.parametrize("name", ["vllm", "sglang", "llamacpp"])
    def test_listens_on_loopback_with_the_nodes_credential(self, name: str) -> None:
        shell, option, command = shlex.split(engine_command(replace(PLAN, engine=EnginePlan(name, "1"))))
        assert (shell, option) == ("/bin/sh", "-c")
        assert command.startswith("exec ")
        assert "--host 127.0.0.1" in command
        assert f"--port {ENGINE_PORT}" in command
        assert "$ENGINE_API_KEY" in command
        assert "meta-llama/Meta-Llama-3-8B-Instruct" in command

    def test_of_a_custom_engine_is_its_own(self) -> None:
        plan = replace(PLAN, engine=EnginePlan("custom", command="cd /srv && serve"))
        assert shlex.split(engine_command(plan)) == ["/bin/sh", "-c", "cd /srv && serve"]

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"engine": EnginePlan("custom")}, "no_engine"),
            ({"engine": EnginePlan("tgi")}, "unknown_engine"),
            ({"model": "gpt-9"}, "no_weights"),
        ],
    )
    def test_refuses_what_cannot_serve(self, changes: dict[str, object], code: str) -> None:
        with pytest.raises(Rejected) as caught:
            engine_command(replace(PLAN, **changes))  # pyright: ignore[reportArgumentType]
        assert caught.value.code == code
