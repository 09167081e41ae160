"""Cross entropy of logits, or of a layer, whose classes are split over the ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import _layers as layers
from pyloss.functional import _vocab_parallel as split
from pyloss.functional._checks import is_dtensor
from pyloss.functional._options import RowOptions, options_of
from pyloss.functional.classification import RowStats, fused_cross_entropy

_NOT_HERE = ("size_average", "reduce", "inplace", "entropy_weight")


@options_of(fused_cross_entropy, without=_NOT_HERE, after={"smoothing_formula": "label_smoothing"})
def vocab_parallel_cross_entropy(
    logits_shard: Tensor,
    target: Tensor,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    num_classes: int | None = None,
    first_class: Sequence[int] | None = None,
    smoothing_formula: str = "torch",
    **options: Unpack[RowOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Cross entropy (comp-sum family) whose classes are split over the ranks of a process group.

    Every rank calls it with its own columns of the logits and the same targets and options, and
    gets the same loss, bit for bit. One all_gather of 3 to 6 numbers per row; the backward does not
    communicate. With :math:`m_r` the largest logit of rank r, and :math:`D_r` its sum of
    exponentials without the target's:

    .. math::
        m = \max_r m_r, \quad D = \sum_r e^{m_r - m} D_r, \quad d = D + e^{z_y - m}, \qquad
        \mathrm{lse} = m + \log d, \quad -\log p_y = m - z_y + \log d

    Args:
        logits_shard: this rank's columns ``(..., V_r)``, the classes last; float32, bfloat16,
            float16 or float64. Rank 0 has the first classes, and so on; shards may differ in size.
            Or a ``DTensor`` that one mesh dimension splits in its last dimension.
        target: class indices ``(...)`` of all V classes; int64, uint8 or int32.
        group: process group; None: the default one, or the mesh's of a ``DTensor``.
        num_classes: V, where the last entries of the shards are padding, which is then not looked
            at. Default: the sum of the shards.
        first_class: first class of each rank, ascending from 0. Without it the ranks
            tell each other in every call how many classes and rows they hold, one more all_gather
            of four integers, and on CUDA a synchronisation; different numbers of rows are an
            error. Of a ``DTensor`` they know it. Needs ``num_classes``.
        weight: weight of each class, ``(V)``: of all classes, on every rank.
        ignore_index: rows with this target add nothing, and their logits are not read.
        reduction, tau, z_loss, softcap, logit_scale, temperature, token_weight, empty, loss_dtype,
            num_items: as in :func:`pyloss.fused_cross_entropy`.
        label_smoothing: in [0, 1]; with ``tau=1`` only.
        smoothing_formula: ``"torch"`` spreads ``label_smoothing`` over all classes, the target's
            too; ``"megatron"`` multiplies it by ``V / (V - 1)`` first.
        truncate: as there; without label smoothing only.
        return_stats: as there, without ``"rank"``.

    Returns:
        The loss: 0-d, or of the targets' shape with ``reduction="none"``; with ``return_stats`` the
        pair ``(loss, RowStats)``.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised, the process is not in the group, a
            ``DTensor`` is placed in another way, or shapes or dtypes that do not fit. A second
            derivative.
        ValueError: probabilities or MixUp as target, an option out of its range or not available
            here, ``num_classes`` above the sum of the shards.
        TypeError: an argument of the wrong Python type.
        IndexError: a class index out of range (CPU), on every rank. On CUDA that row is NaN.
        NotImplementedError: integer logits.

    Example:
        >>> import torch, pyloss
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> logits = torch.randn(8, 100, requires_grad=True)  # all classes: one rank
        >>> target = torch.randint(100, (8,))
        >>> loss = pyloss.distributed.vocab_parallel_cross_entropy(logits, target)
        >>> loss.backward()
        >>> torch.testing.assert_close(loss, pyloss.fused_cross_entropy(logits, target))
        >>> dist.destroy_process_group()

    Reference:
        Shoeybi et al. Megatron-LM. arXiv 1909.08053. Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    token_weight = options.pop("token_weight")
    options["weight"] = split.local("weight", options["weight"])
    return split.cross_entropy(
        logits_shard,
        target,
        token_weight,
        group,
        options,
        num_classes=num_classes,
        first_class=first_class,
        smoothing_formula=smoothing_formula,
    )


@options_of(
    fused_cross_entropy,
    without=(*_NOT_HERE, "temperature"),
    after={
        "smoothing_formula": "label_smoothing",
        "temperature": "logit_scale",
        "shift": "num_items",
        "chunk": "shift",
        "accumulate_dtype": "chunk",
    },
)
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    bias_shard: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    num_classes: int | None = None,
    first_class: Sequence[int] | None = None,
    smoothing_formula: str = "torch",
    temperature: float | Tensor = 1.0,
    shift: int = 0,
    chunk: int | str = "auto",
    accumulate_dtype: torch.dtype | None = None,
    **options: Unpack[RowOptions],
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Cross entropy of ``input @ weight.T + bias``, rows of the weight split over a process group.

    Neither a rank's logits nor those of all ranks are ever stored: each rank works through chunks
    of rows, forms them again in the backward, and keeps 3 or 4 numbers per row. The weight's and
    the bias's gradients stay on their rank; the input's is the sum over the ranks in float32, one
    all_reduce a chunk, beside the weight's product. The loss is that of
    :func:`vocab_parallel_cross_entropy` on

    .. math:: x_r = W_r h + b_r, \qquad
              \frac{\partial \ell}{\partial h} = \sum_r W_r^\top \frac{\partial \ell}{\partial x_r}

    Args:
        input: hidden states ``(D)`` or ``(..., D)``, the same on every rank; float32, bfloat16,
            float16 or float64. Or a ``DTensor`` on the weight's mesh, gathered where it is split
            along the same dimension.
        weight_shard: this rank's rows ``(V_r, D)``, dtype of ``input``; or a ``DTensor`` that one
            mesh dimension splits by ``Shard(0)`` and the others replicate. Unless ``input`` is
            one, too, the ranks compare their rows, whatever ``first_class`` says.
        target: class indices ``input.shape[:-1]`` of all V classes; int64, uint8 or int32.
        bias_shard: ``(V_r)``, or a ``DTensor`` placed like the weight.
        group, num_classes, first_class, weight, smoothing_formula: as in
            :func:`vocab_parallel_cross_entropy`.
        ignore_index, reduction, label_smoothing, tau, truncate, z_loss, softcap, logit_scale,
            token_weight, return_stats, empty, loss_dtype, num_items: as there.
        temperature, shift, chunk, accumulate_dtype: as in
            :func:`pyloss.fused_linear_cross_entropy`; a tensor without ``softcap``.

    Returns:
        As :func:`vocab_parallel_cross_entropy`.

    Raises:
        As :func:`vocab_parallel_cross_entropy`; and RuntimeError for features, dtypes or placements
        of ``input``, ``weight_shard`` and ``bias_shard`` that do not fit.

    Example:
        >>> import torch, pyloss
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden = torch.randn(2, 16, 32, requires_grad=True)
        >>> head = torch.nn.Linear(32, 1000, bias=False)  # this rank's rows: all
        >>> tokens = torch.randint(1000, (2, 16))
        >>> loss = pyloss.distributed.vocab_parallel_linear_cross_entropy(
        ...     hidden, head.weight, tokens, shift=1
        ... )
        >>> loss.backward()
        >>> dist.destroy_process_group()

    Reference:
        Shoeybi et al. Megatron-LM. arXiv 1909.08053. Wijmans et al. arXiv 2411.09009.
    """
    settings = layers.checked_settings(
        chunk, "auto", accumulate_dtype, None, options["reduction"], options["return_stats"]
    )
    options["temperature"] = temperature
    token_weight = options.pop("token_weight")
    tensors = (input, weight_shard, target, bias_shard, token_weight, options["weight"])
    replicated = is_dtensor(weight_shard) and all(p.is_replicate() for p in weight_shard.placements)
    if replicated:
        raise RuntimeError(
            f"weight_shard must be split by Shard(0), got a DTensor {weight_shard.placements}"
        )
    if is_dtensor(input):
        tensors = (split.laid_out(input, weight_shard), *tensors[1:])
    tensors, group, classes, rows_known = split.localize(tensors, group)
    input, weight_shard, target, bias_shard, token_weight, options["weight"] = tensors
    return split.linear_cross_entropy(
        input,
        weight_shard,
        target,
        bias_shard,
        token_weight,
        group,
        settings,
        options,
        shift=shift,
        num_classes=num_classes,
        dtensor_classes=classes,
        rows_known=rows_known,
        first_class=first_class,
        smoothing_formula=smoothing_formula,
    )
