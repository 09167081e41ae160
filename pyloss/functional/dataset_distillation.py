"""Distillation of data sets: a few images that train a network as the whole data set does.

Not to be confused with `distillation.py`, where a language model learns from another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._row_checks import check_labels, check_rows
from pyloss.functional._sums import summed
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import functorch_active

#: The parameters of a network: all in one tensor, or one tensor each.
Parameters = Tensor | Iterable[Tensor]


# --------------------------------------------------------------------------------------------------
# Losses


def trajectory_matching_loss(
    theta: Parameters,
    target: Parameters,
    start: Parameters,
    mids: Sequence[tuple[Parameters, Parameters]] = (),
    *,
    mid_weight: float | str = 1.0,
) -> Tensor:
    r"""How far a student ends from the parameters of an expert, beside the way of the expert.

    .. math:: \ell = \frac{\|\theta_N - \theta^*\|^2}{\|\theta_0 - \theta^*\|^2}
              + \sum_i \beta_i \frac{\|\theta_{n_i} - \theta^*_i\|^2}
                                    {\|\theta_0 - \theta^*_i\|^2}

    The second sum matches intermediate steps.

    Args:
        theta: parameters of the student after its steps on the distilled data, one tensor or
            several, floating.
        target: those of the expert after its epochs, of the same shapes.
        start: those both have started from; with :func:`perturb_weights` the perturbed ones.
        mids: pairs ``(student, expert)`` at times in between, in their order.
        mid_weight: beta >= 0 of every pair; ``"adaptive"``: i / (1 + number of pairs) of the i-th,
            from 1 on.

    Returns:
        The loss, 0-d, of the dtype of ``theta``; float32 for half types under autocast. Gradients
        for ``theta`` and the students of ``mids`` alone.

    Raises:
        TypeError: what is no floating tensor; a weight that is no number.
        ValueError: shapes that differ; no parameters; an expert that has not moved (CPU, outside of
            compiled code and transforms; elsewhere the loss is infinite or NaN).
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> start, target = torch.zeros(3), torch.ones(3)
        >>> theta = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
        >>> pyloss.functional.trajectory_matching_loss(theta, target, start)
        tensor(0.3333, grad_fn=<DivBackward0>)

    Reference:
        Cazenavette et al. Dataset Distillation by Matching Training Trajectories. arXiv 2203.11932.
        Shen et al. Efficient Dataset Distillation through Alignment with Smooth and High-Quality
        Expert Trajectories. arXiv 2310.10541.
    """
    weights = _mid_weights(mids, mid_weight)
    theta = _checked_list("theta", theta)
    start = _checked_list("start", start, theta)
    loss = _matching(theta, _checked_list("target", target, theta), start, "target")
    for i, (pair, weight) in enumerate(zip(mids, weights)):
        student = _checked_list(f"the student of mids[{i}]", pair[0], theta)
        name = f"the expert of mids[{i}]"
        loss = loss + weight * _matching(student, _checked_list(name, pair[1], theta), start, name)
    dtype = theta[0].dtype
    return loss.to(checks.result_dtype(dtype, theta[0]))


def _mid_weights(mids, mid_weight) -> list[float]:
    if not isinstance(mids, Sequence) or isinstance(mids, str):
        raise TypeError(f"mids must be a sequence of pairs, got {type(mids).__name__}")
    for i, pair in enumerate(mids):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"mids[{i}] must be a pair (student, expert)")
    if isinstance(mid_weight, str):
        checks.check_one_of("mid_weight", mid_weight, ("adaptive",))
        return [i / (1 + len(mids)) for i in range(1, 1 + len(mids))]
    checks.check_range("mid_weight", mid_weight, 0.0)
    return [mid_weight] * len(mids)


def _checked_list(name: str, given, like: list[Tensor] | None = None) -> list[Tensor]:
    if isinstance(given, Tensor):
        tensors = [given]
    elif isinstance(given, Iterable) and not isinstance(given, str):
        tensors = list(given)
    else:
        raise TypeError(f"{name} must be a Tensor or several, got {type(given).__name__}")
    if not tensors:
        raise ValueError(f"{name} must hold one Tensor at least, got none")
    for i, t in enumerate(tensors):
        where = name if isinstance(given, Tensor) else f"{name}[{i}]"
        checks.check_floating(where, t)
        if like is not None and i < len(like):
            checks.check_device(where, t, like[i], f"theta[{i}]")
            if t.shape != like[i].shape:
                raise ValueError(
                    f"{where} must have the shape of that of theta, {list(like[i].shape)}, got "
                    f"{list(t.shape)}"
                )
    if like is not None and len(tensors) != len(like):
        raise ValueError(f"{name} must hold {len(like)} Tensors as theta does, got {len(tensors)}")
    return tensors


def _matching(student: list[Tensor], expert: list[Tensor], start: list[Tensor], name: str):
    with torch.no_grad():
        way = _squared_distance(start, expert)
    if checks.can_look_at(way) and way == 0:
        raise ValueError(f"{name} equals start: an expert that has not moved has no scale")
    return _squared_distance(student, [t.detach() for t in expert]) / way


def _squared_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """In float32 at least."""
    wide = accumulator_dtype(a[0].dtype)
    a, b = ([t.to(wide) for t in side] for side in (a, b))
    if functorch_active():  # whose vmap knows no list of tensors
        squares = [(x - y).square() for x, y in zip(a, b)]
    else:
        difference = torch._foreach_sub(a, b)
        squares = torch._foreach_mul(difference, difference)
    return torch.stack([summed(s) for s in squares]).sum()


def lipschitz_gradient_penalty(
    inputs: Tensor,
    outputs: Tensor | Callable[[Tensor], Tensor],
    weight: float = 2.0,
    target_norm: float = 1.0,
    *,
    dims: int | Sequence[int] | None = None,
) -> Tensor:
    r"""Keeps the gradient of a network with respect to its inputs at one length.

    .. math:: \ell = w\, \mathbb{E}\, \big(\big\| \nabla_x \textstyle\sum_c f_c(x) \big\|
              - n\big)^2

    Experts that are trained with it move more evenly, and are easier to match.

    Args:
        inputs: x, a batch ``(B, *)``, floating.
        outputs: f: the network, or what it has made of ``inputs``, which must require a gradient
            then. The network works under ``torch.compile`` and the transforms of ``torch.func``,
            but must not change its buffers, as BatchNorm does in training: give what it made there.
        weight: w >= 0.
        target_norm: n >= 0.
        dims: dimensions of x that a norm runs over; default: all but the first. The authors' code
            has 1, the channels.

    Returns:
        The penalty, 0-d, of the dtype of ``inputs``; float32 for half types under autocast. The
        mean over nothing is NaN.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number or a dimension out of range; ``inputs`` of no dimension.
        RuntimeError: ``outputs`` are a tensor that does not depend on ``inputs``.

    Example:
        >>> import torch, pyloss
        >>> net = torch.nn.Linear(4, 3)
        >>> x = torch.randn(8, 4)
        >>> pyloss.functional.lipschitz_gradient_penalty(x, net).backward()
        >>> net.weight.grad.shape
        torch.Size([3, 4])

    Reference:
        Shen et al. arXiv 2310.10541. Gulrajani et al. Improved Training of Wasserstein GANs. arXiv
        1704.00028.
    """
    checks.check_floating("inputs", inputs)
    checks.check_has_dimension("inputs", inputs)
    checks.check_range("weight", weight, 0.0)
    checks.check_range("target_norm", target_norm, 0.0)
    along = _checked_dims(dims, inputs)
    slope = _input_gradient(inputs, outputs).to(accumulator_dtype(inputs.dtype))
    squares = slope.square()
    # The root has a gradient at 0 too, where a network may begin.
    norm = ((squares.sum(along) if along else squares) + 1e-12).sqrt()
    off = (norm - target_norm).square()
    loss = weight * (summed(off) / off.new_full((), off.numel()))
    return loss.to(checks.result_dtype(inputs.dtype, inputs))


def _checked_dims(dims, inputs: Tensor) -> tuple[int, ...]:
    if dims is None:
        return tuple(range(1, inputs.dim()))
    given = tuple(dims) if isinstance(dims, Sequence) else (dims,)
    found = tuple(checks.checked_integer("dims", d) for d in given)
    low = -inputs.dim()
    for d in found:
        if not low <= d < inputs.dim():
            raise ValueError(f"dims must be in [{low}, {inputs.dim() - 1}], got {d}")
    if len({d % inputs.dim() for d in found}) < len(found):
        raise ValueError(f"dims must differ, got {list(found)}")
    return found


def _input_gradient(inputs: Tensor, outputs) -> Tensor:
    if callable(outputs):  # a tensor is not
        value, pull = torch.func.vjp(outputs, inputs)
        checks.check_tensor("the result of outputs", value)
        return pull(torch.ones_like(value))[0]
    checks.check_tensor("outputs", outputs)
    if not (inputs.requires_grad and outputs.requires_grad):
        raise RuntimeError(
            "outputs must be made of inputs that require a gradient; or give the network itself"
        )
    (slope,) = torch.autograd.grad(
        outputs, inputs, torch.ones_like(outputs), create_graph=True, allow_unused=True
    )
    if slope is None:
        raise RuntimeError("outputs do not depend on inputs")
    return slope


# --------------------------------------------------------------------------------------------------
# Weights and schedules


def clip_schedule(epoch: int, *, first: float = 0.5, epochs: int = 10) -> float:
    r"""Factor of the loss in the first epochs of an expert, so that these move it less.

    .. math:: d_e = d_0 + (1 - d_0) \frac{e}{E} \quad (e < E), \qquad 1 \text{ after}

    Args:
        epoch: e >= 0.
        first: d_0 in (0, 1].
        epochs: E >= 0.

    Returns:
        The factor: with the defaults 0.5, 0.55, ..., 0.95, 1, 1, ...

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.

    Example:
        >>> import pyloss
        >>> [pyloss.functional.clip_schedule(e) for e in (0, 1, 9, 10)]
        [0.5, 0.55, 0.95, 1.0]

    Reference:
        Shen et al. arXiv 2310.10541.
    """
    epoch = checks.checked_count("epoch", epoch)
    epochs = checks.checked_count("epochs", epochs)
    checks.check_range("first", first, 0.0, open_low=True)
    if first > 1:
        raise ValueError(f"first must be in (0, 1], got {first}")
    return 1.0 if epoch >= epochs else first + (1 - first) * epoch / epochs


def balanced_loss_weight(
    start: int, max_start: int, *, base: float = 5.0, offset: float = 8.0
) -> float:
    r"""Factor of the student's inner loss by the epoch of the expert that it starts from.

    .. math:: w = \log_b(s - h + o) \quad (s \ge h), \qquad
              w = 1 / \log_b(h - s + o) \quad (s < h), \qquad h = s_\mathrm{max} / 2

    Late experts have small gradients, and early ones large: the factor brings them together.

    Args:
        start: s in [0, max_start].
        max_start: largest epoch to start from, > 0.
        base: b > 1.
        offset: o > 1.

    Returns:
        The factor, > 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.

    Example:
        >>> import pyloss
        >>> [round(pyloss.functional.balanced_loss_weight(s, 20), 2) for s in (0, 10, 20)]
        [0.56, 1.29, 1.8]

    Reference:
        Shen et al. arXiv 2310.10541.
    """
    start = checks.checked_count("start", start)
    max_start = checks.checked_count("max_start", max_start)
    if not 0 < max_start:
        raise ValueError("max_start must be > 0, got 0")
    if start > max_start:
        raise ValueError(f"start must be in [0, {max_start}], got {start}")
    for name, value in (("base", base), ("offset", offset)):
        checks.check_range(name, value, 1.0, open_low=True)
    away = start - max_start / 2
    factor = math.log(abs(away) + offset) / math.log(base)
    return factor if away >= 0 else 1 / factor


def perturb_weights(
    params: Iterable[Tensor],
    alpha: float = 1.0,
    *,
    min_dim: int = 4,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    r"""Parameters beside those of an expert, for a student to start from.

    .. math:: \theta' = \theta + \alpha \frac{d}{\|d\|_F} \odot \theta, \qquad
              d \sim \mathcal{N}(0, 1)

    Args:
        params: the parameters, floating.
        alpha: >= 0.
        min_dim: tensors of fewer dimensions stay: 4 perturbs convolutions, 2 all weights.
        generator: of d.

    Returns:
        A new list; what stays is the same tensor. Gradients for ``params``.

    Raises:
        TypeError: what are no floating tensors.
        ValueError: a number out of range; no parameters.

    Example:
        >>> import torch, pyloss
        >>> net = torch.nn.Conv2d(3, 8, 3)
        >>> weight, bias = pyloss.functional.perturb_weights(net.parameters(), alpha=1.0)
        >>> bias is net.bias, bool((weight - net.weight).norm() > 0)
        (True, True)

    Reference:
        Shen et al. arXiv 2310.10541.
    """
    if isinstance(params, Tensor):
        raise TypeError("params must be several Tensors, got one")
    params = _checked_list("params", params)
    checks.check_range("alpha", alpha, 0.0)
    min_dim = checks.checked_count("min_dim", min_dim)

    def moved(t: Tensor) -> Tensor:
        wide = accumulator_dtype(t.dtype)
        drawn = t.device if generator is None else generator.device
        d = torch.randn(t.shape, generator=generator, dtype=wide, device=drawn).to(t.device)
        scale = alpha * d / d.norm() if t.numel() else d
        return (t.to(wide) * (1 + scale)).to(t.dtype)

    return [moved(t) if t.dim() >= min_dim else t for t in params]


# --------------------------------------------------------------------------------------------------
# Which samples to begin with


@torch.no_grad()
def representative_indices(
    features: Tensor,
    labels: Tensor,
    per_class: int,
    *,
    clusters: int | None = None,
    iterations: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Samples that stand for their class: those next to the centres of its clusters.

    k-means, seeded by k-means++, on the features of each class; of each cluster the nearest samples
    to its centre, none of them twice.

    Args:
        features: logits of an expert, as a rule, ``(N, D)``, floating.
        labels: class of each, ``(N,)``, integer.
        per_class: number of samples of each class, >= 1.
        clusters: k of each class, a divisor of ``per_class``; default ``per_class``.
        iterations: of k-means, >= 0.
        generator: of the first centres.

    Returns:
        ``(C * per_class,)``, int64: indices, class by class in the order of the labels.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit; a number out of range; a class of fewer samples than
            ``per_class``; features that are not finite (CPU).
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> labels = torch.arange(3).repeat_interleave(20)
        >>> logits = torch.randn(60, 3) + torch.eye(3)[labels]
        >>> index = pyloss.functional.representative_indices(logits, labels, per_class=2)
        >>> labels[index]
        tensor([0, 0, 1, 1, 2, 2])

    Reference:
        Shen et al. arXiv 2310.10541. Arthur, Vassilvitskii. k-means++: The Advantages of Careful
        Seeding (2007).
    """
    check_rows("features", features)
    check_labels(labels, features, like_name="features")
    per_class = checks.checked_count("per_class", per_class, 1)
    clusters = per_class if clusters is None else checks.checked_integer("clusters", clusters)
    if clusters < 1 or per_class % clusters:
        raise ValueError(f"clusters must divide per_class, {per_class}, got {clusters}")
    iterations = checks.checked_count("iterations", iterations)
    x = features.to(accumulator_dtype(features.dtype))
    if checks.can_look_at(x) and not bool(x.isfinite().all()):
        raise ValueError("features must not contain NaN or infinities")
    if x.numel():  # squares of very large or small numbers have no place in the dtype
        largest = x.abs().amax()
        x = x / torch.where(largest > 0, largest, 1.0)
    chosen = []
    for label in labels.unique():
        own = (labels == label).nonzero().squeeze(1)
        if own.numel() < per_class:
            raise ValueError(
                f"class {int(label)} has {own.numel()} samples, fewer than per_class, {per_class}"
            )
        centres = _k_means(x[own], clusters, iterations, generator)
        chosen.append(own[_nearest(x[own], centres, per_class // clusters)])
    return torch.cat(chosen) if chosen else labels.new_zeros(0, dtype=torch.int64)


def _k_means(x: Tensor, k: int, iterations: int, generator) -> Tensor:
    """Centres, (k, D)."""
    drawn = x.device if generator is None else generator.device

    def pick(weights: Tensor) -> Tensor:
        found = torch.multinomial(checks.widened(weights).to(drawn), 1, generator=generator)
        return x[found.to(x.device)]

    centres = pick(x.new_ones(x.shape[0]))
    for _ in range(1, k):
        far = _squared(x, centres).min(1).values
        # Where all samples sit on centres, any of them.
        centres = torch.cat([centres, pick(torch.where(far.max() > 0, far, 1.0))])
    for _ in range(iterations):
        member = torch.nn.functional.one_hot(_squared(x, centres).argmin(1), k).to(x.dtype)
        count = member.sum(0).unsqueeze(1)
        moved = member.T @ x / count.clamp(min=1)
        centres = torch.where(count > 0, moved, centres)  # an empty cluster stays
    return centres


def _squared(x: Tensor, centres: Tensor) -> Tensor:
    return (x.unsqueeze(1) - centres).square().sum(2)


def _nearest(x: Tensor, centres: Tensor, each: int) -> Tensor:
    """The `each` samples next to every centre, those that an earlier centre has taken left out."""
    distance = _squared(x, centres)
    taken = []
    for column in distance.T:
        column = column.clone()
        if taken:
            column[torch.cat(taken)] = torch.inf
        taken.append(column.topk(each, largest=False, sorted=True).indices)
    return torch.cat(taken)
