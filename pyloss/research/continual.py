"""Analytic continual learning: ridge regression that takes its data in any pieces, old and new
classes mixed, and ends where training on all of them at once would (G-ACIL, arXiv 2403.15706)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyloss.functional import _checks as checks
from pyloss.functional._row_checks import check_labels, check_rows
from pyloss.research._state import StateModule

__all__ = ["AnalyticClassifier", "RecursiveRidge"]

_ADVICE = "raise gamma, or scale the features down"


class RecursiveRidge(StateModule):
    r"""Ridge regression that learns batch after batch, and keeps no sample.

    .. math:: R &\leftarrow R - R X^\top (I + X R X^\top)^{-1} X R, \qquad R_0 = I / \gamma \\
              W &\leftarrow W + R X^\top (Y - X W)

    After any batches, of any sizes and in any order, W is the minimiser of :math:`\lVert Y - X W
    \rVert^2 + \gamma \lVert W \rVert^2` over all the samples there were. A class that comes later
    begins with a column of zeros, which is what it has in the joint problem too; it may share a
    batch with old ones.

    A batch of at most D samples costs O(N^2 D + N D^2), by a Cholesky factorisation of N x N; a
    larger one takes the primal form, with D x D factors, in O(N D^2 + D^3).

    Args:
        in_features: D.
        gamma: > 0, weight of the penalty.
        bias: whether a feature that is always 1 is added; it is penalised as the others are.
        dtype: of the state, ``torch.float64`` or ``torch.float32``. The D x D buffer takes 512 MiB
            for D = 8192 in float64; the equality to the joint
            solution holds to the precision of the dtype times the condition of the problem.

    Shape:
        - input: ``(..., D)``, floating
        - output: ``(..., C)``, logits for the C classes so far; dtype of the input, float32 for
          half types under autocast

    Attributes:
        R: inverse of :math:`X^\top X + \gamma I`, ``(D, D)``; one more with ``bias``.
        W: weights, ``(D, C)``. Both are buffers; a state_dict with another C can be loaded.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an option out of range, shapes that do not fit, a sample that is not finite.
        IndexError: a negative label.
        RuntimeError: numbers that overflow or lose their meaning, with an advice, the state being
            as before the batch; logits before any class.

    Example:
        >>> import torch
        >>> from pyloss.research.continual import RecursiveRidge
        >>> x, y = torch.randn(60, 5), torch.arange(60) % 3
        >>> ridge = RecursiveRidge(5, gamma=1.0)
        >>> for task in range(3):  # one class after the other
        ...     _ = ridge.fit_batch(x[y == task], y[y == task])
        >>> torch.testing.assert_close(ridge(x), RecursiveRidge(5, gamma=1.0).fit_batch(x, y)(x))

    Reference:
        Zhuang et al. G-ACIL: Analytic Learning for Exemplar-Free Generalized Class Incremental
        Learning. arXiv 2403.15706.
    """

    R: Tensor
    W: Tensor

    def __init__(
        self,
        in_features: int,
        gamma: float = 0.1,
        bias: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        in_features = checks.checked_count("in_features", in_features, 1)
        checks.check_range("gamma", gamma, 0.0, open_low=True)
        bias = checks.checked_flag("bias", bias)
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        super().__init__(in_features=in_features, gamma=gamma, bias=bias)
        rows = in_features + bias
        self.register_buffer("R", torch.eye(rows, dtype=dtype).div_(gamma))
        self.register_buffer("W", torch.zeros(rows, 0, dtype=dtype))

    @property
    def num_classes(self) -> int:
        """C, so far."""
        return self.W.shape[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.num_classes}"

    def reset(self) -> RecursiveRidge:
        """Forgets all samples and classes."""
        self.R.zero_().fill_diagonal_(1 / self.gamma)
        self.W = self.W[:, :0]
        return self

    @torch.no_grad()
    def fit_batch(self, X: Tensor, y: Tensor) -> RecursiveRidge:
        """Adds samples, of old or new classes. Looks at the labels and waits for the device.

        Args:
            X: features, ``(N, D)``, floating and finite.
            y: labels, ``(N,)``, integers >= 0; or targets Y, ``(N, C)``, floating, where fewer
                columns than there are classes stand for the first ones.

        Returns:
            The module.
        """
        check_rows("X", X)
        checks.check_device("X", X, self.R, "the module")
        if X.shape[1] != self.in_features:
            raise ValueError(f"X must have {self.in_features} features, got {list(X.shape)}")
        x = self._augmented(X)
        if not x.isfinite().all():
            raise ValueError("X must be finite")
        target = self._target(y, X)
        W = nn.functional.pad(self.W, (0, target.shape[1] - self.num_classes))
        with checks.without_autocast(x):
            self._update(x, target, W)
        return self

    def forward(self, input: Tensor) -> Tensor:
        checks.check_floating("input", input)
        checks.check_has_dimension("input", input)
        checks.check_device("input", input, self.W, "the module")
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"input must have {self.in_features} features, got {list(input.shape)}"
            )
        if self.num_classes == 0:
            raise RuntimeError("there are no classes yet: call fit_batch first")
        with checks.without_autocast(input):
            found = self._augmented(input) @ self.W
        return self._rounded(found, input)

    def _takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return name == "W" and shape[0] == self.W.shape[0]

    def _augmented(self, X: Tensor) -> Tensor:
        x = X.to(self.R.dtype)
        return nn.functional.pad(x, (0, 1), value=1.0) if self.bias else x

    def _target(self, y: Tensor, X: Tensor) -> Tensor:
        """(N, C), with the new classes."""
        checks.check_tensor("y", y)
        if y.is_floating_point() and y.dim() == 2:
            if y.shape[0] != X.shape[0]:
                raise ValueError(f"y must have {X.shape[0]} rows, got {list(y.shape)}")
            checks.check_device("y", y, X, "X")
            if not y.isfinite().all():
                raise ValueError("y must be finite")
            return nn.functional.pad(y.to(self.R.dtype), (0, max(0, self.num_classes - y.shape[1])))
        check_labels(y, X, "y", "X")
        y = y.long()
        if y.numel() and int(y.min()) < 0:
            raise IndexError(f"y must be >= 0, got {int(y.min())}")
        classes = max(self.num_classes, int(y.max()) + 1 if y.numel() else 0)
        target = X.new_zeros(X.shape[0], classes, dtype=self.R.dtype)
        return target.scatter_(1, y.unsqueeze(1), 1.0)

    def _update(self, x: Tensor, target: Tensor, W: Tensor) -> None:
        right = target - x @ W
        small = x.shape[0] <= x.shape[1]
        if small:
            half = x @ self.R
            factor = self._cholesky(half @ x.mT)
        else:
            # With R = F F', the new one is F (I + F' X' X F)^-1 F'.
            root, info = torch.linalg.cholesky_ex(self.R)
            self._check(info == 0)
            seen = x @ root
            half, right = root.mT, seen.mT @ right
            factor = self._cholesky(seen.mT @ seen)
        half = torch.linalg.solve_triangular(factor, half, upper=False)
        right = torch.linalg.solve_triangular(factor, right, upper=False)
        W = W + half.mT @ right
        R = half.mT @ half
        R = self.R - R if small else R
        self._check(W.isfinite().all() & R.isfinite().all())
        self.R.copy_(R + R.mT).div_(2)
        self.W = W

    def _cholesky(self, gram: Tensor) -> Tensor:
        """Of I + gram."""
        gram.diagonal().add_(1)
        factor, info = torch.linalg.cholesky_ex(gram)
        self._check(info == 0)
        return factor

    @staticmethod
    def _check(fine: Tensor) -> None:
        if not fine:
            raise RuntimeError(f"the batch cannot be added in this precision: {_ADVICE}")


class AnalyticClassifier(nn.Module):
    r"""A frozen network, random features of its output, and :class:`RecursiveRidge` on them: a
    classifier for streams whose classes come in any order, new ones together with old ones.

    .. math:: \text{logits} = W^\top \operatorname{relu}(E\, b(x)), \qquad E_{ij} \sim
              \mathcal N(0, 1 / F)

    Nothing is trained by gradients, no sample is kept, and nothing is forgotten: the weights are
    those of joint training on all that was seen. The backbone b is taken out of training for good:
    its parameters need no gradient from here on, and it stays in evaluation mode. In float32 it may
    round a sample by the size of the batch it is in: the equality then holds up to that.

    Args:
        backbone: a module whose output for N samples has N rows of F numbers, after flattening.
        feature_dim: F.
        buffer_size: number of random features, D of the ridge. More separate better and cost a
            D x D buffer: 512 MiB for 8192 in float64.
        gamma: > 0, as in :class:`RecursiveRidge`; relative to features of the size of the
            backbone's.
        generator: for E.
        dtype: of E and of the ridge's state, ``torch.float64`` or ``torch.float32``.

    Shape:
        - input: what the backbone takes
        - output: ``(N, C)``, logits for the C classes so far; dtype of the backbone's output,
          float32 for half types under autocast

    Raises:
        TypeError: a backbone that is no module, or whose output is no floating tensor; as
            :class:`RecursiveRidge`.
        ValueError: an output of another size; as :class:`RecursiveRidge`.
        RuntimeError: as :class:`RecursiveRidge`.

    Example:
        >>> import torch
        >>> from pyloss.research.continual import AnalyticClassifier
        >>> model = AnalyticClassifier(torch.nn.Flatten(), 64, buffer_size=100)
        >>> x, y = torch.randn(40, 8, 8), torch.arange(40) % 4
        >>> for task in (torch.arange(0, 25), torch.arange(25, 40)):
        ...     _ = model.fit_batch(x[task], y[task])
        >>> model(x).shape
        torch.Size([40, 4])

    Reference:
        Zhuang et al. G-ACIL: Analytic Learning for Exemplar-Free Generalized Class Incremental
        Learning. arXiv 2403.15706.
    """

    expansion: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        buffer_size: int = 8192,
        gamma: float = 0.1,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a Module, got {type(backbone).__name__}")
        feature_dim = checks.checked_count("feature_dim", feature_dim, 1)
        buffer_size = checks.checked_count("buffer_size", buffer_size, 1)
        checks.check_generator(generator)
        super().__init__()
        self.ridge = RecursiveRidge(buffer_size, gamma, dtype=dtype)
        self.backbone = backbone.requires_grad_(False).eval()
        device = "cpu" if generator is None else generator.device
        expansion = torch.randn(
            buffer_size, feature_dim, generator=generator, dtype=dtype, device=device
        )
        self.register_buffer("expansion", expansion.cpu() / feature_dim**0.5)

    @property
    def num_classes(self) -> int:
        """C, so far."""
        return self.ridge.num_classes

    def train(self, mode: bool = True) -> AnalyticClassifier:
        """The backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def fit_batch(self, x: Tensor, y: Tensor) -> AnalyticClassifier:
        """Adds samples x that the backbone takes, with labels or targets y as for
        :meth:`RecursiveRidge.fit_batch`."""
        with torch.no_grad():
            features = self._features(self._backbone_output(x))
        self.ridge.fit_batch(features, y)
        return self

    def forward(self, input: Tensor) -> Tensor:
        found = self._backbone_output(input)
        logits = self.ridge(self._features(found))
        return logits.to(checks.result_dtype(found.dtype, found))

    def _backbone_output(self, x: Tensor) -> Tensor:
        """(N, F)"""
        found = self.backbone(x)
        checks.check_floating("the backbone's output", found)
        features = self.expansion.shape[1]
        flat = found.flatten(1) if found.dim() > 1 else found
        if flat.dim() != 2 or flat.shape[1] != features:
            raise ValueError(
                f"the backbone's output must have {features} features, got {list(found.shape)}"
            )
        return flat

    def _features(self, found: Tensor) -> Tensor:
        with checks.without_autocast(found):
            return (found.to(self.expansion.dtype) @ self.expansion.mT).relu()
