"""Peak resident memory of this process.

Linux keeps the high-water mark in VmHWM of /proc/self/status and sets it back to the present size
when 5 is written to /proc/self/clear_refs. Elsewhere `resource.getrusage` gives the peak since
the process began, which cannot be set back; the demo runs each training in a process of its own,
so this is still the peak of that training, setup included.
"""

from __future__ import annotations

import sys
from pathlib import Path

_MIB = float(1 << 20)


class PeakMemory:
    """`peak()` is the largest size since the last `reset()`, in MiB, or None where unknown."""

    def __init__(self) -> None:
        self.can_reset = _reset_mark() and _high_water_mark() is not None

    @property
    def method(self) -> str:
        """How it is measured, in words for the report."""
        if self.can_reset:
            return "VmHWM of /proc/self/status, reset before each step"
        if self.peak() is not None:
            return "getrusage of the run's own process (this system cannot reset it)"
        return "not available on this system"

    def reset(self) -> None:
        if self.can_reset:
            _reset_mark()

    def peak(self) -> float | None:
        return _high_water_mark() if self.can_reset else _getrusage()


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> float | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / _MIB
    except OSError:
        pass
    return None


def _getrusage() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak * 1024 / _MIB
