from pyloss.regularizers.equivariance import EquivarianceRegularizer
from pyloss.regularizers.symmetry import SymmetryType

__all__ = [
    "EquivarianceRegularizer",
    "SymmetryType",
]
