"""What processes have used, as `/proc` tells it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench.processes import TICK_S, BenchError, Program, read_stat, tree

# Leaves a grandchild in the session and waits.
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def own_core() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:1]


class TestReadStat:
    def test_survives_any_name_of_a_program(self) -> None:
        text = "42 (a ) (b) 1 2) S 7 42 41 0 -1 4194304 1 2 3 4 100 50 7 3 20 0 1 0 5 1000 25 18446744073709551615"
        use = read_stat(text)
        assert (use.pid, use.parent, use.session) == (42, 7, 41)
        assert use.cpu_s == pytest.approx(160 * TICK_S)
        assert use.rss_bytes == 25 * os.sysconf("SC_PAGE_SIZE")


class TestTree:
    def test_has_this_process_with_what_it_has_used(self) -> None:
        before = tree(os.getpid())[0]
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        after = tree(os.getpid())[0]
        assert before.pid == after.pid == os.getpid()
        assert after.cpu_s - before.cpu_s >= 0.1 - 3 * TICK_S
        assert after.rss_bytes > 1_000_000


class TestProgram:
    def test_counts_its_children_and_leaves_none(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        program = Program("family", [sys.executable, "-c", FAMILY], own_core(), log)
        program.wait_until(lambda: log.read_text().endswith("\n"), 30)
        child = int(log.read_text())
        assert {use.pid for use in tree(program.pid)} == {program.pid, child}
        assert os.sched_getaffinity(child) == set(own_core())
        program.stop()
        assert tree(program.pid) == []
        assert [use for use in tree(child) if Path(f"/proc/{child}/stat").read_text().split()[2] != "Z"] == []

    def test_one_that_dies_at_the_start_tells_why(self, tmp_path: Path) -> None:
        program = Program(
            "dead", [sys.executable, "-c", "print('no such luck'); exit(3)"], own_core(), tmp_path / "log"
        )
        with pytest.raises(BenchError, match=r"dead ended with 3:\s+no such luck"):
            program.wait_until(lambda: False, 30)
        program.stop()

    def test_one_that_does_not_exist_is_an_error_of_ours(self, tmp_path: Path) -> None:
        with pytest.raises(BenchError, match="nowhere cannot be started"):
            Program("nowhere", ["/nowhere/at-all"], own_core(), tmp_path / "log")
