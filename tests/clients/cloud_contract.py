"""What every cloud must do, whoever it is: the cases of `Cloud` in activities/cloud.py (F1, F3, T4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import pytest

from activities.cloud import Cloud, is_gone
from crosslogic.contracts.node import Machine, NodeSpec
from crosslogic.domain.errors import Rejected, Unavailable
from crosslogic.domain.health import MachineStatus

PREFIX = "cic-contract-"

T = TypeVar("T")


class Landlord(Protocol):
    """A cloud under test, and the hands that move it from outside."""

    patience_s: float

    @property
    def cloud(self) -> Cloud:
        """The client."""
        ...

    def spec(self, name: str) -> NodeSpec:
        """An order for a machine of that name."""
        ...

    def count(self, cluster: str) -> int:
        """Machines of that name which cost money, asked behind the cloud's back."""
        ...

    def lose_next_reply(self) -> None:
        """The next order is carried out, and nobody is told."""
        ...

    def fill(self) -> None:
        """There is no capacity from now on."""
        ...

    def restart(self) -> None:
        """The cloud's server dies in the midst of what it does, and is started again."""
        ...

    def take(self, cluster: str) -> None:
        """The machine's power is cut."""
        ...


async def bring_up(landlord: Landlord, spec: NodeSpec) -> Machine:
    """Order a machine and wait for it, as provisioning does. Raises Rejected when it cannot be had."""
    await order(landlord, spec)
    deadline = time.monotonic() + landlord.patience_s
    while time.monotonic() < deadline:
        machine = await look(landlord, spec.cluster)
        if machine is not None:
            if machine.failure or machine.status == MachineStatus.GONE:
                raise Rejected(machine.reason, code=machine.failure or "machine_gone")
            if machine.is_order_lost:
                await order(landlord, spec)
            elif machine.status == MachineStatus.RUNNING and (machine.endpoint or not machine.has_endpoints):
                return machine
        await asyncio.sleep(0.2)
    raise AssertionError(f"{spec.cluster} does not run within {landlord.patience_s} s")


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What a cloud answers, as soon as it does: everybody who asks one tries again."""
    while True:
        try:
            return await ask()
        except Unavailable:
            await asyncio.sleep(0.2)


async def order(landlord: Landlord, spec: NodeSpec) -> None:
    """Order until the order is taken."""
    await patiently(lambda: landlord.cloud.ensure(spec))


async def look(landlord: Landlord, cluster: str) -> Machine | None:
    """The machine, as soon as the cloud answers."""
    return await patiently(lambda: landlord.cloud.find(cluster))


async def end(landlord: Landlord, cluster: str) -> None:
    """End a machine and wait until the cloud says that it is gone."""
    deadline = time.monotonic() + landlord.patience_s
    while time.monotonic() < deadline:
        try:
            await landlord.cloud.end(cluster)
            if is_gone(await landlord.cloud.find(cluster)):
                return
        except Unavailable:
            pass
        await asyncio.sleep(0.2)
    raise AssertionError(f"{cluster} does not end within {landlord.patience_s} s")


class CloudContract:
    """The cases. A subclass has a fixture `landlord`."""

    async def test_makes_one_machine_however_often_it_is_ordered(self, landlord: Landlord) -> None:
        spec = landlord.spec("one")
        landlord.lose_next_reply()
        with pytest.raises(Unavailable):
            await landlord.cloud.ensure(spec)
        machine = await bring_up(landlord, spec)
        await order(landlord, spec)
        assert machine.status == MachineStatus.RUNNING
        assert await look(landlord, spec.cluster) == machine
        assert landlord.count(spec.cluster) == 1
        listed = await patiently(lambda: landlord.cloud.list_all(PREFIX))
        assert [found.cluster for found in listed if not is_gone(found)] == [spec.cluster]
        assert await patiently(lambda: landlord.cloud.list_all("cic-nobodys-")) == []
        await end(landlord, spec.cluster)
        assert landlord.count(spec.cluster) == 0
        await patiently(lambda: landlord.cloud.end(spec.cluster))
        assert is_gone(await look(landlord, spec.cluster))

    async def test_ends_what_was_never_there(self, landlord: Landlord) -> None:
        await patiently(lambda: landlord.cloud.end(f"{PREFIX}never"))
        assert await look(landlord, f"{PREFIX}never") is None

    async def test_ends_a_machine_that_is_being_made(self, landlord: Landlord) -> None:
        spec = landlord.spec("half")
        await order(landlord, spec)
        deadline = time.monotonic() + landlord.patience_s
        while not landlord.count(spec.cluster):
            assert time.monotonic() < deadline, "no machine was made"
            await asyncio.sleep(0.1)
        machine = await look(landlord, spec.cluster)
        assert machine is not None
        assert not is_gone(machine)
        await end(landlord, spec.cluster)
        assert landlord.count(spec.cluster) == 0

    async def test_says_that_there_is_no_capacity(self, landlord: Landlord) -> None:
        landlord.fill()
        spec = landlord.spec("full")
        with pytest.raises(Rejected) as caught:
            await bring_up(landlord, spec)
        assert caught.value.code == "no_capacity"
        assert landlord.count(spec.cluster) == 0
        await end(landlord, spec.cluster)

    async def test_carries_out_an_order_that_a_restart_interrupted_and_sees_the_machine_taken(
        self, landlord: Landlord
    ) -> None:
        spec = landlord.spec("again")
        await order(landlord, spec)
        landlord.restart()
        await bring_up(landlord, spec)
        assert landlord.count(spec.cluster) == 1
        landlord.take(spec.cluster)
        deadline = time.monotonic() + landlord.patience_s
        while not is_gone(await look(landlord, spec.cluster)):
            assert time.monotonic() < deadline, "the machine's end is not seen"
            await asyncio.sleep(0.2)
        await end(landlord, spec.cluster)
        assert landlord.count(spec.cluster) == 0
