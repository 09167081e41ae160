"""Every module of pyloss, flat."""

from pyloss.nn.classification import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
)

__all__ = ["CompSumLoss", "CrossEntropyLoss", "FocalLoss", "GeneralizedCrossEntropyLoss"]
