from __future__ import annotations

import itertools

import pytest

from crosslogic.domain.health import HealthPolicy, MachineStatus, Signals, Verdict, judge

POLICY = HealthPolicy(silence_s=15.0, confirming_polls=3)

M, V = MachineStatus, Verdict

SILENT: dict[tuple[bool, bool, MachineStatus], Verdict] = {
    # (silent for long, confirmed by polls, what the cloud says)
    (False, False, M.STARTING): V.SUSPECT,
    (False, False, M.RUNNING): V.SUSPECT,
    (False, False, M.GONE): V.LOST,
    (False, False, M.UNKNOWN): V.SUSPECT,
    (False, True, M.STARTING): V.SUSPECT,
    (False, True, M.RUNNING): V.SUSPECT,
    (False, True, M.GONE): V.LOST,
    (False, True, M.UNKNOWN): V.SUSPECT,
    (True, False, M.STARTING): V.SUSPECT,
    (True, False, M.RUNNING): V.SUSPECT,
    (True, False, M.GONE): V.LOST,
    (True, False, M.UNKNOWN): V.SUSPECT,
    (True, True, M.STARTING): V.BROKEN,
    (True, True, M.RUNNING): V.BROKEN,
    (True, True, M.GONE): V.LOST,
    (True, True, M.UNKNOWN): V.BROKEN,
}


class TestJudge:
    @pytest.mark.parametrize(
        ("is_long", "is_confirmed", "machine"), list(itertools.product([False, True], [False, True], MachineStatus))
    )
    def test_of_a_silent_engine(self, is_long: bool, is_confirmed: bool, machine: MachineStatus) -> None:
        signals = Signals(False, 15.0 if is_long else 14.9, machine, 3 if is_confirmed else 2)
        verdict, reason = judge(signals, POLICY)
        assert verdict is SILENT[is_long, is_confirmed, machine]
        assert reason

    @pytest.mark.parametrize("machine", MachineStatus)
    @pytest.mark.parametrize("silent_for_s", [0.0, 1e6])
    def test_never_buries_an_engine_that_answers(self, machine: MachineStatus, silent_for_s: float) -> None:
        assert judge(Signals(True, silent_for_s, machine, 99), POLICY)[0] is V.HEALTHY
