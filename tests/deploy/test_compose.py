"""docker-compose.yml without Docker: what it says is checked here, what it starts in test_start.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from crosslogic.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
OURS = ("setup", "api", "worker")
KNOWN = {f"CROSSLOGIC_{name.upper()}" for name in Settings.model_fields}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def variables(text: str) -> set[str]:
    """The names that Compose takes from its own environment and has no default for."""
    return set(re.findall(r"(?<!\$)\$\{(\w+)(?!\w|:-)", text))


class TestServices:
    def test_are_the_pieces_of_the_product(self, compose: dict[str, Any]) -> None:
        assert set(compose["services"]) == {
            *("postgres", "valkey", "temporal-schema", "temporal", "temporal-namespace", "temporal-ui", "skypilot"),
            *OURS,
        }

    def test_every_image_has_a_tag_and_none_is_latest(self, compose: dict[str, Any]) -> None:
        for name, service in compose["services"].items():
            image, _, tag = service["image"].partition(":")
            assert image, name
            assert re.fullmatch(r"\d+[\w.-]*", tag), f"{name} uses {service['image']}"

    def test_ours_come_from_one_dockerfile(self, compose: dict[str, Any]) -> None:
        assert len({compose["services"][name]["image"] for name in OURS}) == 1
        for name in OURS:
            assert (ROOT / compose["services"][name]["build"]["dockerfile"]).is_file()

    def test_ports_are_published_on_loopback_only(self, compose: dict[str, Any]) -> None:
        published = [port for service in compose["services"].values() for port in service.get("ports", [])]
        assert published
        assert all(port.startswith("127.0.0.1:") for port in published)

    def test_whatever_stays_up_is_restarted(self, compose: dict[str, Any]) -> None:
        once = {"setup", "temporal-schema", "temporal-namespace"}
        for name, service in compose["services"].items():
            assert service["restart"].startswith("on-failure" if name in once else "unless-stopped"), name

    def test_waiting_for_health_is_waiting_for_a_health_check(self, compose: dict[str, Any]) -> None:
        services = compose["services"]
        for name, service in services.items():
            for needed, how in service.get("depends_on", {}).items():
                assert needed in services, name
                assert how["condition"] != "service_healthy" or "healthcheck" in services[needed], f"{name} → {needed}"

    def test_named_volumes_are_declared_and_files_exist(self, compose: dict[str, Any]) -> None:
        for service in compose["services"].values():
            for volume in service.get("volumes", []):
                source = volume.partition(":")[0]
                assert source in compose["volumes"] or (ROOT / source).exists(), volume

    def test_the_usage_log_outlives_its_container(self, compose: dict[str, Any]) -> None:
        api = compose["services"]["api"]
        mounts = dict(volume.split(":")[:2] for volume in api["volumes"])
        assert mounts["usage-log"] == api["environment"]["CROSSLOGIC_STATE_DIR"]

    def test_running_requests_may_end_before_the_kill(self, compose: dict[str, Any]) -> None:
        grace_s = float(Settings.model_fields["shutdown_grace_s"].default)
        for name in ("api", "worker"):
            assert float(compose["services"][name]["stop_grace_period"].removesuffix("s")) > grace_s
        command = compose["services"]["api"]["command"]
        assert float(command[command.index("--timeout-graceful-shutdown") + 1]) == grace_s

    def test_a_process_that_knows_nothing_replaces_none(self, compose: dict[str, Any]) -> None:
        command = compose["services"]["api"]["command"]
        patience_s = float(command[command.index("--timeout-worker-healthcheck") + 1])
        assert patience_s < float(Settings.model_fields["start_patience_s"].default)

    def test_skypilot_is_the_release_that_was_locked(self, compose: dict[str, Any]) -> None:
        lock = (ROOT / "requirements" / "skypilot.lock").read_text()
        assert f"skypilot=={compose['services']['skypilot']['image'].partition(':')[2]} " in lock


class TestVariables:
    def test_every_one_of_ours_is_a_setting(self, compose: dict[str, Any]) -> None:
        for name in OURS:
            assert set(compose["services"][name]["environment"]) <= KNOWN

    def test_secrets_have_no_default(self) -> None:
        text = (ROOT / "docker-compose.yml").read_text()
        for name in variables(text):
            assert len(re.findall(rf"\$\{{{name}\b", text)) == len(re.findall(rf"\$\{{{name}:\?[^}}]+\}}", text)), name

    def test_the_example_names_each_that_must_be_set(self) -> None:
        lines = (ROOT / "deploy" / "compose.env.example").read_text().splitlines()
        example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        assert set(example) == variables((ROOT / "docker-compose.yml").read_text())
        assert not any(example.values())


class TestImage:
    def test_holds_what_our_services_need_and_nothing_of_a_developer(self) -> None:
        dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
        ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
        copied = {
            source
            for line in dockerfile.splitlines()
            if line.startswith("COPY ") and "--from" not in line
            for source in line.split()[1:-1]
        }
        assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
        assert {"activities", "api", "crosslogic", "workflows", "worker.py", "requirements/server.lock"} == copied
        assert "--require-hashes" in dockerfile
        assert re.search(r"^USER (?!root)", dockerfile, re.MULTILINE)


class TestUnits:
    @pytest.fixture(params=["setup", "api", "worker"])
    def unit(self, request: pytest.FixtureRequest) -> tuple[str, dict[str, list[str]]]:
        path = ROOT / "deploy" / "systemd" / f"crosslogic-{request.param}.service"
        found: dict[str, list[str]] = {}
        for line in path.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                name, value = line.split("=", 1)
                found.setdefault(name, []).append(value)
        return request.param, found

    def test_start_what_compose_starts(self, unit: tuple[str, dict[str, list[str]]], compose: dict[str, Any]) -> None:
        name, settings = unit
        service = compose["services"][name]
        (command,) = settings["ExecStart"]
        program, *arguments = shlex.split(command)
        expected = [*service.get("entrypoint", []), *service["command"]]
        assert Path(program).name == expected[0]
        # A container listens on all of its addresses, a host's service on loopback. systemd knows no defaults.
        here = [word.replace("0.0.0.0", "127.0.0.1").replace(":-1}", "}") for word in expected[1:]]
        assert arguments == here
        if "${CROSSLOGIC_API_PROCESSES}" in arguments:
            assert settings["Environment"] == ["CROSSLOGIC_API_PROCESSES=1"]

    def test_leave_time_to_end(self, unit: tuple[str, dict[str, list[str]]]) -> None:
        name, settings = unit
        if name != "setup":
            assert float(settings["TimeoutStopSec"][0]) > float(Settings.model_fields["shutdown_grace_s"].default)

    def test_the_example_environment_names_settings_only(self) -> None:
        lines = (ROOT / "deploy" / "systemd" / "crosslogic.env.example").read_text().splitlines()
        names = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
        assert names <= KNOWN
        assert {"CROSSLOGIC_ADMIN_TOKEN", "CROSSLOGIC_NODE_SECRET", "CROSSLOGIC_DATABASE_URL"} <= names
