"""patch_loss on models beyond decoders of text: seq2seq, masked, images; and adapters of PEFT."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_integration_transformers import (  # noqa: E402
    SMALL,
    VOCABULARY,
    Shapes,
    assert_same_gradients,
    batch,
    gradients,
    make,
    pair,
)

from pyloss.integrations.transformers import patch_loss, unpatch_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

exhaustive = pytest.mark.exhaustive
T5 = dict(
    vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0,
    decoder_start_token_id=0,
)  # fmt: skip
BART = dict(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    max_position_embeddings=40, dropout=0.0, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
MARIAN = dict(BART, pad_token_id=0)
WHISPER = dict(
    BART, num_mel_bins=4, max_source_positions=12, max_target_positions=40, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
BERT = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip

# name: (model, configuration, its options)
SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "scale_decoder_outputs": True}),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", {**T5, "tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", BART),
    "marian": ("MarianMTModel", "MarianConfig", MARIAN),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", MARIAN),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "bart_decoder": ("BartForCausalLM", "BartConfig", BART),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=24, pad_token_id=0, cls_token_id=1, sep_token_id=2),
    ),
}  # fmt: skip
QUICK = ("t5", "bart", "whisper")


def built(family: str, dtype: torch.dtype = torch.float64) -> Any:
    model, config, options = SEQ2SEQ[family]
    torch.manual_seed(1)
    result = getattr(transformers, model)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for p in result.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
        if hasattr(result, "final_logits_bias"):  # 0 by itself
            result.final_logits_bias.normal_()
    return result.to(dtype).train()


def inputs_of(family: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    labels = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    if family.startswith(("bart_", "bert", "modern")):  # one sequence
        labels = tokens.clone()
    labels[0, -3:] = -100
    if family == "whisper":
        sound = torch.randn(2, 4, 24, generator=generator, dtype=torch.float64).to(dtype)
        return {"input_features": sound, "labels": labels}
    return {"input_ids": tokens, "labels": labels}


def families() -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=exhaustive) for name in SEQ2SEQ]


def assert_same(model: Any, patched: Any, inputs: dict[str, Any], tolerance: float) -> None:
    """Loss, gradients and the rest of the output in training; everything in eval mode."""
    want, got = model(**inputs), patched(**inputs)
    assert want.logits is not None and got.logits is None and type(got) is type(want)
    torch.testing.assert_close(
        got.loss, want.loss, atol=tolerance, rtol=tolerance, check_dtype=False
    )
    assert_same_gradients(gradients(patched, got.loss), gradients(model, want.loss), 10 * tolerance)
    model.eval(), patched.eval()
    with torch.no_grad():
        want, got = model(**inputs), patched(**inputs)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("family", families())
def test_families_in_float64(family: str) -> None:
    model = built(family)
    patched = patch_loss(copy.deepcopy(model))
    # A loss function of transformers converts the logits to float32.
    assert_same(model, patched, inputs_of(family), 1e-6 if family == "modernbert" else 1e-12)


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=exhaustive)])
def test_generate(family: str) -> None:
    model = built(family, torch.float32)
    patched = patch_loss(copy.deepcopy(model))
    inputs = inputs_of(family, torch.float32)
    inputs.pop("labels")
    for mode in ("eval", "train"):
        runs = [
            getattr(m, mode)().generate(**inputs, max_new_tokens=5, num_beams=2, do_sample=False)
            for m in (model, patched)
        ]
        assert torch.equal(*runs)


def test_the_scale_and_the_bias_matter() -> None:
    """The families above could agree with steps that do nothing."""
    for family, change in (
        ("t5", lambda m: setattr(m.config, "scale_decoder_outputs", False)),
        ("bart", lambda m: m.final_logits_bias.zero_()),
    ):
        model = patch_loss(built(family))
        before = model(**inputs_of(family)).loss
        change(model)
        assert abs(model(**inputs_of(family)).loss - before) > 1e-2, family


def test_a_bias_of_the_classes_may_learn() -> None:
    class Added(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            logits = torch.tanh((3.0 * logits + self.bias) / 2.0) * 2.0
            loss = None if labels is None else self.loss_function(logits, labels, VOCABULARY)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model = Added(make().config)
    model.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    patched = patch_loss(copy.deepcopy(model))
    inputs = {k: v for k, v in batch().items() if k != "attention_mask"}
    assert_same(model.train(), patched.train(), inputs, 2e-6)


@exhaustive
@pytest.mark.parametrize("family", ["bart", "bert"])
def test_compile(family: str) -> None:
    """With a graph break, where torch's cross_entropy asks the stand-in for the logits."""
    model = built(family, torch.float32)
    patched = patch_loss(copy.deepcopy(model))
    inputs = inputs_of(family, torch.float32)
    torch._dynamo.reset()
    want, got = model(**inputs), torch.compile(patched, backend="aot_eager")(**inputs)
    assert got.logits is None
    torch.testing.assert_close(got.loss, want.loss, atol=2e-6, rtol=2e-6)
    assert_same_gradients(gradients(patched, got.loss), gradients(model, want.loss), 2e-5)
    torch._dynamo.reset()


def test_no_logits_are_stored() -> None:
    inputs, sizes = {k: v.repeat(3, 1) for k, v in inputs_of("t5").items()}, {}
    for name, m in (("own", built("t5")), ("patched", patch_loss(built("t5"), chunk=4))):
        with Shapes() as shapes:
            m(**inputs).loss.backward()
        found = [math.prod(s) for s in shapes.seen if s and s[-1] == VOCABULARY]
        sizes[name] = max(found, default=0)
    # The weight and its gradient, of 16 columns, are seen in either case.
    assert sizes["own"] == 42 * VOCABULARY and sizes["patched"] <= 16 * VOCABULARY


def test_bfloat16_seq2seq_has_a_loss_in_float32() -> None:
    model = built("t5").bfloat16()
    patched = patch_loss(copy.deepcopy(model))
    exact = copy.deepcopy(model).double()(**inputs_of("t5")).loss
    got = patched(**inputs_of("t5", torch.bfloat16)).loss
    assert got.dtype == torch.float32 and abs(got.item() - exact.item()) < 0.05 * exact.item()


# --------------------------------------------------------------------------------------------------
# Models of images and text


def text(**more: Any) -> dict[str, Any]:
    return {k: v for k, v in SMALL.items() if k != "head_dim"} | more


def llava() -> tuple[Any, dict[str, Any]]:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**text()), image_token_index=4,
        image_seq_length=4, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    inputs = with_image(4, 4)
    return model, {**inputs, "pixel_values": torch.randn(2, 3, 8, 8)}


def paligemma() -> tuple[Any, dict[str, Any]]:
    vision = dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
    )  # fmt: skip
    decoder = dict(SMALL, model_type="gemma2", final_logit_softcapping=0.3)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=decoder, image_token_index=4, projection_dim=32,
    )  # fmt: skip
    model = transformers.PaliGemmaForConditionalGeneration(config)
    inputs = with_image(4, 4)
    return model, {
        **inputs,
        "pixel_values": torch.randn(2, 3, 8, 8),
        "token_type_ids": (torch.arange(12) >= 6).long().expand(2, 12),
    }


def qwen2_vl() -> tuple[Any, dict[str, Any]]:
    vision = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4)
    decoder = text(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    config = transformers.Qwen2VLConfig(
        text_config=decoder, vision_config=vision, image_token_id=4, video_token_id=5,
        vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config)
    grid = torch.tensor([[1, 4, 4]] * 2)
    inputs = with_image(4, 4)
    return model, {
        **inputs,
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        "mm_token_type_ids": (inputs["input_ids"] == 4).long(),
    }


def idefics3() -> tuple[Any, dict[str, Any]]:
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.Idefics3Config(
        vision_config=vision, text_config=dict(text(), model_type="llama"), image_token_id=4,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Idefics3ForConditionalGeneration(config)
    inputs = with_image(4, 1)
    return model, {**inputs, "pixel_values": torch.randn(2, 1, 3, 8, 8)}


def blip2() -> tuple[Any, dict[str, Any]]:
    """The output layer is that of a language model inside, whose logits are cut."""
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    decoder = dict(
        model_type="opt", vocab_size=VOCABULARY, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0,
    )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=dict(size, image_size=8, patch_size=4),
        qformer_config=dict(
            size, encoder_hidden_size=16, vocab_size=8, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=decoder, num_query_tokens=4, image_token_index=4,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration(config)
    inputs = with_image(4, 4)
    return model, {**inputs, "pixel_values": torch.randn(2, 3, 8, 8)}


def with_image(token: int, count: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(8, VOCABULARY, (2, 12))
    tokens[:, 1 : 1 + count] = token
    labels = tokens.masked_fill(tokens == token, -100)
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize(
    "family",
    [llava, *(pytest.param(f, marks=exhaustive) for f in (paligemma, qwen2_vl, idefics3, blip2))],
)
def test_images_and_text(family: Any) -> None:
    model, inputs = family()
    patched = patch_loss(copy.deepcopy(model.train()))
    assert_same(model, patched, inputs, 2e-6)
    inputs.pop("labels")
    runs = [m.generate(**inputs, max_new_tokens=3, do_sample=False) for m in (model, patched)]
    assert torch.equal(*runs)
    assert type(unpatch_loss(patched)) is type(model)


# --------------------------------------------------------------------------------------------------
# PEFT


def adapted(**options: Any) -> Any:
    """LoRA whose second matrices are not 0, as they are at the beginning."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 5, **options})
    model = peft.get_peft_model(make(), config).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def assert_same_adapted(model: Any, patched: Any) -> None:
    want, got = model(**batch()), patched(**batch())
    assert want.logits is not None and got.logits is None
    torch.testing.assert_close(got.loss, want.loss, atol=2e-6, rtol=2e-6)
    assert_same_gradients(gradients(patched, got.loss), gradients(model, want.loss), 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "v_proj"]),
        dict(target_modules=["q_proj", "lm_head"], lora_bias=True),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["attention", "lm_head", "saved"],
)
def test_peft(options: dict[str, Any]) -> None:
    model = adapted(**options)
    patched = copy.deepcopy(model)
    assert patch_loss(patched, z_loss=0.0) is patched
    assert_same_adapted(model, patched)
    with model.disable_adapter(), patched.disable_adapter():
        want, got = model(**batch()).loss, patched(**batch()).loss
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    assert abs(want - model(**batch()).loss) > 1e-4
    assert unpatch_loss(patched) is patched
    assert torch.equal(patched(**batch()).logits, model(**batch()).logits)


def test_saved_adapters_are_read_again(tmp_path: Path) -> None:
    """An adapter with an output layer of its own, over a base model that is patched already."""
    peft = pytest.importorskip("peft")
    trained = patch_loss(adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained.save_pretrained(tmp_path)
    for base in (make(), patch_loss(make())):
        read = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
        plain = unpatch_loss(copy.deepcopy(read))
        patch_loss(read)
        assert_same_adapted(plain, read)
        got = read(**batch()).loss
        torch.testing.assert_close(got, trained(**batch()).loss)
        merged = read.merge_and_unload()  # the saved layer becomes the model's own
        assert merged.train()(**batch()).logits is None
        torch.testing.assert_close(merged(**batch()).loss, got, atol=2e-6, rtol=2e-6)


def test_peft_after_the_patch_and_two_adapters() -> None:
    peft = pytest.importorskip("peft")
    plain, patched = pair()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    models = [peft.get_peft_model(m, config).train() for m in (plain, patched)]
    for m in models:
        m.add_adapter("other", config)
        m.base_model.set_adapter(["default", "other"])
        torch.manual_seed(3)
        with torch.no_grad():
            for name, p in m.named_parameters():
                if "lora_" in name:
                    p.normal_()
    assert_same_adapted(*models)
    for m in models:
        m.merge_adapter()
    want, got = (m(**batch()) for m in models)
    assert got.logits is None
    torch.testing.assert_close(got.loss, want.loss, atol=2e-6, rtol=2e-6)


def test_half_model_with_an_adapter_in_float32() -> None:
    """As PEFT makes them; not further from float64 than the model's own loss."""
    half = adapted(target_modules=["lm_head"])
    half.base_model.model.bfloat16()
    for name, p in half.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    patched, exact = patch_loss(copy.deepcopy(half)), copy.deepcopy(half).double()
    losses = [m(**batch()).loss for m in (exact, half, patched)]
    off = [abs(loss.item() - losses[0].item()) for loss in losses[1:]]
    assert off[1] <= 1.5 * off[0] + 2e-3
    found = gradients(patched, losses[2])
    wanted = gradients(exact, losses[0])
    assert found.keys() == wanted.keys() and len(found) == 2
    for name, g in found.items():
        assert g.dtype == torch.float32
        assert (g - wanted[name]).norm() < 0.03 * wanted[name].norm(), name


def test_dropout_of_an_adapter() -> None:
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    patched = patch_loss(copy.deepcopy(model))
    losses = []
    for m in (model, patched, patched):
        torch.manual_seed(7)
        losses.append(m(**batch()).loss)
    torch.testing.assert_close(losses[1], losses[0], atol=2e-6, rtol=2e-6)
    torch.manual_seed(8)
    assert abs(patched(**batch()).loss - losses[2]) > 1e-4


def test_prompt_tuning() -> None:
    """PEFT puts virtual tokens, whose labels are -100, before the others."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make(), config).train()
    assert_same_adapted(model, patch_loss(copy.deepcopy(model)))


def test_adapters_that_are_not_supported() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match="LoRA with the variant DoraLinearVariant"):
        patch_loss(adapted(target_modules=["lm_head"], use_dora=True))
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=["lm_head"]
    )
    with pytest.raises(TypeError, match="an adapter of the type peft.tuners.ia3"):
        patch_loss(peft.get_peft_model(make(), config))
