from pyloss.optim import lr_scheduler as lr_scheduler
from pyloss.optim.lanczos_sgd import LanczosSGD
from pyloss.optim.lion_k import Lion, LionK
from pyloss.optim.lyapunov import LionKLyapunov, LyapunovMonitor, lion_k_lyapunov
from pyloss.optim.sso import SSO

__all__ = [
    "LanczosSGD",
    "Lion",
    "LionK",
    "LionKLyapunov",
    "LyapunovMonitor",
    "SSO",
    "lion_k_lyapunov",
]
