from __future__ import annotations

import pytest

ONE = "test_of_one_seed"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--seed N` (tests/plugin.py) runs the test of one seed and nothing else; without it that test does not run."""
    is_asked_for = config.getoption("--seed") is not None
    left_out = [item for item in items if (item.name == ONE) is not is_asked_for]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if (item.name == ONE) is is_asked_for]
