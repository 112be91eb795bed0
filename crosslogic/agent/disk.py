"""What an agent needs of its machine: free space, and room made when old files take too much; kills for memory."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence

# Files that were written since may be in use.
YOUNG_S = 3_600.0
MOST_FILES = 1_000_000

_MEMORY_EVENTS = "/sys/fs/cgroup/memory.events"


def free_mb(path: str) -> int | None:
    """Free megabytes where this path is, None when that cannot be found out."""
    try:
        return shutil.disk_usage(path).free // 1_000_000
    except OSError:
        return None


class Log:
    """A file that is appended to. Beyond `limit_bytes` it becomes `path.1`; of such files `kept` stay."""

    def __init__(self, path: str, limit_bytes: int, kept: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._kept = kept
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)

    def write(self, data: bytes) -> None:
        """Append, at once. A disk that is full must not end the engine: what it has no room for is left out."""
        with contextlib.suppress(OSError):
            self._file.write(data)
            self._file.flush()
            if self._file.tell() > self._limit_bytes:
                self._file.close()
                for number in range(self._kept - 1, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(f"{self._path}.{number}", f"{self._path}.{number + 1}")
                os.replace(self._path, f"{self._path}.1")
                self._file = open(self._path, "ab")  # noqa: SIM115

    def close(self) -> None:
        """Write no more."""
        with contextlib.suppress(OSError):
            self._file.close()


def trim(folders: Sequence[str], limit_mb: int, now: float) -> int:
    """Remove the files written longest ago until the folders hold no more than the limit; bytes that were removed.

    Files younger than an hour stay, and links are never followed.
    """
    found: list[tuple[float, int, str]] = []
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(place, name)
                with contextlib.suppress(OSError):
                    status = os.lstat(path)
                    found.append((status.st_mtime, status.st_size, path))
                if len(found) >= MOST_FILES:
                    break
    excess = sum(size for _, size, _ in found) - limit_mb * 1_000_000
    removed = 0
    for written_at, size, path in sorted(found):
        if excess - removed <= 0 or now - written_at < YOUNG_S:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
            removed += size
    return removed


def kernel_kills() -> int:
    """How often the kernel killed a process of this control group for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError), open(_MEMORY_EVENTS) as file:
        for line in file:
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
