"""Whole lives of the fleet, each drawn from a seed. `./test simulation --seed N` shows one, step by step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.simulation.processes import Registry
from tests.simulation.scenario import live
from tests.simulation.world import Violation, World, registry, run_in_virtual_time

# The long run: as many as two cores live through in four minutes or so.
SEEDS = 2_000
PER_TEST = 50
# The default run's, which are others: what the long run has shown often need not be shown always.
SMOKE = range(1_000_000, 1_000_050)
# Each so-manieth seed runs in the sandbox of production.
SANDBOXED = 10


def live_through(seed: int) -> World:
    """One seed, to its end. Raises Violation, saying how to see it again."""
    known = _known(seed % SANDBOXED == 0)
    try:
        return run_in_virtual_time(partial(live, seed, known))
    except Violation as error:
        raise Violation(f"seed {seed}: {error}\n\nTo see it again: ./test simulation --seed {seed}") from None


_registries: dict[bool, Registry] = {}


def _known(is_sandboxed: bool) -> Registry:
    if is_sandboxed not in _registries:
        _registries[is_sandboxed] = registry(is_sandboxed=is_sandboxed)
    return _registries[is_sandboxed]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chunk" in metafunc.fixturenames:
        metafunc.parametrize("chunk", range(0, SEEDS, PER_TEST))


class TestLives:
    """F1, F3 to F7, T2, T3, T4, T6, T7 under the faults a to i and l, by tests/simulation/laws.py."""

    @pytest.mark.simulation
    def test_keep_every_law(self, chunk: int) -> None:
        for seed in range(chunk, chunk + PER_TEST):
            live_through(seed)

    def test_keep_every_law_in_a_sample(self) -> None:
        for seed in SMOKE:
            live_through(seed)

    @pytest.mark.simulation
    def test_of_one_seed(self, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
        seed: Any = request.config.getoption("--seed")
        world = live_through(seed)
        with capsys.disabled():
            print(f"\n{world.story(most=100_000)}\n\nseed {seed} keeps every law")

    def test_are_the_same_every_time(self) -> None:
        first, second = live_through(7), live_through(7)
        assert first.trace == second.trace
        assert len(first.trace) > 20
        assert live_through(8).trace != first.trace

    def test_have_every_trouble(self) -> None:
        """A simulator in which nothing goes wrong proves nothing."""
        told = "\n".join(line for seed in range(100, 115) for _, line in live_through(seed).trace)
        for words in (
            "is killed",
            "is stopped",
            "is to end",
            "Temporal is away",
            "postgres is away",
            "Redis has lost its memory",
            "is cut off from",
            "the reply was lost",
            "refused before it had an effect",
            "was slow",
            "heartbeat timeout",
            "is taken back",
            "gets the signal drain",
            "is to be cancelled",
            "is terminated",
            "fleet-sweep-",
            "machine appears",
            "ready g",
            "failed g",
            "lost g",
        ):
            assert words in told, words
