"""What this process sees of demand, said once a second; and what it is told in return: when nodes will come, and what
the autoscaler has decided. All of it beside the path of requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from api.inference.admission import Admission
from api.inference.auth import within
from api.inference.observing import FIRST_TOKEN_MS, Observer, Totals
from api.inference.proxy import PROMPT_TOKENS_PER_WORK
from api.inference.router import RouteTable
from crosslogic.domain.autoscaling import RATE_WINDOW_S
from crosslogic.domain.errors import Unavailable
from crosslogic.domain.lead_time import LeadTimes
from crosslogic.hot.demand import TTFT_BOUNDS_MS, DemandBoard, Place, ProcessDemand
from crosslogic.store.lead_times import LeadTimeStore
from crosslogic.store.nodes import NodeStore
from crosslogic.store.scaling import ScalingStore

log = logging.getLogger("crosslogic.demand")

INTERVAL_S = 1.0
# Nodes on their way are looked at so often, what was learnt of lead times more seldom.
ETA_INTERVAL_S = 2.0
LEARN_INTERVAL_S = 60.0
TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Reading:
    """The counters of one place at one moment, and what was under way."""

    at: float
    totals: Totals
    shed: int
    work: float  # In flight and queued.


@dataclass(slots=True)
class _History:
    """The readings of the last minute, oldest first."""

    readings: deque[_Reading] = field(default_factory=deque[_Reading])

    def add(self, reading: _Reading) -> _Reading:
        """Take the newest; the oldest that is left, a minute old or less."""
        self.readings.append(reading)
        while reading.at - self.readings[0].at > RATE_WINDOW_S:
            self.readings.popleft()
        return self.readings[0]


class DemandTeller:
    """Reads what the hot path counts and says it on the board."""

    def __init__(
        self,
        board: DemandBoard,
        process: str,
        *,
        table: RouteTable,
        admission: Admission,
        observer: Observer,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._board = board
        self._process = process
        self._table = table
        self._admission = admission
        self._observer = observer
        self._now = now
        self._looked_at = now()
        self._histories: dict[Place, _History] = {}

    def see(self) -> dict[Place, ProcessDemand]:
        """What is asked for now, by model and region; a place that nobody has asked for is left out."""
        now = self._now()
        in_flight = {(pool.model, pool.region): pool.tokens_in_flight for pool in self._table.pools}
        waiting = self._admission.demand()
        totals = self._observer.totals()
        sheds = self._observer.sheds()
        seen: dict[Place, ProcessDemand] = {}
        for place in {*in_flight, *waiting, *totals, *self._histories}:
            here = waiting.get(place)
            queued = here.queued_tokens if here is not None else 0.0
            flying = in_flight.get(place, 0) + (here.entering_tokens if here is not None else 0)
            reading = _Reading(now, totals.get(place, Totals()), sheds.get(place, 0), flying + queued)
            history = self._histories.get(place)
            if history is None:
                # Nothing had been counted here when this process last looked.
                history = self._histories[place] = _History(deque([_Reading(self._looked_at, Totals(), 0, 0.0)]))
            before = history.add(reading)
            passed_s = max(INTERVAL_S, now - before.at)
            served = _work(reading.totals) - _work(before.totals)
            # What came is what went and what there is more of now.
            arrived = max(0.0, served + reading.work - before.work)
            seen[place] = ProcessDemand(
                tokens_in_flight=float(flying),
                queued_requests=here.queued_requests if here is not None else 0,
                queued_tokens=float(queued),
                arrival_tokens_per_s=arrived / passed_s,
                served_tokens_per_s=served / passed_s,
                held_requests=here.held_requests if here is not None else 0,
                sheds_per_s=(reading.shed - before.shed) / passed_s,
                ttft_counts=_spread(reading.totals.first_token, before.totals.first_token),
            )
        self._looked_at = now
        return seen

    async def keep_telling(self) -> None:
        """Run for the life of the process."""
        is_away = False
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await within(TIMEOUT_S, self._board.put(self._process, self.see(), self._now()))
                if is_away:
                    log.info("Redis hears of demand again")
                is_away = False
            except (Unavailable, TimeoutError) as error:
                if not is_away:
                    log.warning("demand cannot be told, so nothing is scaled by it: %s", error)
                is_away = True
            await asyncio.sleep(max(0.0, began + INTERVAL_S - asyncio.get_running_loop().time()))

    async def leave(self) -> None:
        """This process sees nothing any more."""
        await self._board.leave(self._process)


class Arrivals:
    """When each model's next node will serve in a region, for `Retry-After`."""

    def __init__(self, nodes: NodeStore, lead_times: LeadTimeStore, now: Callable[[], float] = time.time) -> None:
        self._nodes = nodes
        self._lead_times = lead_times
        self._now = now
        self._learnt = LeadTimes()
        self._learnt_at = float("-inf")
        self._serving_at: dict[Place, float] = {}

    def eta_s(self, model: str, region: str) -> float:
        """Seconds until the first node on its way serves, at least 1; where none is: for one that is ordered now."""
        serving_at = self._serving_at.get((model, region))
        if serving_at is not None:
            return max(1.0, serving_at - self._now())
        return max(1.0, self._learnt.eta(cloud="", gpu="", model=model).p50_s)

    async def read_once(self) -> None:
        """Look at the nodes on their way. Raises what the stores raise."""
        now = self._now()
        if now - self._learnt_at >= LEARN_INTERVAL_S:
            self._learnt = await within(TIMEOUT_S, self._lead_times.load())
            self._learnt_at = now
        coming = await within(TIMEOUT_S, self._nodes.list_on_the_way())
        ended = await within(TIMEOUT_S, self._lead_times.ended_phases([node.id for node in coming])) if coming else {}
        earliest: dict[Place, float] = {}
        for node in coming:
            place = (node.model, node.region)
            eta = self._learnt.eta_of(node, ended.get(node.id, {}), now)
            earliest[place] = min(earliest.get(place, float("inf")), now + eta.p50_s)
        self._serving_at = earliest

    async def keep_reading(self) -> None:
        """Run for the life of the process; without Postgres the last reading holds."""
        while True:
            try:
                await self.read_once()
            except Exception as error:
                log.debug("nodes on their way cannot be read now: %r", error)
            await asyncio.sleep(ETA_INTERVAL_S)


async def keep_showing(decisions: ScalingStore, observer: Observer, interval_s: float = 10.0) -> None:
    """Run for the life of the process: show what the autoscaler decided last."""
    while True:
        try:
            latest = await within(TIMEOUT_S, decisions.latest())
        except Exception as error:
            log.debug("decisions cannot be read now: %r", error)
        else:
            for gauge in (observer.replicas_desired, observer.replicas_needed, observer.replicas_serving):
                gauge.clear()
            for one in latest:
                place = (one.deployment, one.region)
                observer.replicas_desired.set(one.desired, *place)
                observer.replicas_serving.set(one.serving, *place)
                if one.needed is not None:
                    observer.replicas_needed.set(one.needed, *place)
        await asyncio.sleep(interval_s)


def _work(totals: Totals) -> float:
    return totals.prompt_tokens / PROMPT_TOKENS_PER_WORK + totals.completion_tokens


def _spread(after: Iterable[int], before: Iterable[int]) -> tuple[int, ...]:
    """The first tokens between two readings, by the board's bounds; empty where there were none."""
    counts = [0] * len(TTFT_BOUNDS_MS)
    earlier = list(before) or [0] * (len(FIRST_TOKEN_MS) + 1)
    for place, count in enumerate(after):
        new = count - earlier[place]
        if new > 0:
            bound = FIRST_TOKEN_MS[place] if place < len(FIRST_TOKEN_MS) else TTFT_BOUNDS_MS[-1]
            counts[min(bisect_left(TTFT_BOUNDS_MS, bound), len(counts) - 1)] += new
    return tuple(counts) if any(counts) else ()
