"""Optimisers, and what wraps or watches one."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "lanczos_sgd": ("LanczosSGD",),
        "lion_k": ("Lion", "LionK"),
        "lyapunov": ("LionKLyapunov", "LyapunovMonitor", "lion_k_lyapunov"),
        "sso": ("SSO",),
    },
    submodules=("lr_scheduler",),
)
