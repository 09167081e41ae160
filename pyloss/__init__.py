"""pyloss: losses and training objectives for PyTorch, with C++, CUDA and Triton kernels."""

from __future__ import annotations

import importlib

import torch  # noqa: F401  pyloss means nothing without it; a missing torch should say so itself

try:
    from pyloss import _C
except ImportError as error:
    raise ImportError(
        "pyloss._C, the compiled part of pyloss, cannot be imported. In a source checkout build "
        "it with `pip install --no-build-isolation --no-deps -e .`; if pyloss is installed and "
        "you are in its source folder, leave that folder or set PYTHONSAFEPATH=1."
    ) from error

__version__ = "0.1.0"

if _C.version != __version__:
    raise ImportError(
        f"pyloss {__version__} found a compiled module of version {_C.version}; reinstall "
        "pyloss so that both are built together"
    )

from pyloss import functional, nn
from pyloss.backends import backend, show_config
from pyloss.functional import (
    RowStats,
    comp_sum_loss,
    focal_loss,
    fused_cross_entropy,
    fused_linear_cross_entropy,
    tensor_attention,
    token_logprobs,
)
from pyloss.nn import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    LinearCrossEntropyLoss,
)

__all__ = [
    "CompSumLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "RowStats",
    "backend",
    "comp_sum_loss",
    "focal_loss",
    "functional",
    "fused_cross_entropy",
    "fused_linear_cross_entropy",
    "nn",
    "show_config",
    "tensor_attention",
    "token_logprobs",
]

_LAZY = ("demo", "distributed", "integrations", "reference", "testing")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"pyloss.{name}")
    raise AttributeError(f"module 'pyloss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
