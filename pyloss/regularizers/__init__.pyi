from pyloss.regularizers.monoids import (
    associativity_loss,
    commutativity_loss,
    identity_loss,
)

__all__ = ["associativity_loss", "commutativity_loss", "identity_loss"]
