"""Lazy and rich training: output scales, empirical tangent kernels, their alignment
(arXiv 2310.06110).

    alpha (f(x; theta) - f(x; theta_0)),    K(x, x') = <df(x) / dtheta, df(x') / dtheta>

With a large alpha the weights need not move far, and the kernel stays what it was at the start:
lazy. With a small one it learns features: rich.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from pyloss.functional import _checks as checks

__all__ = ["LazyScale", "empirical_ntk", "kernel_alignment", "scaled_mse"]

OUTPUTS = ("trace", "full")


class LazyScale(nn.Module):
    r"""A model whose output is scaled, less what it was at the start.

    .. math:: \alpha \big(f(x; \theta) - f(x; \theta_0)\big)

    The start is a copy of the module as it is now, with its buffers: frozen, and in evaluation mode
    also while the module trains. In half precision the difference of two outputs has few digits
    left; a module that draws (dropout), or whose batch norm uses the batch, is not 0 at the start
    while it trains.

    Args:
        module: f; its output is a tensor.
        alpha: > 0. Large: lazy; small: rich.
        center: whether to subtract the output at the start; without, there is no copy.

    Attributes:
        module: f, which learns.
        initial: the copy, or None. Its parameters require no gradient and are in the state_dict.

    Shape:
        As ``module``.

    Raises:
        TypeError: no module, an output that is no tensor. ValueError: alpha out of range.

    Example:
        >>> import torch, pyloss
        >>> model = pyloss.analysis.LazyScale(torch.nn.Linear(3, 1), alpha=10.0)
        >>> model(torch.ones(2, 3))
        tensor([[0.],
                [0.]], grad_fn=<MulBackward0>)

    Reference:
        Kumar, Bordelon, Gershman, Pehlevan. arXiv 2310.06110. Chizat, Oyallon, Bach. On Lazy
        Training in Differentiable Programming (2019).
    """

    def __init__(self, module: nn.Module, alpha: float, center: bool = True) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a Module, got {type(module).__name__}")
        checks.check_range("alpha", alpha, 0.0, open_low=True)
        self.module, self.alpha = module, float(alpha)
        self.center = checks.checked_flag("center", center)
        self.initial = None
        if center:
            self.initial = copy.deepcopy(module).requires_grad_(False)

    def train(self, mode: bool = True) -> LazyScale:
        """As every module; the copy stays as it is."""
        super().train(mode)
        if self.initial is not None:
            self.initial.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found = self.module(*args, **kwargs)
        checks.check_tensor("the output of module", found)
        if self.initial is not None:
            found = found - self.initial(*args, **kwargs)
        return self.alpha * found

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, center={self.center}"


def scaled_mse(pred: Tensor, y: Tensor, alpha: float, *, reduction: str = "mean") -> Tensor:
    r"""Squared error whose gradient moves a scaled model as fast, whatever the scale.

    .. math:: \frac{1}{\alpha^2} \operatorname{mean}\, (\text{pred} - y)^2

    Args:
        pred: the output of :class:`LazyScale`, any shape.
        y: targets of that shape.
        alpha: > 0, that of the model.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or of the shape of ``pred``.

    Raises:
        TypeError: no floating tensors. ValueError: shapes that differ, alpha out of range.

    Example:
        >>> import torch, pyloss
        >>> pyloss.analysis.scaled_mse(torch.tensor([3.0]), torch.tensor([1.0]), alpha=2.0)
        tensor(1.)

    Reference:
        Kumar, Bordelon, Gershman, Pehlevan. arXiv 2310.06110.
    """
    checks.check_floating("pred", pred)
    checks.check_floating("y", y)
    if y.shape != pred.shape:
        raise ValueError(f"y must have the shape of pred, {list(pred.shape)}, got {list(y.shape)}")
    checks.check_range("alpha", alpha, 0.0, open_low=True)
    checks.check_reduction(reduction)
    wide = torch.promote_types(torch.promote_types(pred.dtype, y.dtype), torch.float32)
    # Divided first: the square of a scaled output may be beyond the numbers, with that of alpha.
    found = ((pred.to(wide) - y.to(wide)) / alpha).square()
    if reduction != "none":
        found = found.mean() if reduction == "mean" else found.sum()
    return found.to(checks.result_dtype(torch.promote_types(pred.dtype, y.dtype), pred))


def empirical_ntk(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    chunk: int = 16,
    outputs: str = "trace",
) -> Tensor:
    r"""Neural tangent kernel of a model with its present parameters.

    .. math:: K(x, x')_{cd} = \Big\langle \frac{\partial f_c(x)}{\partial \theta},
              \frac{\partial f_d(x')}{\partial \theta} \Big\rangle, \qquad
              \operatorname{tr} K = \sum_c K_{cc}

    Gradients of ``chunk`` samples are held against those of as many others; of one set alone, each
    pair of chunks once.

    Memory: beside the result at most :math:`3\,\text{chunk}\, C\, P` numbers for P parameters and C
    outputs, as long as these outweigh the activations of the model for as many backward passes.

    Args:
        model: its output for a batch ``(n, *)`` is ``(n, *)``, and that of a sample does not depend
            on the others (no batch norm in training mode). Parameters that are frozen do not
            count, one that is shared counts once.
        x1: ``(n_1, *)``.
        x2: ``(n_2, *)``; default: x1.
        chunk: samples at a time.
        outputs: ``"trace"``: the sum over outputs; ``"full"``: a matrix over them.

    Returns:
        ``(n_1, n_2)``, or ``(n_1, n_2, C, C)``; float64, without a graph.

    Raises:
        TypeError: no module, no tensors. ValueError: no parameter that requires a gradient; an
            option out of range; outputs that are no tensor of a row for each sample.

    Example:
        >>> import torch, pyloss
        >>> model = torch.nn.Linear(3, 2)
        >>> pyloss.analysis.empirical_ntk(model, torch.eye(3)[:2])  # 2 (x . x' + 1)
        tensor([[4., 2.],
                [2., 4.]], dtype=torch.float64)

    Reference:
        Kumar, Bordelon, Gershman, Pehlevan. arXiv 2310.06110.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    for name, x in (("x1", x1),) if x2 is None else (("x1", x1), ("x2", x2)):
        checks.check_tensor(name, x)
        checks.check_has_dimension(name, x)
    chunk = checks.checked_count("chunk", chunk, 1)
    checks.check_one_of("outputs", outputs, OUTPUTS)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model must have a parameter that requires a gradient, got none")

    def of_sample(params: dict[str, Tensor], x: Tensor) -> Tensor:
        found = functional_call(model, params, (x.unsqueeze(0),))
        if not isinstance(found, Tensor) or not found.dim() or found.shape[0] != 1:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"model must return a Tensor with a row for each sample, got {shape}")
        return found.reshape(-1)

    gradients = vmap(jacrev(of_sample), (None, 0))
    # Weights of the module that the call leaves alone would have their graphs recorded.
    with torch.no_grad():
        return _kernel(lambda x: gradients(params, x), x1.detach(), x2, chunk, outputs)


def _kernel(
    gradients: Callable[[Tensor], dict[str, Tensor]],
    x1: Tensor,
    x2: Tensor | None,
    chunk: int,
    outputs: str,
) -> Tensor:
    same = x2 is None
    others = x1 if same else x2.detach()
    kernel = None
    for row in range(0, len(x1), chunk):
        left = gradients(x1[row : row + chunk])
        for column in range(row if same else 0, len(others), chunk):
            right = left
            if not (same and row == column):
                right = gradients(others[column : column + chunk])
            block = _block(left, right, outputs)
            if kernel is None:
                kernel = block.new_zeros(len(x1), len(others), *block.shape[2:])
            kernel[row : row + chunk, column : column + chunk] = block
            if same and row != column:
                mirrored = block.transpose(0, 1).transpose(-1, -2) if outputs == "full" else block.T
                kernel[column : column + chunk, row : row + chunk] = mirrored
            del right
    if kernel is None:  # no pair: how many outputs there are nobody said
        kernel = x1.new_zeros(len(x1), len(others), dtype=torch.float64)
        return kernel[..., None, None] if outputs == "full" else kernel
    return kernel


def _block(left: dict[str, Tensor], right: dict[str, Tensor], outputs: str) -> Tensor:
    """Of gradients (n, C, *S) for each parameter."""
    total = 0.0
    for name, a in left.items():
        a, b = a.flatten(2), right[name].flatten(2)
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        if outputs == "trace":
            part = a.flatten(1) @ b.flatten(1).T
        else:
            part = (a.flatten(0, 1) @ b.flatten(0, 1).T).view(*a.shape[:2], *b.shape[:2])
            part = part.transpose(1, 2)
        total = total + part.double()
    return total


def kernel_alignment(K1: Tensor, K2: Tensor, centered: bool = True) -> Tensor:
    r"""How much two kernels of the same samples agree: 1 where one is a multiple of the other.

    .. math:: \frac{\langle H K_1 H, H K_2 H \rangle}{\lVert H K_1 H \rVert\,
              \lVert H K_2 H \rVert}, \qquad H = 1 - \tfrac1n 1 1^T

    Centred it is CKA, the centred kernel alignment; with :math:`K_2 = y y^T` that of a kernel and
    the labels.

    Args:
        K1: ``(*, n, n)``, symmetric.
        K2: likewise; the leading dimensions are broadcast.
        centered: whether H is there.

    Returns:
        ``(*)``, float64, differentiable in both; in [0, 1] for positive semidefinite kernels. NaN
        where a kernel, once centred, is 0, as that of constant labels.

    Raises:
        TypeError: no floating tensors. ValueError: shapes that do not fit.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(20, 3)
        >>> float(pyloss.analysis.kernel_alignment(x @ x.T, 7 * x @ x.T).round(decimals=6))
        1.0

    Reference:
        Kumar, Bordelon, Gershman, Pehlevan. arXiv 2310.06110. Cortes, Mohri, Rostamizadeh.
        Algorithms for Learning Kernels Based on Centered Alignment (2012).
    """
    for name, kernel in (("K1", K1), ("K2", K2)):
        checks.check_floating(name, kernel)
        if kernel.dim() < 2 or kernel.shape[-1] != kernel.shape[-2]:
            raise ValueError(f"{name} must be square, (*, n, n), got {list(kernel.shape)}")
    if K1.shape[-1] != K2.shape[-1]:
        raise ValueError(
            f"K1 and K2 must be of the same samples, got {list(K1.shape)} and {list(K2.shape)}"
        )
    checks.check_flag("centered", centered)
    first, second = _centered(K1, centered), _centered(K2, centered)
    return (first * second).sum((-2, -1))


def _centered(kernel: Tensor, centered: bool) -> Tensor:
    """Of norm 1; NaN where nothing but rounding is left."""
    # Rounding is that of the given numbers, which others have computed.
    least = 4 * torch.finfo(kernel.dtype).eps
    kernel = kernel.double()
    whole = torch.linalg.matrix_norm(kernel.detach(), keepdim=True)
    if centered:
        kernel = kernel - kernel.mean(-1, keepdim=True)
        kernel = kernel - kernel.mean(-2, keepdim=True)
    norm = torch.linalg.matrix_norm(kernel.detach(), keepdim=True)
    none = norm <= least * whole
    kernel = torch.where(none, 1.0, kernel)  # its slope would reach the gradients of others
    return torch.where(none, torch.nan, kernel / torch.linalg.matrix_norm(kernel, keepdim=True))
