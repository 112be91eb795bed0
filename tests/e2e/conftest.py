from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import Stack, free_port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One stack for all tests that leave it as they found it."""
    running = Stack(tmp_path_factory.mktemp("stack"), free_port())
    try:
        print(f"\nfirst answer {running.wait_until_serving():.1f} s after ./run")
        running.wait_for_nodes(3, model="llama-3-8b")
        running.wait_for_nodes(1, model="bge-base-en")
        yield running
    finally:
        seconds = running.stop()
        print(f"\nstack stopped in {seconds:.1f} s")


@pytest.fixture(scope="session")
def key(stack: Stack) -> str:
    """A key with room for a whole test run, made as an operator makes it."""
    return make_key(stack)


def make_key(stack: Stack) -> str:
    """A key of the demo org's staging environment, without limits that a test would meet."""
    import json

    made = stack.command("keys", "create", "--org", "demo", "--env", "staging", "--json")
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    generous = (
        "--requests-per-min",
        "none",
        "--tokens-per-min",
        "none",
        "--tokens-per-day",
        "none",
        "--concurrency",
        "none",
    )
    for whose in (("--key", document["id"]), ("--environment", document["environment_id"])):
        set_to = stack.command("limits", "set", *whose, *generous)
        assert set_to.returncode == 0, set_to.stderr + set_to.stdout
    return str(document["secret"])
