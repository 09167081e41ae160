"""pyloss: losses and training objectives for PyTorch, with C++, CUDA and Triton kernels."""

from __future__ import annotations

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

from pyloss import _lazy
from pyloss.backends import backend, show_config  # noqa: F401  looks at PYLOSS_BACKEND

__getattr__, __dir__, _names = _lazy.exports(
    __name__,
    {
        "functional": (
            "BettiMatching",
            "BettiTarget",
            "PersistencePairs",
            "RowStats",
            "aldr_loss",
            "betti_matching",
            "betti_matching_loss",
            "clip_loss",
            "comp_sum_loss",
            "focal_loss",
            "fused_cross_entropy",
            "fused_linear_cross_entropy",
            "groco_loss",
            "info_nce",
            "ldr_loss",
            "nt_xent",
            "persistence_pairs",
            "siglip_loss",
            "soft_argsort",
            "soft_permutation",
            "soft_permute",
            "soft_rank",
            "soft_sort",
            "soft_topk",
            "sorting_cross_entropy",
            "spearman_loss",
            "supervised_contrastive",
            "tensor_attention",
            "tensor_attention_cost",
            "tensor_attention_error",
            "tensor_attention_n",
            "token_logprobs",
            "topk_cross_entropy",
        ),
        "metrics": ("betti_matching_error", "betti_number_error", "betti_numbers"),
        "nn": (
            "ALDRLoss",
            "BettiMatchingLoss",
            "CompSumLoss",
            "CrossEntropyLoss",
            "DiffSortNet",
            "DiffTopkNet",
            "FocalLoss",
            "GeneralizedCrossEntropyLoss",
            "GroCoLoss",
            "LDRLoss",
            "LinearCrossEntropyLoss",
            "SortingCrossEntropyLoss",
            "TopKCrossEntropyLoss",
        ),
    },
    submodules=(
        "adversarial",
        "aggregate",
        "analysis",
        "demo",
        "distributed",
        "integrations",
        "ops",
        "optim",
        "reference",
        "regularizers",
        "segment",
        "testing",
        "visualize",
    ),
)
__all__ = sorted([*_names, "backend", "functional", "metrics", "nn", "show_config"])
