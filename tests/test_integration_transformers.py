"""patch_loss: the loss, gradients and manners of the model's own loss, without its logits."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import os
import pickle
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TORCH, check_ranks, needs_torch
from linear_cross_entropy_cases import Memory
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

transformers = pytest.importorskip("transformers")

from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

import pyloss.integrations._deferred_logits as deferred  # noqa: E402
from pyloss import fused_cross_entropy  # noqa: E402
from pyloss.integrations.transformers import patch_loss, unpatch_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 131
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
NEOX = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
GPT2 = dict(
    vocab_size=VOCABULARY,
    n_positions=64,
    n_embd=32,
    n_inner=48,
    n_layer=2,
    n_head=4,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=2,
)

# name: (model, configuration, its options)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SMALL, "final_logit_softcapping": 0.3}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, "final_logit_softcapping": 0.3}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**SMALL, "logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**SMALL, "logits_scaling": 3.0}),
    "phi": ("PhiForCausalLM", "PhiConfig", SMALL),  # a bias
    "mixtral": (  # adds the routers' loss
        "MixtralForCausalLM",
        "MixtralConfig",
        {**SMALL, "num_local_experts": 4, "output_router_logits": True},
    ),
    "recurrent_gemma": (  # soft capping through torch.nn.functional
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {**SMALL, "logits_soft_cap": 0.7, "attention_window_size": 8, "use_cache": False},
    ),
}


def make(family: str = "llama", **options: Any) -> Any:
    model, config, defaults = FAMILIES[family]
    torch.manual_seed(1)
    built = getattr(transformers, config)(**{**defaults, **options})
    result = getattr(transformers, model)(built)
    with torch.no_grad():  # logits of order 1, biases that are not 0
        for name, p in result.named_parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
            assert torch.isfinite(p).all(), name
    return result.train()


def batch(rows: int = 3, length: int = 12, padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = tokens.clone()
    mask = torch.ones_like(tokens)
    if padded:
        labels[0, :4] = -100  # a prompt
        tokens[1, -3:], labels[1, -3:], mask[1, -3:] = 0, -100, 0
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def pair(family: str = "llama", **loss_options: Any) -> tuple[Any, Any]:
    """(the model as it is, a patched copy)"""
    model = make(family)
    return model, patch_loss(copy.deepcopy(model), **loss_options)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 2e-6
) -> None:
    assert got.keys() == want.keys() and want
    for name, w in want.items():
        atol = tolerance * max(1e-3, w.abs().max().item())
        torch.testing.assert_close(
            got[name], w, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_step(
    model: Any, patched: Any, tolerance: float = 2e-6, **inputs: Any
) -> torch.Tensor:
    want = model(**inputs)
    got = patched(**inputs)
    assert want.logits.shape[-1] == VOCABULARY and got.logits is None
    assert type(got) is type(want)
    torch.testing.assert_close(got.loss, want.loss, atol=tolerance, rtol=tolerance)
    assert_same_gradients(gradients(patched, got.loss), gradients(model, want.loss), 5 * tolerance)
    return got.loss


# --------------------------------------------------------------------------------------------------
# Equal loss and gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model, patched = pair(family)
    assert_same_step(model, patched, **batch())


def test_soft_capping_and_scale_matter() -> None:
    """The families above could agree with a transform that does nothing."""
    for family, name, plain in (
        ("gemma2", "final_logit_softcapping", None),
        ("cohere", "logit_scale", 1.0),
        ("granite", "logits_scaling", 1.0),
    ):
        capped = patch_loss(make(family))(**batch()).loss
        without = patch_loss(make(family, **{name: plain}))(**batch()).loss
        assert abs(capped - without) > 1e-2, family


@pytest.mark.parametrize("kind", ["int", "float", "tensor", "one_entry"])
def test_num_items_in_batch(kind: str) -> None:
    model, patched = pair()
    n = {
        "int": 17,
        "float": 17.0,
        "tensor": torch.tensor(17),
        "one_entry": torch.tensor([17]),  # what the replicas of DataParallel get
    }[kind]
    want, got = (m(**batch(), num_items_in_batch=n).loss for m in (model, patched))
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    assert_same_gradients(gradients(patched, got.sum()), gradients(model, want.sum()), 1e-5)


def test_nothing_to_learn_from() -> None:
    model, patched = pair()
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for extra in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}):
        assert model(**inputs, **extra).loss.isnan() and patched(**inputs, **extra).loss.isnan()
    zeros = ({"num_items_in_batch": n} for n in (0, torch.tensor(0), torch.tensor([0])))
    for extra in ({}, *zeros):
        got = gradients(patched, patched(**inputs, **extra).loss.sum())
        want = gradients(model, model(**inputs, **extra).loss.sum())
        assert all(not g.any() for g in (*got.values(), *want.values()))  # 0, and not NaN
    zero = patched(**inputs, num_items_in_batch=4).loss
    assert zero == 0 == model(**inputs, num_items_in_batch=4).loss
    assert all(not g.any() for g in gradients(patched, zero).values())
    one_token = {k: v[:, :1] for k, v in batch(padded=False).items()}
    assert model(**one_token).loss.isnan() and patched(**one_token).loss.isnan()


def test_shift_labels() -> None:
    model, patched = pair()
    inputs = batch()
    shifted = inputs["labels"].roll(-2, dims=1).contiguous()
    loss = assert_same_step(model, patched, **inputs, shift_labels=shifted)
    assert abs(loss - patched(**inputs).loss) > 1e-3
    flat = patched(**inputs, shift_labels=shifted.reshape(1, -1)).loss
    torch.testing.assert_close(flat, loss)


def test_ignore_index() -> None:
    model, patched = pair()
    inputs = batch()
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 7)
    loss = assert_same_step(model, patched, **inputs, ignore_index=7)
    assert abs(loss - patched(**inputs).loss) > 1e-3
    by_option = patch_loss(patched, ignore_index=7)(**inputs).loss
    torch.testing.assert_close(by_option, loss)


def test_positional_arguments() -> None:
    model, patched = pair()
    inputs = batch()
    position = list(inspect.signature(model.forward).parameters).index("labels")
    args = [inputs["input_ids"], inputs["attention_mask"], *[None] * (position - 2)]
    want, got = (m(*args, inputs["labels"]) for m in (model, patched))
    assert got.logits is None
    torch.testing.assert_close(got.loss, want.loss)


def test_embeddings_as_input() -> None:
    model, patched = pair()
    inputs = batch()
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert_same_step(model, patched, **inputs, inputs_embeds=embedded)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_activation_checkpointing(family: str) -> None:
    model, patched = pair(family)
    patched.gradient_checkpointing_enable()
    assert_same_step(model, patched, **batch())


def test_the_whole_model_inside_a_checkpoint() -> None:
    model, patched = pair()

    def loss() -> torch.Tensor:
        return patched(**batch()).loss

    got = torch.utils.checkpoint.checkpoint(loss, use_reentrant=False)
    assert_same_gradients(gradients(patched, got), gradients(model, model(**batch()).loss), 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bfloat16(family: str) -> None:
    """Not further from float64 than the model's own loss in bfloat16."""
    model = make(family).bfloat16()
    patched = patch_loss(copy.deepcopy(model))
    exact = copy.deepcopy(model).double()  # the same numbers
    exact_loss = exact(**batch()).loss
    want = gradients(exact, exact_loss)
    off, distance = {}, {}
    for name, m in (("own", model), ("patched", patched)):
        loss = m(**batch()).loss
        assert loss.dtype == torch.float32
        off[name] = abs(loss.item() - exact_loss.item())
        got = gradients(m, loss)
        assert all(g.dtype == torch.bfloat16 for g in got.values())
        # Of all parameters together: some gradients are 0 but for rounding (GPT-2's keys' bias).
        distance[name] = math.hypot(*((got[k].double() - want[k]).norm() for k in want))
    # Both start from the same hidden states, whose rounding is most of it. 1e-4: one number's error
    # may be small by chance.
    assert off["patched"] <= 1.1 * off["own"] + 1e-4
    assert distance["patched"] <= 1.1 * distance["own"]


def test_autocast() -> None:
    model, patched = pair()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(**batch()), patched(**batch())
    torch.testing.assert_close(got.loss, want.loss, atol=2e-2, rtol=0)
    got_gradients, wanted = gradients(patched, got.loss), gradients(model, want.loss)
    assert all(g.dtype == torch.float32 for g in got_gradients.values())
    assert_same_gradients(got_gradients, wanted, 0.05)


# --------------------------------------------------------------------------------------------------
# Options


def test_options_reach_the_loss() -> None:
    options = dict(label_smoothing=0.1, z_loss=1e-2, tau=1.3, chunk=5, strategy="recompute")
    model, patched = pair("gemma2", **options)
    inputs = batch()
    got = patched(**inputs)
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    rest = {k: v for k, v in options.items() if k not in ("chunk", "strategy")}
    want = fused_cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), **rest
    )
    torch.testing.assert_close(got.loss, want, atol=2e-6, rtol=2e-6)
    assert_same_gradients(gradients(patched, got.loss), gradients(model, want), 1e-5)


def test_class_weights() -> None:
    weight = torch.rand(VOCABULARY, dtype=torch.float32) + 0.5
    model, patched = pair(weight=weight)
    inputs = batch()
    want = torch.nn.functional.cross_entropy(
        model(**inputs).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), weight
    )
    torch.testing.assert_close(patched(**inputs).loss, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"lable_smoothing": 0.1}, "unknown option 'lable_smoothing'.*label_smoothing"),
        ({"softcap": 30.0}, "softcap comes from the model"),
        ({"reduction": "none"}, "reduction must stay"),
        ({"num_items": 3}, "num_items_in_batch"),
        ({"token_weight": torch.ones(3)}, "token_weight"),
        ({"return_stats": ("lse",)}, "return_stats"),
    ],
)
def test_wrong_options(option: dict[str, Any], message: str) -> None:
    model = make()
    with pytest.raises(TypeError, match=message):
        patch_loss(model, **option)
    assert type(model) is transformers.LlamaForCausalLM


# --------------------------------------------------------------------------------------------------
# What stays as it was


def test_logits_outside_training() -> None:
    model, patched = pair("gemma2")
    inputs = batch()
    labels = inputs.pop("labels")
    same = [
        (dict(inputs), "train"),  # no labels
        (dict(inputs, labels=labels), "eval"),
        (dict(inputs, labels=labels, logits_to_keep=inputs["input_ids"].shape[1]), "train"),
        (dict(inputs, logits_to_keep=2), "eval"),
    ]
    for kwargs, mode in same:
        getattr(model, mode)(), getattr(patched, mode)()
        want, got = model(**kwargs), patched(**kwargs)
        assert torch.equal(got.logits, want.logits), kwargs.keys()
        if "labels" in kwargs:
            assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generate(family: str) -> None:
    model, patched = pair(family)
    prompt = batch(2, 5, padded=False)["input_ids"]
    for mode in ("eval", "train"):
        getattr(model, mode)(), getattr(patched, mode)()
        for options in (dict(do_sample=False), dict(do_sample=True), dict(num_beams=2)):
            runs = []
            for m in (model, patched):
                torch.manual_seed(3)
                runs.append(m.generate(prompt, max_new_tokens=6, **options))
            assert torch.equal(*runs), (mode, options)


def test_the_rest_of_the_output() -> None:
    model, patched = pair()
    inputs = batch()
    model.set_attn_implementation("eager"), patched.set_attn_implementation("eager")
    extras = dict(output_hidden_states=True, output_attentions=True, use_cache=True)
    want, got = model(**inputs, **extras), patched(**inputs, **extras)
    assert list(got.keys()) == [key for key in want.keys() if key != "logits"]
    for a, b in zip(want.hidden_states + want.attentions, got.hidden_states + got.attentions):
        assert torch.equal(a, b)
    assert got["cache" if "cache" in want else "past_key_values"].get_seq_length() == 12
    wanted, found = (m(**inputs, return_dict=False) for m in (model, patched))
    assert isinstance(found, tuple) and len(found) == len(wanted)
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1] is None and type(found[2]) is type(wanted[2])


def test_the_signature_that_trainers_look_at() -> None:
    model, patched = pair()
    assert inspect.signature(patched.forward) == inspect.signature(model.forward)
    assert inspect.signature(type(patched).forward) == inspect.signature(type(model).forward)
    assert type(patched).__name__ == "LlamaForCausalLM"
    assert isinstance(patched, transformers.LlamaForCausalLM)


def test_another_loss_function_is_kept() -> None:
    model, patched = pair()
    for m in (model, patched):
        m.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    want, got = model(**batch()), patched(**batch())
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)
    with pytest.raises(ValueError, match="ForCausalLMLoss.*lambda"):
        patch_loss(model)


def test_everything_is_back_after_an_error() -> None:
    model, patched = pair()
    inputs = batch()
    with pytest.raises(IndexError):
        patched(**{**inputs, "labels": torch.full_like(inputs["labels"], VOCABULARY)})
    assert type(patched.lm_head) is torch.nn.Linear and "forward" not in vars(patched.lm_head)
    assert "_loss_function" not in vars(patched)
    assert_same_step(model, patched, **inputs)


# --------------------------------------------------------------------------------------------------
# Patching, copies, files


def test_other_threads_see_the_model_as_it_is() -> None:
    model, patched = pair()
    inside, done = threading.Event(), threading.Event()
    losses = []

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert done.wait(60)

    def train() -> None:
        losses.append(patched(**batch()).loss)

    # Once while the layers run, and once inside the output layer, where the loss is computed.
    for place in (patched.model.norm, patched.lm_head):
        inside.clear(), done.clear()
        hook = place.register_forward_hook(wait)
        thread = threading.Thread(target=train)
        thread.start()
        assert inside.wait(60)
        tokens = {k: v for k, v in batch().items() if k != "labels"}
        want = model(**tokens).logits
        torch.testing.assert_close(patched(**tokens).logits, want)
        assert type(patched.lm_head) is torch.nn.Linear
        torch.testing.assert_close(
            patched.lm_head(torch.ones(2, 32)), model.lm_head(torch.ones(2, 32))
        )
        losses.append(patched(**batch()).loss)  # a step of its own
        done.set()
        thread.join()
        hook.remove()
    assert len(losses) == 4
    for loss in losses:
        torch.testing.assert_close(loss, model(**batch()).loss, atol=2e-6, rtol=2e-6)


def test_what_a_forward_keeps_on_its_model() -> None:
    """As Qwen-VL models do with their rope_deltas."""
    patched = patch_loss(Keeping(make().config).train())
    loss = patched(**batch()).loss
    assert patched.kept == 3 and isinstance(patched.state, torch.Tensor)
    assert "_loss_function" not in vars(patched) and type(patched.lm_head) is torch.nn.Linear
    loss.backward()


def test_patch_twice_and_unpatch() -> None:
    model = make()
    original = type(model)
    want = model(**batch()).loss
    assert patch_loss(model, z_loss=0.5) is model
    once = type(model)
    with_z = model(**batch()).loss
    assert patch_loss(model) is model and type(model) is once
    torch.testing.assert_close(model(**batch()).loss, want)
    assert abs(with_z - want) > 0.1
    assert unpatch_loss(model) is model and type(model) is original
    assert torch.equal(model(**batch()).loss, want) and model(**batch()).logits is not None
    assert unpatch_loss(model) is model and type(model) is original
    with pytest.raises(TypeError, match="Module"):
        unpatch_loss("model")


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replica(model: Any) -> Any:
    """What DataParallel makes of a model: shallow, with parameters of its own."""
    result = model._replicate_for_data_parallel()
    for name, module in model._modules.items():
        result._modules[name] = copy.deepcopy(module)
    return result


class Keeping(transformers.LlamaForCausalLM):
    kept = 0

    def forward(self, input_ids=None, labels=None, **kwargs):
        self.kept = len(input_ids)
        self.state = input_ids.double()
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, VOCABULARY)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, replica])
def test_copies_are_patched_and_independent(copied: Callable) -> None:
    patched = patch_loss(make(), z_loss=0.5)
    want = patched(**batch()).loss
    other = copied(patched)
    with torch.no_grad():  # a copy that ran the original's layers would see this
        patched.lm_head.weight.zero_()
    got = other(**batch())
    assert got.logits is None
    torch.testing.assert_close(got.loss, want)
    if copied is not replica:
        unpatch_loss(other)
        assert other(**batch()).logits is not None and patched(**batch()).logits is None


def test_save_and_load(tmp_path: Path) -> None:
    model, patched = pair()
    patched.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert patched.state_dict().keys() == model.state_dict().keys()
    assert_same_step(model, patch_loss(loaded.train()), **batch())


def test_after_resize() -> None:
    """The output layer is another module then."""
    model, patched = pair("gpt2")
    for m in (model, patched):
        m.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    with torch.no_grad():
        patched.load_state_dict(model.state_dict())
    want, got = model(**batch()), patched(**batch())
    assert want.logits.shape[-1] == VOCABULARY + 6
    torch.testing.assert_close(got.loss, want.loss, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("patch_first", [True, False])
def test_hooks_of_accelerate(patch_first: bool) -> None:
    """Offloading: the hooks, a forward of their own, bring the weights in from elsewhere."""
    accelerate = pytest.importorskip("accelerate")
    model, patched = make(), make()
    if patch_first:
        patch_loss(patched)
    accelerate.cpu_offload(patched, execution_device=torch.device("cpu"))
    assert patched.lm_head.weight.is_meta
    patch_loss(patched)
    got, want = patched(**batch()), model(**batch())
    assert got.logits is None
    torch.testing.assert_close(got.loss, want.loss, atol=2e-6, rtol=2e-6)
    assert patched.lm_head.weight.is_meta and patched(batch()["input_ids"]).logits is not None


def test_checkpoint_wrapper_around_the_output_layer() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, patched = pair()
    patched.lm_head = checkpoint_wrapper(patched.lm_head)
    got, want = patched(**batch()), model(**batch())
    torch.testing.assert_close(got.loss, want.loss, atol=2e-6, rtol=2e-6)
    got.loss.backward(), want.loss.backward()
    torch.testing.assert_close(
        patched.lm_head._checkpoint_wrapped_module.weight.grad, model.lm_head.weight.grad
    )


# --------------------------------------------------------------------------------------------------
# Models that cannot be patched


class Swapped(transformers.LlamaForCausalLM):
    """Does something unknown to its logits."""

    step: Callable[[Any], Any]

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = type(self).step(self.lm_head(self.model(input_ids).last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "step, message",
    [
        (lambda z: z + 1.0, "adds something other than one number per class"),
        (lambda z: z * torch.ones(()), "multiplies its logits by a Tensor"),
        (lambda z: torch.tanh(z).tanh(), "tanh to its logits twice"),
        (lambda z: torch.sigmoid(z), "calls sigmoid"),
        (lambda z: z[..., :-1], "takes a part"),
        (lambda z: z.clamp(max=1.0), r"uses \.clamp"),
        (lambda z: torch.ones(1, 1, VOCABULARY), "not computed from the output"),
    ],
)
def test_unknown_steps_on_the_logits(step: Callable, message: str) -> None:
    Swapped.step = staticmethod(step)
    model = patch_loss(Swapped(transformers.LlamaConfig(**SMALL)).train())
    with pytest.raises(TypeError, match=message):
        model(batch()["input_ids"], labels=batch()["labels"])


@pytest.mark.parametrize(
    "step",
    [
        lambda z: (2.0 * z.float().contiguous() / 3).to(torch.float64),
        lambda z: torch.nn.functional.tanh(z / 2) * 3,
        lambda z: torch.tanh(z) / 0.5,
        lambda z: -1.5 * z,
        lambda z: (torch.arange(VOCABULARY) / 50 + z)[:, :, :] / 2,
    ],
)
def test_known_steps_on_the_logits(step: Callable) -> None:
    Swapped.step = staticmethod(step)
    model = Swapped(transformers.LlamaConfig(**SMALL)).train()
    inputs = dict(input_ids=batch()["input_ids"], labels=batch()["labels"])
    want = model(**inputs).loss
    wanted = gradients(model, want)
    got = patch_loss(model)(**inputs).loss
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6, check_dtype=False)
    assert_same_gradients(gradients(model, got), wanted, 1e-5)


def test_what_cannot_be_patched() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        patch_loss(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="before torch.compile"):
        patch_loss(torch.nn.DataParallel(make()))
    with pytest.raises(TypeError, match="labels.*loss_function"):
        patch_loss(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)))
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL))
    with pytest.raises((TypeError, ValueError), match="NoneType|ForSequenceClassification"):
        patch_loss(classifier)
    odd = make()
    odd.lm_head = torch.nn.Sequential(odd.lm_head)
    with pytest.raises(TypeError, match="torch.nn.Linear; LlamaForCausalLM has Sequential"):
        patch_loss(odd)
    replaced = make()
    replaced.forward = lambda **kwargs: None
    with pytest.raises(TypeError, match="has been replaced"):
        patch_loss(replaced)


def test_an_output_layer_changed_later() -> None:
    patched = patch_loss(make())
    patched.lm_head = torch.nn.Sequential(patched.lm_head)
    with pytest.raises(TypeError, match="has become Sequential"):
        patched(**batch())
    patched = patch_loss(make())
    patched.config.vocab_size += 1
    with pytest.raises(ValueError, match="vocab_size is 132.*131 classes"):
        patched(**batch())


# --------------------------------------------------------------------------------------------------
# Memory


class Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        # Not one number that is expanded to the logits' shape, whose storage is one number.
        stored = [t for t in tensors if t.untyped_storage().nbytes() >= t.numel() * t.itemsize]
        self.seen |= {tuple(t.shape) for t in stored}
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_no_logits_in_training(family: str) -> None:
    """Neither between the operators nor inside of them."""
    inputs = batch(4, 16, padded=False)
    logits = 4 * 16 * VOCABULARY

    def run(model: Any) -> tuple[int, int]:
        """(elements of the largest tensor with V columns, bytes of the largest allocation)"""
        with Shapes() as shapes:
            model(**inputs).loss.backward()
        found = [math.prod(s) for s in shapes.seen if s and s[-1] == VOCABULARY]
        with Memory() as memory:
            model(**inputs).loss.backward()
        return max(found, default=0), memory.largest

    model, patched = pair(family, chunk=8)
    elements, size = run(model)
    assert elements >= logits and size >= 4 * logits, "the test does not see logits"
    elements, size = run(patched)
    # 8 rows of logits may exist; the weight's gradient has 32 columns and 131 rows.
    assert elements <= 8 * VOCABULARY
    assert size < 4 * logits * 0.8


# --------------------------------------------------------------------------------------------------
# Trainer, torch.compile, FSDP2, documentation


class Tokens(torch.utils.data.Dataset):
    def __init__(self, rows: int = 24, length: int = 10) -> None:
        self.tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator())
        self.labels = self.tokens.clone()
        for i in range(rows):
            self.labels[i, : i % 7] = -100  # so that the batches differ in their number of items

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trainer(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    calls = []
    function = deferred.fused_linear_cross_entropy

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(deferred, "fused_linear_cross_entropy", counted)

    def history(model: Any) -> list[dict[str, float]]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            # Not Adam, which makes steps of full size from the rounding errors of a gradient that
            # is 0, as that of the bias of GPT-2's keys.
            optim="sgd",
            learning_rate=0.3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=Tokens(), eval_dataset=Tokens(6)
        )
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        trainer.evaluate()
        return trainer.state.log_history

    model, patched = pair(family)
    want = history(model)
    assert not calls
    got = history(patched)
    assert len(calls) == 6 and all("num_items" in kwargs for kwargs in calls)
    losses = [entry["loss"] for entry in want if "loss" in entry]
    assert len(losses) == 3 and losses[0] != losses[2]
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"loss", "grad_norm", "eval_loss", "train_loss"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-4), (key, a[key], b[key])
    for p, q in zip(model.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=2e-5)


def trainer_of(model: Any, folder: Path, **options: Any) -> Any:
    options = {"max_steps": 3, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, optim="sgd",
        gradient_accumulation_steps=2, learning_rate=0.3, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **options,
    )  # fmt: skip
    data = dict(train_dataset=Tokens(), eval_dataset=Tokens(6))
    return transformers.Trainer(model=model, args=arguments, **data)


def test_trainer_with_label_smoothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    calls = []
    function = deferred.fused_linear_cross_entropy

    @functools.wraps(function)  # patch_loss looks at the signature
    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["label_smoothing"])
        return function(*args, **kwargs)

    monkeypatch.setattr(deferred, "fused_linear_cross_entropy", counted)
    model, patched = make(), make()
    plain = trainer_of(model, tmp_path, label_smoothing_factor=0.3)
    trainer = patch_loss(trainer_of(patched, tmp_path, label_smoothing_factor=0.3))
    for t in (plain, trainer):
        t.train()
        t.evaluate()  # smoothed, too
    assert calls == [0.3] * 6
    for a, b in zip(plain.state.log_history, trainer.state.log_history, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "eval_loss", "train_loss"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-4), (key, a[key], b[key])
    for p, q in zip(model.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=2e-5)
    with pytest.raises(ValueError, match="label_smoothing=0.1, but .* label_smoothing_factor=0.3"):
        patch_loss(trainer, label_smoothing=0.1)
    unpatch_loss(trainer)
    assert "compute_loss" not in vars(trainer) and type(patched) is transformers.LlamaForCausalLM
    assert not patched._forward_hooks and not patched._forward_pre_hooks_with_kwargs
    trainer.compute_loss_func = print
    with pytest.raises(ValueError, match="compute_loss_func"):
        patch_loss(trainer)


def test_trainer_with_a_batch_without_labels(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, patched = pair()
    for m in (model, patched):
        trainer = trainer_of(m, tmp_path)
        trainer.train_dataset.labels[:] = -100
        trainer.train_dataset.labels[:4] = trainer.train_dataset.tokens[:4]
        trainer.train()
    for p, q in zip(model.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=2e-5)  # NaN is not close to NaN here


def test_training_without_the_patched_loss(recwarn: pytest.WarningsRecorder) -> None:
    def texts() -> list[str]:
        found = [str(w.message) for w in recwarn if "patched by patch_loss" in str(w.message)]
        recwarn.clear()
        return found

    patched = patch_loss(make())
    tokens = batch()["input_ids"]
    patched(**batch()).loss.backward()
    with torch.no_grad():
        patched(tokens)
    patched.eval()(tokens), patched.train()
    assert not texts()
    patched(tokens), patched(tokens)
    (text,) = texts()  # once
    assert "gave no labels" in text and "label_smoothing_factor" in text
    original = type(patched)._pyloss_original.forward
    patched = patch_loss(make())
    patched.forward = functools.partial(original, patched)  # as Liger's kernels
    for _ in range(2):
        assert patched(**batch()).logits is not None
    (text,) = texts()
    assert "forward has been replaced" in text


def test_the_fused_output_layer_of_trl() -> None:
    """TRL sets a forward of its own on the model, which never calls the patched one."""
    patched = patch_loss(make())

    @functools.wraps(type(patched).forward)
    def fused(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return self.model(kwargs["input_ids"]) if fused_lm_head else None

    patched.forward = fused.__get__(patched)
    with pytest.raises(RuntimeError, match=r"no effect.*fused output layer.*unpatch_loss\(model\)"):
        patched(**batch(), fused_lm_head=True)
    with torch.no_grad():
        patched(**batch(), fused_lm_head=True)
    unpatch_loss(patched)(**batch(), fused_lm_head=True)
    trainer = type("SFTTrainer", (transformers.Trainer,), {"__module__": "trl.trainer.sft_trainer"})
    with pytest.raises(TypeError, match="TRL's trainers, such as this SFTTrainer"):
        patch_loss(object.__new__(trainer))


def test_compile() -> None:
    # In one graph, where torch can: before 2.11 not even the model of transformers as it is can be
    # one, and in 2.11 the patch is in the way.
    fullgraph = TORCH >= (2, 13)
    model, patched = pair("gemma2")
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=fullgraph)
    for inputs in (batch(), batch(2)):
        want, got = model(**inputs), compiled(**inputs)
        assert got.logits is None
        torch.testing.assert_close(got.loss, want.loss, atol=2e-6, rtol=2e-6)
        assert_same_gradients(gradients(patched, got.loss), gradients(model, want.loss), 1e-5)
    model.eval(), compiled.eval()
    torch.testing.assert_close(compiled(**batch()).logits, model(**batch()).logits)
    model.train(), compiled.train()
    torch.testing.assert_close(compiled(**batch()).loss, model(**batch()).loss)
    torch._dynamo.reset()


# Any model crashes on the CPU with torch 2.6, and gets twice its gradient with 2.8.
NEEDS_FSDP2 = needs_torch((2, 11), "FSDP2 on the CPU")


@pytest.mark.slow
@NEEDS_FSDP2
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_fsdp2(tmp_path: Path, ranks: int) -> None:
    texts = check_ranks(tmp_path, ranks, str(ROOT / "tests" / "fsdp2_worker.py"))
    assert all(text.count(": ok") == 16 + (TORCH >= (2, 13)) for text in texts)


def run_script(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@NEEDS_FSDP2
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_fsdp2_example_of_the_documentation(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    script = tmp_path / "train.py"
    script.write_text(next(block for block in blocks if "init_process_group" in block))
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    losses = re.findall(r"loss ([\d.]+)", run_script(*run, str(script)))
    assert len(losses) >= 2 and float(losses[-1]) < float(losses[0]), losses


def test_example_file() -> None:
    printed = run_script(str(ROOT / "examples" / "transformers_lm_loss.py"), "--steps", "4")
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) >= 2 and losses[-1] < losses[0], printed


def test_example_of_the_refined_schedule(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("accelerate")
    path = str(ROOT / "examples" / "transformers_refined_schedule.py")
    monkeypatch.setattr(sys, "argv", [path, "--steps", "8"])
    runpy.run_path(path, run_name="__main__")
    rates = [float(x) for x in re.findall(r"rate ([\d.]+)", capsys.readouterr().out)]
    assert len(rates) == 8 and 0.002 < max(rates[:4]) < 0.003 < max(rates[4:]) <= 0.006


def test_docstring_examples() -> None:
    import doctest

    for function in (patch_loss, unpatch_loss):
        tests = doctest.DocTestFinder().find(function, function.__name__, globs={})
        results = [doctest.DocTestRunner().run(t) for t in tests if t.examples]
        assert results and all(r.attempted and not r.failed for r in results)


def test_import_is_lazy() -> None:
    """pyloss does not load transformers; the module does, to register its attention."""
    program = "import sys, pyloss; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
