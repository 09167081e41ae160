"""Compiles the COMPILE_CASES of one file for one architecture: `triton_compile.py FILE CAPABILITY`.

Runs in its own process, because a kernel that was decorated under TRITON_INTERPRET=1 cannot be
compiled. Prints one JSON line per case; needs no GPU.

A case is a dict:
  kernel      the @triton.jit function
  signature   argument name -> type ("*bf16", "i32", ...) or tuple of types, constexprs left out
  constexprs  argument name -> value; (argument, element) -> value of an element of a tuple, whose
              type is "constexpr"
  options     optional launch options: {"num_warps": 8, "enable_fp_fusion": True, ...}
  ptx_has     optional: capability -> text that the PTX must contain ("wgmma" for 90, ...)
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

# Largest dynamic shared memory of one block, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def load(path: Path) -> Any:
    if path.parent.name == "kernels":  # so that its imports of pyloss.kernels._launch work
        return importlib.import_module(f"pyloss.kernels.{path.stem}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_case(case: dict[str, Any], capability: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case["kernel"]
    signature = dict(case["signature"])
    named = [name for name in case["constexprs"] if isinstance(name, str)]
    signature.update(dict.fromkeys(named, "constexpr"))
    source = ASTSource(kernel, signature, constexprs=case["constexprs"])
    target = GPUTarget("cuda", capability, 32)
    done = triton.compile(source, target=target, options=case.get("options", {}))
    wanted = case.get("ptx_has", {}).get(capability)
    return {
        "kernel": kernel.__name__,
        "cubin_bytes": len(done.asm["cubin"]),
        "shared": done.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
        "missing": wanted if wanted and wanted not in done.asm["ptx"] else None,
    }


def main() -> None:
    path, capability = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    for case in load(path).COMPILE_CASES:
        print(json.dumps(compile_case(case, capability)))


if __name__ == "__main__":
    main()
