"""Virtual time: an event loop whose clock jumps to the next timer, and the clocks of the code that runs on it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as real_datetime
import selectors
import sys
import time as real_time
from collections.abc import Generator, Mapping
from typing import Any

# When every simulation begins: any instant will do, as long as it is always the same.
EPOCH = real_datetime.datetime(2026, 1, 1, tzinfo=real_datetime.UTC)

# Modules that read a clock. What they import as `time` or `datetime` becomes the loop's.
READERS = ("activities.", "crosslogic.clients.entities", "crosslogic.new_ids", "worker")


class _Selector(selectors.BaseSelector):
    """There are no sockets. Instead of waiting it says that the time has passed."""

    now = 0.0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits for something that never comes"
        self.now += timeout
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """Virtual time, in seconds from 0."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """The virtual now."""
        return self._clock.now


def now() -> real_datetime.datetime:
    """The instant that the running loop has reached."""
    return EPOCH + real_datetime.timedelta(seconds=asyncio.get_running_loop().time())


class _Time:
    """Stands for the module `time`."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()

    perf_counter = monotonic

    @staticmethod
    def time() -> float:
        return now().timestamp()

    @staticmethod
    def time_ns() -> int:
        return int(now().timestamp() * 1e9)


class _IsDatetime(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, real_datetime.datetime)


class _Datetime(real_datetime.datetime, metaclass=_IsDatetime):
    """Stands for the class `datetime.datetime`."""

    @classmethod
    def now(cls, tz: real_datetime.tzinfo | None = None) -> Any:
        return now().astimezone(tz)


@contextlib.contextmanager
def virtual_clocks() -> Generator[None]:
    """Inside, the modules of READERS read the running loop's clock."""
    replaced: list[tuple[Any, str, Any]] = []
    stand_ins: dict[int, Any] = {id(real_time): _Time, id(real_datetime.datetime): _Datetime}
    for name, module in list(sys.modules.items()):
        if not f"{name}.".startswith(READERS) and name not in READERS:
            continue
        for attribute in ("time", "datetime"):
            stand_in = stand_ins.get(id(vars(module).get(attribute)))
            if stand_in is not None:
                replaced.append((module, attribute, vars(module)[attribute]))
                setattr(module, attribute, stand_in)
    try:
        yield
    finally:
        for module, attribute, value in replaced:
            setattr(module, attribute, value)
