"""Rows of all ranks on each of them, with a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.functional._checks import check_tensor
from pyloss.functional._contrastive_group import all_rows


def all_gather_with_grad(
    input: Tensor,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    r"""Rows of all ranks of a process group, in their order, through which gradients flow back.

    .. math:: y = [x_0; \dots; x_{R-1}], \qquad
              \frac{\partial L}{\partial x_r} = \sum_{s} \frac{\partial L_s}{\partial y}
              \Big|_{\text{rows of } r}

    with :math:`L_s` the loss of rank s: a rank's rows get the gradients of all ranks' losses, half
    types summed in float32. Under DDP, which takes the mean over the ranks of the parameters'
    gradients, that is the gradient of the mean of the losses. Batches may differ in size. Every
    rank must call it, and run the backward through it, in the same order.

    Args:
        input: this rank's rows ``(B_r, ...)``, of any dtype; may be empty.
        group: process group; None: the default one.
        sizes: :math:`B_r` of each rank. Without it the ranks tell each other in every call, one
            more all_gather of three integers, for which CUDA waits.

    Returns:
        ``(sum of B_r, ...)``. Differentiable twice; not for ``fullgraph=True``.

    Raises:
        TypeError: an input that is no Tensor.
        RuntimeError: ``torch.distributed`` is not initialised, or the process is not in the group.
        ValueError: a 0-d input; rows of different dtypes or sizes on the ranks; ``sizes`` that do
            not fit.

    Example:
        >>> import torch, pyloss
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> z = torch.randn(4, 8, requires_grad=True)
        >>> pyloss.distributed.all_gather_with_grad(z).sum().backward()
        >>> z.grad.shape
        torch.Size([4, 8])
        >>> dist.destroy_process_group()
    """
    check_tensor("input", input)
    return all_rows("input", input, group, sizes)
