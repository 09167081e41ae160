"""convert: attention over pairs of tokens inside transformers models, on tiny random ones."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from pyloss.integrations import _tensor_attention_hf as integration  # noqa: E402
from pyloss.integrations.transformers import convert, from_pretrained, patch_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, LENGTH, PADDING = 131, 12, 4
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
NEOX = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
# Each second layer sees 6 tokens.
SLIDING = dict(
    sliding_window=6,
    use_sliding_window=True,
    layer_types=["full_attention", "sliding_attention"] * 2,
)

# name: (model, configuration, its options)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL),
    "mistral_sliding": ("MistralForCausalLM", "MistralConfig", {**SMALL, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL),
    "qwen2_sliding": ("Qwen2ForCausalLM", "Qwen2Config", {**SMALL, **SLIDING}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL),  # norms of queries and keys
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SMALL),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, "sliding_window": 6}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),  # one matrix, partly rotated
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL),  # one matrix with fewer key heads
}
SOME = ["llama", "mistral_sliding", "qwen3", "gpt_neox"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """The tensors are far too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(family: str = "llama", **options: Any) -> Any:
    model, config, defaults = FAMILIES[family]
    torch.manual_seed(1)
    result = getattr(transformers, model)(getattr(transformers, config)(**{**defaults, **options}))
    with torch.no_grad():  # logits of order 1, biases that are not 0
        for p in result.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return result.eval()


def converted(
    family: str = "llama", layers: Any = "all", window: Any = None, **options: Any
) -> Any:
    """Away from the identity."""
    model = convert(make(family, **options), layers=layers, window=window, init="random")
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "k2_proj" in name or "v2_proj" in name:
                p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 1.0))
    return model


def batch(padded: bool = False) -> dict[str, Tensor]:
    """Two texts; with padding on the left of the first."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, :PADDING], mask[0, :PADDING] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def attention_of(model: Any, layer: int) -> Any:
    return integration._attention_layers(model)[layer]


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [None, (12, 3)])
def test_identity(family: str, window: Any) -> None:
    """The same logits and the same gradients of the parameters that were there before."""
    model = make(family)
    new = convert(copy.deepcopy(model), layers=[0, 1, 3], window=window)
    for padded in (False, True):
        inputs = batch(padded)
        seen = inputs["attention_mask"].bool()
        close(logits(new, **inputs)[seen], logits(model, **inputs)[seen], 5e-6)
    inputs["labels"] = inputs["input_ids"].masked_fill(~seen, -100)
    for m in (model, new):
        m.train()(**inputs).loss.backward()
    grads = dict(new.named_parameters())
    for name, p in model.named_parameters():
        scale = max(1e-3, p.grad.abs().max().item())
        close(grads[name].grad / scale, p.grad / scale, 2e-5)
    added = [n for n in grads if "k2_proj" in n or "v2_proj" in n]
    assert len(added) == 3 * 4
    assert all(grads[n].grad.abs().max() > 1e-6 for n in added), "no gradient"


def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first features, the two halves as one plane each."""
    width = cos.shape[-1]
    turned, rest = t[..., :width], t[..., width:]
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    return torch.cat([turned * cos[:, None] + half * sin[:, None], rest], -1)


def layer_by_hand(layer: Any, x: Tensor, position: tuple, keep: Tensor, window: Any) -> Tensor:
    """One converted layer, every triple of tokens in one tensor; keep (B, n, n): i sees j."""
    batch_size, n, _ = x.shape
    config = layer.config
    heads = config.num_attention_heads
    d = getattr(layer, "head_dim", None) or layer.head_size

    def split(t: Tensor) -> Tensor:
        return t.view(batch_size, n, -1, d).transpose(1, 2)

    if hasattr(layer, "query_key_value"):  # per head the query, the key, the value
        fused = layer.query_key_value(x).view(batch_size, n, heads, 3, d)
        q, k, v = (fused[:, :, :, i].transpose(1, 2) for i in range(3))
        out_proj = layer.dense
    else:
        q, k, v = (split(p(x)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        out_proj = layer.o_proj
        if hasattr(layer, "q_norm"):
            q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = rotated(q, *position), rotated(k, *position)
    group = heads // k.shape[1]
    k, k2, v, v2 = (
        t.repeat_interleave(group, 1).double()
        for t in (k, split(layer.k2_proj(x)), v, split(layer.v2_proj(x)))
    )
    score = layer.scaling * torch.einsum("bhil,bhjl,bhkl->bhijk", q.double(), k, k2)
    seen = []
    for w in window or (None, None):
        p = torch.arange(n)
        near = torch.ones(n, n, dtype=torch.bool) if w is None else p[None] > p[:, None] - w
        seen.append(keep & near)
    pairs = seen[0][:, :, :, None] & seen[1][:, :, None, :]
    score = score.masked_fill(~pairs[:, None], -torch.inf).flatten(3)
    weight = score.softmax(-1).nan_to_num(0).view(batch_size, heads, n, n, n)
    out = torch.einsum("bhijk,bhjc,bhkc->bhic", weight, v, v2)
    return out_proj(out.transpose(1, 2).flatten(2).float())


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("window", [None, (5, 3), (None, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_layer_against_the_formula(family: str, window: Any, padded: bool) -> None:
    model = converted(family, window=window)
    layer = attention_of(model, 2)
    caught: dict[str, Any] = {}

    def catch(_: Any, args: tuple, kwargs: dict, output: tuple) -> None:
        caught.update(kwargs, x=args[0] if args else kwargs["hidden_states"], out=output[0])

    handle = layer.register_forward_hook(catch, with_kwargs=True)
    inputs = batch(padded)
    logits(model, **inputs)
    handle.remove()
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if family == "mistral_sliding":
        keep = keep.triu(-5)
    keep = keep & inputs["attention_mask"].bool()[:, None]
    with torch.no_grad():
        want = layer_by_hand(layer, caught["x"], caught["position_embeddings"], keep, window)
    assert want.abs().max() > 0.1
    close(caught["out"], want)


def test_random_init_is_not_the_identity() -> None:
    plain = make()
    for init, same in (("identity", True), ("random", False)):
        new = convert(copy.deepcopy(plain), layers=[1], window=None, init=init)
        distance = (logits(new, **batch()) - logits(plain, **batch())).abs().max()
        assert (distance < 1e-5) == same


def test_windows_and_layers_matter() -> None:
    """The tests above could agree with windows and choices that do nothing."""
    results = [
        logits(converted(layers=layers, window=window), **batch())
        for layers, window in (("all", None), ("all", (5, 3)), ("all", (3, 5)), ([1], None))
    ]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a - b).abs().max() > 1e-2


def test_left_padding_changes_nothing() -> None:
    """The text alone, and behind padding."""
    for family in SOME:
        model = converted(family, window=(6, 4))
        inputs = batch(padded=True)
        alone = logits(model, input_ids=inputs["input_ids"][:1, PADDING:])
        # Rotary embedding by true positions, as generate has them.
        position = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        together = logits(model, **inputs, position_ids=position)
        assert torch.isfinite(together).all()
        close(together[:1, PADDING:], alone)


def test_right_padding_changes_nothing() -> None:
    model = converted(window=(6, 4))
    inputs = batch()
    want = logits(model, input_ids=inputs["input_ids"][:, :7])
    inputs["attention_mask"][:, 7:] = 0
    close(logits(model, **inputs)[:, :7], want)


def test_packed_sequences_by_position() -> None:
    """Two texts in one row, told apart by position_ids: as each alone."""
    model = converted(window=(6, 4))
    tokens = batch()["input_ids"]
    packed = tokens.reshape(1, -1)
    position = torch.arange(LENGTH).repeat(2)[None]
    # transformers looks for texts in the positions only without a cache.
    got = logits(model, input_ids=packed, position_ids=position, use_cache=False)
    close(got.reshape(2, LENGTH, -1), logits(model, input_ids=tokens))


def test_masks_of_four_dimensions() -> None:
    model = converted()
    inputs = batch()
    want = logits(model, **inputs)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, added):
        close(logits(model, input_ids=inputs["input_ids"], attention_mask=mask), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_dtypes(family: str, dtype: torch.dtype) -> None:
    model = make(family).to(dtype)
    new = convert(copy.deepcopy(model), layers=[1, 3], window=(8, 8), init="random")
    assert attention_of(new, 1).k2_proj.weight.dtype == dtype
    exact = copy.deepcopy(new).double()
    tolerance = {torch.bfloat16: 0.15, torch.float16: 0.02, torch.float64: 1e-12}[dtype]
    close(logits(new, **batch(True))[1].double(), logits(exact, **batch(True))[1], tolerance)


def test_autocast() -> None:
    for family in ("llama", "qwen3"):
        model = converted(family, window=(8, 4))
        with torch.autocast("cpu", torch.bfloat16):
            got = logits(model, **batch())
        close(got.float(), logits(model, **batch()), 0.2)


# --------------------------------------------------------------------------------------------------
# method="auto"


@pytest.mark.parametrize("window", [None, (40, 30)])
def test_auto_is_low_rank_where_it_may_be(window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask the near-linear form where its bound allows it; a mask of pairs is exact."""
    from pyloss.functional import _lowrank

    chosen = []
    choose = _lowrank.choose
    monkeypatch.setattr(
        _lowrank, "choose", lambda p, options: chosen.append(choose(p, options)) or chosen[-1]
    )
    model = converted(window=window)
    auto = copy.deepcopy(model)
    with torch.no_grad():
        for m in (model, auto):
            for i in range(4):
                layer = attention_of(m, i)
                for name in ("q_proj", "k_proj", "k2_proj"):  # small scores
                    for p in getattr(layer, name).parameters():
                        p.mul_(0.1)
    for i in range(4):
        layer = attention_of(auto, i)
        layer._pyloss_settings = layer._pyloss_settings._replace(method="auto")
    tokens = torch.randint(3, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    got, want = (logits(m, input_ids=tokens) for m in (auto, model))
    assert len(chosen) == 4 and None not in chosen
    assert 0.0 < (got - want).abs().max() < 1e-2 * want.abs().max()
    # Padding: transformers joins it with causality to a mask of pairs.
    chosen.clear()
    mask = torch.ones_like(tokens)
    mask[0, :PADDING] = 0
    got, want = (logits(m, input_ids=tokens, attention_mask=mask) for m in (auto, model))
    assert not chosen and torch.equal(got, want)
    # Large scores: no degree keeps the tolerance.
    for m in (model, auto):
        with torch.no_grad():
            attention_of(m, 1).q_proj.weight.mul_(1e3)
            attention_of(m, 1).k_proj.weight.mul_(1e3)
    logits(auto, input_ids=tokens)
    assert [c is None for c in chosen] == [False, True, False, False]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_auto_trains_and_generates(family: str) -> None:
    model = convert(make(family), layers=[1, 3], window=(12, 3), method="auto")
    plain = convert(make(family), layers=[1, 3], window=(12, 3))
    inputs = batch(padded=True)
    inputs["labels"] = inputs["input_ids"]
    model.train()(**inputs).loss.backward()
    assert attention_of(model, 1).k2_proj.weight.grad.isfinite().all()
    inputs = batch(padded=True)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    want = plain.generate(**inputs, **options)
    for cache in ({}, dict(cache_implementation="static")):
        assert torch.equal(model.eval().generate(**inputs, **options, **cache), want)


# --------------------------------------------------------------------------------------------------
# Cache and generation


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("window", [None, (6, 3)])
def test_cache(family: str, window: Any) -> None:
    """Token by token and in pieces, with a dynamic and a static cache: as all at once."""
    model = converted(family, layers=[0, 3], window=window)
    inputs = batch(padded=True)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    want = logits(model, **inputs, position_ids=position)
    for pieces in ([5, 1, 1, 1, 1, 1, 1, 1], [4, 3, 5], [12]):
        for cache in (
            transformers.DynamicCache(config=model.config),
            transformers.StaticCache(config=model.config, max_cache_len=15),
        ):
            got, start = [], 0
            for length in pieces:
                end = start + length
                with torch.no_grad():
                    output = model(
                        input_ids=tokens[:, start:end],
                        attention_mask=mask[:, :end],
                        position_ids=position[:, start:end],
                        past_key_values=cache,
                        use_cache=True,
                    )
                got.append(output.logits)
                start = end
            seen = mask.bool()
            close(torch.cat(got, 1)[seen], want[seen])
    first = cache.layers[0]
    # Two vectors in one cache entry, only where the layer was converted.
    assert first.keys.shape[-1] == 16 and cache.layers[1].keys.shape[-1] == 8


def test_static_cache_without_a_mask() -> None:
    """The empty places behind the text are not looked at."""
    model = converted(window=(6, 3))
    tokens = batch()["input_ids"]
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    got = [
        logits(model, input_ids=tokens[:, a:b], past_key_values=cache, use_cache=True)
        for a, b in ((0, 8), (8, 9), (9, 12))
    ]
    close(torch.cat(got, 1), logits(model, input_ids=tokens))


def test_cache_by_position() -> None:
    """A layer takes its cache as the original does, by name or by place."""
    model = converted(layers=[0], window=(6, 3))
    layer, hidden = attention_of(model, 0), torch.randn(1, 5, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    got, lengths = [], []
    with torch.no_grad():
        for by_place in (True, False):
            cache = transformers.DynamicCache(config=model.config)
            args = (cache,) if by_place else ()
            options = {} if by_place else dict(past_key_values=cache)
            got.append(layer(hidden, rotary, None, *args, **options)[0])
            lengths.append(cache.layers[0].keys.shape[2:])
    assert torch.equal(*got)
    assert lengths == [(5, 16), (5, 16)]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str) -> None:
    """Greedy search gives one text with any cache, the text alone or behind padding."""
    # Tied weights would repeat one word.
    model = converted(family, layers=[1, 2], window=(8, 3), tie_word_embeddings=False)
    inputs = batch(padded=True)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    want = model.generate(**inputs, **options)
    for cache in (dict(use_cache=False), dict(cache_implementation="static")):
        assert torch.equal(model.generate(**inputs, **options, **cache), want), cache
    alone = model.generate(inputs["input_ids"][:1, PADDING:], **options)
    assert torch.equal(alone, want[:1, PADDING:])
    assert len(set(want[:, LENGTH:].flatten().tolist())) > 3


def test_beam_search_and_sampling() -> None:
    model = converted(window=(8, 3))
    for options in (dict(num_beams=3), dict(do_sample=True)):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            text = model.generate(**batch(True), max_new_tokens=6, use_cache=use_cache, **options)
            texts.append(text)
        assert torch.equal(*texts), options


# --------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    model = converted(family, layers=[1, 3], window=(8, 3)).train()
    inputs = batch(True)
    inputs["labels"] = inputs["input_ids"]
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**inputs).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, want in grads[0].items():
        close(grads[1][name], want, 1e-6)


def test_with_patch_loss() -> None:
    model = converted(layers=[1], window=(8, 3)).train()
    inputs = batch()
    inputs["labels"] = inputs["input_ids"]
    want = model(**inputs).loss
    output = patch_loss(model)(**inputs)
    assert output.logits is None
    close(output.loss, want)


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = convert(make(), layers="every:2", window=(8, 4))
    torch.manual_seed(3)
    rows = torch.randint(3, VOCABULARY, (4, 10))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=1e-2, report_to=[], logging_steps=1, use_cpu=True
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert attention_of(model, 1).k2_proj.weight.abs().max() > 1e-3  # away from the identity
    trainer.save_model(str(tmp_path / "end"))
    close(logits(from_pretrained(tmp_path / "end"), **batch()), logits(model.eval(), **batch()))


# Not even the model of transformers as it is, before.
@needs_torch((2, 8), "fullgraph=True of transformers 5")
@pytest.mark.parametrize("training", [False, True])
def test_compile(training: bool) -> None:
    model = converted(layers=[1, 3], window=(8, 3)).train(training)
    inputs = {**batch(), "labels": batch()["input_ids"], "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(**inputs), model(**inputs)
    close(got.logits, want.logits)
    got.loss.backward()
    assert attention_of(model, 3).v2_proj.weight.grad.abs().max() > 0


# --------------------------------------------------------------------------------------------------
# Copies and files


def test_copies() -> None:
    model = converted(layers=[1], window=(8, 3))
    want = logits(model, **batch())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other, **batch()), want)
        with torch.no_grad():
            attention_of(other, 1).k2_proj.weight.add_(1.0)
        assert not torch.equal(logits(other, **batch()), want)
    assert torch.equal(logits(model, **batch()), want)


@pytest.mark.parametrize("family", SOME)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model = converted(family, layers=[0, -1], window=(8, None))
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is type(model) is getattr(transformers, FAMILIES[family][0])
    assert again.config.tensor_attention == {
        "layers": [0, 3],
        "window": [8, None],
        "method": "exact",
    }
    assert again.config._attn_implementation == "tensor_attention"
    assert not again.training
    want = logits(model, **batch(True))
    assert torch.equal(logits(again, **batch(True)), want)
    assert again.state_dict().keys() == model.state_dict().keys()
    half = from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert attention_of(half, 0).v2_proj.weight.dtype == torch.bfloat16
    # Once more, from what was loaded.
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(from_pretrained(tmp_path / "second"), **batch(True)), want)


def test_load_another_class(tmp_path: Path) -> None:
    model = converted(layers=[1], window=(8, 3))
    model.save_pretrained(tmp_path)
    base, info = from_pretrained(tmp_path, transformers.LlamaModel, output_loading_info=True)
    assert type(base) is transformers.LlamaModel and not info["missing_keys"]
    with torch.no_grad():
        got = base(**batch()).last_hidden_state
        assert torch.equal(got, model.model(**batch()).last_hidden_state)


def test_loading_errors(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no entry tensor_attention.*then call convert"):
        from_pretrained(tmp_path / "plain")
    model = converted(layers=[1])
    model.save_pretrained(tmp_path / "converted")
    with pytest.raises(ValueError, match="'tensor_attention', got 'sdpa'"):
        from_pretrained(tmp_path / "converted", attn_implementation="sdpa")
    with pytest.raises(TypeError, match="subclass of .*, got AutoModelForCausalLM; without it"):
        from_pretrained(tmp_path / "converted", transformers.AutoModelForCausalLM)
    for names in (None, ["OfSomeoneElse"]):
        config = transformers.AutoConfig.from_pretrained(tmp_path / "converted")
        config.architectures = names
        with pytest.raises(ValueError, match="no class for the architectures.*give model_class"):
            from_pretrained(tmp_path / "converted", config=config)
    # transformers' own function gives a plain model; it is not taken for one never converted.
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "converted")
    with pytest.raises(ValueError, match="converted before.*are lost"):
        convert(plain)
    weights = {k: v for k, v in model.state_dict().items() if "k2_proj" not in k}
    model.save_pretrained(tmp_path / "without", state_dict=weights)
    with pytest.raises(RuntimeError, match="no weights for model.layers.1.self_attn.k2_proj.bias"):
        from_pretrained(tmp_path / "without")


def test_accelerate_hooks(tmp_path: Path) -> None:
    """Converted before and after accelerate has put its hooks on every layer."""
    accelerate = pytest.importorskip("accelerate")
    plain = make()
    want = logits(plain, **batch())
    for hooks_first in (False, True):
        model = copy.deepcopy(plain)
        if hooks_first:
            model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        model = convert(model, layers=[1], window=None)
        if not hooks_first:
            model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        close(logits(model, **batch()), want, 5e-6)
        with torch.no_grad():
            attention_of(model, 1).v2_proj.bias.zero_()
        assert (logits(model, **batch()) - want).abs().max() > 1e-2
    model = converted(layers=[1])
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits(again, **batch()), logits(model, **batch()))


# --------------------------------------------------------------------------------------------------
# Arguments and errors


@pytest.mark.parametrize(
    "layers, want",
    [
        ("all", [0, 1, 2, 3]),
        ("every:2", [1, 3]),
        ("every:4", [3]),
        (slice(1, None, 2), [1, 3]),
        ([2, -1, 2], [2, 3]),
        (range(2), [0, 1]),
    ],
)
def test_layers(layers: Any, want: list[int]) -> None:
    model = convert(make(), layers=layers)
    assert model.config.tensor_attention == {"layers": want, "window": [512, 32], "method": "exact"}
    for i, layer in integration._attention_layers(model).items():
        assert hasattr(layer, "k2_proj") == (i in want)
        assert type(layer).__name__ == "LlamaAttention"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(layers="every:5"), ValueError, "none of the model's 4 layers"),
        (dict(layers=[]), ValueError, "none of the model's 4 layers"),
        (dict(layers="each"), ValueError, "all, every:k, a slice or indices"),
        (dict(layers="every:0"), ValueError, "all, every:k"),
        (dict(layers=[4]), ValueError, "layer 4 is out of range, the model has 4"),
        (dict(layers=[-5]), ValueError, "layer -5 is out of range"),
        (dict(layers=3), TypeError, "layers must be a string, a slice or indices, got int"),
        (dict(layers=[1.0]), TypeError, "layers must hold integers, got 1.0"),
        (dict(window=0), ValueError, "window must be positive"),
        (dict(window=(4, 4, 4)), ValueError, "one number, two or None"),
        (dict(window=(4, 2.5)), TypeError, "window must hold integers"),
        (dict(window=3.5), TypeError, "window must be an integer, a pair or None, got 3.5"),
        (dict(init="zero"), ValueError, "identity or random"),
        (dict(method="lowrank"), ValueError, "exact or auto"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type, message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        convert(model, **arguments)
    assert type(attention_of(model, 3)) is transformers.models.llama.modeling_llama.LlamaAttention
    assert not hasattr(model.config, "tensor_attention")
    assert model.config._attn_implementation == "sdpa"


def test_twice() -> None:
    model = convert(make(), layers=[1])
    with pytest.raises(ValueError, match="converted before.*one call"):
        convert(model, layers=[2])


def test_a_new_model_of_a_converted_configuration() -> None:
    config = convert(make(), layers=[1]).config
    new = transformers.LlamaForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"no converted layer. If it is a new model, `del model.co"
    ):
        convert(new, layers=[1])
    del new.config.tensor_attention
    assert hasattr(convert(new, layers=[1]).model.layers[1].self_attn, "k2_proj")


SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("Mamba", SIZES, "MambaForCausalLM: .* It has MambaMixer without one"),
        ("GPT2", dict(vocab_size=64, n_embd=32, n_layer=1, n_head=2), "GPT2Attention.*cross-atten"),
        ("Bloom", dict(vocab_size=64, hidden_size=32, n_layer=1, n_head=2),
         "BloomAttention: its forward does not update a cache"),
        ("T5", dict(vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=8),
         "several with layer_idx 0, of types T5Attention.*encoders and cross-attention"),
        ("Gemma2", SIZES | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8),
         "Gemma2Attention: it has attn_logit_softcapping"),
    ],
)  # fmt: skip
def test_models_that_it_does_not_support(name: str, sizes: dict[str, int], message: str) -> None:
    kind = "ForConditionalGeneration" if name == "T5" else "ForCausalLM" if name != "GPT2" else ""
    model_class = getattr(transformers, f"{name}{kind}" if kind else "GPT2LMHeadModel")
    with pytest.raises(TypeError, match=message):
        convert(model_class(getattr(transformers, f"{name}Config")(**sizes)), layers="all")


def test_models_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        convert(torch.nn.Linear(2, 2))
    gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4)
    small = {k: v for k, v in SMALL.items() if k != "head_dim"}
    for config, message in (
        (gpt2, "GPT2Attention: its forward has encoder_hidden_states"),
        (transformers.Gemma2Config(**SMALL), "Gemma2Attention: it has attn_logit_softcapping"),
        (transformers.BertConfig(**small, is_decoder=True), "Bert"),
        (transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32), "no attention"),
    ):
        with pytest.raises(TypeError, match=message):
            convert(transformers.AutoModelForCausalLM.from_config(config), layers="all")


def test_attention_weights_are_refused() -> None:
    model = convert(make(), layers="all")
    with pytest.raises(NotImplementedError, match="output_attentions must be False"):
        model(**batch(), output_attentions=True)


def test_dropout_is_refused_in_training_only() -> None:
    model = convert(make(attention_dropout=0.1), layers=[1])
    logits(model, **batch())
    with pytest.raises(NotImplementedError, match="attention_dropout = 0.1 in training"):
        model.train()(**batch())
    attention_of(model, 1).attention_dropout = 0.0  # the other layers keep theirs
    model(**batch())


def test_another_implementation_is_refused() -> None:
    model = convert(make(), layers=[1])
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="'tensor_attention', but the model has 'sdpa'"):
        model(**batch())
    model.set_attn_implementation("tensor_attention")
    logits(model, **batch())


def test_what_the_function_refuses() -> None:
    q, pair = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 8)
    layer = torch.nn.Module()
    for option, message in (
        (dict(softcap=30.0), "soft capping"),
        (dict(s_aux=torch.zeros(2)), "attention sinks"),
        (dict(position_bias=torch.zeros(1, 2, 5, 5)), "position bias"),
        (dict(cu_seq_lens_q=torch.tensor([0, 5])), "packed sequences by cu_seq_lens_q"),
        (dict(dropout=0.5), "no dropout"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            integration.attention(layer, q, pair, pair, None, **option)
    with pytest.raises(NotImplementedError, match="soft capping"):  # a plain layer too
        integration.attention(layer, q, q, q, None, softcap=30.0)
    with pytest.raises(ValueError, match="twice as many, got 4 and 6"):
        integration.attention(layer, q, pair[..., :6], pair[..., :6], None)


def test_a_layer_that_does_something_else() -> None:
    """A layer that passes its cache by, as those that share one do, is not taken for plain."""
    model = converted(layers=[1])
    layer = attention_of(model, 1)
    original = type(layer)._pyloss_original

    class Sharing(original):
        def forward(self, hidden_states, cache=None, **kwargs):
            return hidden_states, None

    layer.__class__ = integration._converted_class(Sharing)
    with pytest.raises(RuntimeError, match="Sharing updated its cache 0 times"):
        logits(model, **batch())


def test_registered_for_models_that_are_not_converted() -> None:
    """attn_implementation="tensor_attention" alone is sdpa."""
    for family in SOME:
        plain = make(family)
        want = logits(plain, **batch(True))
        plain.set_attn_implementation("tensor_attention")
        assert torch.equal(logits(plain, **batch(True)), want)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**SMALL), attn_implementation="tensor_attention"
    )
    assert model.config._attn_implementation == "tensor_attention"


def test_without_transformers() -> None:
    """The module imports, and says what is missing when it is used."""
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from pyloss.integrations.transformers import convert\n"
        "try:\n    convert(None)\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert "needs transformers 4.53 or newer" in done.stdout


def test_example_file() -> None:
    script = str(ROOT / "examples" / "transformers_tensor_attention.py")
    done = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    number = r"([\d.]+)"
    at, later = re.findall(rf"plain {number}  converted {number}", done.stdout)
    assert abs(float(at[0]) - float(at[1])) < 1e-3  # the same model until it is trained
    assert all(float(after) < float(before) for before, after in zip(at, later))
    right = re.findall(rf"{number}%", done.stdout)
    assert len(right) == 6 and right[0] == right[1], done.stdout


def test_docstring_examples() -> None:
    import doctest

    for function in (convert, from_pretrained):
        tests = doctest.DocTestFinder().find(function, function.__name__, globs={})
        results = [doctest.DocTestRunner().run(t) for t in tests if t.examples]
        assert results and all(r.attempted and not r.failed for r in results)
