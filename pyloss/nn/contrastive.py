"""Modules of the contrastive losses; the factor of the similarities may be a parameter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import contrastive as F
from pyloss.functional._checks import check_number, checked_flag
from pyloss.functional._options import (
    DCLOptions,
    GroupOptions,
    HardInfoNCEOptions,
    InfoNCEOptions,
    SimpleContrastiveOptions,
    options_of,
)
from pyloss.nn._module import LossModule

CALL = ("queue", "target", "ids", "key_ids", "queue_ids")  # what info_nce gets when called


class _Learned(property):
    """An option that is a number, or what its parameter stands for.

    A property, and not a descriptor of its own kind: Dynamo of torch 2.6 looks into no other.
    """

    def __init__(self, name: str, parameter: str, to: Callable, back: Callable, check: Callable):
        kept = f"_{name}"

        def get(module: LossModule):
            found = module._parameters.get(parameter)
            return module.__dict__[kept] if found is None else back(found)

        def put(module: LossModule, value: float) -> None:
            found = module._parameters.get(parameter)
            if found is None:
                module.__dict__[kept] = value
            else:
                check(name, value)
                with torch.no_grad():
                    found.fill_(to(value))

        def learn(module: LossModule) -> None:
            value = to(module.__dict__.pop(kept))
            module.register_parameter(parameter, nn.Parameter(torch.tensor(float(value))))

        super().__init__(get, put)
        self.learn = learn


def _by_logarithm(name: str) -> _Learned:
    return _Learned(name, f"log_{name}", math.log, torch.exp, F.check_positive)


class _ContrastiveLoss(LossModule):
    """A loss whose numbers may be learned, and may be given by the call instead."""

    _loss: Callable[..., Tensor]
    _learned: tuple[str, ...]

    def __init__(self, learnable: bool, **options) -> None:
        for name in self._learned:
            check_number(name, options[name])
        super().__init__(**options)
        self.learnable = checked_flag("learnable", learnable)
        if learnable:
            for name in self._learned:
                getattr(type(self), name).learn(self)

    def _call(self, *inputs: Tensor | None, **call) -> Tensor:
        given = {name: value for name, value in call.items() if value is not None}
        return self._loss(*inputs, **{**self.options, **given})

    def extra_repr(self) -> str:
        shown = {
            name: float(f"{value.item():.6g}") if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        text = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"{text}, learnable={self.learnable}"


class _TemperatureLoss(_ContrastiveLoss):
    _learned = ("temperature",)
    temperature = _by_logarithm("temperature")


class InfoNCELoss(_TemperatureLoss):
    r"""Module of :func:`pyloss.info_nce`.

    .. math:: \ell_i = -\log \frac{e^{s_{i t_i} / T}}{\sum_{j \in K_i} e^{s_{ij} / T}}

    Args:
        temperature, in_batch, normalize, symmetric, reduction, group, ring: as for
            :func:`pyloss.info_nce`.
        learnable: the temperature is learned, as the parameter ``log_temperature``.

    Shape:
        - query: ``(B, D)``
        - key: ``(B, D)``, or ``(M, D)`` with target
        - queue, target, ids, key_ids, queue_ids: optional, as for the function
        - temperature: optional, in place of the module's
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.info_nce`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.InfoNCELoss(0.07, learnable=True)
        >>> query, key = torch.randn(2, 32, 16)
        >>> criterion(query, key).backward()
        >>> criterion.log_temperature.grad.shape
        torch.Size([])

    Reference:
        van den Oord, Li, Vinyals. arXiv 1807.03748.
    """

    _loss = staticmethod(F.info_nce)

    @options_of(F.info_nce, without=(*CALL, "temperature"))
    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable: bool = False,
        **options: Unpack[InfoNCEOptions],
    ) -> None:
        F.check_info_nce(temperature=temperature, **options)
        super().__init__(learnable, temperature=temperature, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        queue: Tensor | None = None,
        *,
        target: Tensor | None = None,
        ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        queue_ids: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        return self._call(
            query, key, queue, target=target, ids=ids, key_ids=key_ids, queue_ids=queue_ids,
            temperature=temperature,
        )  # fmt: skip


class NTXentLoss(_TemperatureLoss):
    r"""Module of :func:`pyloss.nt_xent`, the loss of SimCLR.

    .. math:: \ell_a = -\log \frac{e^{s_{a p(a)} / T}}{\sum_{b \ne a} e^{s_{ab} / T}}

    Args:
        temperature, normalize, reduction, group, ring: as for :func:`pyloss.nt_xent`.
        learnable: the temperature is learned, as the parameter ``log_temperature``.

    Shape:
        - z1, z2: ``(B, D)``
        - temperature: optional, in place of the module's
        - output: scalar, or ``(2B,)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.nt_xent`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.NTXentLoss(0.2)
        >>> criterion(torch.randn(32, 16), torch.randn(32, 16)).shape
        torch.Size([])

    Reference:
        Chen, Kornblith, Norouzi, Hinton. arXiv 2002.05709.
    """

    _loss = staticmethod(F.nt_xent)

    @options_of(F.nt_xent, without=("temperature",))
    def __init__(
        self,
        temperature: float = 0.5,
        *,
        learnable: bool = False,
        **options: Unpack[GroupOptions],
    ) -> None:
        F.check_nt_xent(temperature=temperature, **options)
        super().__init__(learnable, temperature=temperature, **options)

    def forward(self, z1: Tensor, z2: Tensor, *, temperature: Tensor | None = None) -> Tensor:
        return self._call(z1, z2, temperature=temperature)


class CLIPLoss(_ContrastiveLoss):
    r"""Module of :func:`pyloss.clip_loss`; is called like open_clip's.

    .. math:: \ell_i = -\frac12 \Big(\log \frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
              + \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ji}}}\Big), \qquad
              z_{ij} = \lambda \cos(x_i, y_j)

    Args:
        logit_scale, normalize, reduction, group, ring: as for :func:`pyloss.clip_loss`.
        learnable: the scale is learned, as the parameter ``log_logit_scale``.

    Shape:
        - image_features, text_features: ``(B, D)``
        - logit_scale: optional, in place of the module's, as a model returns it that learns it
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.clip_loss`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.CLIPLoss()
        >>> image, text = torch.randn(2, 32, 16)
        >>> criterion(image, text, torch.tensor(14.3)).shape
        torch.Size([])

    Reference:
        Radford et al. arXiv 2103.00020.
    """

    _loss = staticmethod(F.clip_loss)
    _learned = ("logit_scale",)
    logit_scale = _by_logarithm("logit_scale")

    @options_of(F.clip_loss, without=("logit_scale",))
    def __init__(
        self,
        logit_scale: float = 1 / 0.07,
        *,
        learnable: bool = False,
        **options: Unpack[GroupOptions],
    ) -> None:
        F.check_clip(logit_scale=logit_scale, **options)
        super().__init__(learnable, logit_scale=logit_scale, **options)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | None = None
    ) -> Tensor:
        return self._call(image_features, text_features, logit_scale=logit_scale)


class SupervisedContrastiveLoss(_TemperatureLoss):
    r"""Module of :func:`pyloss.supervised_contrastive`.

    .. math:: \ell_a = -\frac{1}{|P_a|} \sum_{p \in P_a}
              \log \frac{e^{s_{ap} / T}}{\sum_{b \ne a} e^{s_{ab} / T}}

    Args:
        temperature, normalize, reduction, group, ring: as for
            :func:`pyloss.supervised_contrastive`.
        learnable: the temperature is learned, as the parameter ``log_temperature``.

    Shape:
        - features: ``(B, D)``, or ``(B, V, D)``
        - labels: ``(B,)``
        - temperature: optional, in place of the module's
        - output: scalar, or ``(B,)`` or ``(B, V)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.supervised_contrastive`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SupervisedContrastiveLoss()
        >>> criterion(torch.randn(32, 16), torch.randint(4, (32,))).shape
        torch.Size([])

    Reference:
        Khosla et al. arXiv 2004.11362.
    """

    _loss = staticmethod(F.supervised_contrastive)

    @options_of(F.supervised_contrastive, without=("temperature",))
    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable: bool = False,
        **options: Unpack[GroupOptions],
    ) -> None:
        F.check_nt_xent(temperature=temperature, **options)
        super().__init__(learnable, temperature=temperature, **options)

    def forward(
        self, features: Tensor, labels: Tensor, *, temperature: Tensor | None = None
    ) -> Tensor:
        return self._call(features, labels, temperature=temperature)


class DCLLoss(_TemperatureLoss):
    r"""Module of :func:`pyloss.functional.dcl`.

    .. math:: \ell_a = -w_a \frac{s_{a p(a)}}{T} + \log \sum_{b \ne a, p(a)} e^{s_{ab} / T}

    Args:
        temperature, sigma, normalize, reduction, group, ring: as for :func:`pyloss.functional.dcl`.
        learnable: the temperature is learned, as the parameter ``log_temperature``.

    Shape:
        - z1, z2: ``(B, D)``
        - temperature: optional, in place of the module's
        - output: scalar, or ``(2B,)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.dcl`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.DCLLoss(sigma=0.5)
        >>> criterion(torch.randn(32, 16), torch.randn(32, 16)).shape
        torch.Size([])

    Reference:
        Yeh et al. arXiv 2110.06848.
    """

    _loss = staticmethod(F.dcl)

    @options_of(F.dcl, without=("temperature",))
    def __init__(
        self, temperature: float = 0.1, *, learnable: bool = False, **options: Unpack[DCLOptions]
    ) -> None:
        F.check_dcl(temperature=temperature, **options)
        super().__init__(learnable, temperature=temperature, **options)

    def forward(self, z1: Tensor, z2: Tensor, *, temperature: Tensor | None = None) -> Tensor:
        return self._call(z1, z2, temperature=temperature)


class HardInfoNCELoss(_TemperatureLoss):
    r"""Module of :func:`pyloss.functional.hard_info_nce`.

    .. math:: \ell_i = -\log \frac{e^{s_{ii} / T}}{e^{s_{ii} / T} + \sum_{j \in H_i} e^{s_{ij} / T}}

    Args:
        temperature, hard_fraction, normalize, reduction: as for
            :func:`pyloss.functional.hard_info_nce`.
        learnable: the temperature is learned, as the parameter ``log_temperature``.

    Shape:
        - query, key: ``(B, D)``
        - temperature: optional, in place of the module's
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.hard_info_nce`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.HardInfoNCELoss(hard_fraction=0.25)
        >>> criterion(torch.randn(32, 16), torch.randn(32, 16)).shape
        torch.Size([])

    Reference:
        Wang, Liu. arXiv 2012.09740.
    """

    _loss = staticmethod(F.hard_info_nce)

    @options_of(F.hard_info_nce, without=("temperature",))
    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable: bool = False,
        **options: Unpack[HardInfoNCEOptions],
    ) -> None:
        F.check_hard_info_nce(temperature=temperature, **options)
        super().__init__(learnable, temperature=temperature, **options)

    def forward(self, query: Tensor, key: Tensor, *, temperature: Tensor | None = None) -> Tensor:
        return self._call(query, key, temperature=temperature)


class SimpleContrastiveLoss(LossModule):
    r"""Module of :func:`pyloss.functional.simple_contrastive`.

    .. math:: \ell_i = -s_{ii} + \lambda \sum_{j \in H_i} s_{ij}

    Args:
        weight, hard_fraction, normalize, reduction: as for
            :func:`pyloss.functional.simple_contrastive`.

    Shape:
        - query, key: ``(B, D)``
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.simple_contrastive`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SimpleContrastiveLoss(hard_fraction=0.25)
        >>> criterion(torch.randn(32, 16), torch.randn(32, 16)).shape
        torch.Size([])

    Reference:
        Wang, Liu. arXiv 2012.09740.
    """

    @options_of(F.simple_contrastive)
    def __init__(self, **options: Unpack[SimpleContrastiveOptions]) -> None:
        F.check_simple(**options)
        super().__init__(**options)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return F.simple_contrastive(query, key, **self.options)


class SigLIPLoss(_ContrastiveLoss):
    r"""Module of :func:`pyloss.siglip_loss`; is called like open_clip's.

    .. math:: \ell_i = \sum_j \log\big(1 + e^{-y_{ij} (\lambda \cos(x_i, y_j) + b)}\big)

    Args:
        logit_scale, logit_bias, normalize, reduction, group, ring: as for
            :func:`pyloss.siglip_loss`.
        learnable: both are learned, as the parameters ``log_logit_scale`` and ``bias``.

    Shape:
        - image_features, text_features: ``(B, D)``
        - logit_scale, logit_bias: optional, in place of the module's, as a model returns them that
          learns them
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.siglip_loss`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SigLIPLoss(learnable=True)
        >>> criterion(torch.randn(32, 16), torch.randn(32, 16)).backward()
        >>> sorted(dict(criterion.named_parameters()))
        ['bias', 'log_logit_scale']

    Reference:
        Zhai, Mustafa, Kolesnikov, Beyer. arXiv 2303.15343.
    """

    _loss = staticmethod(F.siglip_loss)
    _learned = ("logit_scale", "logit_bias")
    logit_scale = _by_logarithm("logit_scale")
    logit_bias = _Learned("logit_bias", "bias", float, lambda bias: bias, F.check_finite)

    @options_of(F.siglip_loss, without=("logit_scale", "logit_bias"))
    def __init__(
        self,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        *,
        learnable: bool = False,
        **options: Unpack[GroupOptions],
    ) -> None:
        F.check_siglip(logit_scale=logit_scale, logit_bias=logit_bias, **options)
        super().__init__(learnable, logit_scale=logit_scale, logit_bias=logit_bias, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        return self._call(
            image_features, text_features, logit_scale=logit_scale, logit_bias=logit_bias
        )
