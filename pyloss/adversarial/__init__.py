"""Adversarial training: attacks on a model, and losses that attack it as they go."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "attacks": ("pgd_attack", "pgd_maximise"),
        "losses": ("mart_loss", "trades_loss"),
        "training": ("AdvCompSum", "DoublyRobustATLoss"),
    },
)
