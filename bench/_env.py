"""Describes the machine and the software, so that two result files can be compared honestly."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# The instruction sets that matter to these kernels; the whole list is too long to read.
_CPU_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl")
_CPU_FLAGS += ("avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_ROOT = Path(__file__).resolve().parent.parent


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def git_revision() -> str:
    """Commit of the tree, with "-dirty" where tracked files differ; or PYLOSS_REVISION."""
    revision = _output("git", "rev-parse", "--short=12", "HEAD")
    if not revision:
        return os.environ.get("PYLOSS_REVISION", "unknown")
    return revision + ("-dirty" if _output("git", "status", "--porcelain", "-uno") else "")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return {
        "model": model,
        "flags": [f for f in _CPU_FLAGS if f in flags],
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def huge_page_mode() -> str:
    """always, madvise or never; empty where the kernel does not say."""
    text = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return text.partition("[")[2].partition("]")[0]


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
    smi = _output("nvidia-smi", query, "--format=csv,noheader").splitlines()
    fields = [f.strip() for f in smi[0].split(",")] if smi else []
    driver, sm_clock, memory_clock = (*fields, "", "", "")[:3]
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": driver,
        "clocks_at_start": {"sm": sm_clock, "memory": memory_clock},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _pyloss() -> dict[str, Any]:
    try:
        import pyloss
        from pyloss import _C
    except ImportError as error:
        return {"version": None, "reason": str(error)}
    return {
        "version": pyloss.__version__,
        "built_with_cuda": _C.built_with_cuda,
        "cuda_archs": _C.cuda_archs,
        "simd_level": _C.simd_level(),
    }


def describe() -> dict[str, Any]:
    """Everything about the machine that a reader of the numbers has to know."""
    peers = ("liger-kernel", "cut-cross-entropy", "quack-kernels")
    peers += ("gudhi", "cripser", "topolosses", "monai", "diffsort", "difftopk", "torchsort")
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "revision": git_revision(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "pyloss": _pyloss(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "peers": {name: version for name in peers if (version := _version(name))},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "huge_pages": huge_page_mode(),
        "load_average_at_start": list(load),
    }


def same_hardware(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether times from two environments may be compared."""

    def key(environment: dict[str, Any]) -> tuple:
        cpu, gpu = environment["cpu"], environment["gpu"] or {}
        return (
            cpu["model"],
            cpu["cores_usable"],
            cpu["flags"],
            environment["huge_pages"],
            gpu.get("name"),
        )

    return key(a) == key(b)
