"""Tensor attention in Hugging Face transformers models.

A converted attention layer is an instance of a subclass of its own class, and the original
`forward` does its work: projections, norms, rotary embedding, cache. Only the cache argument is
exchanged, for a `_Joined`, whose `update` lays the second keys beside the first, [k1 | k2] on the
head dimension, and [v1 | v2], and hands both to the real cache. So k1 is rotated, k2 is not, and
one cache entry holds both. The attention function, registered as "tensor_attention", takes them
apart again. A layer that was not converted comes with keys as wide as its queries, and goes to
`sdpa`; this is how one model mixes both kinds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyloss.functional import tensor_attention
from pyloss.functional._attention_checks import checked_windows
from pyloss.functional._checks import as_integer
from pyloss.integrations._lookalike import change_class, lookalike

try:
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
except ImportError as error:  # absent, or older than 4.53: patch_loss may work all the same
    _MISSING: ImportError | None = error
else:
    _MISSING = None

NAME = "tensor_attention"
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
# Arguments that models hand to their attention function and that change its result.
_UNKNOWN_STEPS = {
    "softcap": "soft capping of the attention scores: sdpa, which serves other layers, has none",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "block_table")


class _Settings(NamedTuple):
    """What convert leaves on a layer."""

    window: tuple[int | None, int | None] | None
    method: str


def convert(
    model: Any,
    layers: str | slice | Iterable[int] = "every:4",
    window: int | tuple[int | None, int | None] | None = (512, 32),
    init: str = "identity",
    method: str = "exact",
) -> Any:
    r"""Let the attention of chosen layers of a transformers model look at pairs of tokens.

    .. math::
        \mathrm{out}_i = \sum_{jk} \mathrm{softmax}_{jk}\Big(s \sum_l q_{il}\, k^1_{jl}\,
        k^2_{kl}\Big)\, v^1_j \odot v^2_k, \qquad k^2 = W_{k2} x + b_{k2},\; v^2 = W_{v2} x + b_{v2}

    with q, k1, v1 and s those of the layer, rotary embedding included, and two new projections
    ``k2_proj`` and ``v2_proj``, hidden size to key heads times head size, which have no rotary
    embedding. With ``init="identity"`` they start at weight 0 and bias 1, where the model computes
    what it did before, as long as no text is longer than the first window; training moves it away.
    The model is changed in place; its configuration gets an entry ``tensor_attention``, and its
    attention implementation becomes ``"tensor_attention"``, which is ``"sdpa"`` for the other
    layers. Cache, ``generate``, padding, gradient checkpointing and ``save_pretrained`` work as
    before; load with :func:`from_pretrained`.

    Args:
        model: a ``transformers`` decoder of the Llama kind: causal self-attention with
            ``q_proj``, ``k_proj``, ``v_proj`` or ``query_key_value``, and with a cache.
        layers: ``"all"``; ``"every:k"``, the last of each k layers; a slice, or indices, where
            negative ones count from the end.
        window: ``(w1, w2)``, or one number for both: a query at position p sees the pairs with
            p - w1 < j <= p and p - w2 < k <= p; None in a place: no limit.
        init: ``"identity"``, or ``"random"``: the new projections as those of ``Linear``.
        method: that of :func:`pyloss.tensor_attention`; ``"exact"`` or ``"auto"``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a transformers model; a layer that is not of that kind.
        ValueError: a layer out of range, no layer, a window of 0, an unknown option, a model that
            has been converted before.
        ImportError: transformers is older than 4.53.
        NotImplementedError: in a forward: attention dropout in training mode, attention weights
            asked for, packed sequences given as ``cu_seq_lens``.

    Example:
        >>> import torch
        >>> from pyloss.integrations.transformers import convert
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=4, num_attention_heads=4)
        >>> model, tokens = LlamaForCausalLM(config).eval(), torch.randint(128, (2, 16))
        >>> before = model(tokens).logits
        >>> model = convert(model, layers=[1, -1])
        >>> torch.allclose(model(tokens).logits, before, atol=1e-5)
        True
        >>> model.model.layers[3].self_attn.k2_proj
        Linear(in_features=32, out_features=32, bias=True)

    Reference:
        Roy et al. Fast and Simplex: 2-Simplicial Attention in Triton. arXiv 2507.02754. Alman,
        Song. arXiv 2310.04064.
    """
    _check_transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {type(model).__name__}; convert a "
            "model before torch.compile, DistributedDataParallel or PEFT wrap it"
        )
    if (settings := getattr(model.config, NAME, None)) is not None:
        name = type(model).__name__
        if any(hasattr(module, "_pyloss_settings") for module in model.modules()):
            raise ValueError(
                f"this {name} has been converted before (config.{NAME} = {settings}); choose all "
                "layers in one call"
            )
        raise ValueError(
            f"the configuration of this {name} says that it has been converted before "
            f"(config.{NAME} = {settings}), but it has no converted layer. If it is a new model, "
            f"`del model.config.{NAME}`, then convert it. If its files were loaded by "
            "transformers' own from_pretrained, the trained k2_proj and v2_proj are lost: load "
            "them with pyloss.integrations.transformers.from_pretrained"
        )
    if init not in ("identity", "random"):
        raise ValueError(f"init must be identity or random, got {init!r}")
    if method not in ("exact", "auto"):
        raise ValueError(f"method must be exact or auto, got {method!r}")
    return _convert(model, layers, _checked_window(window), init, method)


def from_pretrained(path: Any, model_class: Any = None, **options: Any) -> Any:
    """Load a converted model that ``save_pretrained`` has written.

    The model's own ``from_pretrained`` builds the model without its new projections and leaves
    their weights out, with a warning. This function builds it with them.

    Args:
        path: folder, or name of a repository.
        model_class: the class to build; None: the one that the configuration names.
        options: those of ``PreTrainedModel.from_pretrained``, such as ``dtype``, ``device_map``.

    Returns:
        The model, in eval mode; as the model's own function does, a pair with the loading info
        where ``output_loading_info=True``.

    Raises:
        TypeError: ``model_class`` is no model class, as the Auto classes are none.
        ValueError: the configuration has no entry ``tensor_attention`` or names no class that
            transformers has, or another ``attn_implementation`` is asked for.
        RuntimeError: files without the weights of the new projections.
        ImportError: transformers is older than 4.53.

    Example:
        >>> import tempfile
        >>> from pyloss.integrations.transformers import convert, from_pretrained
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> model = convert(LlamaForCausalLM(config), layers="all", window=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = from_pretrained(folder)
        >>> again.config.tensor_attention["layers"]
        [0, 1]
    """
    _check_transformers()
    asked = options.pop("attn_implementation", NAME)
    if asked != NAME:
        raise ValueError(f"a converted model needs attn_implementation={NAME!r}, got {asked!r}")
    config = options.pop("config", None)
    if config is None:
        of_hub = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
        found = {name: options[name] for name in of_hub if name in options}
        config = transformers.AutoConfig.from_pretrained(path, **found)
    settings = getattr(config, NAME, None)
    if settings is None:
        raise ValueError(
            f"the configuration of {path} has no entry {NAME}: it is not of a converted model; "
            "load it with its own from_pretrained, then call convert"
        )
    if model_class is None:
        model_class = _named_class(config)
    elif not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TypeError(
            "model_class must be a subclass of transformers.PreTrainedModel, got "
            f"{getattr(model_class, '__name__', model_class)}; without it the class that the "
            "configuration names is built"
        )
    with_info = options.pop("output_loading_info", False)
    model, info = _loading_class(model_class).from_pretrained(
        path, config=config, output_loading_info=True, **options
    )
    missing = [k for k in info["missing_keys"] if ".k2_proj." in k or ".v2_proj." in k]
    if missing:
        raise RuntimeError(f"{path} has no weights for {', '.join(sorted(missing))}")
    model.__class__ = model_class
    return (model, info) if with_info else model


def _named_class(config) -> type:
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise ValueError(
            f"transformers has no class for the architectures {names} of the configuration; give "
            "model_class"
        )
    return found


def _loading_class(cls: type) -> type:
    """cls whose new instances are converted before weights are loaded into them."""

    def __init__(self, config, *args, **kwargs):
        super(made, self).__init__(config, *args, **kwargs)
        settings = getattr(config, NAME)
        window = _checked_window(settings["window"])
        _convert(self, settings["layers"], window, "identity", settings["method"])

    made = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__init__": __init__})
    return made


# --------------------------------------------------------------------------------------------------
# Conversion


def _check_transformers() -> None:
    if _MISSING is not None:
        raise ImportError(
            "tensor attention needs transformers 4.53 or newer, with AttentionMaskInterface"
        ) from _MISSING


def _convert(model, layers, window, init, method):
    found = _attention_layers(model)
    chosen = _chosen(layers, max(found, default=-1) + 1)
    absent = [i for i in chosen if i not in found]
    if absent:
        raise ValueError(
            f"layers {absent} of this {type(model).__name__} have no attention that convert knows; "
            f"layers {sorted(found)} have one"
        )
    # All checks come before the first change.
    shapes = {i: _checked_layer(found[i]) for i in chosen}
    with torch.no_grad():
        for i in chosen:
            _add_projections(found[i], shapes[i], init)
            change_class(found[i], _converted_class(type(found[i])), "convert")
            found[i]._pyloss_settings = _Settings(window, method)
    stored = None if window is None else list(window)
    setattr(model.config, NAME, {"layers": chosen, "window": stored, "method": method})
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(NAME)
    else:
        model.config._attn_implementation = NAME
    return model


def _attention_layers(model) -> dict[int, nn.Module]:
    """The self-attentions by index of the layer."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or "Attention" not in type(module).__name__:
            continue
        if index in found:
            raise TypeError(
                f"convert needs a model with one attention per layer, but {type(model).__name__} "
                f"has several with layer_idx {index}, of types {type(found[index]).__name__} and "
                f"{type(module).__name__}, as encoders and cross-attention make it; decoders of "
                "the Llama kind are supported"
            )
        found[index] = module
    if not found:
        classes = {type(module).__name__ for module in model.modules()}
        others = sorted(c for c in classes if any(w in c for w in ("Attention", "Mixer")))
        raise TypeError(
            f"convert found no attention that it knows in {type(model).__name__}: modules named "
            "...Attention with a layer_idx, as in Llama. It has "
            + (f"{', '.join(others)} without one" if others else "no attention")
        )
    return found


def _chosen(layers, count: int) -> list[int]:
    if isinstance(layers, str):
        word, _, step = layers.partition(":")
        if layers == "all":
            chosen = list(range(count))
        elif word == "every" and step.isdigit() and int(step) > 0:
            chosen = list(range(int(step) - 1, count, int(step)))
        else:
            raise ValueError(f"layers must be all, every:k, a slice or indices, got {layers!r}")
    elif isinstance(layers, slice):
        chosen = list(range(count))[layers]
    else:
        try:
            chosen = list(layers)
        except TypeError:
            raise TypeError(
                f"layers must be a string, a slice or indices, got {type(layers).__name__}"
            ) from None
        given, chosen = chosen, [as_integer(i) for i in chosen]
        for x, i in zip(given, chosen):
            if i is None:
                raise TypeError(f"layers must hold integers, got {x!r}")
            if not -count <= i < count:
                raise ValueError(f"layer {i} is out of range, the model has {count} layers")
        chosen = sorted({i % count for i in chosen})
    if not chosen:
        raise ValueError(f"layers={layers!r} chooses none of the model's {count} layers")
    return chosen


def _checked_window(window) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    several = isinstance(window, (list, tuple))
    if not several and as_integer(window) is None:
        raise TypeError(f"window must be an integer, a pair or None, got {window!r}")
    if several and len(window) != 2:
        raise ValueError(f"window must be one number, two or None, got {window!r}")
    first, second = checked_windows(window, 2)
    return first or None, second or None


class _Shape(NamedTuple):
    """Sizes of the new projections."""

    width_in: int
    width_out: int
    like: Tensor  # for dtype and device


def _checked_layer(module: nn.Module) -> _Shape:
    """Raises TypeError for a layer whose forward is not of the kind that _Joined fits into."""
    cls = type(module)

    def refused(reason: str) -> TypeError:
        return TypeError(f"convert does not know how to change {cls.__name__}: {reason}")

    parameters = inspect.signature(cls.forward).parameters
    if next(iter(parameters)) != "self" or "hidden_states" not in parameters:
        raise refused("its forward has no hidden_states")
    if _cache_parameter(cls) is None:
        raise refused(f"its forward has no cache argument ({', '.join(_CACHE_NAMES)})")
    for name in ("key_value_states", "encoder_hidden_states"):
        if name in parameters:
            raise refused(f"its forward has {name}, as a cross-attention")
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None or not {"update", "ALL_ATTENTION_FUNCTIONS"} <= set(code.co_names):
        raise refused("its forward does not update a cache and call ALL_ATTENTION_FUNCTIONS")
    if not getattr(module, "is_causal", False):
        raise refused("it is not causal")
    for name in ("attn_logit_softcapping", "sinks"):
        if getattr(module, name, None) is not None:
            raise refused(f"it has {name}, which sdpa does not have, and that serves other layers")
    if hasattr(module, "k2_proj") or hasattr(module, "v2_proj"):
        raise refused("it has a k2_proj or v2_proj of its own")
    config = module.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    d = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    # Name of the projection that holds the keys: how many heads wide it must be.
    kinds = {"k_proj": kv_heads, "qkv_proj": heads + 2 * kv_heads, "query_key_value": 3 * heads}
    name = next((name for name in kinds if hasattr(module, name)), None)
    weight = None if name is None else getattr(getattr(module, name), "weight", None)
    if weight is None or d is None:
        raise refused(f"it has none of {', '.join(kinds)}, or no head_dim")
    wanted = (kinds[name] * d, config.hidden_size)
    if weight.shape != wanted:
        raise refused(f"the weight of {name} has shape {tuple(weight.shape)}, not {wanted}")
    if not weight.is_floating_point():
        raise refused(f"its weights are {weight.dtype}; convert a model before it is quantised")
    return _Shape(config.hidden_size, kv_heads * d, weight)


def _cache_parameter(cls: type) -> str | None:
    parameters = inspect.signature(cls.forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


def _add_projections(module: nn.Module, shape: _Shape, init: str) -> None:
    for name in ("k2_proj", "v2_proj"):
        layer = nn.Linear(
            shape.width_in, shape.width_out, dtype=shape.like.dtype, device=shape.like.device
        )
        if init == "identity":
            layer.weight.zero_()
            layer.bias.fill_(1.0)
        setattr(module, name, layer.train(module.training))


# --------------------------------------------------------------------------------------------------
# The converted layer


@functools.cache
def _converted_class(cls: type) -> type:
    """A subclass of an attention whose forward adds the second keys and values."""
    parameter = _cache_parameter(cls)
    position = list(inspect.signature(cls.forward).parameters).index(parameter) - 1  # less self

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        if self.config._attn_implementation != NAME:
            raise RuntimeError(
                f"a converted layer needs attn_implementation={NAME!r}, but the model has "
                f"{self.config._attn_implementation!r}; call model.set_attn_implementation"
                f"({NAME!r})"
            )
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise NotImplementedError(
                "tensor attention never forms its weights, so output_attentions must be False"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = None
        if len(args) > position:
            cache, args = args[position], (*args[:position], None, *args[position + 1 :])
        for name in _CACHE_NAMES:  # deprecated names too
            if name in kwargs:
                cache = kwargs.pop(name)
        joined = _Joined(cache, self.k2_proj(hidden), self.v2_proj(hidden))
        if len(args) > position:
            args = (*args[:position], joined, *args[position + 1 :])
        else:
            kwargs[parameter] = joined
        out = cls.forward(self, *args, **kwargs)
        if joined.updates != 1:
            raise RuntimeError(
                f"{cls.__name__} updated its cache {joined.updates} times in one forward, not "
                "once: convert does not know this layer"
            )
        return out

    return lookalike(cls, forward, _converted_class)


class _Joined:
    """In the place of a layer's cache, or of None: adds k2 and v2 to what is stored."""

    def __init__(self, cache: Any, k2: Tensor, v2: Tensor) -> None:
        self.cache, self.k2, self.v2, self.updates = cache, k2, v2, 0

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple:
        self.updates += 1
        key, value = _beside(key, self.k2), _beside(value, self.v2)
        if self.cache is None:
            return key, value
        return self.cache.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"convert cannot follow this attention: it uses .{name} of its cache, not only update"
        )


def _beside(first: Tensor, second: Tensor) -> Tensor:
    """[first | second] (B, H, n, 2 d) of (B, H, n, d) and (B, n, H d)."""
    batch, heads, length, d = first.shape
    if second.shape[-1] != heads * d:
        raise RuntimeError(
            f"the keys of a converted layer have {heads} heads of {d} features, but its new "
            f"projection gives {second.shape[-1]}: tensor parallelism is not supported"
        )
    return torch.cat([first, second.view(batch, length, heads, d).transpose(1, 2)], -1)


# --------------------------------------------------------------------------------------------------
# What transformers calls


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind attn_implementation="tensor_attention".

    query (B, H, n_q, d), key (B, G, n_k, 2 d) = [k1 | k2], value (B, G, n_k, 2 dv) = [v1 | v2];
    with a key of d features, the sdpa function of transformers. The mask holds for both axes.
    Returns (B, n_q, H, dv) and None.
    """
    d = query.shape[-1]
    plain = key.shape[-1] == d
    for name, step in _UNKNOWN_STEPS.items():
        # What sdpa knows by itself is left to it.
        if kwargs.get(name) is not None and not (plain and name == "position_bias"):
            raise NotImplementedError(f"attn_implementation={NAME!r} has no {step} ({name})")
    if plain:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    if key.shape[-1] != 2 * d:
        raise ValueError(
            f"the keys must have as many features as the queries or twice as many, got {d} and "
            f"{key.shape[-1]}"
        )
    if dropout > 0.0:
        raise NotImplementedError(
            f"tensor attention has no dropout, got attention_dropout = {dropout} in training; set "
            "it to 0 in the configuration before the model is built, or on each converted layer"
        )
    for name in _PACKED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"tensor attention takes no packed sequences by {name}; give position_ids or a mask"
            )
    k1, k2 = key.chunk(2, -1)
    v1, v2 = value.chunk(2, -1)
    settings = getattr(module, "_pyloss_settings", _Settings(None, "exact"))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = tensor_attention(
        query,
        k1,
        k2,
        v1,
        v2,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        method=settings.method,
        **_visible(attention_mask, query.shape[2], key.shape[2], settings.window, bool(is_causal)),
    )
    return out.transpose(1, 2).contiguous(), None


def _visible(mask, n_q: int, n_k: int, window, causal: bool) -> dict[str, Any]:
    """Mask, window and causality as arguments of tensor_attention."""
    if mask is None:  # the queries are the last of the keys
        return dict(is_causal=causal, window=window, q_offset=n_k - n_q)
    mask = mask[..., :n_k]  # of older versions, as long as the longest layer's keys
    if window is None:
        return dict(attn_mask=mask, is_causal=False)
    if n_q == n_k:
        return dict(attn_mask=mask, is_causal=causal, window=window, q_offset=0)
    # A static cache is longer than the text: where a query stands, only the mask tells. It is the
    # last key that the query sees, itself.
    keep = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    keys = torch.arange(n_k, device=mask.device, dtype=torch.int32)
    own = torch.where(keep, keys, -1).amax(-1, keepdim=True)
    masks = []
    for w in window:
        near = keep if w is None else keep & (keys > own - w)
        masks.append(near if mask.dtype == torch.bool else mask.masked_fill(~near, -torch.inf))
    return dict(mask1=masks[0], mask2=masks[1], is_causal=False)


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa's mask (B, 1, n_q, n_k), True = keep; None only where the queries are the last keys.

    sdpa's own function also leaves the mask out over the empty part of a static cache, where
    queries are the first keys. The attention function could not tell these cases apart.
    """
    if kwargs.get("allow_is_causal_skip", True):
        n_q, offset = kwargs.get("q_length"), kwargs.get("q_offset", 0)
        if n_q is None:  # before 5.0: the positions of the queries
            n_q, offset = kwargs["cache_position"].shape[0], None
        n_k = kwargs["kv_length"]
        if n_q != n_k:
            last = isinstance(offset, int) and offset + n_q == kwargs.get("kv_offset", 0) + n_k
            kwargs["allow_is_causal_skip"] = last
    return sdpa_mask(*args, **kwargs)


def _register() -> None:
    functions: tuple[tuple[Any, Callable], ...] = (
        (AttentionInterface, attention),
        (AttentionMaskInterface, mask),
    )
    for interface, function in functions:
        interface.register(NAME, function)


if _MISSING is None:
    _register()
