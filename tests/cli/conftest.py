from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from crosslogic.dev.temporal import Temporal
from crosslogic.settings import Settings, child_environment
from tests.api.admin.server import TOKEN, serving

ROOT = Path(__file__).resolve().parents[2]

# Runs a command line: arguments, then environment variables; the finished process.
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def settings(database: str, temporal_server: Temporal, task_queue: str, tmp_path: Path) -> Settings:
    """Dev mode over a database and a task queue of its own."""
    return Settings(
        mode="dev",
        state_dir=tmp_path / "state",
        database_url=SecretStr(database),
        temporal_address=temporal_server.address,
        fleet_task_queue=task_queue,
        cloud_provider="local",
        admin_token=SecretStr(TOKEN),
    )


@pytest.fixture
def run(settings: Settings) -> Run:
    """The command line with the settings in its environment."""
    environment = {
        "CROSSLOGIC_MODE": settings.mode,
        "CROSSLOGIC_CLOUD_PROVIDER": settings.cloud_provider,
        "CROSSLOGIC_STATE_DIR": str(settings.state_dir),
        "CROSSLOGIC_DATABASE_URL": settings.database_url.get_secret_value(),
        "CROSSLOGIC_TEMPORAL_ADDRESS": settings.temporal_address,
        "CROSSLOGIC_FLEET_TASK_QUEUE": settings.fleet_task_queue,
        "CROSSLOGIC_ADMIN_TOKEN": TOKEN,
    }

    def execute(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "crosslogic.cli", *words],
            cwd=ROOT,
            env=child_environment(**(environment | more)),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return execute


@pytest.fixture
def stack(settings: Settings) -> Iterator[str]:
    """The admin API, and a state directory that says where it is."""
    with serving(settings) as url:
        settings.state_dir.mkdir()
        (settings.state_dir / "endpoints.json").write_text(json.dumps({"api": url}))
        yield url


@pytest.fixture
def ok(run: Run, stack: str) -> Callable[..., str]:
    """A command that must succeed: what it printed."""

    def execute(*words: str) -> str:
        done = run(*words)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    return execute


@pytest.fixture
def read(ok: Callable[..., str]) -> Callable[..., Any]:
    """A command with --json: what it printed, read."""
    return lambda *words: json.loads(ok(*words, "--json"))
