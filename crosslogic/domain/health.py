"""Health: what several signals about one node mean together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MachineStatus(StrEnum):
    """What the cloud says of a machine."""

    STARTING = "starting"
    RUNNING = "running"
    GONE = "gone"  # Terminated, preempted, or not in the cloud's list.
    UNKNOWN = "unknown"  # The cloud could not be asked, or there is no cloud behind the node.


class Verdict(StrEnum):
    """What to do about a node."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"  # One signal only: look again before acting.
    LOST = "lost"  # The cloud took the machine.
    BROKEN = "broken"  # The machine may be there, but nothing has answered for too long.


@dataclass(frozen=True, slots=True)
class Signals:
    """The latest reading of each signal. `silent_for_s` is the time since the engine last answered a poll."""

    is_answering: bool
    silent_for_s: float
    machine: MachineStatus
    failed_polls: int = 0


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """Thresholds of a verdict; the defaults are the product's (PRD/requirements.md, Fleet)."""

    silence_s: float = 15.0
    confirming_polls: int = 3


def judge(signals: Signals, policy: HealthPolicy) -> tuple[Verdict, str]:
    """A verdict and its reason in plain words.

    Death takes two signals: the cloud says that the machine is gone and the engine does not answer. Silence alone is
    believed after `silence_s` confirmed by `confirming_polls` polls. An engine that answers is never dead, whatever the
    cloud's list says: lists lag.
    """
    if signals.is_answering:
        return Verdict.HEALTHY, "the engine answers"
    if signals.machine is MachineStatus.GONE:
        return Verdict.LOST, "the engine is silent and the cloud says that the machine is gone"
    if signals.silent_for_s >= policy.silence_s and signals.failed_polls >= policy.confirming_polls:
        return (
            Verdict.BROKEN,
            f"the engine has been silent for {signals.silent_for_s:.0f} s and {signals.failed_polls} polls",
        )
    return Verdict.SUSPECT, f"the engine has missed {signals.failed_polls} polls"
