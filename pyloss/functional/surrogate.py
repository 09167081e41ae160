"""Surrogates in the space of a model's outputs, on which an expensive loss is asked but once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional.classification import fused_cross_entropy

DIVERGENCES = ("l2", "kl")


def target_surrogate_loss(
    output: Tensor,
    output_ref: Tensor,
    grad_ref: Tensor,
    eta: float | Tensor,
    *,
    divergence: str = "l2",
    reduction: str = "sum",
) -> Tensor:
    r"""An upper model of a loss around the outputs at which its gradient is known.

    .. math::
        \langle g, z \rangle + \frac{1}{\eta} D(z, z_t), \qquad
        D = \begin{cases} \frac12 \lVert z - z_t \rVert^2 & \text{l2} \\
        \sum_i \mathrm{KL}(\mathrm{softmax}(z_{t,i}) \,\Vert\, \mathrm{softmax}(z_i)) & \text{kl}
        \end{cases}

    At :math:`z = z_t` its gradient is g, that of the loss; steps on it ask the model alone.

    Args:
        output: z, of any shape and floating dtype; ``"kl"``: logits, classes last.
        output_ref: :math:`z_t`, of the same shape; no gradient.
        grad_ref: g, the gradient of the loss with respect to its inputs at :math:`z_t`, of the same
            shape; no gradient.
        eta: > 0, or a tensor of one number: how far g is to be believed.
        divergence: ``"l2"``, or ``"kl"``, the mirror map of classification: with ``eta`` 1 the
            surrogate of the sum of cross entropies is that sum itself.
        reduction: ``"sum"``, or ``"mean"``: divided by the number of samples, ``output.shape[0]``.
            It changes what a step of an inner optimizer means, not the minimiser.

    Returns:
        0-d, of the dtype of ``output``, float32 for half types under autocast.

    Raises:
        TypeError: tensors that are not floating; an option of the wrong type.
        ValueError: shapes that differ; an option out of range; no classes.
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 3), torch.randn(8)
        >>> model = torch.nn.Linear(3, 1)
        >>> z = model(x).squeeze(1).detach().requires_grad_()
        >>> (g,) = torch.autograd.grad((z - y).square().sum(), z)  # the one call of the loss
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> for _ in range(10):
        ...     output = model(x).squeeze(1)
        ...     surrogate = pyloss.functional.target_surrogate_loss(output, z, g, eta=0.5)
        ...     optimizer.zero_grad()
        ...     surrogate.backward()
        ...     optimizer.step()

    Reference:
        Lavington, Vaswani, Babanezhad, Schmidt, Le Roux. Target-based Surrogates for Stochastic
        Optimization. arXiv 2302.02607.
    """
    check_options(divergence, eta)
    checks.check_reduction(reduction, ("sum", "mean"))
    checks.check_floating("output", output)
    for name, other in (("output_ref", output_ref), ("grad_ref", grad_ref)):
        checks.check_floating(name, other)
        if other.shape != output.shape:
            raise ValueError(
                f"{name} must have the shape of output, {list(output.shape)}, got "
                f"{list(other.shape)}"
            )
        checks.check_device(name, other, output, "output")
    dtype = torch.promote_types(output.dtype, output_ref.dtype)
    loss = surrogate_of(output_ref.to(dtype), grad_ref, eta, divergence)(output)
    if reduction == "mean" and output.dim():
        loss = loss / max(1, output.shape[0])
    return loss.to(checks.result_dtype(output.dtype, output))


def check_options(divergence: str, eta: float | Tensor) -> None:
    checks.check_one_of("divergence", divergence, DIVERGENCES)
    if isinstance(eta, Tensor):
        checks.one_number("eta", eta)
    else:
        checks.check_range("eta", eta, 0.0, open_low=True)


def surrogate_of(
    output_ref: Tensor, grad_ref: Tensor, eta: float | Tensor, divergence: str
) -> Callable[[Tensor], Tensor]:
    """The sum as a function of the output, for many calls: 0-d, no less than float32."""
    dtype = torch.promote_types(output_ref.dtype, torch.float32)
    ref, grad = output_ref.detach().to(dtype), grad_ref.detach().to(dtype)
    rate = 1 / (eta.detach().reshape(()).to(dtype) if isinstance(eta, Tensor) else eta)
    if divergence == "l2":

        def square(output: Tensor) -> Tensor:
            output = output.to(dtype)
            return (output * grad).sum() + (0.5 * rate) * (output - ref).square().sum()

        return square

    checks.check_has_dimension("output", ref)
    if not ref.shape[-1]:
        raise ValueError(f"output must have classes, got the shape {list(ref.shape)}")
    ref = ref.reshape(-1, ref.shape[-1])
    likely = ref.softmax(-1)
    entropy = fused_cross_entropy(ref, likely, reduction="sum")

    def relative(output: Tensor) -> Tensor:
        rows = output.to(dtype).reshape(ref.shape)
        divergence = fused_cross_entropy(rows, likely, reduction="sum") - entropy
        return (rows * grad.reshape(ref.shape)).sum() + rate * divergence

    return relative
