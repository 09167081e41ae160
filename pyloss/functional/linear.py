"""Losses of a linear layer's output whose logits are never stored whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _layers as layers
from pyloss.functional import _rows as rows
from pyloss.functional.classification import MixUpTarget, RowStats
from pyloss.ops import linear_cross_entropy as op
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import forward_ad_active, functorch_active
from pyloss.ops.linear_cross_entropy import small
from pyloss.ops.row_softmax.epilogue import unless_zero


def fused_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | MixUpTarget,
    linear_bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    tau: float = 1.0,
    truncate: float | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    return_stats: Sequence[str] = (),
    empty: str = "nan",
    loss_dtype: torch.dtype | None = None,
    num_items: float | Tensor | None = None,
    shift: int = 0,
    chunk: int | str = "auto",
    strategy: str = "auto",
    accumulate_dtype: torch.dtype | None = None,
    filter: float | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    options: object | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Cross entropy (comp-sum family) of ``input @ linear_weight.T + linear_bias``, by chunks.

    Equal to ``fused_cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`` with
    the same options, but the logits exist only for some hundred rows at a time. Stands in for
    :func:`torch.nn.functional.linear_cross_entropy`, whose arguments it all accepts. Per row, with
    :math:`x = W h + b` and :math:`z = \mathrm{transform}(x)`:

    .. math::
        \ell = k \Big( w_y\, \frac{e^{(1-\tau) L_y} - 1}{1-\tau}
               + \mathrm{z\_loss} \cdot \mathrm{lse}(z)^2 \Big),
        \qquad L_y = -\log \mathrm{softmax}(z)_y

    Args:
        input: hidden states ``(D)`` or ``(..., D)``; float32, bfloat16, float16 or float64. Rows
            whose target is ``ignore_index`` are never read. Of a ``DTensor`` whose rows are split
            the loss is one, a sum or mean ``Partial``; docs/meshes.md.
        linear_weight: ``(V, D)``, dtype of ``input``. A K-dimensional ``(V, d1, ..., dk, D)``, as
            torch has it, runs unfused. A ``DTensor`` with ``Shard(0)`` selects the vocab-parallel
            loss of its mesh.
        target: one of

            - class indices of shape ``input.shape[:-1]``; int64, uint8 or int32
            - class probabilities ``(*input.shape[:-1], V)``, floating; differentiable, unfused then
            - MixUp: ``(y, y2, lam)``, as in :func:`fused_cross_entropy`
        linear_bias: ``(V)``, dtype of ``input``.
        weight: weight of each class, ``(V)``.
        ignore_index: target value of rows that are left out; None means -100.
        reduction: ``"none" | "mean" | "sum"``, as in :func:`fused_cross_entropy`.
        label_smoothing, tau, truncate, z_loss, softcap, logit_scale, token_weight, return_stats,
            empty, loss_dtype, num_items: as in :func:`fused_cross_entropy`.
        temperature: as there; or a tensor, 0-d or one for each target, which is differentiable: the
            hidden states are divided by it, and with a bias the weight is copied once. With
            ``softcap`` the logits are stored then.
        shift: score position t of the sequence dimension (the last but one of ``input``) against
            ``target[..., t + shift]``; 1 is next-token prediction. ``target``, ``token_weight`` and
            a tensor ``temperature`` keep the full length T, results per row have length
            ``T - shift``. Nothing is copied.
        chunk: rows of logits that exist at a time, or ``"auto"``.
        strategy: ``"forward"`` forms the gradients in the forward pass, 3 products in all, for
            scalar losses; ``"recompute"`` forms the logits again in the backward, 4 products;
            ``"auto"`` takes the first where it can: a scalar loss without differentiable
            statistics, float32 or bfloat16, no saved-tensor hooks (checkpointing). ``"tiles"``
            recomputes in Triton kernels that never store a tile of logits, on CUDA only;
            ``"auto"`` takes it with ``filter``.
        accumulate_dtype: None: products in the dtype of ``input``, added up over the chunks in
            float32; ``torch.float32``: the product that gives the weight's gradient in float32 too.
        filter: None: exact. A number > 0 allows the backward to leave out tiles of the logits'
            gradient that hold no label and in which every entry is below ``filter`` times the
            largest entry of its row. Selects ``strategy="tiles"`` on CUDA; on the CPU and on the
            reference backend nothing is left out. Neither goes with probabilities, MixUp, a
            K-dimensional weight, float64, ``label_smoothing`` with ``tau != 1``, ``chunk``,
            ``group`` or the statistics ``argmax``, ``correct`` and ``rank``; ``filter`` also not
            with ``label_smoothing`` and ``softcap`` together.
        group: ``torch.distributed`` process group over which the classes are split;
            ``linear_weight`` and ``linear_bias`` are then this rank's shard, see
            :func:`pyloss.distributed.vocab_parallel_linear_cross_entropy`.
        options: accepted for torch's signature and ignored.

    Returns:
        The loss: 0-d, or of the targets' shape with ``reduction="none"``; with ``return_stats`` the
        pair ``(loss, RowStats)``.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: an option out of its range or unknown.
        RuntimeError: shapes or dtypes of ``input``, ``linear_weight``, ``linear_bias``, ``target``,
            ``weight`` or ``token_weight`` that do not fit; ``strategy="tiles"`` without CUDA
            tensors or without Triton.
        IndexError: a class index out of range (CPU). On CUDA loss and gradient of that row are NaN.
        NotImplementedError: integer ``input``.

    Example:
        >>> import torch, pyloss
        >>> hidden = torch.randn(2, 16, 32, requires_grad=True)  # batch, tokens, features
        >>> head = torch.nn.Linear(32, 1000, bias=False)
        >>> tokens = torch.randint(1000, (2, 16))
        >>> loss = pyloss.fused_linear_cross_entropy(hidden, head.weight, tokens, shift=1)
        >>> loss.backward()

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288. Wijmans et al. Cut Your Losses in Large-Vocabulary
        Language Models. arXiv 2411.09009.
    """
    if (
        not torch.compiler.is_compiling()  # first: a graph must not depend on the values below
        and weight is token_weight is truncate is softcap is loss_dtype is num_items is None
        and accumulate_dtype is filter is group is None
        and (reduction == "mean" or reduction == "sum")
        and _all_are(
            _PLAIN, label_smoothing, tau, z_loss, logit_scale, temperature, return_stats, empty,
            shift, chunk, strategy,
        )
        and (ignore_index is None or type(ignore_index) is int)
        and small.is_small(input, linear_weight, target, linear_bias)
    ):  # fmt: skip
        ignore_index = -100 if ignore_index is None else ignore_index
        return small.small_linear_cross_entropy(
            input, linear_weight, target, linear_bias, ignore_index, reduction == "mean"
        )
    arguments = dict(
        weight=weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        tau=tau,
        truncate=truncate,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        return_stats=return_stats,
        empty=empty,
        loss_dtype=loss_dtype,
        num_items=num_items,
    )
    settings = layers.checked_settings(
        chunk, strategy, accumulate_dtype, filter, reduction, return_stats
    )
    tensors = (input, linear_weight, target, linear_bias, token_weight, weight)
    if group is not None or any(map(checks.is_dtensor, tensors)):
        from pyloss.functional import _vocab_parallel as split

        if checks.is_dtensor(input):
            tensors = (split.laid_out(input, linear_weight), *tensors[1:])
            if group is None and any(p.is_shard() for p in tensors[0].placements):
                from pyloss.functional._linear_dtensors import loss_of_split_rows

                how = dict(
                    ignore_index=ignore_index, chunk=chunk, strategy=strategy,
                    accumulate_dtype=accumulate_dtype, filter=filter,
                )  # fmt: skip
                return loss_of_split_rows(tensors[:5], shift, settings, how, arguments)
        tensors, group, classes, rows_known = split.localize(tensors, group)
        input, linear_weight, target, linear_bias, token_weight, arguments["weight"] = tensors
        if group is not None:
            return split.linear_cross_entropy(
                input, linear_weight, target, linear_bias, token_weight, group, settings, arguments,
                shift=shift, dtensor_classes=classes, rows_known=rows_known,
            )  # fmt: skip
    layer = layers.checked_layer(input, linear_weight, linear_bias)
    if ignore_index is not None:
        _check_no_probabilities(target, *layer[:2])
    if settings.tiles is not None:
        _check_tiles(layer, target, settings, chunk, arguments)
    if layer[1].dim() > 2:
        return _k_dimensional(*layer, target, token_weight, shift, arguments)
    lead = tuple(input.shape[:-1])
    shift = layers.checked_shift(shift, lead)
    if not lead:
        target = rows.without_batch(target)
    rows.checked_smoothing(label_smoothing)
    layers.check_target_shape(target, layers.logits_like(input, *lead, linear_weight.shape[0]))
    if token_weight is not None:
        checks.check_token_weight(token_weight, lead)
    if linear_weight.shape[0] == 0:
        return _stored(*layer, target, token_weight, shift, arguments)
    if isinstance(temperature, Tensor):
        if softcap is not None:
            return _stored(*layer, target, token_weight, shift, arguments, temperature)
        input, linear_weight = layers.tempered(
            *layer, target, temperature, shift, arguments["ignore_index"]
        )
        layer, arguments["temperature"] = (input, linear_weight, None), 1.0
    return _by_rows(*layer, target, token_weight, shift, settings, arguments)


# Of label_smoothing, tau, z_loss, logit_scale, temperature, return_stats, empty, shift, chunk,
# strategy.
_PLAIN = (0.0, 1.0, 0.0, 1.0, 1.0, (), "nan", 0, "auto", "auto")


def _all_are(wanted, *values) -> bool:
    """Equal and of the same type: a tensor or True is no 1.0."""
    return all(type(v) is type(w) and v == w for v, w in zip(values, wanted))


def _by_rows(input, linear_weight, linear_bias, target, token_weight, shift, settings, arguments):
    """The checked layer, its rows flattened and its labels shifted, through the op."""
    classes, ignore = linear_weight.shape[0], arguments["ignore_index"]
    flat, target, token_weight, lead, shift = _flat(
        input, target, token_weight, shift, classes, ignore
    )
    like = layers.logits_like(input, flat.shape[0], classes)
    like, p = rows.prepare(like, target, token_weight=token_weight, **arguments)
    flat = flat.to(like.dtype)  # float64 probabilities make all of it float64
    tensors = op.Tensors(flat, linear_weight, linear_bias, *_with_divisor(p, flat))
    # Transforms must see into the op; a gradient of the probabilities needs all logits.
    dense = isinstance(target, Tensor) and target.is_floating_point()
    unfused = functorch_active() or forward_ad_active() or (dense and p.labels[0].requires_grad)
    if unfused:
        found = op.composed(tensors, p.options, p.codes, p.loss_dtype, p.wants)
    else:
        found = op.linear_cross_entropy(
            tensors, p.options, p.codes, p.loss_dtype, p.wants, settings
        )
    value, extras, index = found
    if p.divisor is not None and p.empty == "nan":
        value = value * torch.where(p.divisor == 0, torch.nan, 1.0).to(value.dtype)
    stats = rows.named_stats(p, extras, index, lead) if p.return_stats else None
    return _shaped(value, stats, lead, shift, arguments["reduction"])


def _stored(
    input, linear_weight, linear_bias, target, token_weight, shift, arguments, temperature=None
):
    """Through stored logits: a soft cap below a temperature of each row, which over the temperature
    is another cap in each; and a layer of no classes, where nothing is stored."""
    ignore, given = arguments["ignore_index"], input.dtype
    if temperature is not None:
        input, temperature = layers.scored_at(input, target, temperature, shift, ignore)
    bias = linear_bias if linear_bias is None else linear_bias.to(input.dtype)
    logits = F.linear(input, linear_weight.to(input.dtype), bias)
    if temperature is not None:
        softcap, scale = arguments["softcap"], arguments["logit_scale"]
        checks.check_range("softcap", softcap, 0.0, open_low=True)
        checks.check_range("logit_scale", scale, -math.inf)
        logits = softcap * torch.tanh(logits.to(temperature.dtype) * (scale / softcap))
        logits = logits / temperature.unsqueeze(-1)
        arguments.update(softcap=None, logit_scale=1.0, temperature=1.0)
    flat, target, token_weight, lead, shift = _flat(
        logits, target, token_weight, shift, logits.shape[-1], ignore
    )
    if arguments["loss_dtype"] is None:
        if isinstance(target, Tensor) and target.is_floating_point():
            given = torch.promote_types(given, target.dtype)
        arguments["loss_dtype"] = checks.result_dtype(given, input)
    found = rows.row_loss(flat, target, **{**arguments, "token_weight": token_weight})
    value, stats = found if arguments["return_stats"] else (found, None)
    if stats is not None:
        stats = RowStats(*(s if s is None else s.view(lead) for s in stats))
    return _shaped(value, stats, lead, shift, arguments["reduction"])


def _flat(x, target, token_weight, shift, classes, ignore):
    """(rows of x, labels, token weights, leading dimensions, shift): one row for each label."""
    lead = tuple(x.shape[:-1])
    dense = isinstance(target, Tensor) and target.is_floating_point()
    if shift and dense:  # probabilities have no value that says "ignored"
        x, target = x[..., : lead[-1] - shift, :], target[..., shift:, :]
        token_weight = token_weight if token_weight is None else token_weight[..., shift:]
        lead, shift = tuple(x.shape[:-1]), 0
    if dense:
        target = target.reshape(math.prod(lead), classes)
    else:
        target = layers.flat_labels(target, lead, shift, ignore)
    if token_weight is not None:
        token_weight = layers.shifted(token_weight, shift, 0.0).reshape(-1)
    # -1 is ambiguous without features
    return x.reshape(math.prod(lead), x.shape[-1]), target, token_weight, lead, shift


def _shaped(value, stats, lead, shift, reduction):
    """The result with the leading dimensions of the input."""
    if reduction == "none":
        value = layers.unshifted(value.view(lead), shift)
    if stats is None:
        return value
    return value, RowStats(*(s if s is None else layers.unshifted(s, shift) for s in stats))


def _with_divisor(p, input):
    """The labels with a tensor `num_items` divided into the token weights, so that the gradients
    need no second pass."""
    if p.divisor is None:
        return p.labels
    divisor = p.divisor.detach().to(input.device, accumulator_dtype(input.dtype))
    factor = 1 / divisor
    if p.empty == "zero":
        factor = torch.where(divisor == 0, 0.0, factor)
    *labels, token_weight = p.labels
    if token_weight is None:
        return (*labels, factor.expand(input.shape[0]))
    return (*labels, unless_zero(token_weight, token_weight * factor))


def _k_dimensional(input, linear_weight, linear_bias, target, token_weight, shift, arguments):
    """A layer with several outputs per class, through stored logits."""
    if shift:
        raise ValueError(f"shift needs a weight of two dimensions, got {linear_weight.dim()}")
    if isinstance(arguments["temperature"], Tensor):
        raise ValueError(
            f"a tensor temperature needs a weight of two dimensions, got {linear_weight.dim()}"
        )
    classes, *outputs, features = linear_weight.shape
    if input.dim() != 2:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {features}), got unbatched input with shape "
            f"{tuple(input.shape)}"
            if input.dim() < 2
            else f"expected input with dimensionality 1 or 2, got {input.dim()}"
        )
    weight = linear_weight.reshape(-1, features).to(input.dtype)
    bias = None if linear_bias is None else linear_bias.reshape(-1).to(input.dtype)
    logits = F.linear(input, weight, bias).view(input.shape[0], classes, *outputs)
    return rows.row_loss(logits, target, token_weight=token_weight, **arguments)


def _check_no_probabilities(target, input, weight) -> None:
    """As torch, which knows probabilities by their shape: one dimension less are float labels."""
    y = target[0] if isinstance(target, tuple) and target else target
    if (
        isinstance(y, Tensor)
        and y.is_floating_point()
        and y.dim() == input.dim() + weight.dim() - 2
    ):
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")


def _check_tiles(layer, target, settings, chunk, arguments) -> None:
    """What the tile kernels do not have. The same on every device, so that a call is portable."""
    input, weight, _ = layer
    y = target[0] if isinstance(target, tuple) and target else target
    smoothing, tau = arguments["label_smoothing"], arguments["tau"]
    capped = arguments["softcap"] is not None
    stats = [s for s in arguments["return_stats"] if s in ("argmax", "correct", "rank")]
    refused = {
        "a target of class probabilities": isinstance(y, Tensor) and y.is_floating_point(),
        "a MixUp target": isinstance(target, tuple),
        "a linear_weight of more than two dimensions": weight.dim() > 2,
        "float64": input.dtype == torch.float64,
        "label_smoothing with tau other than 1": smoothing and tau != 1,
        f"return_stats {', '.join(map(repr, stats))}": stats,
        f"chunk={chunk}": chunk != "auto",
        "a tensor temperature with softcap": capped
        and isinstance(arguments["temperature"], Tensor),
        "label_smoothing with softcap": settings.tiles > 0 and smoothing and capped,
    }
    name = "filter" if settings.tiles > 0 else "strategy='tiles'"
    for what, found in refused.items():
        if found:
            raise ValueError(f"{name} cannot be used with {what}")
    if settings.strategy == "tiles" and not op.tiles().runs_on(input):
        raise RuntimeError(f"strategy='tiles' needs CUDA tensors, got {input.device.type}")


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    chunk: int | str = "auto",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probability of each token under ``softmax(hidden @ weight.T + bias)``, by chunks.

    What preference and reinforcement-learning trainers need of a language model, without its
    logits; differentiable, as is the entropy of each distribution.

    .. math::
        \log p_t = z_{t, y_t} - \mathrm{lse}(z_t), \qquad H_t = -\sum_j p_{tj} \log p_{tj},
        \qquad z_t = (W h_t + b) / \mathrm{temperature}

    Args:
        hidden: hidden states ``(..., D)``; float32, bfloat16, float16 or float64.
        weight: ``(V, D)``, dtype of ``hidden``.
        tokens: class indices, ``(...)``; int64, uint8 or int32.
        bias: ``(V)``.
        temperature: divides the logits, > 0: a number, or a tensor as in
            :func:`fused_linear_cross_entropy`.
        return_entropy: also return the entropies.
        softcap, logit_scale: as in :func:`fused_cross_entropy`.
        ignore_index: tokens with this value get 0, and their hidden states are not read.
        shift: 1 scores position t against ``tokens[..., t + 1]``; the result then has one position
            less. As in :func:`fused_linear_cross_entropy`.
        chunk, group: as there.

    Returns:
        Log-probabilities of the shape of ``tokens`` (the last dimension shorter by ``shift``), in
        float32, float64 for float64 input; with ``return_entropy`` the pair of them and the
        entropies.

    Raises:
        As :func:`fused_linear_cross_entropy`, where ``hidden`` is ``input``, ``weight``
        ``linear_weight``, and ``tokens`` ``target``.

    Example:
        >>> import torch, pyloss
        >>> hidden = torch.randn(2, 16, 32, requires_grad=True)
        >>> head, tokens = torch.randn(1000, 32), torch.randint(1000, (2, 16))
        >>> logprobs, entropy = pyloss.token_logprobs(
        ...     hidden, head, tokens, shift=1, return_entropy=True
        ... )
        >>> logprobs.shape
        torch.Size([2, 15])
        >>> (-logprobs.mean() - 0.01 * entropy.mean()).backward()

    Reference:
        Wijmans et al. Cut Your Losses in Large-Vocabulary Language Models. arXiv 2411.09009.
    """
    if isinstance(tokens, Tensor) and tokens.is_floating_point():
        raise RuntimeError(
            f"tokens must hold class indices, integers, got {tokens.dtype}; tokens.long()"
        )
    checks.check_flag("return_entropy", return_entropy)
    wide = isinstance(hidden, Tensor) and hidden.dtype == torch.float64
    found = fused_linear_cross_entropy(
        hidden,
        weight,
        tokens,
        bias,
        ignore_index=ignore_index,
        reduction="none",
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        return_stats=("logprob", "entropy") if return_entropy else (),
        loss_dtype=torch.float64 if wide else torch.float32,
        shift=shift,
        chunk=chunk,
        group=group,
    )
    return (found[1].logprob, found[1].entropy) if return_entropy else 0.0 - found  # not -0.0
