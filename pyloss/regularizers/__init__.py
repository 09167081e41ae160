"""Penalties that are added to a loss: what a network should be, but is not forced to be."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "equivariance": ("EquivarianceRegularizer",),
        "invariance": ("invariance_penalty",),
        "symmetry": ("SymmetryType",),
        "monoids": ("associativity_loss", "commutativity_loss", "identity_loss"),
    },
)
