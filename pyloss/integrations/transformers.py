"""Losses and tensor attention of pyloss in Hugging Face transformers models.

How `patch_loss` works. The model gets a subclass of its own class with another `forward`. In a
training step with labels that runs the model's original `forward` with two things exchanged: the
output layer returns a `Deferred`, which stands for the logits and notes what the model does to
them (soft capping, scaling, a bias); and the loss function, when it is handed the `Deferred`,
computes the loss from the hidden states. Models without a loss function call torch's cross_entropy,
which asks the `Deferred` by itself. So the model's own code decides which options reach the loss,
what the output holds and what is added to the loss (router losses), and a step on the logits that
pyloss does not know is an error, never a wrong number.

The loss itself runs inside a call of the output layer with another `forward`, so that the layer's
hooks run: under FSDP2 they gather its weight before and free it after, and again in the backward.

Nothing of this is seen from outside: what is exchanged is exchanged on a view of the model, an
object of its own that shares all the rest, so that other threads may call the model meanwhile.
Under torch.compile, which cannot make such an object, it is exchanged on the model, while tracing.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyloss.functional import fused_linear_cross_entropy
from pyloss.integrations._deferred_logits import Deferred, DeferredHead, causal_loss, masked_loss
from pyloss.integrations._enable import Settings, use, warn_of_own_loss
from pyloss.integrations._lookalike import change_class, lookalike
from pyloss.integrations._output_layer import head_of

# Also registers attn_implementation="tensor_attention", where transformers is installed.
from pyloss.integrations._tensor_attention_hf import convert, from_pretrained
from pyloss.nn._layer_call import FORWARDS, exchanged, view_of

__all__ = ["convert", "disable", "enable", "from_pretrained", "patch_loss", "unpatch_loss"]

# Arguments of fused_linear_cross_entropy that are not the user's to choose, and why.
_BY_THE_MODEL = "comes from the model"
_SCALAR = "must stay as it is: a model's loss is one number"
_RESERVED = {
    "input": _BY_THE_MODEL,
    "linear_weight": _BY_THE_MODEL,
    "target": _BY_THE_MODEL,
    "linear_bias": _BY_THE_MODEL,
    "softcap": _BY_THE_MODEL,
    "logit_scale": _BY_THE_MODEL,
    "shift": _BY_THE_MODEL,
    "num_items": "comes from the trainer, as num_items_in_batch",
    "reduction": _SCALAR,
    "return_stats": _SCALAR,
    "token_weight": "is one tensor per batch, which an option of the model cannot be",
    "group": "comes from the model: parallelize_module or a tp_plan splits its output layer",
    "options": "is there for torch's signature only",
}

_LOSSES = {"ForCausalLMLoss": causal_loss, "ForMaskedLMLoss": masked_loss}
_STATE = "_pyloss_loss"
_LOSS = "_loss_function"  # where transformers keeps a model's loss
_ABSENT = object()
_WARNED = "_pyloss_warned"
_NO_LABELS = (
    "a call in training mode gave no labels, as Trainer's with label_smoothing_factor (call "
    "patch_loss with the trainer instead of the model) or with compute_loss_func"
)
_TRL = (
    "they compute their loss with a fused output layer of their own, which leaves out the model's "
    "loss; call unpatch_loss(model), and pyloss.integrations.trl.patch_trainer(trainer)"
)
_calls = threading.local()  # reached: whether the patched forward has run in this call


class _LossPatch(NamedTuple):
    """What patch_loss leaves on a model."""

    head: str  # path of the output layer
    options: dict[str, Any]
    loss: str | None  # name of the loss function that this stands in for; None: cross_entropy
    lenient: bool = False  # the model's own loss, after a warning, where it cannot be followed


def patch_loss(model: Any, **loss_options: Any) -> Any:
    r"""Give a language model of transformers a training loss without stored logits.

    .. math::
        \ell = \frac{1}{n} \sum_t \ell_\mathrm{fused}(\mathrm{transform}(W h_t + b),\; y_{t+1})

    with the output layer W, b and the transform (soft capping, scale, a bias) of the model, and n
    the number of labels that are not ``ignore_index``, or ``num_items_in_batch``; for masked models
    and most seq2seq models the label is that of the place itself, :math:`y_t`. Without options the
    loss and its gradients are those of the model's own loss. The model is changed in place. The
    loss is used in training mode, when ``labels`` are given; the output then holds no logits. In
    eval mode, without ``labels``, with ``logits_to_keep``, or with another ``loss_function``, the
    original forward runs. Patching twice is patching once, with the options of the second call. A
    model that trains without the patched loss says so once, by a warning.

    Args:
        model: a ``transformers`` model with labels of tokens, such as ``LlamaForCausalLM``,
            ``T5ForConditionalGeneration``, ``BertForMaskedLM``,
            ``LlavaForConditionalGeneration``, or a model of PEFT around one, where the adapters of
            the output layer are LoRA or ``modules_to_save``; before ``torch.compile`` or
            ``DistributedDataParallel`` wrap it, before or after ``fully_shard`` and
            ``parallelize_module``. Or a
            ``transformers.Trainer``, whose model is patched; its ``label_smoothing_factor``, which
            else needs the logits, becomes the loss's ``label_smoothing`` in training.
        loss_options: options of :func:`pyloss.fused_linear_cross_entropy`: ``z_loss``,
            ``label_smoothing``, ``tau``, ``truncate``, ``temperature``, ``weight``,
            ``ignore_index`` (for calls that name none), ``empty``, ``loss_dtype``, ``chunk``,
            ``strategy``, ``accumulate_dtype``, ``filter``. The other arguments come from the model.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a transformers model, or not one whose output layer and
            ``forward`` are of the kind described in docs/transformers.md; an unknown option. In the
            first training step: the model does something to its logits that is not known here. A
            trainer of TRL, which computes its loss without the model's.
        ValueError: the model's loss function is another than ``ForCausalLMLoss`` and
            ``ForMaskedLMLoss``; a trainer with a ``compute_loss_func``, or with another
            ``label_smoothing_factor`` than the option.
        RuntimeError: in a training step: TRL's fused output layer stands before the patched loss.

    Example:
        >>> import torch
        >>> from pyloss.integrations.transformers import patch_loss
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> model = patch_loss(LlamaForCausalLM(config), z_loss=1e-4).train()
        >>> tokens = torch.randint(128, (2, 16))
        >>> output = model(input_ids=tokens, labels=tokens)
        >>> output.loss.backward()
        >>> output.logits is None
        True

    Reference:
        Wijmans et al. Cut Your Losses in Large-Vocabulary Language Models. arXiv 2411.09009.
    """
    if _is_trainer(model):
        return _patch_trainer(model, loss_options)
    _check_options(loss_options)
    whole, model = model, _base_of(model)
    state = _LossPatch(_check_model(model), loss_options, _loss_of(model))
    if not hasattr(type(model), "_pyloss_original"):
        change_class(model, _patched_class(type(model)), "patch_loss")
    model.__dict__[_STATE] = state
    if _call_begins not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_call_begins, with_kwargs=True)
        model.register_forward_hook(_call_ends)
    return whole


def unpatch_loss(model: Any) -> Any:
    """Undo `patch_loss`: the model's own forward, class and loss again.

    Args:
        model: a model, or a trainer; one that is not patched stays as it is.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from pyloss.integrations.transformers import patch_loss, unpatch_loss
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        >>> model = unpatch_loss(patch_loss(GPT2LMHeadModel(config)))
        >>> type(model) is GPT2LMHeadModel
        True
    """
    if _is_trainer(model):
        _restore_compute_loss(model)
        unpatch_loss(model.model)
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    whole, model = model, _base_of(model)
    for name in (_STATE, _WARNED):
        model.__dict__.pop(name, None)
    for hooks, function, names in (
        (model._forward_pre_hooks, _call_begins, model._forward_pre_hooks_with_kwargs),
        (model._forward_hooks, _call_ends, {}),
    ):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            names.pop(key, None)
    # fully_shard puts a class of its own over the patched one. That stays: without the state the
    # patched forward is the original one.
    if "_pyloss_original" in vars(type(model)):
        model.__class__ = type(model)._pyloss_original
    return whole


def enable(*, strict: bool = False, **loss_options: Any) -> Settings:
    r"""Let every ``Trainer`` train with :func:`patch_loss`, whether it is made before or after.

    From now on ``Trainer.train`` patches the trainer, as ``patch_loss(trainer, **loss_options)``
    does, when it begins, and takes the patch back when it ends; outside of it nothing is changed.
    Trainers of TRL get :func:`pyloss.integrations.trl.patch_trainer`. A model or trainer that is
    patched already keeps its options. Calling it again replaces the options.

    Args:
        strict: an error, instead of a warning, from ``train`` of a trainer whose model or loss
            cannot be patched, also where this shows in the first step.
        loss_options: those of :func:`patch_loss`.

    Returns:
        A context manager, for ``with enable():``, which brings back what was before. A trainer
        takes the options of a block of its own thread, else the latest. Without a ``with`` they
        hold until :func:`disable`.

    Raises:
        TypeError: an unknown option, ``strict`` not a bool.
        ImportError: transformers is not installed.

    Example:
        >>> from pyloss.integrations.transformers import disable, enable
        >>> enable(z_loss=1e-4)
        enable(z_loss=0.0001, strict=False)
        >>> with enable():
        ...     pass  # trainer.train()
        >>> disable()
    """
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be a bool, got {type(strict).__name__}")
    _check_options(loss_options)
    settings = Settings(strict, loss_options)
    use(settings)
    return settings


def disable() -> None:
    """Undo `enable`: trainers train with their own loss again.

    Returns:
        None.

    Example:
        >>> from pyloss.integrations.transformers import disable
        >>> disable()
    """
    use(None)


def is_patched(model: Any) -> bool:
    """Whether patch_loss has been called on a model, or on the model in a model of PEFT."""
    return _STATE in _base_of(model).__dict__


def tolerate(model: Any) -> None:
    """Let a patched model that turns out not to be followed train with its own loss."""
    state = _base_of(model).__dict__
    state[_STATE] = state[_STATE]._replace(lenient=True)


# --------------------------------------------------------------------------------------------------
# Trainers, and models that train without the patched loss


def _is_trainer(model: Any) -> bool:
    names = {(cls.__module__, cls.__name__) for cls in type(model).__mro__}
    return ("transformers.trainer", "Trainer") in names


def _base_of(model: Any) -> Any:
    """The transformers model in a model of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _patch_trainer(trainer: Any, options: dict[str, Any]) -> Any:
    name = type(trainer).__name__
    if any(cls.__module__.partition(".")[0] == "trl" for cls in type(trainer).__mro__):
        raise TypeError(f"patch_loss has no effect in TRL's trainers, such as this {name}: {_TRL}")
    if trainer.compute_loss_func is not None:
        raise ValueError(
            f"this {name} has a compute_loss_func, which takes the place of the model's loss, "
            "patched or not"
        )
    if trainer.label_smoother is not None:
        factor = trainer.label_smoother.epsilon
        if options.setdefault("label_smoothing", factor) != factor:
            raise ValueError(
                f"label_smoothing={options['label_smoothing']}, but this {name} has "
                f"label_smoothing_factor={factor}"
            )
    patch_loss(trainer.model, **options)
    _restore_compute_loss(trainer)
    own = trainer.__dict__.get("compute_loss")  # a user may have set one on the instance
    trainer.compute_loss = functools.partial(_compute_loss, trainer, own)
    return trainer


def _restore_compute_loss(trainer: Any) -> None:
    """Undo what _patch_trainer does to compute_loss."""
    ours = trainer.__dict__.get("compute_loss")
    if getattr(ours, "func", None) is _compute_loss:
        del trainer.compute_loss
        if (own := ours.args[1]) is not None:
            trainer.compute_loss = own


def _compute_loss(trainer: Any, own: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Trainer.compute_loss which, in training, leaves the label smoothing to the model."""
    compute_loss = own or functools.partial(type(trainer).compute_loss, trainer)
    smoother = trainer.label_smoother
    if model.training:
        trainer.label_smoother = None
    try:
        return compute_loss(model, *args, **kwargs)
    finally:
        trainer.label_smoother = smoother


def _trains(model: Any) -> bool:
    return model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _call_begins(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a patched model."""
    _calls.reached = False
    if kwargs.get("fused_lm_head") and _trains(model):
        raise RuntimeError(f"patch_loss has no effect on this {type(model).__name__}: {_TRL}")


def _call_ends(model: Any, args: tuple, output: Any) -> None:
    """Forward hook of a patched model."""
    own = model.__dict__.get("forward")
    compiled = hasattr(own, "_torchdynamo_orig_callable")  # does not set the mark
    if own is not None and _trains(model) and not _calls.reached and not compiled:
        _warn(model, "its forward has been replaced since the patch; patch it after that")


def _warn(model: Any, reason: str) -> None:
    if not model.__dict__.get(_WARNED):
        model.__dict__[_WARNED] = True
        warnings.warn(
            f"this {type(model).__name__} is patched by patch_loss, but trains without the patched "
            f"loss: {reason} (docs/transformers.md lists when it has no effect)",
            stacklevel=3,
        )


# --------------------------------------------------------------------------------------------------
# Checks


def _check_options(options: dict[str, Any]) -> None:
    known = inspect.signature(fused_linear_cross_entropy).parameters
    for name in options:
        if name in _RESERVED:
            raise TypeError(f"patch_loss: {name} {_RESERVED[name]}")
        if name not in known:
            choice = ", ".join(sorted(set(known) - set(_RESERVED)))
            raise TypeError(f"patch_loss got an unknown option {name!r}; there are {choice}")


def _check_model(model: Any) -> str:
    """The path of the output layer of a model that can be patched."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {name}; patch a model before "
            "torch.compile or DistributedDataParallel wrap it"
        )
    parameters = inspect.signature(type(model).forward).parameters
    losses = ("loss_function", "CrossEntropyLoss", "cross_entropy")
    if "labels" not in parameters or not any(_forward_names(type(model), x) for x in losses):
        raise TypeError(
            f"patch_loss needs a language model whose forward takes labels and calls "
            f"self.loss_function or torch's cross entropy; {name}.forward does not"
        )
    head = model.get_output_embeddings()
    head_of(
        head,
        "patch_loss needs an output layer (get_output_embeddings(), usually lm_head) of type "
        f"torch.nn.Linear; {name} has",
    )
    path = next((path for path, module in model.named_modules() if module is head), None)
    if path is None:
        raise TypeError(
            f"patch_loss found an output layer in {name}.get_output_embeddings(), but not among "
            "the model's submodules"
        )
    return path


def _forward_names(cls: type, name: str) -> bool:
    """Whether the code of cls.forward, below its decorators, mentions a name."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            code = getattr(inspect.unwrap(vars(base)["forward"]), "__code__", None)
            if code is None or name in code.co_names:
                return code is not None
            if "super" not in code.co_names:
                return False
    return False


def _loss_of(model: Any) -> str | None:
    """The name of the model's loss function; None for a model that calls cross_entropy itself."""
    if not _forward_names(type(model), "loss_function"):
        return None
    from transformers.loss import loss_utils

    for name in _LOSSES:
        if model.loss_function is getattr(loss_utils, name):
            return name
    found = getattr(model.loss_function, "__name__", model.loss_function)
    raise ValueError(
        f"patch_loss stands in for transformers' {' and '.join(_LOSSES)}, but "
        f"{type(model).__name__} has the loss function {found}"
    )


def _has_another_loss(model: Any, name: str | None) -> bool:
    """Whether the user has set model.loss_function since the patch."""
    # Not model.loss_function itself, which may log, and torch.compile cannot trace that.
    if name is None or _LOSS not in model.__dict__:
        return False
    from transformers.loss import loss_utils

    return model.__dict__[_LOSS] is not getattr(loss_utils, name)


# --------------------------------------------------------------------------------------------------
# The patched class


@functools.cache
def _patched_class(cls: type) -> type:
    """A subclass of cls that looks the same from outside and uses the loss."""
    parameters = inspect.signature(cls.forward).parameters
    position = {name: i - 1 for i, name in enumerate(parameters)}  # less self

    @functools.wraps(cls.forward)  # trainers look at the signature
    def forward(self, *args, **kwargs):
        def given(name):
            i = position.get(name, -1)
            return args[i] if 0 <= i < len(args) else kwargs.get(name)

        if not torch.compiler.is_compiling():
            _calls.reached = True
        patch = self.__dict__.get(_STATE)
        if patch is None or not self.training:
            return cls.forward(self, *args, **kwargs)
        if given("labels") is None:
            if _trains(self):
                _warn(self, _NO_LABELS)
            return cls.forward(self, *args, **kwargs)
        keep = given("logits_to_keep")
        if isinstance(keep, Tensor) or keep or _has_another_loss(self, patch.loss):
            return cls.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling() or not patch.lenient:
            return followed(self, patch, args, kwargs)
        try:
            return followed(self, patch, args, kwargs)
        except TypeError as error:
            output = cls.forward(self, *args, **kwargs)  # an error of the model's own comes again
            if self.__dict__.pop(_STATE, None) is not None:
                warn_of_own_loss(self, error)
            return output

    def followed(self, patch, args, kwargs):
        with _deferred(self, patch) as view:
            output = cls.forward(view, *args, **kwargs)
        return _without_logits(output)

    return lookalike(cls, forward, _patched_class)


@contextmanager
def _deferred(model: Any, patch: _LossPatch) -> Iterator[Any]:
    """A view of the model with a deferred output layer and the loss function for it."""
    layer = model.get_submodule(patch.head)
    head = head_of(
        layer,
        "patch_loss needs an output layer with the forward of torch.nn.Linear, but since the patch "
        "it has become",
    )
    stand_in = DeferredHead(head, patch.options)
    loss = _LOSSES.get(patch.loss, causal_loss)
    if torch.compiler.is_compiling():
        parent, _, name = patch.head.rpartition(".")
        modules = model.get_submodule(parent)._modules
        with exchanged(modules, name, stand_in), exchanged(model.__dict__, _LOSS, loss):
            yield model
        return
    view, before = _view(model, patch.head.split("."), stand_in), dict(model.__dict__)
    view.__dict__[_LOSS] = loss
    yield view
    for name, value in view.__dict__.items():  # what a forward keeps on its model
        if name not in (_LOSS, "_modules", *FORWARDS) and value is not before.get(name, _ABSENT):
            model.__dict__[name] = value


def _view(module: nn.Module, path: list[str], end: nn.Module) -> Any:
    """The module as another object, with `end` at the path; parameters and hooks are shared.

    The module stays as it is, for other threads that use it.
    """
    if not path:
        return end
    view = view_of(module)
    inner = _view(module._modules[path[0]], path[1:], end)
    view.__dict__["_modules"] = {**module._modules, path[0]: inner}
    return view


def _without_logits(output: Any) -> Any:
    """The output with None for the logits; in a tuple the other entries keep their places."""
    if isinstance(output, tuple):
        return tuple(None if isinstance(entry, Deferred) else entry for entry in output)
    entries = {k: v for k, v in output.items() if not isinstance(v, Deferred)}
    for name, value in entries.items():  # the output of a language model in a model of images
        if hasattr(value, "to_tuple"):
            entries[name] = _without_logits(value)
    return type(output)(**entries)
