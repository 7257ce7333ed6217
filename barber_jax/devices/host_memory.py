"""Host memory that a process may still take."""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux has the limits of a container (version 2)."""


def available_bytes() -> int | None:
    """Bytes of host memory that are available to this process, within its container's limit; None where unknown."""
    found = [value for value in (_system(), _container()) if value is not None]
    return min(found) if found else None


def _system() -> int | None:
    """What Linux says is available; elsewhere half of the memory that there is."""
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _container() -> int | None:
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        return max(0, int(limit) - int((CGROUP / "memory.current").read_text())) if limit != "max" else None
    except (OSError, ValueError):
        return None
