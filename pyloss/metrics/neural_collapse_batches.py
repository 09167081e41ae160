"""Neural collapse over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _neural_collapse as collapse
from pyloss.functional._class_stats import (
    ClassStats,
    merged,
    merged_scatter,
    over_ranks,
    scatter_over_ranks,
    total_over_ranks,
)
from pyloss.functional._row_checks import check_rows
from pyloss.metrics.neural_collapse import check_logits, disagreements


class NeuralCollapse(NamedTuple):
    """What :meth:`NeuralCollapseMetrics.compute` finds: 0-d tensors, NaN where something is not
    known. :func:`pyloss.visualize.draw_collapse` draws a sequence of them.

    Example:
        >>> import torch, pyloss
        >>> metrics = pyloss.metrics.NeuralCollapseMetrics(3, 5)
        >>> metrics.update(torch.randn(30, 5), torch.arange(30) % 3)
        >>> found = metrics.compute()
        >>> bool(found.nc2_w.isnan())  # no weight was given
        True
    """

    nc1: Tensor  #: tr(Sigma_W pinv(Sigma_B)) / K
    nc1_trace: Tensor  #: tr(Sigma_W) / tr(Sigma_B)
    cdnv: Tensor  #: mean over pairs of classes
    nc2_w: Tensor  #: of the classifier
    nc2_h: Tensor  #: of the class means
    nc3: Tensor  #: alignment of the two
    nc4: Tensor  #: share of samples of `compare` whose class is not that of the nearest mean
    equinorm_w: Tensor  #: spread of the lengths of the classifier's rows
    equinorm_h: Tensor  #: of the class means
    equiangle_w: Tensor  #: largest error of a cosine between rows
    equiangle_h: Tensor  #: between class means


class NeuralCollapseMetrics:
    r"""NC1 to NC4 of all batches together: counts, means and scatter of the classes alone are kept.

    .. math:: n = n_a + n_b, \qquad \mu = \mu_a + \tfrac{n_b}{n} \delta, \qquad
              S = S_a + S_b + \tfrac{n_a n_b}{n} \delta \delta^\top, \qquad
              \delta = \mu_b - \mu_a

    for each class, in float64: large means cost no digits. What is measured is that of
    :func:`pyloss.metrics.nc1`, :func:`pyloss.metrics.cdnv`, :func:`pyloss.metrics.nc2`,
    :func:`pyloss.metrics.nc3`, :func:`pyloss.metrics.nc4`, :func:`pyloss.metrics.equinorm`,
    :func:`pyloss.metrics.equiangle`. Class means are centred for the target ``"etf"``. Classes
    without samples count nowhere.

    Args:
        num_classes: K.
        num_features: D.
        target: ``"etf"`` or ``"of"``; or three targets for classifier, class means and their
            product, each as for :func:`pyloss.metrics.nc2`: ``(found.w_norm2, found.h_norm2,
            found.logits_diag)`` of :func:`pyloss.analysis.ufm_minimizer` for unequal classes.
        scatter: keep the D x D scatter, which ``nc1`` needs. False: it is NaN, and ``nc1_trace``
            stays.
        ignore_index: the label of samples that are left out.
        group: a process group: ``compute`` is of the samples of all its ranks, which must all call
            it. Each keeps its own.

    Shape:
        - features: ``(N, D)``, floating; labels: ``(N,)``, integers
        - weight of ``compute``: ``(K, D)``
        - logits of ``compare``: ``(N, K)``

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range, tensors that do not fit.
        IndexError: a label that is no class (CPU).
        RuntimeError: ``compute`` before ``update``, ``compare`` before ``compute``.

    Example:
        >>> import torch, pyloss
        >>> net, head = torch.nn.Linear(8, 5), torch.nn.Linear(5, 3)
        >>> batches = [(torch.randn(12, 8), torch.arange(12) % 3) for _ in range(2)]
        >>> metrics = pyloss.metrics.NeuralCollapseMetrics(3, 5)
        >>> for x, y in batches:
        ...     metrics.update(net(x), y)
        >>> found = metrics.compute(head.weight)
        >>> for x, y in batches:  # NC4 needs the means of all: a second pass
        ...     metrics.compare(head(net(x)), net(x))
        >>> found = metrics.compute(head.weight)

    Reference:
        Papyan, Han, Donoho. arXiv 2008.08186. Dang et al. arXiv 2301.00437.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        target: str | Sequence[Tensor] = "etf",
        *,
        scatter: bool = True,
        ignore_index: int = -100,
        group: Any = None,
    ) -> None:
        self.num_classes = checks.checked_count("num_classes", num_classes, 1)
        self.num_features = checks.checked_count("num_features", num_features, 1)
        self.target = _checked_targets(target, self.num_classes)
        self.scatter = checks.checked_flag("scatter", scatter)
        self.ignore_index = checks.checked_integer("ignore_index", ignore_index)
        self.group = group
        self.reset()

    def __repr__(self) -> str:
        target = self.target if isinstance(self.target, str) else "..."
        return (
            f"NeuralCollapseMetrics({self.num_classes}, {self.num_features}, target={target!r}, "
            f"scatter={self.scatter})"
        )

    def reset(self) -> None:
        """Forgets everything."""
        self._stats: ClassStats | None = None
        self._scatter: Tensor | None = None
        self._found: ClassStats | None = None  # of the last compute
        self._compared: Tensor | None = None  # samples that disagree, samples

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds a batch; what ``compare`` has counted is forgotten."""
        y, _ = collapse.checked_samples(features, labels, self.num_classes, self.ignore_index)
        self._check_width(features)
        with torch.no_grad(), checks.without_autocast(features):
            stats = collapse.stats_of(features, y, self.num_classes, torch.float64)
            scatter = None
            if self.scatter:
                off = collapse.residuals(features, y, stats)
                scatter = off.T @ off
            self._add(stats, scatter)

    def _add(self, stats: ClassStats, scatter: Tensor | None) -> None:
        if self._stats is not None:
            own = ClassStats(*(t.to(stats.count.device) for t in self._stats))
            if scatter is not None:
                own_scatter = self._scatter.to(scatter.device)
                scatter = merged_scatter(own, own_scatter, stats, scatter)
            stats = merged(own, stats)
        self._stats, self._scatter = stats, scatter
        self._found = self._compared = None

    def compare(self, logits: Tensor, features: Tensor) -> None:
        """Adds a batch to NC4: logits against the nearest of the means that the last ``compute``
        had. All samples count, also those whose label ``update`` leaves out."""
        if self._found is None:
            raise RuntimeError("NeuralCollapseMetrics.compare() before compute()")
        check_rows("features", features)
        self._check_width(features)
        check_logits(logits, features, self.num_classes)
        with torch.no_grad():
            count, means, _ = (t.to(features.device) for t in self._found)
            wrong = disagreements(logits, features, means, count > 0)
            batch = torch.stack([wrong, torch.full_like(wrong, len(features))])
            before = self._compared
            self._compared = batch if before is None else before.to(batch.device) + batch

    def _check_width(self, features: Tensor) -> None:
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"features must be (N, {self.num_features}), got {list(features.shape)}"
            )

    def compute(self, weight: Tensor | None = None) -> NeuralCollapse:
        """:class:`pyloss.metrics.NeuralCollapse` of all samples so far, and of the classifier's
        weight, if it is given; a collective call with a ``group``."""
        if self._stats is None and self.group is None:
            raise RuntimeError("NeuralCollapseMetrics.compute() before update()")
        if weight is not None:
            check_rows("weight", weight)
            if weight.shape != (self.num_classes, self.num_features):
                raise ValueError(
                    f"weight must be {[self.num_classes, self.num_features]}, got "
                    f"{list(weight.shape)}"
                )
        with torch.no_grad():
            device = "cpu" if weight is None else weight.device
            stats, scatter, compared = self._of_all_ranks(device)
            self._found = stats
            with checks.without_autocast(stats.mean):
                return self._measured(stats, scatter, compared, weight)

    def _measured(self, stats, scatter, compared, weight) -> NeuralCollapse:
        present = stats.count > 0
        nan = stats.mean.new_full((), math.nan)
        off = collapse.off_centre(stats)
        angle = self.target if isinstance(self.target, str) else "of"
        means = off if angle == "etf" else stats.mean
        of_w, of_h, of_both = self._targets(stats.mean)
        found = dict.fromkeys(NeuralCollapse._fields, nan)
        found.update(
            nc1_trace=collapse.nc1_trace(stats),
            cdnv=collapse.mean_of_pairs(collapse.cdnv_of(stats), present),
            nc2_h=collapse.off_target(means @ means.T, of_h, present),
            equinorm_h=collapse.norm_spread(means, present),
            equiangle_h=collapse.angle_error(means, angle, present),
        )
        if scatter is not None:
            found["nc1"] = collapse.nc1_pinv(stats, off @ scatter @ off.T)
        if compared is not None:
            found["nc4"] = compared[0] / compared[1]
        if weight is not None:
            w = weight.detach().to(means)
            found.update(
                nc2_w=collapse.off_target(w @ w.T, of_w),
                nc3=collapse.off_target(w @ means.T, of_both, present),
                equinorm_w=collapse.norm_spread(w),
                equiangle_w=collapse.angle_error(w, angle),
            )
        return NeuralCollapse(**found)

    def _targets(self, like: Tensor) -> tuple[str | Tensor, ...]:
        if isinstance(self.target, str):
            return (self.target,) * 3
        moved = (t if isinstance(t, str) else t.to(like.device) for t in self.target)
        return tuple(collapse.checked_target("target", t, self.num_classes, like) for t in moved)

    def _of_all_ranks(self, device) -> tuple[ClassStats, Tensor | None, Tensor | None]:
        if self.group is None:
            return self._stats, self._scatter, self._compared
        own, scatter, compared = self._stats, self._scatter, self._compared
        if own is None:  # a rank that has had no samples
            zero = torch.zeros(
                self.num_classes, self.num_features, dtype=torch.float64, device=device
            )
            own = ClassStats(zero[:, 0].clone(), zero, zero.clone())
            scatter = zero.new_zeros(2 * (self.num_features,))
        if self.scatter:
            stats, scatter = scatter_over_ranks(own, scatter, self.group)
        else:
            stats = over_ranks(own, self.group)
        if not bool(stats.count.any()):
            raise RuntimeError("NeuralCollapseMetrics.compute() before update() of any rank")
        compared = own.count.new_zeros(2) if compared is None else compared
        return stats, scatter if self.scatter else None, total_over_ranks(compared, self.group)

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept of this process's samples, as copies."""
        if self._stats is None:
            return {}
        state = {name: t.clone() for name, t in self._stats._asdict().items()}
        return state if self._scatter is None else {**state, "scatter": self._scatter.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what ``state_dict`` gave, in place of what there was."""
        self.reset()
        if not state:
            return
        k, d = self.num_classes, self.num_features
        shapes = {"count": (k,), "mean": (k, d), "ssd": (k, d)}
        if self.scatter:
            shapes["scatter"] = (d, d)
        found = {name: tuple(t.shape) for name, t in state.items()}
        if found != shapes:
            raise ValueError(f"the state must have the shapes {shapes}, got {found}")
        kept = {name: t.detach().clone().to(torch.float64) for name, t in state.items()}
        self._scatter = kept.pop("scatter", None)
        self._stats = ClassStats(**kept)


def _checked_targets(target, classes: int) -> str | tuple[str | Tensor, ...]:
    if isinstance(target, str):
        checks.check_one_of("target", target, ("etf", "of"))
        return target
    if isinstance(target, Tensor) or not isinstance(target, Sequence) or len(target) != 3:
        raise ValueError(
            "target must be 'etf', 'of', or three targets for classifier, means and product, got "
            f"{type(target).__name__}"
        )
    for t in target:
        like = t if isinstance(t, Tensor) and t.is_floating_point() else torch.zeros(())
        collapse.checked_target("target", t, classes, like)
    return tuple(target)
