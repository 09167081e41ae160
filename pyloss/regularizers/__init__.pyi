from pyloss.regularizers.equivariance import EquivarianceRegularizer
from pyloss.regularizers.invariance import invariance_penalty
from pyloss.regularizers.monoids import (
    associativity_loss,
    commutativity_loss,
    identity_loss,
)
from pyloss.regularizers.symmetry import SymmetryType

__all__ = [
    "EquivarianceRegularizer",
    "SymmetryType",
    "associativity_loss",
    "commutativity_loss",
    "identity_loss",
    "invariance_penalty",
]
