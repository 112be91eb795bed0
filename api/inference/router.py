"""The route table: every node this process may use, in memory, and the choice among them.

Entries arrive by push from Redis and by full reads from Postgres; of two readings of one node the higher generation
holds (F4). A node that left is remembered for a while, so that a late message cannot bring it back.

Nodes are grouped in pools, one for each model and region. A pool sorts its nodes into those that are eligible and those
that are left out when one of them changes, so that a choice looks at two of them and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import getrandbits
from typing import Any, Final
from uuid import UUID

from api.inference.upstream import FailureKind, Upstream
from crosslogic.domain.affinity import PrefixMap, prefix_blocks
from crosslogic.domain.certificates import server_name
from crosslogic.domain.ids import NODE, ORG
from crosslogic.domain.node import FINAL_STATES, ON_THE_WAY, RouteEntry
from crosslogic.domain.regions import RegionPlan
from crosslogic.domain.scheduling import (
    AFFINITY,
    BUSY_FACTOR,
    COST_WEIGHTED,
    DEFAULT_CAPACITY_TOKENS_PER_S,
    FIRST_EJECTION_S,
    FRESH,
    LAST_RESORT,
    LATENCY_WEIGHTED,
    LEAST_FACTOR,
    LEAST_LOAD,
    NO_SPLIT,
    PREFIX_AFFINITY,
    RECOVERY_PER_S,
    ROUND_ROBIN,
    SLOW_EJECTION_S,
    SPARE,
    STEADY,
    TRIAL,
    WHOLE_BP,
    Choice,
    Rules,
    Split,
    cost_weighted,
    ejection_s,
    is_drawn,
    latency_weighted,
    least_load,
    load_s,
    may_keep_affinity,
    most_ejected,
    peak,
    ramp,
    recovered,
    round_robin,
    slow_above_s,
    slowness,
    smoothed,
    weigh,
)

# Messages older than this cannot be in flight any more.
REMEMBER_GONE_S = 600.0
SUSPICIOUS = frozenset({FailureKind.CONNECT, FailureKind.RESET})
# After its ejection one request finds out whether a node is well again; for so long the others keep away.
TRIAL_S = 1.0
# So many failed connections in a row, and no request is started there any more until a connection succeeds (F2).
UNREACHABLE_AFTER = 3
PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 2.0
# Requests that were under way together are told "busy" together: that is one piece of news.
BUSY_INTERVAL_S = 0.1
# Fewer samples than this may be chance.
LEAST_SAMPLES = 2
MEDIAN_INTERVAL_S = 1.0
# Block hashes a pool remembers for affinity: 16 MB or so, a thousand long conversations.
MOST_PREFIXES = 65_536
RANDOM_BITS = 32
# Between a region's name and an org's id, in the names of pools that are one org's alone. No region's name has it.
OWNED = "~"

NOBODY: Final = ()


class Node:
    """One node as this process sees it: its latest entry, its connections and what it has been through."""

    __slots__ = (
        "answers",
        "busy_at",
        "connect_failures",
        "ejected_at",
        "ejected_until",
        "entry",
        "errors",
        "factor",
        "failures",
        "group",
        "head",
        "id",
        "is_counted",
        "is_eligible",
        "is_gone",
        "is_member",
        "is_out",
        "peak_ttft_s",
        "pool",
        "ramp_until",
        "refusals",
        "requests_in_flight",
        "samples",
        "seconds_per_token",
        "settles_at",
        "shown_id",
        "starts",
        "tokens_in_flight",
        "trial_at",
        "ttft_at",
        "ttft_s",
        "upstream",
    )

    def __init__(self, entry: RouteEntry, upstream: Upstream, pool: Pool) -> None:
        self.entry = entry
        self.upstream = upstream
        self.pool = pool
        self.id = NODE.parse(entry.node_id)
        self.shown_id = entry.node_id.encode()
        # The lines by which every answer says who gave it.
        self.head = f"x-crosslogic-node: {entry.node_id}\r\nx-crosslogic-region: {entry.region}\r\n".encode()
        self.is_gone = False
        # Whether its revision is the one that serves, one that is rolled out, or another.
        self.group = STEADY
        # Routable by its state; left out for now or on trial; neither; and counted in the pool's sums.
        self.is_member = False
        self.is_out = False
        self.is_eligible = False
        self.is_counted = False
        self.tokens_in_flight = 0
        self.requests_in_flight = 0
        # For api.passive: what it was given, and how that ended. They only grow.
        self.starts = self.answers = self.errors = self.refusals = 0
        self.failures = 0
        self.connect_failures = 0
        self.ejected_at = 0.0
        self.ejected_until = 0.0
        self.trial_at = 0.0
        self.samples = 0
        self.ttft_s = 0.0
        self.peak_ttft_s = 0.0
        self.ttft_at = 0.0
        self.ramp_until = 0.0
        self.factor = 1.0
        self.busy_at = -math.inf
        self.settles_at = 0.0
        self.seconds_per_token = 0.0
        self._set_pace()

    def update(self, entry: RouteEntry) -> None:
        """Take a newer entry of the same engine."""
        self.entry = entry
        self._set_pace()

    def leave(self) -> None:
        """It is no member of its pool any more; what is in flight there ends, uncounted."""
        self.is_member = self.is_eligible = self.is_counted = False

    def _set_pace(self) -> None:
        capacity = self.entry.capacity_tokens_per_s or DEFAULT_CAPACITY_TOKENS_PER_S
        self.seconds_per_token = slowness(self.ttft_s, self.pool.median_ttft_s) / capacity

    @property
    def is_unreachable(self) -> bool:
        """Did the last connections all fail?"""
        return self.connect_failures >= UNREACHABLE_AFTER

    def weight(self, now: float) -> float:
        """The share of its capacity that it should be given: its ramp, times what "busy" left of it."""
        return ramp(now, self.ramp_until, self.pool.rules.slow_start_s) * self.factor_at(now)

    def factor_at(self, now: float) -> float:
        """What "busy" left of its weight, by now."""
        return self.factor if self.factor == 1.0 else recovered(self.factor, now - self.busy_at)

    def start_slowly(self, now: float) -> None:
        """Begin with a small weight that grows."""
        self.ramp_until = now + self.pool.rules.slow_start_s
        self.settles_at = max(self.settles_at, self.ramp_until)

    # What the relay tells

    def take(self, tokens: int) -> None:
        """A request that holds so many tokens starts there."""
        self.tokens_in_flight += tokens
        self.requests_in_flight += 1
        self.starts += 1
        if self.is_counted:
            self.pool.tokens_in_flight += tokens

    def give_back(self, tokens: int) -> None:
        """It has ended: the stream, and not just its first byte."""
        self.tokens_in_flight -= tokens
        self.requests_in_flight -= 1
        if self.is_counted:
            pool = self.pool
            pool.tokens_in_flight -= tokens
            if pool.on_room is not None:
                pool.on_room()

    def first_token(self, latency_s: float, now: float) -> bool:
        """A stream's first token came after so long; True when that, again and again, got the node ejected."""
        self.samples += 1
        self.ttft_s = smoothed(self.ttft_s, latency_s)
        self.peak_ttft_s = peak(self.peak_ttft_s, latency_s, now - self.ttft_at)
        self.ttft_at = now
        pool = self.pool
        if now >= pool.median_due_at:
            pool.measure(now)
        if self.is_out:
            if now >= self.ejected_until:
                self._come_back(now)
        elif self.ttft_s > pool.slow_above_s and self.samples >= LEAST_SAMPLES and pool.may_spare(self, now):
            # Measured afresh when it is back: ejected once for what it was, not again and again.
            self.samples = 0
            self.ttft_s = self.peak_ttft_s = 0.0
            self._set_pace()
            self._eject(SLOW_EJECTION_S, now)
            return True
        self._set_pace()
        return False

    def succeeded(self, now: float) -> None:
        """It answered as it should, to the end; a first byte alone proves too little."""
        self.answers += 1
        self.failures = 0
        if self.connect_failures:
            was_unreachable = self.is_unreachable
            self.connect_failures = 0
            if was_unreachable:
                self.pool.recount(now)
        if self.is_out and now >= self.ejected_until:
            self._come_back(now)

    def failed(self, kind: FailureKind, now: float) -> bool:
        """Note a failure; True when it got the node ejected. Being full, or asked for too much, is none."""
        if kind is FailureKind.TOTAL:
            return False
        if kind is FailureKind.BUSY:
            self.refusals += 1
            self._was_busy(now)
            return False
        self.errors += 1
        self.failures += 1
        self.connect_failures = self.connect_failures + 1 if kind is FailureKind.CONNECT else 0
        pause_s = ejection_s(self.failures, is_connection_failure=kind in SUSPICIOUS)
        if pause_s:
            self._eject(pause_s, now)
        return pause_s > 0

    def _was_busy(self, now: float) -> None:
        if now - self.busy_at < BUSY_INTERVAL_S:
            return
        before = self.factor_at(now)
        self.factor = max(LEAST_FACTOR, before * BUSY_FACTOR)
        self.busy_at = now
        self.settles_at = max(self.settles_at, now + (1.0 - self.factor) / RECOVERY_PER_S)
        if self.is_counted:
            self.pool.was_busy(self.entry.capacity_tokens_per_s, self.factor - before)

    def _eject(self, pause_s: float, now: float) -> None:
        self.is_out = True
        self.ejected_at = now
        self.ejected_until = max(self.ejected_until, now + pause_s)
        self.trial_at = self.ejected_until
        if self.is_member:
            self.pool.relieve(self, now)
            self.pool.recount(now)

    def _come_back(self, now: float) -> None:
        self.is_out = False
        self.ejected_until = 0.0
        self.start_slowly(now)
        if self.is_member:
            self.pool.recount(now)


class Pool:
    """The nodes of one model in one region: the same object for as long as the process lives.

    `nodes` are those that are eligible now. `routable_count` counts all where a request may be started, at worst as the
    last resort. `tokens_in_flight` and `capacity_tokens` are sums over the eligible nodes (over the ejected ones where
    no other is left); `capacity_tokens` is 0, no bound is known, while any of them is unmeasured. `lost_at` is when the
    last routable node went, None while there are some or never were any. `on_room` is called when a request has ended
    or a node has come: there may be room for another.
    """

    __slots__ = (
        "_capacity_tokens",
        "_due_at",
        "_is_unsettled",
        "_prefixes",
        "_tokens_per_s",
        "_turn",
        "_unmeasured",
        "capacity_tokens",
        "groups",
        "had_nodes",
        "lost_at",
        "median_due_at",
        "median_ttft_s",
        "members",
        "model",
        "nodes",
        "on_room",
        "on_the_way",
        "out",
        "prices",
        "region",
        "routable_count",
        "rules",
        "shares_bp",
        "slow_above_s",
        "strategy",
        "tokens_in_flight",
    )

    def __init__(self, model: str, region: str, rules: Rules) -> None:
        self.model = model
        self.region = region
        self.rules = rules
        self.strategy = LEAST_LOAD
        # By group: its share of the requests, and its eligible nodes with their prices; None while all are STEADY.
        self.shares_bp = (WHOLE_BP, 0, 0)
        self.groups: tuple[tuple[list[Node], list[list[Node]]], ...] | None = None
        self.nodes: list[Node] = []
        self.out: list[Node] = []
        self.members: list[Node] = []
        self.prices: list[list[Node]] = []
        self.routable_count = 0
        self.on_the_way = 0
        self.tokens_in_flight = 0
        self.capacity_tokens = 0
        self.had_nodes = False
        self.lost_at: float | None = None
        self.on_room: Callable[[], None] | None = None
        self.median_ttft_s = 0.0
        self.slow_above_s = math.inf
        self.median_due_at = 0.0
        self._capacity_tokens = 0.0
        self._tokens_per_s = 0
        self._unmeasured = 0
        self._is_unsettled = False
        self._due_at = math.inf
        self._turn = 0
        self._prefixes: PrefixMap[Node] = PrefixMap(MOST_PREFIXES)

    @property
    def wants_prefix(self) -> bool:
        """Is a choice here better with the conversation's `prefix_blocks`?"""
        return self.strategy == PREFIX_AFFINITY

    # When something changes

    def set_members(self, members: list[Node], on_the_way: int, strategy: str, now: float, fresh_bp: int = 0) -> None:
        """These nodes are routable by their state now, and so many will be; the FRESH ones get that share."""
        self.shares_bp = (WHOLE_BP - fresh_bp, fresh_bp, 0)
        self.on_the_way = on_the_way
        self.strategy = strategy
        before, self.members = self.members, members
        for node in before:
            node.is_member = False
        had_others = self.routable_count > 0
        known = set(before)
        for node in members:
            node.is_member = True
            if had_others and node not in known:
                node.start_slowly(now)
        for node in before:
            if not node.is_member:
                node.leave()
        self.recount(now)

    def recount(self, now: float) -> None:
        """Sort the nodes anew and sum them up: one of them has changed."""
        nodes: list[Node] = []
        out: list[Node] = []
        due_at = math.inf
        for node in self.members:
            node.is_eligible = node.is_counted = False
            if node.connect_failures >= UNREACHABLE_AFTER:
                continue
            if node.is_out:
                out.append(node)
                if self.shares_bp[node.group]:
                    due_at = min(due_at, node.trial_at)
            else:
                node.is_eligible = True
                nodes.append(node)
        had_room = (len(self.nodes), self._capacity_tokens)
        self.nodes, self.out, self._due_at = nodes, out, due_at
        self.prices = self._by_price(nodes)
        self.groups = None
        if any(node.group != STEADY for node in nodes):
            sorted_out = [[node for node in nodes if node.group == group] for group in (STEADY, FRESH, SPARE)]
            self.groups = tuple((group, self._by_price(group)) for group in sorted_out)
        self.routable_count = len(nodes) + len(out)
        if self.routable_count:
            self.had_nodes, self.lost_at = True, None
        elif self.had_nodes and self.lost_at is None:
            self.lost_at = now
        self._sum_up(now)
        if self.on_room is not None and (len(nodes) > had_room[0] or self._capacity_tokens > had_room[1]):
            self.on_room()

    def _by_price(self, nodes: list[Node]) -> list[list[Node]]:
        """The nodes of each price, cheapest first, where the strategy asks for that."""
        if self.strategy != COST_WEIGHTED:
            return []
        by_price: dict[float, list[Node]] = {}
        for node in nodes:
            # A price that nobody knows is no reason to prefer a node.
            by_price.setdefault(node.entry.price_microdollars_per_h or math.inf, []).append(node)
        return [by_price[price] for price in sorted(by_price)]

    def _sum_up(self, now: float) -> None:
        tokens, tokens_per_s, unmeasured, capacity, settles_at = 0, 0, 0, 0.0, 0.0
        for node in self.nodes or self.out:
            node.is_counted = True
            tokens += node.tokens_in_flight
            tokens_per_s += node.entry.capacity_tokens_per_s or DEFAULT_CAPACITY_TOKENS_PER_S
            unmeasured += not node.entry.capacity_tokens_per_s
            capacity += node.entry.capacity_tokens_per_s * node.factor_at(now)
            settles_at = max(settles_at, node.settles_at)
        self.tokens_in_flight = tokens
        self._tokens_per_s = tokens_per_s
        self._unmeasured = unmeasured
        self._capacity_tokens = capacity * self.rules.full_load_s
        self._is_unsettled = settles_at > now
        self.capacity_tokens = 0 if unmeasured else int(self._capacity_tokens)

    def was_busy(self, capacity_tokens_per_s: int, change: float) -> None:
        """A node's factor has changed by so much."""
        self._is_unsettled = True
        self._capacity_tokens += capacity_tokens_per_s * change * self.rules.full_load_s
        self.capacity_tokens = 0 if self._unmeasured else int(self._capacity_tokens)

    def refresh(self, now: float) -> None:
        """Once a second: what "busy" took away comes back with time."""
        if self._is_unsettled:
            before = self._capacity_tokens
            self._sum_up(now)
            if self.on_room is not None and self._capacity_tokens > before:
                self.on_room()

    def measure(self, now: float) -> None:
        """Take the median time to first token: what is slow here. With two nodes it is the faster one's."""
        self.median_due_at = now + MEDIAN_INTERVAL_S
        known = sorted(node.ttft_s for node in self.members if node.samples >= LEAST_SAMPLES)
        if len(known) < 2:
            self.median_ttft_s, self.slow_above_s = 0.0, math.inf
        else:
            self.median_ttft_s = known[(len(known) - 1) // 2]
            self.slow_above_s = slow_above_s(self.median_ttft_s)

    def may_spare(self, node: Node, now: float) -> bool:
        """May one more node be ejected that only is slow? Not the last one, and not beyond the share."""
        ejected = sum(other.ejected_until > now for other in self.out)
        return (
            node.is_eligible
            and len(self.nodes) > 1
            and ejected < most_ejected(self.routable_count, self.rules.ejected_share)
        )

    def relieve(self, node: Node, now: float) -> None:
        """This one was ejected: if they are too many now, the one ejected longest is put on trial.

        Its trial waits until the shortest ejection has passed, lest every request pay for one.
        """
        others = [other for other in self.out if other is not node and other.ejected_until > now]
        if len(others) >= most_ejected(self.routable_count, self.rules.ejected_share):
            longest = min(others, key=lambda other: other.ejected_at)
            longest.ejected_until = now
            longest.trial_at = max(now, longest.ejected_at + FIRST_EJECTION_S)

    # Asking

    def choose(self, now: float, bits: int, tried: Sequence[Node], blocks: tuple[int, ...]) -> Choice[Node] | None:
        """An eligible node by the pool's strategy, or one whose trial is due; None where there is neither."""
        choice: Choice[Node] | None
        self._turn = turn = self._turn + 1
        if now >= self._due_at and (node := self._next_trial(now, tried)) is not None:
            choice = Choice(node, self.strategy, TRIAL, ())
        elif self.groups is not None:
            choice = self._by_share(self.groups, now, turn, bits, tried, blocks)
        else:
            choice = self._by_strategy(self.nodes, self.prices, now, turn, bits, tried, blocks)
        if choice is not None:
            choice.eligible = len(self.nodes)
            choice.ejected = len(self.out)
        return choice

    def _by_strategy(
        self,
        nodes: list[Node],
        prices: list[list[Node]],
        now: float,
        turn: int,
        bits: int,
        tried: Sequence[Node],
        blocks: tuple[int, ...],
    ) -> Choice[Node] | None:
        strategy = self.strategy
        if strategy == PREFIX_AFFINITY:
            return self._by_affinity(nodes, now, turn, bits, tried, blocks)
        if strategy == ROUND_ROBIN:
            return round_robin(nodes, now, turn, bits, tried)
        if strategy == LATENCY_WEIGHTED:
            return latency_weighted(nodes, now, turn, bits, tried)
        if strategy == COST_WEIGHTED:
            return cost_weighted(prices, now, turn, bits, tried)
        return least_load(nodes, now, turn, bits, tried)

    def _by_share(
        self,
        groups: tuple[tuple[list[Node], list[list[Node]]], ...],
        now: float,
        turn: int,
        bits: int,
        tried: Sequence[Node],
        blocks: tuple[int, ...],
    ) -> Choice[Node] | None:
        """A node of the revision that is drawn; where all of that are left out or full, one of another."""
        order = (FRESH, STEADY, SPARE) if is_drawn(bits, self.shares_bp[FRESH]) else (STEADY, FRESH, SPARE)
        fallback: Choice[Node] | None = None
        for group in order:
            choice = self._by_strategy(*groups[group], now, turn, bits, tried, blocks)
            if choice is not None:
                node = choice.node
                if node.tokens_in_flight * node.seconds_per_token < self.rules.full_load_s:
                    return choice
                fallback = fallback or choice
        return fallback

    def last_resort(self, now: float, bits: int, tried: Sequence[Node]) -> Choice[Node] | None:
        """One of those that are left out; trying it ends its ejection if it answers."""
        self._turn = turn = self._turn + 1
        choice = least_load(self.out, now, turn, bits, tried, self.strategy)
        if choice is not None:
            choice.reason = LAST_RESORT
            choice.eligible = len(self.nodes)
            choice.ejected = len(self.out)
            choice.node.ejected_until = now
        return choice

    def _next_trial(self, now: float, tried: Sequence[Node]) -> Node | None:
        found: Node | None = None
        due_at = math.inf
        for node in self.out:
            if not self.shares_bp[node.group]:
                # No request is risked on a revision that should get none.
                continue
            if found is None and node.trial_at <= now and node not in tried:
                found = node
                node.trial_at = now + TRIAL_S
            due_at = min(due_at, node.trial_at)
        self._due_at = due_at
        return found

    def _by_affinity(
        self,
        nodes: list[Node],
        now: float,
        turn: int,
        bits: int,
        tried: Sequence[Node],
        blocks: tuple[int, ...],
    ) -> Choice[Node] | None:
        owner = self._prefixes.find(blocks) if blocks else None
        choice: Choice[Node] | None = None
        # Those ejected are out, and so are nodes that have left, or went over to another pool.
        is_there = owner is not None and owner.is_eligible and owner.pool is self and owner not in tried
        if owner is not None and is_there and (self.groups is None or owner in nodes):
            mean_s = self.tokens_in_flight / self._tokens_per_s
            if may_keep_affinity(owner, mean_s, now):
                choice = Choice(owner, PREFIX_AFFINITY, AFFINITY, (weigh(owner, load_s(owner, now), now),))
        if choice is None:
            choice = least_load(nodes, now, turn, bits, tried, PREFIX_AFFINITY)
        if choice is not None and blocks:
            self._prefixes.learn(blocks, choice.node)
        return choice


class RouteTable:
    """All nodes, in their pools."""

    def __init__(
        self,
        credential_of: Callable[[str], str],
        tls: ssl.SSLContext | None,
        rules: Rules | None = None,
        clock: Callable[[], float] | None = None,
        *,
        agent_tls: ssl.SSLContext | None = None,
        guard: Callable[[str], str | None] | None = None,
    ) -> None:
        self._credential_of = credential_of
        self._tls = tls
        self._agent_tls = agent_tls
        self._guard = guard
        self._rules = rules or Rules()
        self._now = clock or asyncio.get_running_loop().time
        self._nodes: dict[str, Node] = {}
        self._gone: dict[str, tuple[int, float]] = {}
        self._pools: dict[tuple[str, str], Pool] = {}
        self._strategies: Mapping[str, str] = {}
        # Orgs that have nodes of their own, as their ids are shown.
        self._owners: dict[UUID, str] = {}
        self._splits: Mapping[str, Split] = {}
        self._changed = asyncio.Event()
        self._callbacks: list[Callable[[], None]] = []
        self.is_loaded = False
        self.refreshed_at = 0.0

    # Feeding

    def apply(self, entry: RouteEntry) -> None:
        """Take one node's entry if it is newer than what is known."""
        if self._take(entry):
            self._rebuild()

    def replace(self, entries: Iterable[RouteEntry]) -> None:
        """Take a full reading: nodes that are not in it are gone."""
        present: set[str] = set()
        for entry in entries:
            present.add(entry.node_id)
            self._take(entry)
        for node_id in [node_id for node_id in self._nodes if node_id not in present]:
            self._forget(node_id, self._nodes[node_id].entry.generation)
        horizon = self._now() - REMEMBER_GONE_S
        self._gone = {node_id: mark for node_id, mark in self._gone.items() if mark[1] > horizon}
        self.is_loaded = True
        self.refreshed_at = self._now()
        self._rebuild()

    def set_strategies(self, strategies: Mapping[str, str]) -> None:
        """Each deployment's strategy, by its name."""
        if strategies != self._strategies:
            self._strategies = strategies
            self._rebuild()

    def set_splits(self, splits: Mapping[str, Split]) -> None:
        """Each deployment's revisions and their shares, by its name."""
        if splits != self._splits:
            self._splits = splits
            self._rebuild()

    def _take(self, entry: RouteEntry) -> bool:
        gone = self._gone.get(entry.node_id)
        if gone is not None and entry.generation <= gone[0]:
            return False
        node = self._nodes.get(entry.node_id)
        if node is not None and entry.generation <= node.entry.generation:
            return False
        if entry.state in FINAL_STATES:
            self._forget(entry.node_id, entry.generation)
            return True
        # An org's own nodes are a pool apart, which no other org's plan names (H6).
        place = (entry.model, f"{entry.region}{OWNED}{entry.org}" if entry.org else entry.region)
        pool = self._pools.get(place)
        if pool is None:
            pool = self._pools[place] = Pool(*place, self._rules)
        if node is None or node.pool is not pool or not node.entry.is_same_door(entry):
            if node is not None:
                node.is_gone = True
                node.upstream.close()
            self._nodes[entry.node_id] = Node(entry, self._upstream_of(entry), pool)
        else:
            node.update(entry)
        return True

    def _upstream_of(self, entry: RouteEntry) -> Upstream:
        credential = self._credential_of(entry.node_id)
        if entry.has_agent:
            return Upstream(entry.endpoint, credential, self._agent_tls, server_name(entry.node_id), self._guard)
        return Upstream(entry.endpoint, credential, self._tls, guard=self._guard)

    def _forget(self, node_id: str, generation: int) -> None:
        node = self._nodes.pop(node_id, None)
        if node is not None:
            node.is_gone = True
            node.upstream.close()
        self._gone[node_id] = (generation, self._now())

    def _rebuild(self) -> None:
        now = self._now()
        members: dict[Pool, list[Node]] = {pool: [] for pool in self._pools.values()}
        on_the_way = dict.fromkeys(self._pools.values(), 0)
        self._owners = {ORG.parse(org): org for org in {node.entry.org for node in self._nodes.values()} if org}
        for node in self._nodes.values():
            entry = node.entry
            if entry.is_routable:
                members[node.pool].append(node)
            elif entry.state in ON_THE_WAY and not entry.is_tombstoned:
                on_the_way[node.pool] += 1
        for pool, nodes in members.items():
            # Several deployments may serve a model in one region; one of them must decide for all.
            names = sorted({node.entry.deployment for node in nodes if node.entry.deployment})
            strategy = self._strategies.get(names[0], LEAST_LOAD) if names else LEAST_LOAD
            fresh_bp = 0
            for node in nodes:
                split = self._splits.get(node.entry.deployment)
                node.group = STEADY if split is None else split.group_of(node.entry.revision)
            for name in names:
                fresh_bp = fresh_bp or self._splits.get(name, NO_SPLIT).fresh_bp
            pool.set_members(nodes, on_the_way[pool], strategy, now, fresh_bp)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for call in self._callbacks:
            call()

    # Asking

    def pool(self, model: str, region: str) -> Pool | None:
        """The nodes of a model in a region; None where none was ever known."""
        return self._pools.get((model, region))

    def own_plan(self, org_id: UUID, model: str, plan: RegionPlan) -> RegionPlan:
        """The plan with the org's own nodes of that model in front, where some of them serve now."""
        org = self._owners.get(org_id)
        if org is None:
            return plan
        regions = [f"{region}{OWNED}{org}" for region in plan.candidates]
        own = [region for region in regions if (pool := self._pools.get((model, region))) and pool.routable_count]
        return RegionPlan(own[0], (*own, *plan.candidates)) if own else plan

    def choose(
        self,
        pool: Pool,
        tried: Sequence[Node] = NOBODY,
        blocks: tuple[int, ...] = (),
        random_bits: int | None = None,
        *,
        is_last_resort_allowed: bool = True,
    ) -> Choice[Node] | None:
        """The node for the next try, ejected ones last; None where none is left."""
        now = self._now()
        bits = getrandbits(RANDOM_BITS) if random_bits is None else random_bits
        choice = pool.choose(now, bits, tried, blocks)
        if choice is None and is_last_resort_allowed:
            choice = pool.last_resort(now, bits, tried)
        return choice

    def choose_in(
        self,
        model: str,
        regions: Sequence[str],
        tried: Sequence[Node] = NOBODY,
        body: Mapping[str, Any] | None = None,
    ) -> Choice[Node] | None:
        """The node for the next try: the first region in order that has an untried one decides, ejected ones last."""
        pools = [pool for region in regions if (pool := self._pools.get((model, region))) is not None]
        for pool in pools:
            blocks = prefix_blocks(body) if body is not None and pool.wants_prefix else ()
            choice = self.choose(pool, tried, blocks, is_last_resort_allowed=False)
            if choice is not None:
                return choice
        for pool in pools:
            choice = pool.last_resort(self._now(), getrandbits(RANDOM_BITS), tried)
            if choice is not None:
                return choice
        return None

    def is_any_on_the_way(self, model: str, regions: Sequence[str]) -> bool:
        """Will a node of the model be there soon in one of the regions?"""
        pools = self._pools
        return any((pool := pools.get((model, region))) is not None and pool.on_the_way for region in regions)

    def is_any_routable(self, model: str, regions: Sequence[str]) -> bool:
        """Is a node of the model routable in one of the regions?"""
        pools = self._pools
        return any((pool := pools.get((model, region))) is not None and pool.members for region in regions)

    def regions_of(self, model: str) -> list[str]:
        """Where the model is served now."""
        pools = self._pools.values()
        return sorted(
            pool.region for pool in pools if pool.model == model and pool.members and OWNED not in pool.region
        )

    async def next_change(self) -> None:
        """Wait until an entry has changed."""
        await self._changed.wait()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call this whenever an entry has changed, for the life of the table."""
        self._callbacks.append(callback)

    async def keep_probing(self) -> None:
        """Run for the life of the process: find out when an unreachable node can be reached again."""
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            for pool in self.pools:
                pool.refresh(self._now())
            for node in self.nodes:
                if not node.is_unreachable or not node.entry.is_routable:
                    continue
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(PROBE_TIMEOUT_S):
                        connection = await node.upstream.connect()
                    node.upstream.release(connection)
                    node.connect_failures = 0
                    self._rebuild()

    @property
    def nodes(self) -> list[Node]:
        """All nodes that are not gone."""
        return list(self._nodes.values())

    @property
    def pools(self) -> list[Pool]:
        """All pools that ever had a node."""
        return list(self._pools.values())

    def close(self) -> None:
        """Close all idle connections."""
        for node in self._nodes.values():
            node.upstream.close()
