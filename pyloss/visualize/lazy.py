"""Losses and alignment of a run that goes from lazy to rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyloss.visualize.topology import _pyplot

_TRAIN_COLOR, _TEST_COLOR, _ALIGNMENT_COLOR = "#0072b2", "#d55e00", "#009e73"


def draw_alignment(
    steps: Sequence[float],
    train_loss: Sequence[float],
    test_loss: Sequence[float],
    alignment: Sequence[float],
    axes: Any = None,
) -> Any:
    """Draws training and test loss of a run, and against the right-hand axis the alignment of its
    kernel with the labels; both axes of the losses are logarithmic.

    Args:
        steps: where the others were taken.
        train_loss: of each.
        test_loss: likewise.
        alignment: likewise, such as :func:`pyloss.analysis.kernel_alignment` returns.
        axes: matplotlib axes; None makes a figure.

    Returns:
        The axes of the losses, and those of the alignment.

    Raises:
        ImportError: without matplotlib. ValueError: not as many of each.

    Example:
        >>> import pyloss
        >>> left, right = pyloss.visualize.draw_alignment(
        ...     [1, 10, 100], [1.0, 0.1, 0.0], [1.0, 0.9, 0.1], [0.1, 0.2, 0.9])

    Reference:
        Kumar, Bordelon, Gershman, Pehlevan. arXiv 2310.06110.
    """
    counts = [len(values) for values in (steps, train_loss, test_loss, alignment)]
    if len(set(counts)) != 1:
        raise ValueError(
            f"steps, losses and alignment must be equally many, got {', '.join(map(str, counts))}"
        )
    pyplot = _pyplot()
    if axes is None:
        axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")[1]
    x = [float(step) for step in steps]
    for values, color, label in (
        (train_loss, _TRAIN_COLOR, "train"),
        (test_loss, _TEST_COLOR, "test"),
    ):
        axes.plot(x, [float(v) for v in values], color=color, label=label)
    axes.set(xlabel="steps", ylabel="loss", xscale="log", yscale="log")
    right = axes.twinx()
    right.plot(x, [float(v) for v in alignment], "--", color=_ALIGNMENT_COLOR, label="alignment")
    right.set(ylabel="alignment", ylim=(0, 1.02))
    lines = axes.get_lines() + right.get_lines()
    axes.legend(lines, [line.get_label() for line in lines], fontsize=8)
    return axes, right
