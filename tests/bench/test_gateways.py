"""The command itself; what it measures is not for a test to judge."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gateways
from bench.processes import BenchError
from crosslogic.bootstrap import ROOT


class TestMain:
    def test_an_unknown_system_is_answered_with_the_list(self) -> None:
        command = [sys.executable, "-m", "bench.gateways", "--systems", "nginx,apache"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert f"there is no system 'apache'; there are {', '.join(gateways.SYSTEMS)}" in done.stderr


class TestPrepare:
    def test_leaves_nothing_of_the_last_run(self, tmp_path: Path) -> None:
        (tmp_path / "run" / "logs").mkdir(parents=True)
        assert list(gateways.prepare(tmp_path).iterdir()) == []

    def test_refuses_while_another_run_is_under_way(self, tmp_path: Path) -> None:
        with (tmp_path / "lock").open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(BenchError, match="Another run is under way"):
                gateways.prepare(tmp_path)
