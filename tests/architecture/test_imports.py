"""What the import law says beyond .importlinter: docs/control-plane.md, "The import law"."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("activities", "api", "crosslogic", "workflows", "worker.py")

# They run before there is an environment, so before settings can be read.
BEFORE_SETTINGS = {
    "crosslogic/bootstrap.py",
    "crosslogic/dev/command.py",
    "crosslogic/dev/tasks.py",
}


def sources(*places: str) -> list[Path]:
    """Every Python file below the given files and folders."""
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every `a.b.c` of a module with its line, resolved: after `from os import environ`, `environ` is `os.environ`."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names if alias.asname
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    for node in ast.walk(tree):
        parts: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value
        if isinstance(at, ast.Name) and parts:
            yield at.lineno, ".".join([aliases.get(at.id, at.id), *reversed(parts)])


def offences(paths: list[Path], banned: tuple[str, ...]) -> list[str]:
    """`file:line name` for each use of a banned dotted name or of anything below it."""
    found: list[str] = []
    for path in paths:
        for line, name in dotted_names(ast.parse(path.read_text())):
            if any(name == ban or name.startswith(f"{ban}.") for ban in banned):
                found.append(f"{path.relative_to(ROOT)}:{line} {name}")
    return sorted(set(found))


def modules_below(package: str) -> list[str]:
    """Every importable module of a package, itself included."""
    files = sources(package.replace(".", "/"))
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in files
        if path.name != "__main__.py"
    ]


def modules_loaded_by(modules: list[str]) -> set[str]:
    """What a fresh interpreter has loaded after importing these modules."""
    program = f"import sys, json, {', '.join(modules)}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level packages among them."""
    return {name.partition(".")[0] for name in modules_loaded_by(modules)}


class TestDomain:
    def test_imports_the_standard_library_only(self) -> None:
        for path in sources("crosslogic/domain"):
            for name in imports(ast.parse(path.read_text())):
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or name.startswith("crosslogic.domain"), f"{path}: {name}"

    def test_has_no_clock_no_randomness_and_no_io(self) -> None:
        banned = (
            *("datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today"),
            *("time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter", "time.sleep"),
            *("random", "secrets", "uuid.uuid1", "uuid.uuid4", "os", "io", "pathlib", "socket", "subprocess"),
            *("asyncio", "threading", "urllib.request", "http"),
        )
        assert offences(sources("crosslogic/domain"), banned) == []

    @pytest.mark.parametrize(
        "source",
        ["import time\ntime.time()", "from time import time\ntime()", "from datetime import datetime as d\nd.now()"],
    )
    def test_the_check_sees_every_way_to_write_it(self, source: str) -> None:
        names = {name for _, name in dotted_names(ast.parse(source))}
        assert names & {"time.time", "datetime.datetime.now"}


class TestEnvironment:
    def test_only_settings_reads_it(self) -> None:
        # The agent runs on a node, where there is nothing of ours but the agent.
        allowed = {"crosslogic/settings.py", "crosslogic/agent/config.py", *BEFORE_SETTINGS}
        places = [path for path in sources(*PRODUCT) if str(path.relative_to(ROOT)) not in allowed]
        assert offences(places, ("os.environ", "os.environb", "os.getenv")) == []


class TestOpenDoors:
    def test_nobody_imports_worker(self) -> None:
        for path in sources("activities", "api", "crosslogic", "workflows"):
            assert not {name for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "worker"}, path

    def test_skypilot_is_never_imported(self) -> None:
        # It takes 5 s, and it lives in another environment: the control plane talks to its API server.
        for path in sources(*PRODUCT, "tests"):
            assert not {name for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "sky"}, path


class TestAgent:
    """Nodes have nothing of ours but the agent, and perhaps an old Python."""

    def test_imports_itself_and_the_standard_library_only(self) -> None:
        for path in sources("crosslogic/agent"):
            for name in imports(ast.parse(path.read_text())):
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or name.startswith("crosslogic.agent"), f"{path}: {name}"

    def test_is_written_for_python_3_9(self) -> None:
        newer = (
            "asyncio.timeout",
            "asyncio.TaskGroup",
            "asyncio.Runner",
            "enum.StrEnum",
            "datetime.UTC",
            "typing.Self",
        )
        paths = sources("crosslogic/agent")
        for path in paths:
            tree = ast.parse(path.read_text(), feature_version=(3, 9))
            for node in ast.walk(tree):
                if isinstance(node, ast.keyword):
                    assert node.arg not in ("slots", "kw_only", "strict"), f"{path}: {node.arg}= is newer"
                assert not isinstance(node, ast.Match), f"{path}: match is newer"
        assert offences(paths, newer) == []

    def test_starts_without_the_control_planes_packages(self) -> None:
        loaded = loaded_by(["crosslogic.agent.agent"])
        assert not loaded & {"cryptography", "httpx", "pydantic", "asyncpg", "temporalio", "pynvml", "fastapi"}


class TestWhatAnImportLoads:
    def test_the_hot_path_loads_nothing_that_a_request_does_not_need(self) -> None:
        loaded = loaded_by(modules_below("api.inference"))
        assert not loaded & {"temporalio", "stripe", "sqlalchemy", "sky", "asyncpg", "httpx", "fastapi"}
        assert "opentelemetry" not in loaded
        assert not loaded & {"workflows", "activities"}

    def test_workflows_load_no_clients_of_the_world(self) -> None:
        loaded = loaded_by(modules_below("workflows"))
        assert not loaded & {"asyncpg", "httpx", "stripe", "redis", "fastapi", "uvicorn", "sky"}

    def test_what_sends_traces_is_loaded_only_when_tracing_is_on(self) -> None:
        # FastAPI and redis load parts of OpenTelemetry by themselves where it is installed, but nothing that traces.
        loaded = modules_loaded_by(["api.app", "worker", "crosslogic.telemetry"])
        assert not {name for name in loaded if name.startswith(("opentelemetry.sdk.trace", "opentelemetry.exporter"))}
