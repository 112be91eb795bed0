from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from crosslogic.settings import Settings
from tests.api.admin.server import TOKEN, serving


@pytest.fixture
def settings(database: str, tmp_path: Path) -> Iterator[Settings]:
    """Dev mode over a database of its own, and a Temporal that is away."""
    with socket.socket() as closed:
        closed.bind(
            ("127.0.0.1", 0)
        )  # Bound but not listening: a connection is refused, and nobody else gets the port.
        yield Settings(
            mode="dev",
            state_dir=tmp_path,
            database_url=SecretStr(database),
            temporal_address=f"127.0.0.1:{closed.getsockname()[1]}",
            admin_token=SecretStr(TOKEN),
            node_secret=SecretStr("a-node-secret-for-tests-of-the-admin-api"),
        )


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    with serving(settings) as served:
        yield served


@pytest.fixture
def api(url: str) -> Iterator[httpx.Client]:
    """The admin API with its token; paths are below /admin."""
    with httpx.Client(
        base_url=f"{url}/admin", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=20
    ) as client:
        yield client


@pytest.fixture
def made(api: httpx.Client) -> Callable[..., Any]:
    """POST that must succeed: the answer's body."""

    def post(path: str, **body: Any) -> Any:
        answer = api.post(path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    return post
