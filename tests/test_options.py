"""Groups of options: as the headline functions have them, and checked where they are taken."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyloss
import pyloss.distributed
from pyloss import functional as F
from pyloss.functional import _options as groups
from pyloss.functional._options import LOW_RANK, names_of, options_of

ROW_EXTRA = {"size_average", "reduce", "inplace", "entropy_weight"}
OF_ONE_LOSS = {"poly1", "relaxation", "ldr", "margin"}
# What the group leaves to the function: tensors, and what only one function has.
GROUPS = [
    (groups.RowOptions, F.fused_cross_entropy, ROW_EXTRA, {"gamma", *OF_ONE_LOSS}),
    (groups.DiceOptions, F.soft_dice_loss, set(), set()),
    (groups.DiceCrossEntropyOptions, F.dice_cross_entropy_loss, set(), set()),
    (groups.DiceFocalOptions, F.dice_focal_loss, set(), set()),
    (groups.GeneralizedDiceOptions, F.generalized_dice_loss, set(), set()),
    (groups.GeneralizedDiceFocalOptions, F.generalized_dice_focal_loss, set(), set()),
    (groups.TverskyOptions, F.tversky_loss, set(), set()),
    (groups.SegmentationFocalOptions, F.segmentation_focal_loss, set(), set()),
    (groups.ClDiceOptions, F.cldice_loss, set(), set()),
    (groups.DiceClDiceOptions, F.dice_cldice_loss, set(), set()),
    (groups.SortingLossOptions, F.sorting_cross_entropy, {"mask", "lengths"}, set()),
    (groups.SpearmanOptions, F.spearman_loss, {"mask", "lengths"}, set()),
    (groups.BettiOptions, F.betti_matching_loss, set(), set()),
]


@pytest.mark.parametrize("group, function, extra, missing", GROUPS)
def test_a_group_is_what_its_function_has(group, function, extra, missing) -> None:
    parameters = inspect.signature(function).parameters
    written = _annotations(group)
    assert set(names_of(function)) - extra == set(written) - missing
    for name in set(written) - missing:
        if (group, name) != (groups.DiceCrossEntropyOptions, "weight"):  # narrower there
            assert written[name] == parameters[name].annotation, name


def _annotations(group: Any) -> dict[str, str]:
    """As the source writes them, those of the bases included."""
    return {n: getattr(a, "__forward_arg__", a) for n, a in group.__annotations__.items()}


@pytest.mark.parametrize("function", [F.tensor_attention, F.tensor_attention_n])
def test_low_rank_options(function: Callable) -> None:
    assert tuple(_annotations(groups.LowRankOptions)) == LOW_RANK
    parameters = inspect.signature(function).parameters
    for name, annotation in _annotations(groups.LowRankOptions).items():
        assert parameters[name].annotation == annotation


@pytest.mark.parametrize(
    "function", [F.soft_sort, F.soft_rank, F.soft_argsort, F.soft_permutation, F.soft_permute]
)
def test_network_options(function: Callable) -> None:
    parameters = inspect.signature(function).parameters
    for name, annotation in _annotations(groups.NetworkOptions).items():
        assert parameters[name].annotation == annotation


def _like(x: int, first: int = 1, second: str = "a", third: float = 0.5) -> None: ...


@options_of(_like, positional=1, after={"own": "second"}, annotations={"third": "object"})
def _taker(x: int, *, own: bool = False, **options: Any) -> tuple:
    return x, own, options


def test_what_a_group_stands_for_is_shown() -> None:
    assert str(inspect.signature(_taker)) == (
        "(x: 'int', first: 'int' = 1, *, second: 'str' = 'a', own: 'bool' = False, "
        "third: 'object' = 0.5) -> 'tuple'"
    )


def test_a_group_is_filled_in() -> None:
    assert _taker(1) == (1, False, dict(first=1, second="a", third=0.5))
    assert _taker(1, 2, third=3.0, own=True) == (1, True, dict(first=2, second="a", third=3.0))
    assert _taker(1, first=2) == _taker(1, 2) == _taker(x=1, first=2)


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((1,), {"fourth": 1}, r"_taker\(\) got an unexpected keyword argument 'fourth'"),
        ((1, 2), {"first": 2}, r"_taker\(\) got multiple values for argument 'first'"),
        ((1, 2, 3), {}, r"_taker\(\) takes from 1 to 2 positional arguments but 3 were given"),
        ((), {}, r"_taker\(\) missing 1 required positional argument: 'x'"),
        ((1,), {"x": 1}, r"_taker\(\) got multiple values for argument 'x'"),
    ],
)
def test_a_wrong_call_is_pythons_own_error(args, options, message) -> None:
    with pytest.raises(TypeError, match=message):
        _taker(*args, **options)


@pytest.mark.parametrize(
    "make",
    [
        pyloss.nn.CrossEntropyLoss,
        pyloss.nn.CompSumLoss,
        pyloss.nn.GeneralizedCrossEntropyLoss,
        pyloss.nn.FocalLoss,
        pyloss.nn.SoftDiceLoss,
        pyloss.nn.DiceCELoss,
        pyloss.nn.DiceFocalLoss,
        pyloss.nn.SoftclDiceLoss,
        pyloss.nn.SortingCrossEntropyLoss,
        pyloss.nn.SpearmanLoss,
        pyloss.nn.NeuralSort,
        pyloss.nn.SoftSort,
        pyloss.nn.BettiMatchingLoss,
        pyloss.metrics.BettiNumberError,
        pyloss.metrics.BettiMatchingError,
        lambda **options: pyloss.nn.LinearCrossEntropyLoss(3, 4, **options),
        lambda **options: pyloss.nn.TensorAttention(8, 2, **options),
        lambda **options: pyloss.nn.DiffSortNet("bitonic", 4, **options),
        lambda **options: pyloss.distributed.vocab_parallel_cross_entropy(
            torch.zeros(1, 2), torch.zeros(1), **options
        ),
        lambda **options: pyloss.distributed.vocab_parallel_linear_cross_entropy(
            torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(1), **options
        ),
    ],
)
def test_a_misspelt_option_is_refused_at_once(make: Callable) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'reductoin'"):
        make(reductoin="sum")


def test_an_option_that_the_name_of_the_loss_has_fixed() -> None:
    for name in ("tau", "truncate"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            pyloss.nn.GeneralizedCrossEntropyLoss(**{name: 1.0})


def test_options_may_be_set_between_calls() -> None:
    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    criterion = pyloss.nn.CrossEntropyLoss(z_loss=0.5)
    criterion.z_loss, criterion.reduction = 0.0, "sum"
    torch.testing.assert_close(
        criterion(x, y), torch.nn.functional.cross_entropy(x, y, reduction="sum")
    )
    assert "z_loss=0.0" in repr(criterion) and criterion.options["reduction"] == "sum"
    linear = pyloss.nn.LinearCrossEntropyLoss(3, 5, tau=1.5)
    linear.tau = 1.0
    expected = torch.nn.functional.cross_entropy(linear.linear(x), y)
    torch.testing.assert_close(linear(x, y), expected)
    image, mask = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 6, 6) > 0.5
    betti = pyloss.nn.BettiMatchingLoss(dims=[0])
    betti.dims = (1,)
    assert torch.equal(betti(image, mask), F.betti_matching_loss(image, mask, dims=[1]))


def test_options_of_a_module_are_read_and_set() -> None:
    betti = pyloss.nn.BettiMatchingLoss(reduction="sum")
    assert betti.options["reduction"] == "sum"
    betti.options = {**betti.options, "reduction": "none"}
    assert betti.reduction == "none"
    with pytest.raises(TypeError, match="BettiMatchingLoss.*'reductoin'"):
        betti.options = {"reductoin": "sum"}
    linear = pyloss.nn.LinearCrossEntropyLoss(8, 4, z_loss=1e-3)
    assert linear.loss_options["z_loss"] == 1e-3
    linear.z_loss = 2e-3
    assert linear.loss_options["z_loss"] == 2e-3
