"""Sweeping: is every machine in the cloud one that we intended, and is every node's machine there?"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from crosslogic.domain.credentials import MARK_LENGTH, machine_mark
from crosslogic.domain.node import Node, NodeState

# The name of every machine of every installation starts with it.
PREFIX = "cic-"
# A machine whose node is tombstoned is its workflow's to end, for so long. Then the sweep ends it: with one every two
# minutes, and two looks half a minute apart, none outlives its tombstone by more than 10 min (F3).
ENDING_GRACE_S = 300.0
# A row may be ahead of the cloud's list for this long: lists lag.
MISSING_GRACE_S = 120.0

_HAS_MACHINE = frozenset({NodeState.BOOTING, NodeState.LOADING, NodeState.READY, NodeState.DRAINING})


class Standing(StrEnum):
    """What one machine or row is to us."""

    OWNED = "owned"  # Its node's row is alive.
    ENDING = "ending"  # Its node is tombstoned or has ended, just now: its workflow ends it.
    ORPHAN = "orphan"  # Its node is tombstoned or has ended, too long ago. To be ended.
    UNINTENDED = "unintended"  # Its name bears our mark and no row has ever claimed it. Never right (F3). To be ended.
    FOREIGN = "foreign"  # No row claims it, and its name does not bear our mark: another installation's. Left alone.
    MISSING = "missing"  # A row claims a machine that the cloud does not list. Its workflow is told to look.


# Machines that nobody intended do not happen (F3). Several at once rather mean that we look into the wrong database: of
# them the sweep ends no more than one, or this share of all machines. The rest is left to people.
UNINTENDED_SHARE = 0.1

TO_BE_ENDED = frozenset({Standing.ORPHAN, Standing.UNINTENDED})


@dataclass(frozen=True, slots=True)
class Judgement:
    """A standing, with its reason in plain words."""

    standing: Standing
    reason: str


def bears_our_mark(cluster: str, node_secret: str) -> bool:
    """Was a machine of this name ordered by an installation with our node secret?

    Another's bears our mark by chance once in 2²⁵.
    """
    short_id = cluster.rpartition("-")[2]
    identity, mark = short_id[:-MARK_LENGTH], short_id[-MARK_LENGTH:]
    return bool(identity) and mark == machine_mark(node_secret, identity)


def judge_machine(row: Node | None, is_marked: bool, now: datetime) -> Judgement:
    """What a machine that the cloud lists is to us. `row` must have been read after the list."""
    if row is None:
        if is_marked:
            return Judgement(Standing.UNINTENDED, "its name bears our mark, and no node has ever claimed it")
        return Judgement(Standing.FOREIGN, "another installation's: its name does not bear our mark")
    over_at = row.tombstoned_at or row.ended_at
    if over_at is None:
        return Judgement(Standing.OWNED, f"node {row.node_id} is {row.state}")
    over_s = (now - over_at).total_seconds()
    words = f"node {row.node_id} is {row.state} and over for {over_s:.0f} s"
    return Judgement(Standing.ORPHAN if over_s > ENDING_GRACE_S else Standing.ENDING, words)


def most_unintended(machines: int) -> int:
    """How many unintended machines a sweep of so many machines may end."""
    return max(1, int(machines * UNINTENDED_SHARE))


def is_missing(row: Node, now: datetime) -> bool:
    """Should the cloud by now list the machine of this row?"""
    is_old = (now - row.changed_at).total_seconds() > MISSING_GRACE_S
    return is_old and row.state in _HAS_MACHINE and not row.is_tombstoned
