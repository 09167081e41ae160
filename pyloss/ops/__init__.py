"""The ops of pyloss as torch sees them (``torch.ops.pyloss``). Users call pyloss.functional.

An op registers with torch when its module is imported, which the first use of its family does. A
program that calls ops by their names in torch, as an exported graph does, calls :func:`load_all`.
One that must do without them, as ONNX, is made by :func:`decompose`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._ops import OperatorBase
    from torch.export import ExportedProgram

__all__ = ["decompose", "decompositions", "load_all"]


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


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program with every op of pyloss made of torch operations: for ONNX, or a machine without
    pyloss.

    The operations are those of the op's reference (``pyloss.reference``), so that numbers differ
    from the kernels' by rounding only, and whole matrices are formed that the kernels avoid. Sizes
    that are open in the program stay open. What the reference checks in the numbers (a label out of
    range) is not checked.

    Args:
        program: of ``torch.export.export``, before or after ``run_decompositions``.

    Returns:
        A new program of ATen operations, functional, as ``run_decompositions`` leaves them. The
        composite ones among torch's own are split up too, the others are kept.

    Raises:
        NotImplementedError: an op has no such form; the message names it and says why. These are
            ``betti_loss_fused``, ``betti_matching``, ``persistence_pairs``, whose results an
            algorithm on the values decides, and the ops that write into their arguments.
        TypeError: program is no ExportedProgram.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
        >>> program = torch.export.export(pyloss.nn.CrossEntropyLoss(), (x, y))
        >>> plain = pyloss.ops.decompose(program)
        >>> any("pyloss" in str(node.target) for node in plain.graph.nodes)
        False
        >>> torch.allclose(plain.module()(x, y), program.module()(x, y))
        True
    """
    from torch.export import ExportedProgram

    from pyloss.ops import _decompose

    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program must be an ExportedProgram, got {type(program).__name__}")
    load_all()
    _decompose.check(program.graph_module)
    return program.run_decompositions(_decompose.table())


def decompositions() -> dict[OperatorBase, Callable]:
    """The table behind :func:`decompose`, for tools that take one.

    Such are ``ExportedProgram.run_decompositions`` and ``make_fx``; add
    ``torch.export.default_decompositions()`` for the core ATen set. Backward ops are in it, for the
    graphs of training steps. The entry of an op that has no form in torch operations raises
    NotImplementedError where it is met.

    Example:
        >>> import torch, pyloss
        >>> table = pyloss.ops.decompositions()
        >>> torch.ops.pyloss.row_softmax_fwd.default in table
        True
    """
    from pyloss.ops import _decompose

    load_all()
    return _decompose.table()
