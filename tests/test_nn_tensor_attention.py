"""TensorAttention: equal to nn.MultiheadAttention at its start, arguments and shapes of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pyloss
from pyloss.nn import TensorAttention

E, H, N, L, S = 16, 4, 3, 7, 7


def _pair(order=2, **options):
    """A MultiheadAttention and the TensorAttention that took it over."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(E, H, **options)
    if plain.in_proj_bias is not None:
        nn.init.normal_(plain.in_proj_bias)
        nn.init.normal_(plain.out_proj.bias)
    return plain, TensorAttention.from_multihead(plain, order=order)


def _inputs(layer, batched=True, source=S):
    batch = [N] if batched else []
    sizes = ((L, layer.embed_dim), (source, layer.kdim), (source, layer.vdim))
    inputs = [torch.randn(*batch, n, width) for n, width in sizes]
    if batched and not layer.batch_first:
        inputs = [t.transpose(0, 1) for t in inputs]
    return inputs


def _same(plain, ours, inputs, **masks):
    want, _ = plain(*inputs, need_weights=False, **masks)
    got, weights = ours(*inputs, need_weights=False, **masks)
    assert weights is None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 6}, {"vdim": 3}],
    ids=str,
)
def test_starts_as_multihead_attention(order, options):
    plain, ours = _pair(order, **options)
    _same(plain, ours, _inputs(plain))
    _same(plain, ours, _inputs(plain, source=10))
    _same(plain, ours, _inputs(plain, batched=False))


CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
PADDING = torch.zeros(N, S, dtype=torch.bool)
PADDING[0, 5:] = PADDING[2, 2:4] = True


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "masks",
    [
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": CAUSAL.isinf()},
        {"attn_mask": torch.randn(N * H, L, S, generator=torch.Generator().manual_seed(1))},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": torch.zeros(N, S).masked_fill(PADDING, -torch.inf)},
        {"key_padding_mask": PADDING, "attn_mask": CAUSAL.isinf()},
        {"key_padding_mask": torch.zeros(N, S).masked_fill(PADDING, -9.0), "attn_mask": CAUSAL},
    ],
    ids=str,
)
def test_masks_mean_the_same(order, masks):
    plain, ours = _pair(order, batch_first=True)
    _same(plain, ours, _inputs(plain), **masks)


def test_bool_and_floating_masks_mix():
    plain, ours = _pair(batch_first=True)
    floating = torch.zeros(N, S).masked_fill(PADDING, -torch.inf)
    inputs = _inputs(plain)
    want, _ = ours(*inputs, key_padding_mask=floating, attn_mask=CAUSAL, need_weights=False)
    got, _ = ours(*inputs, key_padding_mask=PADDING, attn_mask=CAUSAL, need_weights=False)
    torch.testing.assert_close(got, want)


def test_a_query_without_keys_gets_the_output_bias():
    _, ours = _pair(batch_first=True)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    out, _ = ours(*_inputs(ours), key_padding_mask=padding, need_weights=False)
    assert out.isfinite().all()
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))


def test_equals_the_function():
    torch.manual_seed(0)
    layer = TensorAttention(E, H, batch_first=True, init="random", window=(2, 4), num_kv_heads=2)
    x = torch.randn(N, L, E)
    out, _ = layer(x, x, x, need_weights=False)

    def heads(t):
        return t.unflatten(-1, (-1, E // H)).transpose(1, 2)

    bias = layer.in_proj_bias.split([E, E // 2, E // 2])
    weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    q, k1, v1 = (heads(x @ w.t() + b) for w, b in zip(weights, bias))
    k2, v2 = heads(layer.more_k_proj[0](x)), heads(layer.more_v_proj[0](x))
    want = pyloss.tensor_attention(q, k1, k2, v1, v2, window=(2, 4), enable_gqa=True)
    torch.testing.assert_close(out, layer.out_proj(want.transpose(1, 2).flatten(2)))


def test_all_parameters_get_a_gradient():
    torch.manual_seed(0)
    for options in ({}, {"qk_norm": True}, {"order": 3}, {"num_kv_heads": 1, "init": "random"}):
        layer = TensorAttention(E, H, **options)
        x = torch.randn(L, N, E)
        layer(x, x, x, need_weights=False)[0].square().sum().backward()
        for name, p in layer.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_training_moves_it_away():
    plain, ours = _pair()
    optimizer = torch.optim.SGD([*ours.more_k_proj.parameters(), *ours.more_v_proj.parameters()], 1)
    inputs = _inputs(plain)
    before, _ = ours(*inputs, need_weights=False)
    before.square().mean().backward()
    optimizer.step()
    after, _ = ours(*inputs, need_weights=False)
    assert after.square().mean() < before.square().mean()


def test_norm():
    layer = TensorAttention(E, H, qk_norm=True)
    x = torch.randn(L, N, E)
    q, keys, _ = layer._projected(*[x.transpose(0, 1)] * 3)
    for t in (q, keys[0]):
        torch.testing.assert_close(t.square().mean(-1), torch.ones(N, H, L), rtol=1e-3, atol=1e-3)


def test_state_dict_is_that_of_torch_and_more():
    for options in ({}, {"kdim": 5}, {"bias": False}):
        plain, ours = nn.MultiheadAttention(E, H, **options), TensorAttention(E, H, **options)
        extra = {f"more_{x}_proj.0.{p}" for x in "kv" for p in ("weight", "bias")}
        assert set(ours.state_dict()) == set(plain.state_dict()) | extra
        found = ours.load_state_dict(plain.state_dict(), strict=False)
        assert set(found.missing_keys) == extra and not found.unexpected_keys
        _same(plain, ours, _inputs(plain))


def test_taken_over_parameters_are_shared():
    plain, ours = _pair()
    assert ours.in_proj_weight is plain.in_proj_weight
    assert ours.out_proj.bias is plain.out_proj.bias
    with pytest.raises(ValueError, match="num_kv_heads"):
        TensorAttention.from_multihead(plain, num_kv_heads=2)
    with pytest.raises(NotImplementedError, match="add_bias_kv"):
        TensorAttention.from_multihead(nn.MultiheadAttention(E, H, add_bias_kv=True))


def test_copies_and_repr():
    layer = TensorAttention(E, H, order=3, window=4, num_kv_heads=2)
    x = torch.randn(L, N, E)
    want, _ = layer(x, x, x, need_weights=False)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(clone) == repr(layer)
        assert torch.equal(clone(x, x, x, need_weights=False)[0], want)
    assert "16, 4, order=3, num_kv_heads=2, window=4, batch_first=False" in repr(layer)


def test_dtype_and_device():
    layer = TensorAttention(E, H, dtype=torch.float64, device="meta")
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    layer = TensorAttention(E, H).bfloat16()
    x = torch.randn(L, N, E).bfloat16()
    assert layer(x, x, x, need_weights=False)[0].dtype == torch.bfloat16


def test_weights_are_none_with_a_warning():
    layer = TensorAttention(E, H)
    x = torch.randn(L, N, E)
    with pytest.warns(UserWarning, match="need_weights=False"):
        _, weights = layer(x, x, x)
    assert weights is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_heads": 3}, ValueError, "divisible by num_heads, got 16 and 3"),
        ({"num_heads": 0}, ValueError, "greater than 0"),
        ({"num_kv_heads": 3}, ValueError, "multiple of num_kv_heads, got 4 and 3"),
        ({"order": 0}, ValueError, "order must be at least 1, got 0"),
        ({"init": "zero"}, ValueError, "init must be identity or random, got 'zero'"),
        ({"dropout": 0.1}, NotImplementedError, "dropout"),
        ({"add_zero_attn": True}, NotImplementedError, "add_zero_attn"),
        ({"add_bias_kv": True}, NotImplementedError, "add_bias_kv"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        TensorAttention(E, **{"num_heads": H, **options})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.randn(L, E)}, "got 2, 3 and 3"),
        ({"key_padding_mask": torch.zeros(N, S + 1).bool()}, r"shape \[3, 7\], got \[3, 8\]"),
        ({"attn_mask": torch.zeros(L, S + 1)}, r"attn_mask must have shape \[7, 7\] or"),
        ({"value": torch.randn(S + 1, N, E)}, r"one length, got .* \[3, 7\], \[3, 8\]"),
    ],
)
def test_bad_inputs(change, words):
    layer = TensorAttention(E, H)
    x = torch.randn(L, N, E)
    inputs = {"query": x, "key": x, "value": x, "need_weights": False, **change}
    with pytest.raises(ValueError, match=words):
        layer(**inputs)


def test_windows_are_causal():
    layer = TensorAttention(E, H, window=3, batch_first=True, init="random")
    x = torch.randn(1, L, E)
    out, _ = layer(x, x, x, need_weights=False)
    changed = x.clone()
    changed[:, 4:] += 1
    other, _ = layer(changed, changed, changed, need_weights=False)
    torch.testing.assert_close(out[:, :4], other[:, :4])
    assert not torch.allclose(out[:, 4:], other[:, 4:])


def test_inside_an_encoder_layer():
    """In eval, where torch's fast path would not call the layer at all."""
    plain = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    swapped = copy.deepcopy(plain)
    swapped.self_attn = TensorAttention.from_multihead(swapped.self_attn)
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), plain(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        swapped.self_attn.more_k_proj[0].weight.normal_()
        assert not torch.allclose(swapped(x), plain(x))


def test_compiles_with_the_default_arguments():
    layer, x = TensorAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="need_weights"):
        want = layer(x, x, x)[0]
    torch.testing.assert_close(compiled(x, x, x)[0], want)


def test_causal_over_other_lengths_starts_at_the_first_key():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    ours = TensorAttention.from_multihead(layer)
    q, k = torch.randn(2, 4, 8), torch.randn(2, 6, 8)
    hidden = torch.ones(4, 6, dtype=torch.bool).triu(1)
    want = layer(q, k, k, attn_mask=hidden, need_weights=False)[0]
    got = ours(q, k, k, attn_mask=hidden, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_mistakes_are_named():
    layer = pyloss.nn.TensorAttention(8, 2, window=2, batch_first=True)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    with pytest.raises(TypeError, match="key_padding_mask must be bool .* got torch.int64"):
        layer(x, x, x, key_padding_mask=torch.ones(2, 5, dtype=torch.int64), need_weights=False)
    with pytest.raises(
        ValueError, match="with a window needs query and key of one length.* 5 and 7"
    ):
        layer(x, y, y, need_weights=False)
    assert layer(x, y, y, need_weights=False, is_causal=True)[0].shape == x.shape
    with pytest.raises(ValueError, match="method must be one of exact, lowrank, auto, got 'fast'"):
        pyloss.nn.TensorAttention(8, 2, method="fast")
    with pytest.raises(AttributeError, match="pyloss.nn.TensorAttention"):
        pyloss.TensorAttention  # noqa: B018


@pytest.mark.parametrize("kdim", [None, 3])
def test_attributes_of_multihead_attention(kdim):
    """What code written for it asks for is there, None where it is None."""
    theirs, ours = (c(E, H, kdim=kdim) for c in (nn.MultiheadAttention, TensorAttention))
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
                 "in_proj_bias", "bias_k", "bias_v"):  # fmt: skip
        a, b = getattr(theirs, name), getattr(ours, name)
        assert (a is None) == (b is None) and (a is None or a.shape == b.shape)
    assert ours.add_zero_attn is theirs.add_zero_attn is False
