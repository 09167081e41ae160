from pyloss.adversarial.attacks import pgd_attack, pgd_maximise
from pyloss.adversarial.losses import mart_loss, trades_loss
from pyloss.adversarial.training import AdvCompSum, DoublyRobustATLoss

__all__ = [
    "AdvCompSum",
    "DoublyRobustATLoss",
    "mart_loss",
    "pgd_attack",
    "pgd_maximise",
    "trades_loss",
]
