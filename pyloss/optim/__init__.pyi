from pyloss.optim import lr_scheduler as lr_scheduler
from pyloss.optim.lion_k import Lion, LionK
from pyloss.optim.sso import SSO

__all__ = ["Lion", "LionK", "SSO"]
