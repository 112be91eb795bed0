"""Whether a request may be served in another region than its home, so that no region pulls the next one down.

Source of the figures: PRD/requirements.md, "Regions and routing".
"""

from __future__ import annotations

import math

# For so long after a loss only a share of the region's requests goes to the next; whoever loses its caches and its
# warm connections as well needs that time.
FIRST_S = 60.0
FIRST_SHARE = 0.2
# Whatever the share: so few requests a minute hurt no region.
TRICKLE = 10
# Afterwards as far as the next region's load allows. Load is the share of its serverless capacity that is in use.
MOST_LOAD_AFTER_LOSS = 0.8
# A region that merely is full sheds its peaks, but only into one that has plenty.
MOST_LOAD_WHEN_FULL = 0.6


class Loss:
    """A region that had nodes of a model, or is promised some, and has none: what has come and gone since.

    `at` is when it was lost; a region that is lost again begins anew.
    """

    __slots__ = ("arrived", "at", "spilled")

    def __init__(self, at: float) -> None:
        self.at = at
        self.arrived = 0
        self.spilled = 0

    def may_spill(self, now: float, load: float, processes: int = 1) -> bool:
        """May one more of its requests go to a region with this load?

        `arrived` counts the requests that are asked about, this one too, and `spilled` those that went; both are one
        process's, and so is its part of the trickle.
        """
        if now - self.at < FIRST_S:
            return self.spilled < max(self.arrived * FIRST_SHARE, math.ceil(TRICKLE / processes))
        return load < MOST_LOAD_AFTER_LOSS

    def first_ends_in_s(self, now: float) -> float:
        """Until more may spill; 0 when it may."""
        return max(0.0, self.at + FIRST_S - now)


def may_relieve(load: float) -> bool:
    """May a request of a full region go to a region with this load?"""
    return load < MOST_LOAD_WHEN_FULL
