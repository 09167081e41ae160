"""Matrix products on the CPU into given memory: those of csrc/cpu/gemm.h, or torch's.

Which ones: float32 and float64 take the own product on x86 CPUs with AVX2 or AVX-512 that are not
Intel's. There torch's product is MKL's, which is made for Intel CPUs and reaches 40 % of the
arithmetic of others; half types have instructions that the own product does not use. PYLOSS_GEMM
says otherwise.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES, address

_CHOICES = ("own", "torch")


def _checked(choice: str | None) -> str | None:
    if choice is not None and choice not in _CHOICES:
        raise ValueError(f"PYLOSS_GEMM must be own or torch; got {choice!r}")
    return choice


_forced = _checked(os.environ.get("PYLOSS_GEMM") or None)
_preferred = _C.prefers_own_gemm()
# Private in torch. Inside an op it is 0: a mode has seen the op, and sees nothing below.
_watched = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def by_torch() -> bool:
    """Whether PYLOSS_GEMM asks for torch's products, in ops whose kernels contain their own."""
    return _forced == "torch"


def is_own(x: Tensor) -> bool:
    """Whether products of such tensors are the own ones."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    return _preferred if _forced is None else _forced == "own"


def _check(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """As torch.mm has it: an op may be called without its function, which checks the layer."""
    fits = a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1])
    same = all((t.dtype, t.device) == (out.dtype, out.device) for t in (a, b))
    if bias is not None:
        fits = fits and bias.shape == b.shape[1:] and bias.is_contiguous()
        same = same and (bias.dtype, bias.device) == (out.dtype, out.device)
    if not (fits and same):
        shapes = " and ".join(f"{list(t.shape)} ({t.dtype}, {t.device})" for t in (a, b))
        raise RuntimeError(f"no product of {shapes} into {list(out.shape)} ({out.dtype})")


def product(a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False):
    """out = a b, plus the row `bias`, or with `add` plus what is there.

    By torch where a mode watches its operations, such as a FlopCounterMode.

    Args:
        a, b: (M, K) and (K, N), of any strides; a bias is (N,) and dense.
        out: (M, N), its rows dense, of memory apart from a and b.
    """
    if not is_own(out) or _watched():
        if bias is not None:
            torch.addmm(bias, a, b, out=out)
        elif add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    (m, k), n = a.shape, b.shape[1]
    _check(a, b, out, bias)
    _C.gemm(
        DTYPE_CODES[out.dtype], m, n, k, a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(),
        out.data_ptr(), out.stride(0), address(bias), add, torch.get_num_threads(),
    )  # fmt: skip
