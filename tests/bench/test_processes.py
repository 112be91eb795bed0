"""What processes have used, as `/proc` tells it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench.processes import TICK_S, BenchError, Program, read_stat, tree

# A process with a child and a grandchild, which say who they are.
FAMILY = """
import os, subprocess, sys
depth = int(sys.argv[1])
print(os.getpid(), flush=True)
if depth:
    subprocess.run([sys.executable, "-c", os.environ["FAMILY"], str(depth - 1)])
else:
    import time
    time.sleep(60)
"""


def own_core() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:1]


def state_of(pid: int) -> str:
    """By proc(5); "" when there is no such process."""
    path = Path(f"/proc/{pid}/stat")
    return path.read_text().rpartition(")")[2].split()[0] if path.exists() else ""


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
        environment = {"FAMILY": FAMILY}
        program = Program("family", [sys.executable, "-c", FAMILY, "2"], own_core(), log, environment=environment)
        program.wait_until(lambda: log.read_text().count("\n") == 3, 30)
        family = [int(line) for line in log.read_text().split()]
        assert [use.pid for use in tree(program.pid)] == family
        assert os.sched_getaffinity(family[2]) == set(own_core())
        program.stop()
        # Init may not have collected the dead yet.
        assert all(state_of(pid) in ("", "Z", "X") for pid in family)

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
