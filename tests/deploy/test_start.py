"""docker-compose.yml without Docker: our services start with exactly its commands and variables.

Servers are the embedded ones. Only what a container network would do is put in their place: host names become ports of
this machine, volumes become folders. What is started sees what the image holds and nothing else: the files that the
Dockerfile copies, and the packages of server.lock.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import httpx
import pytest
import temporalio.client
import yaml
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest

from crosslogic.contracts.names import FLEET_TASK_QUEUE
from crosslogic.dev import binaries, locks
from crosslogic.dev.parts import Launch
from crosslogic.dev.postgres import Postgres
from crosslogic.dev.state import free_port
from crosslogic.dev.temporal import Temporal
from crosslogic.settings import child_environment
from tests.conftest import serving

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "POSTGRES_PASSWORD": "Passw0rdOfPostgres",
    "CROSSLOGIC_ADMIN_TOKEN": "adm_token_of_at_least_24_characters",
    "CROSSLOGIC_NODE_SECRET": "node-secret-of-at-least-32-characters",
}


def until(look: Callable[[], Any], what: str, within_s: float = 60.0) -> Any:
    """The first true value that `look` returns."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            found = look()
        except (OSError, httpx.HTTPError):
            found = None
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {within_s} s: {what}")


@dataclass
class Machine:
    """One machine that stands in for the containers: servers, folders for volumes, and processes to stop."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict[str, int])
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])

    def start(
        self, name: str, command: list[str], environment: Mapping[str, str], cwd: Path
    ) -> subprocess.Popen[bytes]:
        """Start a process whose output goes to a log of that name."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, env=dict(environment), cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.folder / f"{name}.log").read_text()

    def stop(self) -> None:
        """End every process, the last started first."""
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def here(self, text: str) -> str:
        """A value of the Compose file with this machine's ports in place of its containers'."""
        for container, port in self.ports.items():
            text = re.sub(rf"\b{re.escape(container)}\b", f"127.0.0.1:{port}", text)
        return text


def interpolate(text: str) -> str:
    """What Compose makes of a value: `${NAME:?…}` from SECRETS, `${NAME:-default}` its default, `$$` as `$`."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    return re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: SECRETS[found[1]], text).replace("$$", "$")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


class NewTemporal(Temporal):
    """A server without our search attributes: registering them is what set-up is for."""

    def prepare(self) -> Launch:
        launch = Temporal.prepare(self)
        ours = [word for word in launch.command if word.endswith("=Keyword")]
        return replace(launch, command=[word for word in launch.command if word not in (*ours, "--search-attribute")])


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, compose: dict[str, Any]) -> Iterator[Machine]:
    """Postgres, Valkey (by the file's own command) and Temporal, as empty as new containers."""
    machine = Machine(tmp_path_factory.mktemp("compose"))
    postgres = Postgres(machine.folder / "postgres", free_port(), SECRETS["POSTGRES_PASSWORD"])
    temporal = NewTemporal(machine.folder / "temporal", free_port(), free_port(), free_port(), free_port())
    valkey_port = free_port()
    machine.ports = {"postgres:5432": postgres.port, "valkey:6379": valkey_port, "temporal:7233": temporal.port}
    with serving(postgres, machine.folder), serving(temporal, machine.folder):
        try:
            program, *options = compose["services"]["valkey"]["command"]
            assert program == "valkey-server"
            here = ["--port", str(valkey_port), "--bind", "127.0.0.1", "--dir", str(machine.folder)]
            command = [str(binaries.valkey_server()), *options, *here]
            machine.start("valkey", command, child_environment(), machine.folder)
            yield machine
        finally:
            machine.stop()
            postgres.forget()


@pytest.fixture(scope="module")
def image(machine: Machine) -> Path:
    """The image's working directory: what the Dockerfile copies."""
    folder = machine.folder / "image"
    folder.mkdir()
    for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line and "requirements" not in line:
            for source in line.split()[1:-1]:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, folder)
    return folder


@pytest.fixture(scope="module")
def absent(machine: Machine) -> Path:
    """Makes every package that the image does not have fail to import."""
    folder = machine.folder / "absent"
    folder.mkdir()
    installed = {name.replace("_", "-") for name in locks.pins(ROOT / "requirements" / "server.lock")}
    for package, distributions in packages_distributions().items():
        if package.isidentifier() and not {name.lower().replace("_", "-") for name in distributions} & installed:
            (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('the image has no {package}')\n")
    assert (folder / "psutil.py").exists()
    assert not (folder / "httpx.py").exists()
    return folder


@pytest.fixture(scope="module")
def start(machine: Machine, image: Path, absent: Path, compose: dict[str, Any]) -> Callable[..., Any]:
    """Start one of our services by its name."""

    def run(name: str, published: int | None = None) -> subprocess.Popen[bytes]:
        service = compose["services"][name]
        environment = {key: machine.here(interpolate(value)) for key, value in service["environment"].items()}
        volumes = [volume.split(":") for volume in service.get("volumes", [])]
        state = machine.folder / f"state-of-{name}"
        assert all(path == environment["CROSSLOGIC_STATE_DIR"] for _, path in volumes)
        environment["CROSSLOGIC_STATE_DIR"] = str(state)
        command = [interpolate(word) for word in (*service.get("entrypoint", []), *service["command"])]
        if published is not None:
            (mapping,) = service["ports"]
            inside = mapping.rpartition(":")[2]
            command = [word.replace("0.0.0.0", "127.0.0.1").replace(inside, str(published)) for word in command]
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(absent)}
        return machine.start(name, command, environment, image)

    return run


@pytest.fixture(scope="module")
def set_up(machine: Machine, start: Callable[..., Any]) -> None:
    """`setup` has run, as both others wait for it."""
    code = start("setup").wait(120)
    assert code == 0, machine.log("setup")


@pytest.fixture(scope="module")
def api(machine: Machine, start: Callable[..., Any], set_up: None) -> str:
    """The running API's base URL."""
    port = free_port()
    process = start("api", published=port)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, machine.log("api")
        return httpx.get(f"{url}/readyz").status_code == 200

    until(is_ready, "the API is ready")
    return url


class TestSetup:
    def test_can_run_again(self, machine: Machine, start: Callable[..., Any], set_up: None) -> None:
        assert start("setup").wait(120) == 0, machine.log("setup")


class TestApi:
    def test_is_healthy_by_the_file_s_own_check(self, api: str, compose: dict[str, Any]) -> None:
        _, program, *arguments = compose["services"]["api"]["healthcheck"]["test"]
        assert program == "python"
        here = [word.replace("http://127.0.0.1:8080", api) for word in arguments]
        assert subprocess.run([sys.executable, *here], timeout=60).returncode == 0

    def test_asks_for_the_admin_token(self, api: str) -> None:
        token = SECRETS["CROSSLOGIC_ADMIN_TOKEN"]
        assert httpx.get(f"{api}/admin/orgs").status_code == 401
        assert httpx.get(f"{api}/admin/orgs", headers={"Authorization": "Bearer adm_dev_demo"}).status_code == 401
        assert httpx.get(f"{api}/admin/orgs", headers={"Authorization": f"Bearer {token}"}).json()["data"] == []

    def test_serves_a_key_that_the_admin_makes_and_no_demo_key(self, api: str) -> None:
        admin = {"Authorization": f"Bearer {SECRETS['CROSSLOGIC_ADMIN_TOKEN']}"}
        httpx.post(f"{api}/admin/orgs", headers=admin, json={"name": "acme"}).raise_for_status()
        httpx.post(f"{api}/admin/environments", headers=admin, json={"org": "acme", "name": "dev"}).raise_for_status()
        key = httpx.post(f"{api}/admin/keys", headers=admin, json={"org": "acme", "environment": "dev"})
        key.raise_for_status()
        models = httpx.get(f"{api}/v1/models", headers={"Authorization": f"Bearer {key.json()['secret']}"})
        assert "llama-3-8b" in {model["id"] for model in models.json()["data"]}
        demo = httpx.get(f"{api}/v1/models", headers={"Authorization": "Bearer sk_dev_demo"})
        assert demo.status_code == 401


class TestWorker:
    def test_polls_the_fleet_s_task_queue(self, machine: Machine, start: Callable[..., Any], set_up: None) -> None:
        process = start("worker")

        async def pollers() -> int:
            client = await temporalio.client.Client.connect(f"127.0.0.1:{machine.ports['temporal:7233']}")
            request = DescribeTaskQueueRequest(
                namespace="default",
                task_queue=TaskQueue(name=FLEET_TASK_QUEUE),
                task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
            )
            return len((await client.workflow_service.describe_task_queue(request)).pollers)

        def is_polling() -> bool:
            assert process.poll() is None, machine.log("worker")
            return asyncio.run(pollers()) > 0

        until(is_polling, "the worker polls")
