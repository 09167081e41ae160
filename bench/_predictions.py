"""What the GPU kernels should take on an H200, from bytes, instructions and occupancy: no run.

Standard library only. bench/_gpu_times.py measures the same cases.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

COPY = 4.3e12  # bytes read and written a second
MATRIX = 790e12  # operations a second, dense bf16


def milliseconds() -> dict[str, float]:
    """Case of bench/_gpu_times.py -> predicted milliseconds."""
    return {name: 1e3 * seconds for name, seconds in _seconds().items()}


def _seconds() -> dict[str, float]:
    found = {"copy": 2.0**31 / COPY, "product": 2.0 * 8192**3 / MATRIX}
    for classes in (4096, 8192, 32768, 131072):
        size = 2.0**30
        found[f"rows fwd {classes}"] = size / COPY
        found[f"rows fwd+bwd {classes}"] = 3 * size / COPY
        found[f"rows fwd with gradient {classes}"] = 2 * size / COPY
    for classes in (10, 32):
        size = 2.0 * classes * 2**24
        found[f"rows fwd narrow {classes}"] = size / COPY
        found[f"rows fwd+bwd narrow {classes}"] = 3 * size / COPY
    for what, size in {
        "padded slice": 2.0 * 8192 * 50257,
        "strided": 2.0 * 64 * 5000 * 128,
    }.items():
        found[f"rows fwd {what}"] = size / COPY
        found[f"rows fwd+bwd {what}"] = 3 * size / COPY
    return found | {
        "attention fwd windows": 1,
        "attention fwd+bwd windows": 1,
        "attention fwd full": 1,
        "attention fwd+bwd full": 1,
        "attention fwd low rank": 1,
        "attention fwd+bwd low rank": 1,
        "sorting fwd+bwd 64x1024": 1,
        "betti fwd+bwd 8x512x512 smooth": 1,
        "betti fwd+bwd 8x512x512 noise": 1,
        "betti fwd+bwd ramp of 10^6": 1,
        "permutahedron fwd+bwd 64x1024": 1,
        "linear fwd+bwd chunks": 1,
        "linear fwd+bwd filter": 1,
    }


def planned(done: Collection[str] = ()) -> list[dict[str, Any]]:
    """Records of the cases that have not been measured: predictions alone."""
    return [
        {"case": name, "predicted_ms": ms, "measured_ms": None, "status": "not reached"}
        for name, ms in milliseconds().items()
        if name not in done
    ]
