"""The fair queue: who is next, who makes room, and how much is ahead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.domain.fairness import DRAIN_WINDOW_S, MOST_REMEMBERED, Drain, FairQueue

COSTS = st.lists(st.integers(1, 5_000), min_size=1, max_size=40)
BACKLOGS = st.lists(COSTS, min_size=2, max_size=5)


def served(queue: FairQueue[str, int], count: int) -> list[tuple[str, int]]:
    return [(ticket.flow, ticket.cost) for ticket in (queue.pop() for _ in range(count))]


class TestFairQueue:
    @given(BACKLOGS)
    def test_of_two_that_wait_neither_is_ahead_by_more_than_one_request(self, backlogs: list[list[int]]) -> None:
        queue: FairQueue[int, None] = FairQueue()
        for flow, costs in enumerate(backlogs):
            for cost in costs:
                queue.push(flow, cost, None)
        largest = max(max(costs) for costs in backlogs)
        tokens = [0] * len(backlogs)
        left = [len(costs) for costs in backlogs]
        while all(left):
            ticket = queue.pop()
            tokens[ticket.flow] += ticket.cost
            left[ticket.flow] -= 1
            assert max(tokens) - min(tokens) <= largest

    @given(COSTS, st.integers(0, 39), st.integers(1, 5_000))
    def test_a_small_request_waits_for_one_of_a_giants_at_most(self, giant: list[int], after: int, small: int) -> None:
        queue: FairQueue[str, None] = FairQueue()
        for cost in giant:
            queue.push("giant", cost, None)
        for _ in range(min(after, len(giant) - 1)):
            queue.pop()
        queue.push("small", small, None)
        assert "small" in {queue.pop().flow, queue.pop().flow}

    @given(BACKLOGS)
    def test_all_are_served_once_and_each_flow_in_its_order(self, backlogs: list[list[int]]) -> None:
        queue: FairQueue[int, int] = FairQueue()
        for flow, costs in enumerate(backlogs):
            for number, cost in enumerate(costs):
                queue.push(flow, cost, number)
        seen: dict[int, list[int]] = {flow: [] for flow in range(len(backlogs))}
        for _ in range(sum(len(costs) for costs in backlogs)):
            ticket = queue.pop()
            seen[ticket.flow].append(ticket.item)
        assert seen == {flow: list(range(len(costs))) for flow, costs in enumerate(backlogs)}
        assert len(queue) == 0
        assert queue.first() is None

    @given(BACKLOGS, st.data())
    def test_who_leaves_unserved_costs_its_flow_nothing(self, backlogs: list[list[int]], data: st.DataObject) -> None:
        both: list[FairQueue[int, int]] = [FairQueue(), FairQueue()]
        for flow, costs in enumerate(backlogs):
            for number, cost in enumerate(costs):
                ticket = both[0].push(flow, cost, number)
                # In one queue some come and leave again; in the other they never came.
                if number and data.draw(st.booleans()):
                    both[0].remove(ticket)
                else:
                    both[1].push(flow, cost, number)
        assert len(both[0]) == len(both[1])
        for _ in range(len(both[1])):
            one, other = both[0].pop(), both[1].pop()
            assert (one.flow, one.item) == (other.flow, other.item)

    def test_the_first_of_a_flow_can_leave(self) -> None:
        queue: FairQueue[str, None] = FairQueue()
        first, second, other = queue.push("a", 10, None), queue.push("a", 10, None), queue.push("b", 10, None)
        assert queue.remove(first)
        assert not queue.remove(first)
        assert [queue.pop(), queue.pop()] == [second, other]
        assert not queue.remove(other)

    def test_a_flow_whose_items_all_left_can_come_again(self) -> None:
        queue: FairQueue[str, int] = FairQueue()
        queue.push("b", 10, 0)
        queue.remove(queue.push("a", 10, 0))
        queue.push("a", 10, 0)
        assert served(queue, 2) == [("b", 10), ("a", 10)]

    def test_who_was_served_goes_on_behind_what_it_got(self) -> None:
        queue: FairQueue[str, int] = FairQueue()
        queue.push("greedy", 1_000, 0)
        queue.push("modest", 10, 0)
        queue.push("modest", 10, 0)
        assert served(queue, 2) == [("greedy", 1_000), ("modest", 10)]
        queue.push("greedy", 10, 0)
        queue.push("modest", 10, 0)
        assert served(queue, 3) == [("modest", 10), ("modest", 10), ("greedy", 10)]

    def test_when_nobody_waits_nobody_is_owed(self) -> None:
        queue: FairQueue[str, int] = FairQueue()
        queue.push("greedy", 1_000, 0)
        queue.pop()
        queue.push("greedy", 10, 0)
        queue.push("modest", 10, 0)
        assert served(queue, 2) == [("greedy", 10), ("modest", 10)]

    def test_what_it_remembers_is_bounded(self) -> None:
        queue: FairQueue[int, int] = FairQueue()
        for _ in range(3):
            queue.push(-1, 1, 0)
        for flow in range(3 * MOST_REMEMBERED):
            queue.push(flow, 2, 0)
            queue.push(-1, 1, 0)
            queue.pop()
            queue.pop()
        assert len(queue._finished) <= MOST_REMEMBERED + 1  # pyright: ignore[reportPrivateUsage]

    def test_nobody_waiting_cannot_be_served(self) -> None:
        queue: FairQueue[str, int] = FairQueue()
        with pytest.raises(IndexError, match="nobody waits"):
            queue.pop()

    def test_the_end_of_the_longest_backlog_makes_room(self) -> None:
        queue: FairQueue[str, str] = FairQueue()
        for number in range(3):
            queue.push("greedy", 100, f"greedy {number}")
        queue.push("modest", 10, "modest")
        last = queue.last("new")
        assert last is not None
        assert last.item == "greedy 2"
        assert queue.last("greedy") is None

    @given(BACKLOGS, st.integers(0, 4), st.integers(1, 5_000))
    def test_no_less_is_served_before_it_than_was_said(self, backlogs: list[list[int]], flow: int, cost: int) -> None:
        queue: FairQueue[int, str] = FairQueue()
        for number, costs in enumerate(backlogs):
            for one in costs:
                queue.push(number, one, "")
        said = queue.tokens_ahead(flow, 10**9)
        queue.push(flow, cost, "mine")
        ahead = 0
        while (ticket := queue.pop()).item != "mine":
            ahead += ticket.cost
        largest = max(max(costs) for costs in backlogs)
        assert said <= ahead <= said + largest * len(backlogs)

    def test_it_counts_no_further_than_is_enough(self) -> None:
        queue: FairQueue[int, str] = FairQueue()
        for flow in range(10):
            queue.push(flow, 100, "")
            queue.push(flow, 100, "")
        assert queue.tokens_ahead(0, 10**9) == 200 + 9 * 200
        assert queue.tokens_ahead(0, 250) == 400


class TestDrain:
    def test_before_anything_was_seen_it_is_the_nominal_rate(self) -> None:
        assert Drain().rate(100, 5.0) == 100

    def test_what_is_seen_outweighs_it(self) -> None:
        drain = Drain()
        drain.begin(0.0)
        for second in range(1, 10):
            drain.note(500, float(second))
        assert drain.rate(100, 9.0) == pytest.approx((9 * 500 + 100) / 10)

    def test_nothing_leaving_makes_it_fall(self) -> None:
        drain = Drain()
        drain.begin(0.0)
        assert drain.rate(100, 9.0) == 10

    def test_time_in_which_nobody_waits_does_not_count(self) -> None:
        drain = Drain()
        drain.begin(0.0)
        drain.note(1_000, 2.0)
        drain.end(2.0)
        drain.note(77_777, 50.0)
        before = drain.rate(100, 1_000.0)
        drain.begin(1_000.0)
        assert drain.rate(100, 1_000.0) == before == pytest.approx(1_100 / 3)

    def test_it_forgets(self) -> None:
        drain = Drain()
        drain.begin(0.0)
        for second in range(1, 100):
            drain.note(10 if second < 50 else 1_000, float(second))
        assert 950 < drain.rate(0, 99.0) * (DRAIN_WINDOW_S + 1) / DRAIN_WINDOW_S < 1_100
