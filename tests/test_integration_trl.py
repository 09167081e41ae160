"""TRL's trainers with the losses of pyloss: the numbers are those of TRL's own trainers."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("ignore")]

trl = pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

import pyloss.integrations.trl as integration  # noqa: E402
from pyloss.integrations import _trl_head  # noqa: E402
from pyloss.integrations.trl import patch_trainer, unpatch_trainer  # noqa: E402

WORDS = 60
VOCABULARY = WORDS + 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def make(seed: int = 0, family: str = "Llama", **options: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # logits of order 1
        for p in model.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def text(generator: random.Random, words: int) -> str:
    return "".join(f" w{generator.randrange(WORDS)}" for _ in range(words))


def rows(kind: str, count: int = 8) -> Any:
    g = random.Random(0)
    if kind == "sft":
        return datasets.Dataset.from_list([{"text": text(g, 4 + i % 5)} for i in range(count)])
    if kind == "grpo":
        return datasets.Dataset.from_list([{"prompt": text(g, 3 + i % 3)} for i in range(count)])
    pairs = [
        {"prompt": text(g, 3), "chosen": text(g, 2 + i % 4), "rejected": text(g, 5)}
        for i in range(count)
    ]
    return datasets.Dataset.from_list(pairs)


def settings(kind: str, folder: Path, **options: Any) -> Any:
    config = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig}[kind]
    if kind == "grpo":
        options = {"num_generations": 2, "max_completion_length": 6, **options}
    return config(**{
        **dict(
            output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, bf16=False,
            gradient_accumulation_steps=2, learning_rate=1e-2, optim="sgd", seed=3,
        ),
        **options,
    })  # fmt: skip


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(c) % 7) for c in completions]


def trainer(
    cls: type, kind: str, folder: Path, tokenizer: Any, model: Any = None, more: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    given: dict[str, Any] = dict(more or {})
    if kind == "dpo" and not hasattr(model, "peft_config"):
        given.setdefault("ref_model", make(1))
    model = make() if model is None else model
    if kind == "grpo":
        given["reward_funcs"] = reward
        if options.get("beta"):  # the reference is read from where the model came from
            make(1).save_pretrained(folder / "reference")
            model.config._name_or_path = str(folder / "reference")
    return cls(
        model=model, args=settings(kind, folder, **options),
        train_dataset=rows(kind), processing_class=tokenizer, **given,
    )  # fmt: skip


NAMES = {"sft": "SFTTrainer", "dpo": "DPOTrainer", "grpo": "GRPOTrainer"}


def both(kind: str, folder: Path, tokenizer: Any, **options: Any) -> tuple[Any, Any]:
    """(TRL's own trainer, pyloss')"""
    model = options.pop("model", None)
    return tuple(
        trainer(
            getattr(package, NAMES[kind]), kind, folder, tokenizer, copy.deepcopy(model), **options
        )
        for package in (trl, integration)
    )


def assert_same_log(want: dict[str, float], got: dict[str, float]) -> None:
    assert want.keys() == got.keys()
    for key in want:
        if "time" not in key and "runtime" not in key and "per_second" not in key:
            assert math.isclose(want[key], got[key], rel_tol=2e-4, abs_tol=2e-6), (key, want, got)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("sft", {}),
        ("sft", {"loss_type": "dft"}),
        ("dpo", {}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("grpo", {"beta": 0.1}),
        ("grpo", {"num_iterations": 2, "loss_type": "dapo"}),
    ],
)
def test_training(kind: str, options: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    own, ours = both(kind, tmp_path, tokenizer, **options)
    for t in (own, ours):
        transformers.set_seed(5)
        t.train()
    for want, got in zip(own.state.log_history[:2], ours.state.log_history[:2], strict=True):
        assert_same_log(want, got)
    assert own.state.log_history[0]["grad_norm"] > 1e-3
    for p, q in zip(own.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=2e-4)


def loss_and_gradients(t: Any, inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    t.model.train().zero_grad()
    inputs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    loss = t.compute_loss(t.model, inputs)
    loss.backward()
    return loss.detach(), [p.grad for p in t.model.parameters()]


def assert_same_step(own: Any, ours: Any, inputs: Any) -> torch.Tensor:
    want, wanted = loss_and_gradients(own, inputs)
    got, found = loss_and_gradients(ours, inputs)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.abs().max() < 1e3
            torch.testing.assert_close(a, b, atol=1e-6 + 2e-5 * b.abs().max().item(), rtol=2e-4)
    metrics, others = own._metrics["train"], ours._metrics["train"]
    assert metrics.keys() == others.keys()
    for key, values in metrics.items():
        assert values[-1] == pytest.approx(others[key][-1], rel=2e-4, abs=2e-6), key
    return got


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "discopop", "apo_zero", "apo_down", "sft", "sigmoid_norm",
)  # fmt: skip


def pairs_of(t: Any) -> Any:
    return next(iter(t.get_train_dataloader()))


def test_losses_of_dpo(tmp_path: Path, tokenizer: Any) -> None:
    own, ours = both("dpo", tmp_path, tokenizer, label_smoothing=0.1, beta=0.3)
    inputs = pairs_of(own)
    seen = set()
    for name in DPO_LOSSES:
        for t in (own, ours):
            t.loss_types, t.loss_weights = [name], [1.0]
        seen.add(round(assert_same_step(own, ours, inputs).item(), 5))
    assert len(seen) == len(DPO_LOSSES)
    for t in (own, ours):
        t.loss_types, t.loss_weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
        t.ld_alpha = 0.4
    assert_same_step(own, ours, inputs)
    for t in (own, ours):
        t.loss_types, t.loss_weights, t.ld_alpha = ["hinge", "robust"], [1.0, 0.5], None
    for name in ("forward_kl", "js_divergence", "alpha_divergence"):
        for t in (own, ours):
            t.f_divergence_type, t.f_alpha_divergence_coef = name, 0.5
        assert_same_step(own, ours, inputs)


def test_weights_of_wpo(tmp_path: Path, tokenizer: Any) -> None:
    """And soft capping, of which the mean logits need the logits."""
    options = dict(layer_types=["full_attention"], sliding_window=64, final_logit_softcapping=2.0)
    model = make(0, "Gemma2", **options)
    own, ours = both("dpo", tmp_path, tokenizer, use_weighting=True, model=model)
    assert_same_step(own, ours, pairs_of(own))


def test_mixture_of_experts(tmp_path: Path, tokenizer: Any) -> None:
    model = make(0, "Mixtral", num_local_experts=4, router_aux_loss_coef=0.3)
    own, ours = both("dpo", tmp_path, tokenizer, model=model, router_aux_loss_coef=0.3)
    assert own.aux_loss_enabled
    assert_same_step(own, ours, pairs_of(own))


def test_dpo_of_an_adapter(tmp_path: Path, tokenizer: Any) -> None:
    """The reference is the model without it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(make(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    own, ours = both("dpo", tmp_path, tokenizer, model=model)
    assert ours.ref_model is None
    assert_same_step(own, ours, pairs_of(own))


GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def answers() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    prompt, answer = torch.randint(4, VOCABULARY, (4, 3)), torch.randint(4, VOCABULARY, (4, 6))
    lengths = torch.tensor([6, 2, 4, 5])
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": answer,
        "completion_mask": (torch.arange(6) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_per_token_logps": -4.2 + 0.6 * torch.randn(4, 6),
        "ref_per_token_logps": -4.2 + 0.6 * torch.randn(4, 6),
        "num_items_in_batch": torch.tensor(41),
    }


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_of_grpo(level: str, tmp_path: Path, tokenizer: Any) -> None:
    own, ours = both(
        "grpo", tmp_path, tokenizer, beta=0.2, epsilon=0.2, epsilon_high=0.3, delta=1.6,
        importance_sampling_level=level, temperature=0.7, entropy_coef=0.05,
    )  # fmt: skip
    seen = set()
    for name in GRPO_LOSSES:
        if name == "vespo" and level == "sequence":
            continue
        for t in (own, ours):
            t.loss_type, t.current_gradient_accumulation_steps = name, 2
            t.epsilon_high = 1.5 if name == "cispo" else 0.3
            t.args.delta = 1.6 if name in ("grpo", "bnpo") else None
        seen.add(round(assert_same_step(own, ours, answers()).item(), 5))
    assert len(seen) == len(GRPO_LOSSES) - (level == "sequence")
    for t in (own, ours):
        t.args.use_bias_correction_kl = False
    assert_same_step(own, ours, answers())
    tools = torch.ones(4, 6, dtype=torch.long)
    tools[:, 1] = 0
    assert_same_step(own, ours, {**answers(), "tool_mask": tools})
    per_token = torch.randn(4, 6)
    assert_same_step(own, ours, {**answers(), "advantages": per_token})


def test_options_of_sft(tmp_path: Path, tokenizer: Any) -> None:
    """Label smoothing is that of transformers' Trainer, without logits."""
    own = trainer(trl.SFTTrainer, "sft", tmp_path, tokenizer, label_smoothing_factor=0.2)
    ours = trainer(
        integration.SFTTrainer, "sft", tmp_path, tokenizer,
        more={"loss_options": {"label_smoothing": 0.2}},
    )  # fmt: skip
    inputs = pairs_of(own)
    want = assert_same_step(own, ours, inputs)
    patch_trainer(ours, z_loss=0.1)
    assert abs(loss_and_gradients(ours, inputs)[0] - want) > 1e-2
    plain = trainer(trl.SFTTrainer, "sft", tmp_path, tokenizer)
    forward = plain.model.forward
    assert_same_step(plain, patch_trainer(copy.copy(plain)), inputs)
    assert unpatch_trainer(plain).model.forward.__func__ is forward.__func__
    assert plain.model.generate(inputs["input_ids"], max_new_tokens=2).shape[1] > 2
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        patch_trainer(own, z_loss=0.1)
    with pytest.raises(TypeError, match="unknown option 'reduction'"):
        patch_trainer(ours, reduction="sum")
    del plain.model.forward
    with pytest.raises(TypeError, match="no fused output layer"):
        patch_trainer(plain)
    dft = {"loss_options": {"z_loss": 0.1}}
    with pytest.raises(ValueError, match="need loss_type 'nll', got 'dft'"):
        trainer(
            integration.SFTTrainer, "sft", tmp_path, tokenizer, more=dft, loss_type="dft"
        )  # fmt: skip


def test_trainers_of_one_model(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trains with its own options, whichever was made last."""
    seen: list[Any] = []
    function = _trl_head.TokenLogProbs.apply

    def noted(self: Any, *args: Any) -> Any:
        seen.append(getattr(args[-1], "options", None))
        return function(self, *args)

    monkeypatch.setattr(_trl_head.TokenLogProbs, "apply", noted)
    model = make()
    options: tuple[dict[str, Any], ...] = ({"z_loss": 0.5}, {"z_loss": 0.25}, {})
    trainers = [
        trainer(integration.SFTTrainer, "sft", tmp_path, tokenizer, model, {"loss_options": o})
        for o in options[:2]
    ]
    trainers.append(trainer(integration.DPOTrainer, "dpo", tmp_path, tokenizer, model))
    for i in (0, 2, 1):
        trainers[i].train()
        assert seen and all(found == options[i] for found in seen)
        seen.clear()
    unpatch_trainer(trainers[0])
    assert not integration.is_patched(trainers[1])
    trainers[0].train()
    assert seen and not any(seen)


def test_no_logits_are_stored(tmp_path: Path, tokenizer: Any) -> None:
    from test_integration_transformers import Shapes

    ours = trainer(integration.SFTTrainer, "sft", tmp_path, tokenizer,
                   more={"loss_options": {"chunk": 2}})  # fmt: skip
    inputs = pairs_of(ours)
    tokens = int((inputs["labels"][:, 1:] != -100).sum())
    with Shapes() as shapes:
        ours.compute_loss(ours.model.train(), inputs).backward()
    large = [s for s in shapes.seen if s and s[-1] == VOCABULARY and math.prod(s[:-1]) >= tokens]
    assert not large


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("dpo", dict(loss_type="discopop", discopop_tau=0.1), "discopop_tau is 0.05"),
        ("dpo", dict(loss_type="ipo", f_divergence_type="forward_kl"), "f_divergence_type"),
        ("grpo", dict(off_policy_mask_threshold=0.5), "counterpart of off_policy_mask_threshold"),
        ("grpo", dict(top_entropy_quantile=0.5), "top_entropy_quantile.*patch_trainer"),
        ("grpo", dict(loss_type="sapo", sapo_temperature_neg=2.0), "sapo_temperature_neg"),
        ("grpo", dict(loss_type="cispo", epsilon_high=0.5), "clip_high"),
    ],
)
def test_what_pyloss_has_not(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(getattr(integration, NAMES[kind]), kind, tmp_path, tokenizer, **options)


def test_other_trainers_keep_their_loss(tmp_path: Path, tokenizer: Any) -> None:
    """What DPOTrainer refuses, patch_trainer serves: the log-probabilities are pyloss'."""
    own, patched = (
        trainer(trl.GRPOTrainer, "grpo", tmp_path, tokenizer, top_entropy_quantile=0.5)
        for _ in range(2)
    )
    patch_trainer(patched)
    for t in (own, patched):
        t.current_gradient_accumulation_steps = 2
    assert_same_step(own, patched, answers())
    with pytest.raises(ValueError, match="another loss than the log-probabilities of a GRPO"):
        patch_trainer(patched, z_loss=0.1)
