"""Plain PyTorch versions of every op: slow, on any device, and the definition of what is right."""

from pyloss.reference.row_softmax import row_softmax

__all__ = ["row_softmax"]
