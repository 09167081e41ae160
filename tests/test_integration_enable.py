"""enable(): every Trainer trains with the loss, as long as it trains."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_integration_transformers import Tokens, make, trainer_of  # noqa: E402

import pyloss.integrations._deferred_logits as deferred  # noqa: E402
from pyloss.integrations.transformers import disable, enable, patch_loss  # noqa: E402

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
