"""Losses of pyloss in the trainers of Hugging Face TRL.

There are two hooks. `patch_trainer` changes how any of TRL's trainers gets the log-probabilities of
tokens from hidden states; what the trainer makes of them stays TRL's. The subclasses `DPOTrainer`
and `GRPOTrainer` also take the loss itself from pyloss: TRL's own computation of the loss runs,
with all its metrics, while the outputs of the models are noted, and the loss of those is returned
in its place. TRL's options with no counterpart here are refused when the trainer is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
import trl
from torch import Tensor, nn

from pyloss.functional import dpo_loss, grpo_loss
from pyloss.integrations._trl_head import exchange, is_exchanged, restore

__all__ = ["DPOTrainer", "GRPOTrainer", "SFTTrainer", "patch_trainer", "unpatch_trainer"]

_HOW = ("chunk", "strategy", "accumulate_dtype", "filter")  # the result is the same
_WHAT = ("z_loss", "label_smoothing", "tau", "truncate", "weight")  # another loss: SFT only
# Losses of DPO that read an option. TRL has label smoothing in these only; dpo_loss in more.
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
_PER_TOKEN = ("ipo", "sigmoid_norm")  # of log-probabilities divided by the number of tokens
_WITH_DIVERGENCE = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")
_PER_WINDOW = ("dapo", "cispo", "vespo")  # divided by the tokens of all micro-batches
_DISCOPOP_TAU = 0.05
_USE_TRL = "train with TRL's own {} and pyloss.integrations.trl.patch_trainer(trainer)"


def patch_trainer(trainer: Any, **loss_options: Any) -> Any:
    r"""Let a trainer of TRL take the log-probabilities of tokens from pyloss.

    .. math:: \log p(y_t) = -\ell_\mathrm{fused}(\mathrm{transform}(W h_t + b) / T,\; y_t)

    by :func:`pyloss.fused_linear_cross_entropy`, with entropy and accuracy from the same pass. The
    loss of the trainer and its metrics stay TRL's, whatever its options. Patching twice is patching
    once, with the options of the second call. The patch is on the model: when several patched
    trainers share one, it has the options of the trainer that began to train last; a trainer of it
    that is not patched uses them, too.

    Args:
        trainer: an ``SFTTrainer``, ``DPOTrainer``, ``GRPOTrainer``, ``KTOTrainer`` or
            ``RLOOTrainer``, before it trains; its model and its reference model are patched.
        loss_options: options of :func:`pyloss.fused_linear_cross_entropy`: ``chunk``, ``strategy``,
            ``accumulate_dtype``, ``filter``; and for an ``SFTTrainer`` with ``loss_type="nll"``
            those that make another loss: ``z_loss``, ``label_smoothing``, ``tau``, ``truncate``,
            ``weight``.

    Returns:
        ``trainer``.

    Raises:
        TypeError: not a trainer of TRL with a fused output layer; an unknown option.
        ValueError: an option of another loss for another trainer, or beside a loss of the trainer's
            own (``compute_loss_func``, ``label_smoothing_factor``, ``loss_type="dft"``).

    Example:
        >>> from pyloss.integrations.trl import patch_trainer
        >>> patch_trainer("trainer")
        Traceback (most recent call last):
        TypeError: trainer must be a trainer of TRL with a fused output layer, got str

    Reference:
        Wijmans et al. Cut Your Losses in Large-Vocabulary Language Models. arXiv 2411.09009.
    """
    models = models_of(trainer)
    _check_options(trainer, loss_options)
    again = _Again(models, loss_options)
    again.on_train_begin()
    trainer.remove_callback(_Again)
    trainer.add_callback(again)
    return trainer


def unpatch_trainer(trainer: Any) -> Any:
    """Undo `patch_trainer`: TRL's own output layer again.

    Args:
        trainer: a trainer of TRL; one that is not patched stays as it is.

    Returns:
        ``trainer``.

    Raises:
        TypeError: not a trainer of TRL with a fused output layer.

    Example:
        >>> from pyloss.integrations.trl import unpatch_trainer
        >>> unpatch_trainer("trainer")
        Traceback (most recent call last):
        TypeError: trainer must be a trainer of TRL with a fused output layer, got str
    """
    restore_all(trainer, models_of(trainer))
    return trainer


def restore_all(trainer: Any, models: list[nn.Module]) -> None:
    """Give the models of a trainer TRL's own output layer again."""
    trainer.remove_callback(_Again)
    for model in models:
        restore(model)


class _Again(transformers.TrainerCallback):
    """A trainer made or patched since may have given a model that they share other options."""

    def __init__(self, models: list[nn.Module], options: dict[str, Any]) -> None:
        self.models, self.options = models, options

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for model in self.models:
            exchange(model, self.options)


def is_patched(trainer: Any) -> bool:
    """Whether patch_trainer has been called on a trainer."""
    return all(is_exchanged(model) for model in models_of(trainer))


class SFTTrainer(trl.SFTTrainer):
    """TRL's ``SFTTrainer`` with the cross entropy of pyloss.

    Args:
        loss_options: the options of :func:`patch_trainer`, ``z_loss`` and ``label_smoothing`` among
            them.
        *args, **kwargs: those of ``trl.SFTTrainer``; ``loss_type`` of its ``SFTConfig`` is
            ``"nll"`` or ``"dft"``.

    Raises:
        TypeError, ValueError: see :func:`patch_trainer`.

    Example:
        >>> import inspect
        >>> from pyloss.integrations.trl import SFTTrainer
        >>> "loss_options" in inspect.signature(SFTTrainer).parameters
        True
    """

    def __init__(
        self, *args: Any, loss_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        patch_trainer(self, **(loss_options or {}))


class DPOTrainer(trl.DPOTrainer):
    """TRL's ``DPOTrainer`` with the losses of :func:`pyloss.functional.dpo_loss`.

    All of TRL's loss types, alone or as a weighted sum (``loss_type``, ``loss_weights``), and its
    metrics. Log-probabilities come from pyloss, too.

    Args:
        *args, **kwargs: those of ``trl.DPOTrainer``.

    Raises:
        ValueError: ``discopop_tau`` other than 0.05; a number out of the range of ``dpo_loss``; a
            divergence other than ``"reverse_kl"`` with ``"ipo"`` or ``"sigmoid_norm"``.

    Example:
        >>> import trl
        >>> from pyloss.integrations.trl import DPOTrainer
        >>> issubclass(DPOTrainer, trl.DPOTrainer)
        True

    Reference:
        Rafailov et al. Direct Preference Optimization. arXiv 2305.18290.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        patch_trainer(self)
        if "discopop" in self.loss_types and self.args.discopop_tau != _DISCOPOP_TAU:
            raise ValueError(
                f"discopop_tau is {_DISCOPOP_TAU} in pyloss, got {self.args.discopop_tau}; "
                + _USE_TRL.format("DPOTrainer")
            )
        pair = torch.zeros(1)
        for name in self.loss_types:
            if name in _PER_TOKEN and self.f_divergence_type != "reverse_kl":
                raise ValueError(
                    f"loss_type {name!r} has no f_divergence_type {self.f_divergence_type!r} here; "
                    + _USE_TRL.format("DPOTrainer")
                )
            if name != "sft":
                self._loss_of_pairs(name, pair, pair, pair, pair)

    def _loss_of_pairs(self, name: str, *logps: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if name in _SMOOTHED:
            options["label_smoothing"] = self.label_smoothing
        if name in _WITH_DIVERGENCE:
            options["f_divergence_type"] = self.f_divergence_type
            options["f_alpha_divergence_coef"] = self.f_alpha_divergence_coef
        if name == "sigmoid_norm":  # a name of TRL's for sigmoid of means over tokens
            name = "sigmoid"
        return dpo_loss(*logps, beta=self.beta, loss_type=name, reduction="none", **options)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        with _noted(self.model, self.ref_model) as (of_policy, of_reference):
            found = super()._compute_loss(model, inputs, return_outputs)
        policy = of_policy[0]
        # With adapters the reference is the same model without them, called after the policy.
        reference = (of_reference or of_policy[1:2] or [None])[0]
        loss = self._preference_loss(policy, reference, inputs)
        return (loss, found[1]) if return_outputs else loss

    def _preference_loss(self, policy: Any, reference: Any, inputs: Any) -> Tensor:
        answer = inputs["completion_mask"][:, 1:]
        length = answer.shape[1]
        tokens = policy.log_probs[:, -length:]
        share = _shares(answer, self.ld_alpha)
        sums = list((tokens * share).sum(1).chunk(2))
        if self.precompute_ref_logps:
            sums += [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
        else:
            sums += (reference.log_probs[:, -length:] * share).sum(1).chunk(2)
        counts = inputs["completion_mask"].sum(1).clamp(min=1).chunk(2) * 2
        means = [logps / count for logps, count in zip(sums, counts)]
        weight = 1.0
        if self.use_weighting:
            weight = _likelihood(tokens, policy.log_sum_sq_probs[:, -length:], answer)
        loss = 0.0
        for name, factor in zip(self.loss_types, self.loss_weights, strict=True):
            if name == "sft":
                chosen = answer.chunk(2)[0].bool()
                value = -tokens.chunk(2)[0][chosen].mean()
            else:
                value = self._loss_of_pairs(name, *(means if name in _PER_TOKEN else sums))
            loss = loss + factor * (value * weight).mean()
        return loss + _auxiliary(self, policy.aux_loss)


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's ``GRPOTrainer`` with the losses of :func:`pyloss.functional.grpo_loss`.

    All of TRL's loss types (``loss_type`` of its ``GRPOConfig``), both levels of importance
    sampling, KL term, two-sided clipping, a constant entropy bonus, and its metrics.
    Log-probabilities come from pyloss, too.

    Args:
        *args, **kwargs: those of ``trl.GRPOTrainer``.

    Raises:
        ValueError: an option that ``grpo_loss`` has not: ``off_policy_mask_threshold``,
            ``top_entropy_quantile``, ``use_adaptive_entropy``, the importance sampling correction
            of vLLM, other temperatures of ``"sapo"`` and weights of ``"vespo"`` than the defaults;
            a number out of its range, as ``epsilon_high`` below 1 for ``"cispo"``.

    Example:
        >>> import trl
        >>> from pyloss.integrations.trl import GRPOTrainer
        >>> issubclass(GRPOTrainer, trl.GRPOTrainer)
        True

    Reference:
        Shao et al. DeepSeekMath. arXiv 2402.03300.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pyloss_noted: list[Any] = []
        super().__init__(*args, **kwargs)
        patch_trainer(self)
        _check_grpo(self)
        token = torch.zeros(1, 1)
        self._policy_loss(token, token, token[0], None, token, None)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._pyloss_noted.append(found)
        return found

    def _policy_loss(
        self,
        logps: Tensor,
        old: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None,
        reference: Tensor | None,
        num_items: Tensor | None,
    ) -> Tensor:
        # TRL's bound of cispo is that of the ratio itself.
        high = self.epsilon_high - 1 if self.loss_type == "cispo" else self.epsilon_high
        return grpo_loss(
            logps, old, advantages, mask=mask, clip_low=self.epsilon_low, clip_high=high,
            ref_logprobs=reference if self.beta else None, kl_coef=self.beta,
            loss_type=self.loss_type, max_length=self.max_completion_length, num_items=num_items,
            importance_sampling_level=self.importance_sampling_level, max_ratio=self.args.delta,
            kl_correction=self.args.use_bias_correction_kl,
        )  # fmt: skip

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        self._pyloss_noted = []
        super()._compute_loss(model, inputs)
        (logps, entropies, auxiliary), *_ = self._pyloss_noted
        self._pyloss_noted = []
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        # Micro-batches of one step are averaged, or share one denominator.
        training = self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1
        items = None
        if self.loss_type in _PER_WINDOW:
            items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if training:
                items = items * steps / self.args.steps_per_generation
        loss = self._policy_loss(
            logps, inputs.get("old_per_token_logps"), inputs["advantages"], mask,
            inputs.get("ref_per_token_logps"), items,
        )  # fmt: skip
        loss = loss if items is not None else loss / steps
        if self.entropy_coef:
            entropy = (entropies * mask).sum() / mask.sum().clamp(min=1)
            loss = loss - self.entropy_coef * entropy / steps
        return loss + _auxiliary(self, auxiliary) / steps


# --------------------------------------------------------------------------------------------------
# Parts of the losses


@contextlib.contextmanager
def _noted(*models: nn.Module | None) -> Iterator[list[list[Any]]]:
    """One list per model with the outputs of its fused output layer, while this lasts."""
    outputs: list[list[Any]] = [[] for _ in models]

    def hook_into(kept: list[Any]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if getattr(output, "log_probs", None) is not None:
                kept.append(output)

        return hook

    hooks = [
        model.register_forward_hook(hook_into(kept))
        for model, kept in zip(models, outputs)
        if model is not None
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _shares(answer: Tensor, alpha: float | None) -> Tensor:
    """What a token counts. LD-DPO: alpha beyond the length of the shorter answer of the pair."""
    if alpha is None:
        return answer
    shorter = torch.minimum(*answer.sum(1).chunk(2)).repeat(2)
    return answer * torch.where(answer.cumsum(1) <= shorter[:, None], 1.0, alpha)


def _likelihood(tokens: Tensor, squares: Tensor, answer: Tensor) -> Tensor:
    """WPO's weight of a pair: how likely its two answers are under the policy; a constant."""
    aligned = ((tokens.detach() - squares) * answer).sum(1) / answer.sum(1).clamp(min=1)
    chosen, rejected = aligned.exp().chunk(2)
    return chosen * rejected


def _auxiliary(trainer: Any, loss: Tensor | None) -> Tensor | float:
    """The routers' loss of a mixture of experts."""
    return trainer.router_aux_loss_coef * loss if trainer.aux_loss_enabled else 0.0


# --------------------------------------------------------------------------------------------------
# Checks


def models_of(trainer: Any) -> list[nn.Module]:
    """The models of a trainer that have a fused output layer."""
    ours = any(cls.__module__.partition(".")[0] == "trl" for cls in type(trainer).__mro__)
    if not ours or not isinstance(getattr(trainer, "model", None), nn.Module):
        raise TypeError(
            "trainer must be a trainer of TRL with a fused output layer, got "
            f"{type(trainer).__name__}"
        )
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    models = [model for model in models if model is not None]
    return [m.get_base_model() if hasattr(m, "get_base_model") else m for m in models]


def _check_options(trainer: Any, options: dict[str, Any]) -> None:
    for name in options:
        if name not in (*_HOW, *_WHAT):
            raise TypeError(
                f"patch_trainer got an unknown option {name!r}; there are "
                f"{', '.join(sorted((*_HOW, *_WHAT)))}"
            )
    changed = sorted(set(options) & set(_WHAT))
    if not changed:
        return
    name = type(trainer).__name__
    if not isinstance(trainer, trl.SFTTrainer):
        raise ValueError(f"{changed} make another loss than the log-probabilities of a {name}")
    if trainer.args.loss_type != "nll":
        raise ValueError(f"{changed} need loss_type 'nll', got {trainer.args.loss_type!r}")
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise ValueError(
            f"this {name} has a compute_loss_func or a label_smoothing_factor, beside which "
            f"{changed} have no effect; the option label_smoothing stands for the latter"
        )


def _check_grpo(trainer: Any) -> None:
    args = trainer.args
    sapo, vespo = trainer.loss_type == "sapo", trainer.loss_type == "vespo"
    refused = {
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "top_entropy_quantile": trainer.top_entropy_quantile < 1,
        "use_adaptive_entropy": trainer.use_adaptive_entropy,
        "vllm_importance_sampling_correction": (
            trainer.use_vllm and trainer.vllm_importance_sampling_correction
        ),
        "sapo_temperature_pos": sapo and args.sapo_temperature_pos != 1.0,
        "sapo_temperature_neg": sapo and args.sapo_temperature_neg != 1.05,
        "vespo_k_pos": vespo and args.vespo_k_pos != 2.0,
        "vespo_k_neg": vespo and args.vespo_k_neg != 3.0,
        "vespo_lambda_pos": vespo and args.vespo_lambda_pos != 3.0,
        "vespo_lambda_neg": vespo and args.vespo_lambda_neg != 2.0,
    }
    if found := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(
            f"grpo_loss has no counterpart of {', '.join(found)}; " + _USE_TRL.format("GRPOTrainer")
        )
