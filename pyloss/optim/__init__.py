"""Optimisers, and what wraps or watches one."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "lion_k": ("Lion", "LionK"),
        "sso": ("SSO",),
    },
    submodules=("lr_scheduler",),
)
