from __future__ import annotations

from pathlib import Path

import pytest

ONE = "test_of_one_seed"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--seed N` (tests/plugin.py) runs the test of one seed and nothing else; without it that test does not run."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.simulation)
    is_asked_for = config.getoption("--seed") is not None
    left_out = [item for item in items if (item.name == ONE) is not is_asked_for]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if (item.name == ONE) is is_asked_for]
