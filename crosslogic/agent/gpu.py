"""GPUs through NVML, where there are some and pynvml can be imported."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuReading:
    """The hottest GPU's temperature in °C; memory of all GPUs together in megabytes."""

    temperature_c: float | None = None
    memory_used_mb: int | None = None
    memory_total_mb: int | None = None


class Gpus:
    """Reads this machine's GPUs. A machine without any, or without NVML, reads as nothing known."""

    def __init__(self, nvml: Any | None = None) -> None:
        self._nvml: Any = nvml
        self._is_tried = nvml is not None

    def read(self) -> GpuReading:
        """What the GPUs say now. Never raises: a GPU that fell off the bus must not take the heartbeat with it."""
        try:
            if not self._is_tried:
                self._is_tried = True
                self._nvml = importlib.import_module("pynvml")
            if self._nvml is None:
                return GpuReading()
            self._nvml.nvmlInit()
            handles = [self._nvml.nvmlDeviceGetHandleByIndex(n) for n in range(self._nvml.nvmlDeviceGetCount())]
            if not handles:
                return GpuReading()
            memory = [self._nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
            temperatures = [self._nvml.nvmlDeviceGetTemperature(handle, 0) for handle in handles]
            return GpuReading(
                float(max(temperatures)),
                int(sum(one.used for one in memory)) // 1_000_000,
                int(sum(one.total for one in memory)) // 1_000_000,
            )
        except Exception:
            return GpuReading()
