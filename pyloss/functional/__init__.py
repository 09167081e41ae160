"""Every differentiable function of pyloss, flat."""

from pyloss.functional.classification import (
    RowStats,
    comp_sum_loss,
    focal_loss,
    fused_cross_entropy,
)

__all__ = ["RowStats", "comp_sum_loss", "focal_loss", "fused_cross_entropy"]
