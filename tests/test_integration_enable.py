"""enable(): every Trainer trains with the loss, as long as it trains."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_integration_transformers import Tokens, make, trainer_of  # noqa: E402

import pyloss.integrations._deferred_logits as deferred  # noqa: E402
from pyloss.integrations.transformers import disable, enable, patch_loss, unpatch_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def as_before():
    loop = transformers.Trainer._inner_training_loop
    yield
    disable()
    assert transformers.Trainer._inner_training_loop is loop


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    function = deferred.fused_linear_cross_entropy

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(deferred, "fused_linear_cross_entropy", counted)
    return found


def test_trainers_made_before_and_after(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    before = trainer_of(make(), tmp_path, label_smoothing_factor=0.1)
    plain = trainer_of(copy.deepcopy(before.model), tmp_path, label_smoothing_factor=0.1)
    plain.train()
    assert not calls
    assert repr(enable(z_loss=0.0)) == "enable(z_loss=0.0, strict=False)"
    after = trainer_of(make(), tmp_path, label_smoothing_factor=0.1)
    for trainer in (before, after):
        trainer.train()
        assert len(calls) == 6 and calls.pop()["label_smoothing"] == 0.1
        calls.clear()
        assert type(trainer.model) is transformers.LlamaForCausalLM  # as it was
        assert "compute_loss" not in vars(trainer) and not trainer.model._forward_hooks
        for p, q in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=2e-6, rtol=2e-5)
    disable()
    trainer_of(make(), tmp_path).train()
    assert not calls


def test_context_and_options(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    enable(z_loss=0.5)
    with enable(z_loss=0.25):
        trainer_of(make(), tmp_path).train()
    trainer_of(make(), tmp_path).train()
    model = patch_loss(make(), z_loss=0.125)  # keeps its own
    trainer_of(model, tmp_path).train()
    assert [c["z_loss"] for c in calls] == 6 * [0.25] + 6 * [0.5] + 6 * [0.125]
    assert hasattr(type(model), "_pyloss_original")
    with pytest.raises(TypeError, match="unknown option 'z'"):
        enable(z=1)
    with pytest.raises(TypeError, match="strict must be a bool"):
        enable(strict=1)


def test_blocks_that_end_out_of_order(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    own = transformers.Trainer._inner_training_loop

    def used() -> list[float]:
        trainer_of(make(), tmp_path, max_steps=1).train()
        found = [c["z_loss"] for c in calls]
        calls.clear()
        return found

    first, second = enable(z_loss=0.5), enable(z_loss=0.25)
    first.__enter__(), second.__enter__()
    first.__exit__()
    assert used() == 2 * [0.25]  # as long as its block lasts
    enable(z_loss=0.125)
    assert used() == 2 * [0.125]
    second.__exit__()
    assert not used() and transformers.Trainer._inner_training_loop is own
    with enable(z_loss=0.5):
        disable()
        assert not used()
    assert not used()
    for _ in range(2000):  # no chain that a walk could not follow
        enable(z_loss=0.5)
    assert used() == 2 * [0.5]


def test_blocks_of_two_threads(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=60)

    def trains(strength: float) -> list[float]:
        with enable(z_loss=strength):
            together.wait()  # all blocks have begun
            with lock:
                trainer_of(make(), tmp_path, max_steps=1).train()
                found = [c["z_loss"] for c in calls]
                calls.clear()
            together.wait()
        return found

    lock = threading.Lock()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(trains, strength) for strength in (0.5, 0.25)]
        with enable(z_loss=0.125):
            together.wait(), together.wait()
        assert [job.result() for job in jobs] == [2 * [0.5], 2 * [0.25]]
        with enable(z_loss=0.125):  # a thread without a block takes the latest
            pool.submit(trainer_of(make(), tmp_path, max_steps=1).train).result()
    assert [c["z_loss"] for c in calls] == 2 * [0.125]


def test_a_wrapper_around_the_patch_stays(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    with enable():
        ours = transformers.Trainer._inner_training_loop

        @functools.wraps(ours)
        def theirs(*args: Any, **kwargs: Any) -> Any:
            entered.append(True)
            return ours(*args, **kwargs)

        monkeypatch.setattr(transformers.Trainer, "_inner_training_loop", theirs)
    trainer_of(make(), tmp_path, max_steps=1).train()
    assert len(entered) == 1 and not calls
    with enable():
        assert transformers.Trainer._inner_training_loop is theirs
        trainer_of(make(), tmp_path, max_steps=1).train()
    assert len(entered) == 2 and len(calls) == 2
    monkeypatch.undo()
    transformers.Trainer._inner_training_loop = ours.__wrapped__


def test_mixed_precision_twice(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    """accelerate wraps the forward in the first run, and it stays wrapped."""
    trainer = trainer_of(make(), tmp_path, bf16=True)
    with enable(strict=True):
        trainer.train()
        trainer.train()
    assert len(calls) == 12
    trainer.train()
    assert len(calls) == 12


def test_seq2seq(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    from test_integration_transformers_models import built

    trainers = [trainer_of(built("t5", torch.float32), tmp_path) for _ in range(2)]
    trainers[0].train()
    assert not calls
    with enable(strict=True):
        trainers[1].train()
    assert len(calls) == 6
    for a, b in zip(*(t.model.parameters() for t in trainers), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_peft(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    trainers = []
    for _ in range(2):
        torch.manual_seed(0)
        trainers.append(trainer_of(peft.get_peft_model(make(), config), tmp_path))
    trainers[0].train()
    with enable(strict=True):
        trainers[1].train()
    assert len(calls) == 6
    for a, b in zip(*(t.model.parameters() for t in trainers), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.exhaustive
def test_torch_compile(
    tmp_path: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By inductor. Not compiled is the yardstick: with torch_compile the label smoother of
    transformers 5 does not shift the labels."""
    for name in ("BACKEND", "MODE"):  # set by the arguments below; put back at the end
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "default")
    options = dict(label_smoothing_factor=0.1, max_steps=2)
    own = trainer_of(make(), tmp_path, **options)
    model = copy.deepcopy(own.model)
    own.train()
    state = importlib.import_module("accelerate.state").AcceleratorState
    state._reset_state()  # one for all trainers
    ours = trainer_of(model, tmp_path, torch_compile=True, **options)
    torch._dynamo.reset()
    with enable(strict=True):
        ours.train()
    torch._dynamo.reset()
    state._reset_state()
    for a, b in zip(own.state.log_history, ours.state.log_history, strict=True):
        for key in a.keys() & {"loss", "grad_norm"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-4), (key, a, b)
    for a, b in zip(*(t.model.parameters() for t in (own, ours)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert type(ours.model) is transformers.LlamaForCausalLM


def test_liger_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """use_liger_kernel gives the model a forward of its own before the patch: one of the two."""

    def apply(model: Any, config: Any) -> None:
        own = type(model).forward
        wrapper = functools.wraps(own)(lambda *args, **inputs: own(*args, **inputs))
        del wrapper.__wrapped__  # another forward, and not one around the model's
        wrapper.__signature__ = inspect.signature(own)
        model.forward = types.MethodType(wrapper, model)

    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", apply)
    trainer = trainer_of(make(), tmp_path, max_steps=1, use_liger_kernel=True)
    with enable(), pytest.warns(UserWarning, match="own loss.*forward of this .* been replaced"):
        trainer.train()
    with enable(strict=True), pytest.raises(TypeError, match="has been replaced by"):
        trainer.train()
    assert type(trainer.model) is transformers.LlamaForCausalLM


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = trainer_of(make(), tmp_path)
    trainer.train_dataset.labels[:] = 10_000
    with enable(), pytest.raises(IndexError):
        trainer.train()
    assert type(trainer.model) is transformers.LlamaForCausalLM


def test_what_cannot_be_patched(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=131, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    trainer = trainer_of(model, tmp_path)
    trainer.train_dataset = [{"input_ids": t, "labels": 1} for t in Tokens(4).tokens]
    with enable():
        with pytest.warns(UserWarning, match="this Trainer trains with its own loss.*LlamaForSeq"):
            trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    with enable(strict=True), pytest.raises((TypeError, ValueError), match="LlamaForSeq"):
        trainer.train()
    assert not calls


class Clamped(transformers.LlamaForCausalLM):
    """Does something to its logits that patch_loss cannot follow, which shows in the first step."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state).clamp(-1, 1)
        loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_what_cannot_be_followed(tmp_path: Path) -> None:
    config = make().config
    models = []
    for own in (True, False):
        torch.manual_seed(0)
        trainer = trainer_of(Clamped(config), tmp_path)
        models.append(trainer.model)
        if own:
            trainer.train()
            continue
        with enable(strict=True), pytest.raises(TypeError, match=r"uses \.clamp"):
            trainer.train()
        with enable(), pytest.warns(UserWarning, match="with its own loss.*clamp") as found:
            trainer.train()
        assert sum("own loss" in str(w.message) for w in found) == 1
        assert type(trainer.model) is Clamped and not trainer.model._forward_hooks
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compute_loss_of_the_instance(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    trainer = trainer_of(make(), tmp_path, label_smoothing_factor=0.1)
    seen, original = [], trainer.compute_loss

    def mine(*args: Any, **kwargs: Any) -> Any:
        seen.append(trainer.label_smoother)
        return original(*args, **kwargs)

    trainer.compute_loss = mine
    with enable(strict=True):
        trainer.train()
    assert seen == 6 * [None] and len(calls) == 6 and trainer.compute_loss is mine
    unpatch_loss(patch_loss(patch_loss(trainer)))
    assert trainer.compute_loss is mine


def test_a_model_that_gets_wrapped(tmp_path: Path) -> None:
    """As by FSDP: the trainer has a wrapper as its model from then on."""

    class Wraps(transformers.TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            trainer.model = torch.nn.Sequential(trainer.model)

    model = make()
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(Wraps())
    with enable(strict=True):
        trainer.train()
    assert type(model) is transformers.LlamaForCausalLM and not model._forward_hooks


@pytest.mark.exhaustive
def test_trainers_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    import test_integration_trl as cases

    from pyloss.integrations import _trl_head

    words = cases.tokenizer.__wrapped__()
    own, ours = (cases.trainer(trl.DPOTrainer, "dpo", tmp_path, words, bf16=b) for b in (0, 1))
    seen: list[Any] = []
    function = _trl_head.TokenLogProbs.apply

    def noted(self: Any, *args: Any) -> Any:
        seen.append(getattr(args[-1], "options", None))
        return function(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trl_head.TokenLogProbs, "apply", noted)
        for trainer in (own, ours):
            with enable(strict=True, chunk=4):
                trainer.train(), trainer.train()
            assert seen and all(options == {"chunk": 4} for options in seen)
            seen.clear()
            trainer.train()  # TRL's own function again
            assert seen and not any(seen)
            seen.clear()
        with enable(strict=True, empty="zero"), pytest.raises(TypeError, match="option 'empty'"):
            own.train()
