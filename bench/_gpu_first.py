"""The first look at a device: what it is, and the first launch of every kernel.

    python -m bench._gpu_first --json FILE [--device cpu]

Runs the small cases of _sanitizer_cases, each compared with the reference, then says which kernels
of the sources were never launched, and what Triton's compiler made of its own: registers, spilled
registers, shared memory. Exit status 1 if a case differs or a kernel was not reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import _env, _gpu_kernels, _sanitizer_cases

# Off unless PYLOSS_CUDA_CLUSTER=1, which a stage of its own sets.
OPTIONAL = ("row_softmax_cluster_kernel",)


def environment() -> dict[str, Any]:
    found = _env.describe()
    found["device_count"] = torch.cuda.device_count()
    try:
        from pyloss import _C

        found["pyloss_device_count"] = _C.cuda_device_count()
    except (ImportError, AttributeError):
        found["pyloss_device_count"] = None
    return found


@contextlib.contextmanager
def launched(device: str) -> Iterator[set[str]]:
    """Collects the names of the kernels that the device runs."""
    names: set[str] = set()
    if device != "cuda":
        yield names
        return
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        yield names
    torch.cuda.synchronize()
    names |= {event.key for event in profile.key_averages()}


def missing(names: set[str]) -> list[str]:
    """Kernels of the sources that none of the names holds as a word."""
    words = {word for name in names for word in re.findall(r"\w+_kernel\b", name)}
    return [k for k in _gpu_kernels.kernels() if k not in words and k not in OPTIONAL]


def triton_resources() -> list[dict[str, Any]]:
    """Of every kernel of pyloss that Triton has compiled in this process."""
    rows = []
    for module in [m for name, m in sys.modules.items() if name.startswith("pyloss.kernels")]:
        for name, function in vars(module).items():
            if not name.endswith("_kernel") or function.__module__ != module.__name__:
                continue
            for compiled in _compiled(function):
                rows.append(
                    {
                        "kernel": name,
                        "registers": getattr(compiled, "n_regs", None),
                        "spills": getattr(compiled, "n_spills", None),
                        "shared": getattr(compiled.metadata, "shared", None),
                        "num_warps": getattr(compiled.metadata, "num_warps", None),
                    }
                )
    return rows


def _compiled(function: Any) -> list[Any]:
    """Triton keeps them by device: a dictionary, or a tuple whose first is one."""
    found = []
    for per_device in getattr(function, "device_caches", {}).values():
        kernels = per_device[0] if isinstance(per_device, tuple) else per_device
        found += list(kernels.values())
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench._gpu_first")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {"environment": environment(), "wrong": [], "cases": 0}

    def write() -> None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")

    write()  # a first launch that hangs must not take this along
    print(json.dumps(result["environment"]["gpu"]), result["environment"]["torch_cuda"], flush=True)
    with launched(args.device) as names:
        for name, error in _sanitizer_cases.errors(args.device):
            result["cases"] += 1
            if not error <= 1.0:
                result["wrong"].append({"case": name, "error": error})
                print(f"{name}: {error:.3g} times the tolerance", flush=True)
    result["triton"] = triton_resources()
    result["not_launched"] = missing(names) if args.device == "cuda" else []
    write()
    for row in result["triton"]:
        print(row)
    print(f"{result['cases'] - len(result['wrong'])} of {result['cases']} cases agree")
    print("never launched:", ", ".join(result["not_launched"]) or "none")
    return 1 if result["wrong"] or result["not_launched"] else 0


if __name__ == "__main__":
    sys.exit(main())
