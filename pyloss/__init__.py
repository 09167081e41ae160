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

from pyloss import functional, metrics, nn
from pyloss.backends import backend, show_config
from pyloss.functional import (
    BettiMatching,
    BettiTarget,
    PersistencePairs,
    RowStats,
    betti_matching,
    betti_matching_loss,
    comp_sum_loss,
    focal_loss,
    fused_cross_entropy,
    fused_linear_cross_entropy,
    persistence_pairs,
    soft_argsort,
    soft_permutation,
    soft_permute,
    soft_rank,
    soft_sort,
    soft_topk,
    sorting_cross_entropy,
    spearman_loss,
    tensor_attention,
    tensor_attention_cost,
    tensor_attention_error,
    tensor_attention_n,
    token_logprobs,
)
from pyloss.metrics import betti_matching_error, betti_number_error, betti_numbers
from pyloss.nn import (
    BettiMatchingLoss,
    CompSumLoss,
    CrossEntropyLoss,
    DiffSortNet,
    DiffTopkNet,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    LinearCrossEntropyLoss,
    SortingCrossEntropyLoss,
)

__all__ = [
    "BettiMatching",
    "BettiMatchingLoss",
    "BettiTarget",
    "CompSumLoss",
    "CrossEntropyLoss",
    "DiffSortNet",
    "DiffTopkNet",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "PersistencePairs",
    "RowStats",
    "SortingCrossEntropyLoss",
    "backend",
    "betti_matching",
    "betti_matching_error",
    "betti_matching_loss",
    "betti_number_error",
    "betti_numbers",
    "comp_sum_loss",
    "focal_loss",
    "functional",
    "fused_cross_entropy",
    "fused_linear_cross_entropy",
    "metrics",
    "nn",
    "persistence_pairs",
    "show_config",
    "soft_argsort",
    "soft_permutation",
    "soft_permute",
    "soft_rank",
    "soft_sort",
    "soft_topk",
    "sorting_cross_entropy",
    "spearman_loss",
    "tensor_attention",
    "tensor_attention_cost",
    "tensor_attention_error",
    "tensor_attention_n",
    "token_logprobs",
]

_LAZY = ("demo", "distributed", "integrations", "reference", "testing", "visualize")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"pyloss.{name}")
    raise AttributeError(f"module 'pyloss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
