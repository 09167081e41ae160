"""Compiles one of the COMPILE_CASES of a file for one architecture; needs no GPU.

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
from pathlib import Path
from typing import Any

# Largest dynamic shared memory of one block, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def cases_of(path: Path) -> list[dict[str, Any]]:
    """The COMPILE_CASES of a file or package of kernels/, or of a file elsewhere."""
    if path.parent.name == "kernels":  # so that its imports of pyloss.kernels._launch work
        return importlib.import_module(f"pyloss.kernels.{path.stem}").COMPILE_CASES
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.COMPILE_CASES


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
        "cubin_bytes": len(done.asm["cubin"]),
        "shared": done.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
        "missing": wanted if wanted and wanted not in done.asm["ptx"] else None,
    }
