"""Which node answers: the strategies' choice among a pool's eligible nodes, and what a node's past says of its future.

Every function here is pure: `now` is an instant of one clock, in seconds; `turn` is any number that grows by one;
`bits` are at least 32 random bits.

Two nodes are compared instead of all, the one whose turn it is and one that is drawn. So a choice costs the same among
a thousand as among three, many processes that choose at once do not all run to the same node, and equal ones take turns
(Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

ROUND_ROBIN: Final = "round-robin"
LEAST_LOAD: Final = "least-load"
LATENCY_WEIGHTED: Final = "latency-weighted"
COST_WEIGHTED: Final = "cost-weighted"
PREFIX_AFFINITY: Final = "prefix-affinity"

# Reasons for a choice besides the strategies' own names.
ONLY: Final = "only"  # No other was eligible.
AFFINITY: Final = "affinity"  # It has served the longest known beginning of this conversation.
TRIAL: Final = "trial"  # It was ejected, and this request finds out whether it is well again.
LAST_RESORT: Final = "last-resort"  # All are ejected; a wrong suspicion must not take a whole pool away.

# A node whose capacity nobody has measured yet counts as a slow one.
DEFAULT_CAPACITY_TOKENS_PER_S = 20

# What the next request adds to a node's load, so that of two idle nodes the larger wins and a weight counts there, too.
TYPICAL_TOKENS = 500

# Seconds of work in flight beyond which the next dearer node is looked at.
BUSY_S = 15.0
# So many prices are looked at; beyond them the least loaded one seen is taken.
MOST_PRICES = 8

# Affinity holds up to a load of so many times the pool's mean, and always for so many tokens: two requests or so.
AFFINITY_EXCESS = 1.25
AFFINITY_SLACK_TOKENS = 2048

# A latency that is so many seconds old counts half.
LATENCY_FADE_S = 10.0
# What a node that was never heard of is taken to need while its first request is under way.
UNKNOWN_LATENCY_S = 1.0
# Share of the newest sample in the smoothed time to first token.
TTFT_SHARE = 0.3
# Slow: three times the pool's median (the product's promise), and a second more, which clients can feel.
SLOW_TIMES = 3.0
SLOW_BY_S = 1.0
# How far the time to first token may make a node look smaller or larger than its measured capacity.
LEAST_SLOWNESS, MOST_SLOWNESS = 0.5, 4.0

# Passive ejection: a refused or broken connection ejects at once, other failures after two in a row. The first
# ejection is short, because active health has the final word within seconds; each further one doubles.
FIRST_EJECTION_S = 1.0
LONGEST_EJECTION_S = 30.0
FAILURES_BEFORE_EJECTION = 2
# A slow node is not broken: its queue is given time to run down.
SLOW_EJECTION_S = 10.0

# A node that is new, or back from an ejection, begins with this share of its weight.
LEAST_RAMP = 0.1
# "Busy" takes three tenths off a node's weight; then a twentieth of the whole returns every second.
BUSY_FACTOR = 0.7
LEAST_FACTOR = 0.1
RECOVERY_PER_S = 0.05


@dataclass(frozen=True, slots=True)
class Rules:
    """What an operator may set. Times in seconds.

    `full_load_s`: so much work in flight is a node's fill. `slow_start_s`: how long a new node's weight grows.
    `ejected_share`: at most this share of a pool (but at least one node) is ejected at once.
    """

    full_load_s: float = 30.0
    slow_start_s: float = 30.0
    ejected_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Split:
    """Which of a deployment's revisions get its requests.

    `fresh` (None: no roll-out is on) gets `fresh_bp` of them, in basis points, `steady` the rest. Nodes of any other
    revision get what neither can take.
    """

    steady: int = 1
    fresh: int | None = None
    fresh_bp: int = 0

    def group_of(self, revision: int) -> int:
        """STEADY, FRESH or SPARE."""
        if revision == self.fresh:
            return FRESH
        return STEADY if revision == self.steady else SPARE


STEADY: Final = 0
FRESH: Final = 1
SPARE: Final = 2
WHOLE_BP: Final = 10_000
NO_SPLIT: Final = Split()


def is_drawn(bits: int, share_bp: int) -> bool:
    """Does this request belong to the share? The highest 20 of 32 random bits decide; strategies use the others."""
    return (bits >> 12) * WHOLE_BP >> 20 < share_bp


class Candidate(Protocol):
    """What a choice needs to know of a node.

    `seconds_per_token` is 1 over its measured tokens per second, times its slowness. Until `settles_at` its weight is
    below 1. `ttft_s` is its smoothed time to first token and `peak_ttft_s` the one that forgets peaks slowly, last
    measured at `ttft_at`; 0 where unknown.
    """

    shown_id: bytes
    tokens_in_flight: int
    requests_in_flight: int
    seconds_per_token: float
    settles_at: float
    ttft_s: float
    peak_ttft_s: float
    ttft_at: float

    def weight(self, now: float) -> float:
        """The share of its capacity that it should be given, above 0 and at most 1."""
        ...


C = TypeVar("C", bound=Candidate)

# As of the choice: the node, its score in seconds (the lowest wins), tokens in flight, time to first token, weight.
Weighed = tuple[C, float, int, float, float]


class Choice(Generic[C]):
    """A node and why it was chosen. Words are made of it only when somebody asks."""

    __slots__ = ("compared", "ejected", "eligible", "node", "reason", "strategy")

    def __init__(self, node: C, strategy: str, reason: str, compared: tuple[Weighed[C], ...]) -> None:
        self.node = node
        self.strategy = strategy
        self.reason = reason
        self.compared = compared
        self.eligible = 0
        self.ejected = 0

    def explain(self) -> dict[str, Any]:
        """Everything as JSON; nodes by their ids, no addresses."""
        return explained(self.compact())

    def compact(self) -> tuple[Any, ...]:
        """The same in order, without names: cheap enough to be kept for every request (see `explained`)."""
        compared = [(weighed[0].shown_id.decode(), *weighed[1:]) for weighed in self.compared]
        return (self.node.shown_id.decode(), self.strategy, self.reason, self.eligible, self.ejected, compared)

    def header(self) -> bytes:
        """One line for `x-crosslogic-decision`: who was compared, and the seconds that decided."""
        compared = b", ".join(b"%b=%.3f" % (weighed[0].shown_id, weighed[1]) for weighed in self.compared)
        words = (self.strategy.encode(), self.reason.encode(), self.eligible, self.ejected, compared)
        return b"strategy=%b; reason=%b; eligible=%d; ejected=%d; compared=%b" % words


def explained(choice: Sequence[Any]) -> dict[str, Any]:
    """A `compact` choice with names, also after JSON."""
    node, strategy, reason, eligible, ejected, compared = choice
    return {
        "node": node,
        "strategy": strategy,
        "reason": reason,
        "eligible": eligible,
        "ejected": ejected,
        "compared": [
            {
                "node": other,
                "score_s": round(score_s, 6),
                "tokens_in_flight": tokens,
                "ttft_ms": round(ttft_s * 1000),
                "weight": round(weight, 3),
            }
            for other, score_s, tokens, ttft_s, weight in compared
        ],
    }


def explained_decision(decision: Sequence[Any]) -> dict[str, Any]:
    """What is kept of each request, with names: its tries in order, and how the limits stood when it was admitted."""
    tries, standing, would_refuse, is_reserved = decision
    limits = {
        noun: None if allowance is None else dict(zip(("limit", "remaining", "reset_ms"), allowance, strict=True))
        for noun, allowance in zip(("requests", "tokens"), standing, strict=True)
    }
    return {
        "tries": [{**explained(choice), "failure": failure or None} for *choice, failure in tries],
        "limits": limits,
        "would_refuse": [{"layer": layer, "limit": limit} for layer, limit in would_refuse],
        "is_reserved": is_reserved,
    }


def load_s(node: Candidate, now: float) -> float:
    """Seconds of work that a typical request would find there, its own included."""
    seconds = (node.tokens_in_flight + TYPICAL_TOKENS) * node.seconds_per_token
    return seconds if now >= node.settles_at else seconds / node.weight(now)


def latency_s(node: Candidate, now: float) -> float:
    """What the first token of one more request would take: peak latency, times those that wait already and itself.

    A node that was never heard of comes first, until a request is on its way there.
    """
    if node.peak_ttft_s:
        seconds = node.peak_ttft_s * LATENCY_FADE_S / (LATENCY_FADE_S + max(0.0, now - node.ttft_at))
    else:
        seconds = UNKNOWN_LATENCY_S if node.requests_in_flight else 0.0
    seconds *= node.requests_in_flight + 1
    return seconds if now >= node.settles_at else seconds / node.weight(now)


def round_robin(nodes: Sequence[C], now: float, turn: int, bits: int, tried: Sequence[C]) -> Choice[C] | None:
    """The node whose turn it is; one that may not take its full share yet passes some turns on."""
    if tried:
        nodes = [node for node in nodes if node not in tried]
    count = len(nodes)
    if not count:
        return None
    node = nodes[turn % count]
    if now < node.settles_at and (bits & 1023) >= 1024 * node.weight(now):
        node = nodes[(turn + 1) % count]
    return Choice(node, ROUND_ROBIN, ROUND_ROBIN if count > 1 else ONLY, ())


def least_load(
    nodes: Sequence[C], now: float, turn: int, bits: int, tried: Sequence[C], strategy: str = LEAST_LOAD
) -> Choice[C] | None:
    """The one of two that has less work to do."""
    return _better_of_two(nodes, now, turn, bits, tried, load_s, strategy, LEAST_LOAD)


def latency_weighted(nodes: Sequence[C], now: float, turn: int, bits: int, tried: Sequence[C]) -> Choice[C] | None:
    """The one of two that answers sooner."""
    return _better_of_two(nodes, now, turn, bits, tried, latency_s, LATENCY_WEIGHTED, LATENCY_WEIGHTED)


def cost_weighted(
    prices: Sequence[Sequence[C]], now: float, turn: int, bits: int, tried: Sequence[C]
) -> Choice[C] | None:
    """The less loaded of two of the cheapest that are not busy. `prices` are the nodes by price, cheapest first.

    Two of each price stand for the rest. Where all are busy, the least loaded one seen.
    """
    best: Choice[C] | None = None
    seen: tuple[Weighed[C], ...] = ()
    least = math.inf
    for nodes in prices[:MOST_PRICES]:
        choice = _better_of_two(nodes, now, turn, bits, tried, load_s, COST_WEIGHTED, COST_WEIGHTED)
        if choice is None:
            continue
        seconds = min(weighed[1] for weighed in choice.compared)
        seen += choice.compared
        if seconds < least:
            best, least = choice, seconds
        if seconds < BUSY_S:
            break
    if best is not None:
        best.compared = seen
        best.reason = ONLY if len(seen) == 1 == len(prices) else COST_WEIGHTED
    return best


def may_keep_affinity(node: Candidate, mean_s: float, now: float) -> bool:
    """Is it no more loaded than the pool's mean allows? `mean_s` is the pool's tokens in flight over its capacity."""
    seconds = node.tokens_in_flight * node.seconds_per_token
    if now < node.settles_at:
        seconds /= node.weight(now)
    return seconds <= AFFINITY_EXCESS * mean_s + AFFINITY_SLACK_TOKENS * node.seconds_per_token


def weigh(node: C, score_s: float, now: float) -> Weighed[C]:
    """A node's figures as of now, for the explanation."""
    weight = 1.0 if now >= node.settles_at else node.weight(now)
    return (node, score_s, node.tokens_in_flight, node.ttft_s, weight)


def _better_of_two(
    nodes: Sequence[C],
    now: float,
    turn: int,
    bits: int,
    tried: Sequence[C],
    measure: Callable[[C, float], float],
    strategy: str,
    reason: str,
) -> Choice[C] | None:
    count = len(nodes)
    if tried and count < len(tried) + 2:
        nodes = [node for node in nodes if node not in tried]
        count, tried = len(nodes), ()
    if count < 2:
        if not count:
            return None
        only = nodes[0]
        return Choice(only, strategy, ONLY, (weigh(only, measure(only, now), now),))
    first = turn % count
    second = (first + 1 + bits % (count - 1)) % count
    if tried:
        while nodes[first] in tried:
            first = (first + 1) % count
        while second == first or nodes[second] in tried:
            second = (second + 1) % count
    a, b = nodes[first], nodes[second]
    a_score, b_score = measure(a, now), measure(b, now)
    compared = (weigh(a, a_score, now), weigh(b, b_score, now))
    return Choice(b if b_score < a_score else a, strategy, reason, compared)


def ejection_s(failures_in_a_row: int, *, is_connection_failure: bool) -> float:
    """How long to leave a node out after so many failures in a row, in seconds; 0: not at all."""
    excess = failures_in_a_row - (1 if is_connection_failure else FAILURES_BEFORE_EJECTION)
    if excess < 0:
        return 0.0
    # Beyond 2¹⁶ the longest is reached long since, and a float could not hold the power.
    return min(LONGEST_EJECTION_S, FIRST_EJECTION_S * 2 ** min(excess, 16))


def most_ejected(count: int, share: float) -> int:
    """How many of `count` nodes may be ejected at once."""
    return max(1, int(count * share))


def ramp(now: float, until: float, length_s: float) -> float:
    """The share of its weight that a node has on a ramp that ends at `until`, from LEAST_RAMP to 1."""
    if now >= until or length_s <= 0:
        return 1.0
    return max(LEAST_RAMP, 1.0 - (1.0 - LEAST_RAMP) * (until - now) / length_s)


def recovered(factor: float, seconds: float) -> float:
    """An adaptive factor after so many seconds without another "busy"."""
    return min(1.0, factor + RECOVERY_PER_S * seconds)


def smoothed(previous_s: float, sample_s: float) -> float:
    """The time to first token after one more sample; the first one counts whole."""
    return previous_s + TTFT_SHARE * (sample_s - previous_s) if previous_s else sample_s


def peak(previous_s: float, sample_s: float, elapsed_s: float) -> float:
    """The latency after one more sample: it rises at once and falls slowly (peak EWMA, as Finagle has it)."""
    if sample_s >= previous_s:
        return sample_s
    kept = math.exp(-elapsed_s / LATENCY_FADE_S)
    return previous_s * kept + sample_s * (1 - kept)


def slow_above_s(median_s: float) -> float:
    """The time to first token above which a node is slow in a pool of this median."""
    return max(SLOW_TIMES * median_s, median_s + SLOW_BY_S)


def slowness(ttft_s: float, median_s: float) -> float:
    """By how much a node's time to first token stretches its load, against the pool's median; 1 where unknown."""
    if not ttft_s or not median_s:
        return 1.0
    return min(MOST_SLOWNESS, max(LEAST_SLOWNESS, ttft_s / median_s))
