"""Modules of the losses on a linear layer's output; each forward is one call of the functional."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pyloss.functional import _rows as rows
from pyloss.functional import linear as F
from pyloss.functional._checks import is_dtensor
from pyloss.functional._layers import check_options
from pyloss.functional._options import FormulaOptions, names_of
from pyloss.functional.classification import RowStats
from pyloss.nn._layer_call import call_layer
from pyloss.nn._module import OptionsModule

_CHECKED = {
    *names_of(check_options), *names_of(rows.check_options), *FormulaOptions.__annotations__
} - {"gamma"}  # fmt: skip


class LinearCrossEntropyLoss(OptionsModule):
    r"""Module of :func:`pyloss.fused_linear_cross_entropy`, with the linear layer in it.

    Stands in for ``torch.nn.LinearCrossEntropyLoss``: same arguments, same ``state_dict``. Where
    the layer belongs to the model (a language-model head, tied embeddings), :meth:`borrow` it; the
    layer may be one of ``fully_shard`` or ``parallelize_module``, whose hooks run.

    .. math:: \ell = -w_y \log \mathrm{softmax}(W h + b)_y

    Args:
        in_features: size D of a hidden state.
        num_classes: number V of classes.
        out_features: ``(d1, ..., dk)`` for a K-dimensional loss, which runs unfused.
        bias: whether the layer has a bias.
        device, dtype: of the layer.
        reduction: ``"none" | "mean" | "sum"``.
        weight: weight of each class, ``(V)``.
        ignore_index: target value that is left out; None means -100.
        label_smoothing: in [0, 1].
        options: accepted for torch's signature and ignored.
        **loss_options: the other keyword arguments of :func:`pyloss.fused_linear_cross_entropy`,
            except ``token_weight`` and ``num_items``, which ``forward`` takes.

    Shape:
        - input: ``(D)`` or ``(..., D)``
        - target: ``input.shape[:-1]``, or ``(*input.shape[:-1], V)`` for probabilities
        - output: scalar, or the shape of the targets with ``reduction="none"``

    Raises:
        RuntimeError: ``weight`` of a wrong shape, ``label_smoothing`` outside [0, 1]; and what
            :func:`pyloss.fused_linear_cross_entropy` raises; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.LinearCrossEntropyLoss(32, 1000, z_loss=1e-4)
        >>> criterion(torch.randn(8, 32), torch.randint(1000, (8,))).shape
        torch.Size([])
        >>> embedding = torch.nn.Embedding(1000, 32)  # tied: the head is the embedding's weight
        >>> criterion = pyloss.nn.LinearCrossEntropyLoss.borrow(embedding, shift=1)
        >>> criterion(torch.randn(2, 8, 32), torch.randint(1000, (2, 8))).backward()
        >>> embedding.weight.grad.shape, list(criterion.parameters())
        (torch.Size([1000, 32]), [])

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options=None,
        **loss_options,
    ) -> None:
        loss_options = dict(
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
            **loss_options,
        )  # fmt: skip
        self._keep(num_classes, out_features, weight, loss_options)
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    @classmethod
    def borrow(
        cls,
        module: nn.Module,
        *,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        **loss_options,
    ) -> LinearCrossEntropyLoss:
        """The loss of another module's layer, which it neither owns nor stores.

        Args:
            module: anything with a ``weight`` ``(V, D)`` and maybe a ``bias`` ``(V)``, such as
                ``nn.Linear`` or ``nn.Embedding``. Its parameters are not parameters of the result,
                nor in its ``state_dict``.
            reduction, weight, ignore_index, label_smoothing, **loss_options: as for the class.

        Raises:
            TypeError: ``module`` without such a ``weight``.
        """
        found = getattr(module, "weight", None)
        if not isinstance(found, Tensor) or found.dim() != 2:
            raise TypeError(
                f"module must have a weight of two dimensions, got {type(module).__name__}"
            )
        loss_options = dict(
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
            **loss_options,
        )  # fmt: skip
        self = cls.__new__(cls)
        self._keep(found.shape[0], (), weight, loss_options)
        # In a tuple, where nn.Module does not look for submodules.
        self._borrowed = (module,)
        return self

    @property
    def loss_options(self) -> dict:
        """The options at present; each is an attribute of its name, which may be set."""
        return self._options

    def _keep(self, num_classes, out_features, weight, options) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}"
            )
        smoothing = options["label_smoothing"]
        if not 0.0 <= smoothing <= 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {smoothing}")
        self._check_names(options, F.fused_linear_cross_entropy)
        check_options(**{name: x for name, x in options.items() if name in _CHECKED})
        super().__init__(**options)
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)

    @property
    def layer(self) -> nn.Module:
        """The module whose weight and bias are used."""
        return self._borrowed[0] if "_borrowed" in self.__dict__ else self.linear

    def forward(self, input: Tensor, target, **call) -> Tensor | tuple[Tensor, RowStats]:
        def loss(input: Tensor) -> Tensor | tuple[Tensor, RowStats]:
            return self._loss(input, target, call)

        if is_dtensor(self.layer.weight):  # FSDP2 gathers it in the hooks of its layer
            return call_layer(self.layer, loss, input)
        return loss(input)

    def _loss(self, input: Tensor, target, call: dict) -> Tensor | tuple[Tensor, RowStats]:
        weight, bias = self.layer.weight, getattr(self.layer, "bias", None)
        if self.out_features:
            weight = weight.view(self.num_classes, *self.out_features, weight.shape[-1])
            bias = bias if bias is None else bias.view(self.num_classes, *self.out_features)
        return F.fused_linear_cross_entropy(
            input, weight, target, bias, weight=self.weight, **self._options, **call
        )

    def extra_repr(self) -> str:
        layer = self.layer
        has_bias = getattr(layer, "bias", None) is not None
        shown = (
            f"in_features={layer.weight.shape[-1]}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={has_bias}, {super().extra_repr()}"
        )
        borrowed = "_borrowed" in self.__dict__
        return f"{shown}, borrowed={type(layer).__name__!r}" if borrowed else shown
