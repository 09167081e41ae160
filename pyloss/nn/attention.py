"""Layers of tensor attention."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import _checks as checks
from pyloss.functional._attention_checks import (
    check_choices,
    checked_options,
    checked_scale,
    checked_softcap,
    checked_windows,
)
from pyloss.functional._options import LOW_RANK, LowRankOptions, options_of
from pyloss.functional.attention import Window, tensor_attention_n
from pyloss.nn._module import OptionsModule


class TensorAttention(OptionsModule):
    r"""Multi-head attention over pairs of keys; stands in for :class:`torch.nn.MultiheadAttention`.

    .. math::
        \mathrm{out} = W_o\, \mathrm{TA}(W_q x,\; W_k y,\; W_{k2} y + b_{k2},\;
        W_v z,\; W_{v2} z + b_{v2})

    with TA :func:`pyloss.tensor_attention` per head. Parameters have the names and shapes of
    ``MultiheadAttention``, and with ``init="identity"`` the further projections start at weight 0
    and bias 1, where the layer computes exactly what ``MultiheadAttention`` with these parameters
    does; training moves it away. A trained layer is taken over by :meth:`from_multihead`.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as in
            ``MultiheadAttention``.
        dropout: only 0 at present.
        add_bias_kv, add_zero_attn: only False.
        order: number m of keys that a query looks at together.
        num_kv_heads: key heads, each shared by ``num_heads / num_kv_heads`` query heads.
        window: causal windows, as in :func:`pyloss.tensor_attention`; one number or ``order`` ones.
        qk_norm: RMS norm with weights over the features of each query and first key.
        init: ``"identity"``, or ``"random"``: the further projections as those of ``Linear``.
        scale, softcap, method, degree, poly, tol, check, logit_bound: as in
            :func:`pyloss.tensor_attention`.

    Shape:
        As ``MultiheadAttention``: query ``(L, N, E)``, or ``(N, L, E)`` with ``batch_first``, or
        ``(L, E)``; key ``(S, N, kdim)``, value ``(S, N, vdim)``. ``key_padding_mask`` ``(N, S)``
        and ``attn_mask`` ``(L, S)`` or ``(N * num_heads, L, S)``: bool (True: leave out) or added
        to the scores; they hold for every axis of keys. ``is_causal`` replaces ``attn_mask``.

    Returns:
        tuple[Tensor, None]: The output, in the shape of ``query``, and None: weights of pairs are
        never formed. A query that sees no key gets the bias of the output projection, not NaN.

    Raises:
        ValueError: sizes that do not fit, an unknown ``init``.
        NotImplementedError: ``dropout`` > 0, ``add_bias_kv``, ``add_zero_attn``.

    Example:
        >>> import torch, pyloss
        >>> layer = pyloss.nn.TensorAttention(32, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 32)
        >>> out, _ = layer(x, x, x, need_weights=False, is_causal=True)
        >>> out.shape
        torch.Size([2, 10, 32])

    Reference:
        Alman, Song. arXiv 2310.04064. Clift et al. arXiv 1909.00668. Roy et al. arXiv 2507.02754.
    """

    # TransformerEncoderLayer looks at this before its fast path, which would bypass forward.
    _qkv_same_embed_dim = False

    @options_of(tensor_attention_n, LOW_RANK)
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        order: int = 2,
        num_kv_heads: int | None = None,
        window: Window = None,
        qk_norm: bool = False,
        init: str = "identity",
        scale: float | str | None = None,
        softcap: float | None = None,
        **low_rank: Unpack[LowRankOptions],
    ) -> None:
        super().__init__(**low_rank)
        embed_dim = checks.checked_integer("embed_dim", embed_dim)
        num_heads = checks.checked_integer("num_heads", num_heads)
        order = checks.checked_integer("order", order)
        kdim = embed_dim if kdim is None else checks.checked_integer("kdim", kdim)
        vdim = embed_dim if vdim is None else checks.checked_integer("vdim", vdim)
        if num_kv_heads is not None:
            num_kv_heads = checks.checked_integer("num_kv_heads", num_kv_heads)
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(
                f"embed_dim and num_heads must be greater than 0, got {embed_dim} and {num_heads}"
            )
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}"
            )
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads <= 0 or num_heads % kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {kv_heads}"
            )
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        check_choices(self.method, "product", 0.0)
        checked_options(self.method, self.degree, self.poly, self.tol, self.check, self.logit_bound)
        checked_scale(scale, embed_dim // num_heads)
        if softcap is not None:
            checked_softcap(softcap, self.method)
        checked_windows(window, order)
        checks.check_number("dropout", dropout)
        if init not in ("identity", "random"):
            raise ValueError(f"init must be identity or random, got {init!r}")
        if dropout > 0.0:
            raise NotImplementedError("TensorAttention has no dropout yet, dropout must be 0")
        if add_bias_kv or add_zero_attn:
            raise NotImplementedError("TensorAttention has neither add_bias_kv nor add_zero_attn")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.kdim, self.vdim = kdim, vdim
        self.head_dim = embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first
        # What code written for MultiheadAttention asks for.
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        self.order, self.window, self.init, self.scale = order, window, init, scale
        self.softcap = softcap

        to = dict(device=device, dtype=dtype)
        width = kv_heads * self.head_dim
        # One matrix where torch has one, so that checkpoints can be exchanged.
        self._one_matrix = self.kdim == self.vdim == embed_dim and kv_heads == num_heads
        three = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        for name in three if self._one_matrix else ("in_proj_weight",):
            self.register_parameter(name, None)
        if self._one_matrix:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **to))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim, **to))
            self.k_proj_weight = nn.Parameter(torch.empty(width, self.kdim, **to))
            self.v_proj_weight = nn.Parameter(torch.empty(width, self.vdim, **to))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(embed_dim + 2 * width, **to))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **to)
        # The further projections always have a bias: the identity is in it.
        more = range(order - 1)
        self.more_k_proj = nn.ModuleList(nn.Linear(self.kdim, width, **to) for _ in more)
        self.more_v_proj = nn.ModuleList(nn.Linear(self.vdim, width, **to) for _ in more)
        self.q_norm = nn.RMSNorm(self.head_dim, **to) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, **to) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, those shared with MultiheadAttention in its manner."""
        if self._one_matrix:
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
                nn.init.xavier_uniform_(weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for layer in (*self.more_k_proj, *self.more_v_proj):
            if self.init == "identity":
                nn.init.zeros_(layer.weight)
                nn.init.ones_(layer.bias)
            else:
                layer.reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    @classmethod
    def from_multihead(cls, layer: nn.MultiheadAttention, **options) -> TensorAttention:
        """The same layer with further keys; computes the same until it is trained.

        Args:
            layer: its parameters are shared, not copied.
            options: the keyword-only arguments of the constructor.

        Raises:
            NotImplementedError: ``layer`` has ``dropout`` > 0 (set it to 0 first), ``add_bias_kv``
                or ``add_zero_attn``.
        """
        if not isinstance(layer, nn.MultiheadAttention):
            raise TypeError(f"layer must be a MultiheadAttention, got {type(layer).__name__}")
        if layer.bias_k is not None or layer.add_zero_attn:
            raise NotImplementedError("TensorAttention has neither add_bias_kv nor add_zero_attn")
        if options.get("num_kv_heads") not in (None, layer.num_heads):
            raise ValueError(
                "a MultiheadAttention has as many key heads: num_kv_heads must be None"
            )
        weight = layer.out_proj.weight
        new = cls(
            layer.embed_dim,
            layer.num_heads,
            dropout=layer.dropout,
            bias=layer.in_proj_bias is not None,
            kdim=layer.kdim,
            vdim=layer.vdim,
            batch_first=layer.batch_first,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        for name, parameter in layer.named_parameters():
            owner, _, leaf = name.rpartition(".")
            target = new.get_submodule(owner)
            setattr(target, leaf, parameter)
        return new.train(layer.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if need_weights and not torch.compiler.is_compiling():
            warnings.warn(
                "TensorAttention never forms its weights and returns None for them; pass "
                "need_weights=False",
                stacklevel=2,
            )
        self._check_inputs(query, key, value, key_padding_mask, attn_mask)
        if query.dim() not in (2, 3) or query.dim() != key.dim() or key.dim() != value.dim():
            raise ValueError(
                "query, key and value must all have 3 dimensions, or 2 without a batch, got "
                f"{query.dim()}, {key.dim()} and {value.dim()}"
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if key.shape[:2] != value.shape[:2] or key.shape[0] != query.shape[0]:
            sizes = ", ".join(str(list(t.shape[:2])) for t in (query, key, value))
            raise ValueError(
                "query, key and value must have one batch size, key and value one length, got "
                f"(batch, length) {sizes}"
            )
        q, keys, values = self._projected(query, key, value)
        if self.window is not None and not is_causal and q.shape[2] != keys[0].shape[2]:
            raise ValueError(
                "a layer with a window needs query and key of one length, or is_causal=True, where "
                f"the first query sees the first key, got {q.shape[2]} and {keys[0].shape[2]}"
            )
        mask = self._mask(q, keys[0], key_padding_mask, None if is_causal else attn_mask)
        out = tensor_attention_n(
            q,
            keys,
            values,
            attn_mask=mask,
            is_causal=True if is_causal else None,  # None: a window is causal
            # As in torch, the first query sees the first key, whatever the lengths.
            q_offset=0 if is_causal else None,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            enable_gqa=self.num_kv_heads != self.num_heads,
            **self._options,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _check_inputs(self, query, key, value, *masks) -> None:
        widths = (self.embed_dim, self.kdim, self.vdim)
        for name, t, width in zip(("query", "key", "value"), (query, key, value), widths):
            checks.check_tensor(name, t)
            if t.dim() and t.shape[-1] != width:
                raise ValueError(f"{name} must have {width} features, got shape {list(t.shape)}")
        for name, mask in zip(("key_padding_mask", "attn_mask"), masks):
            if mask is not None:
                checks.check_tensor(name, mask)

    def _projected(self, query, key, value):
        """(q, keys, values) as (N, heads, length, head_dim)."""
        if self._one_matrix:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split([w.shape[0] for w in weights])

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = (
            heads(F.linear(t, w, b)) for t, w, b in zip((query, key, value), weights, biases)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        keys = [k, *(heads(layer(key)) for layer in self.more_k_proj)]
        values = [v, *(heads(layer(value)) for layer in self.more_v_proj)]
        return q, keys, values

    def _mask(self, q, k, padding, mask):
        """Both masks as one, bool with True for keep, or added to the scores."""
        batch, heads, length, _ = q.shape
        parts = []
        if padding is not None:
            if padding.shape != (batch, k.shape[2]):
                raise ValueError(
                    f"key_padding_mask must have shape {[batch, k.shape[2]]}, got "
                    f"{list(padding.shape)}"
                )
            if padding.dtype != torch.bool and not padding.is_floating_point():
                raise TypeError(
                    "key_padding_mask must be bool (True: leave out) or floating, got "
                    f"{padding.dtype}; of a tokenizer's attention_mask, pass attention_mask == 0"
                )
            parts.append(padding[:, None, None])
        if mask is not None:
            full = (batch * heads, length, k.shape[2])
            if mask.shape not in (full, full[1:]):
                raise ValueError(
                    f"attn_mask must have shape {list(full[1:])} or {list(full)}, got "
                    f"{list(mask.shape)}"
                )
            parts.append(mask.view(batch, heads, *full[1:]) if mask.dim() == 3 else mask)
        if not parts:
            return None
        if all(p.dtype == torch.bool for p in parts):
            left_out = parts[0] if len(parts) == 1 else parts[0] | parts[1]
            return ~left_out
        added = [
            torch.zeros(p.shape, dtype=q.dtype, device=p.device).masked_fill(p, -torch.inf)
            if p.dtype == torch.bool
            else p
            for p in parts
        ]
        return sum(added[1:], added[0])

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}, order={self.order}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        if self.window is not None:
            text += f", window={self.window}"
        if self.scale is not None:
            text += f", scale={self.scale!r}"
        if self.softcap is not None:
            text += f", softcap={self.softcap!r}"
        if self.method != "exact":
            text += f", method={self.method}, degree={self.degree}, poly={self.poly}"
        return text + f", batch_first={self.batch_first}"
