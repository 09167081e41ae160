"""The ops of pyloss as torch sees them (``torch.ops.pyloss``). Users call pyloss.functional.

An op registers with torch when its module is imported, which the first use of its family does. A
program that calls ops by their names in torch, as an exported graph does, calls :func:`load_all`.
"""

import importlib
import pkgutil

__all__ = ["load_all"]


def load_all() -> None:
    """Registers every op of pyloss with torch.

    Needed before :func:`torch.export.load` (or ``torch.ops.pyloss.<op>``) in a process that has not
    used the functions the graph was made of: ``import pyloss`` alone registers nothing.

    Example:
        >>> import pyloss, torch
        >>> pyloss.ops.load_all()
        >>> torch.ops.pyloss.row_softmax_fwd
        <OpOverloadPacket(op='pyloss.row_softmax_fwd')>
    """
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
