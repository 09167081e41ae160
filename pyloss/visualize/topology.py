"""Barcodes, and matched and unmatched features over an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_KINDS = ("both", "matched", "unmatched")
_DIM_COLORS = ("tab:blue", "tab:orange", "tab:green")
_BIRTH_MARKERS = ("o", "s", "D")  # by dimension
_MATCHED_COLORS = ("#0072b2", "#009e73", "#56b4e9", "#e69f00", "#f0e442", "#cc79a7")
_UNMATCHED_COLOR = "#ff2020"
_OLDEST = dict(marker="*", s=130, color="#ffd700", edgecolors="black", linewidths=0.7)
_FIRST = {"superlevel": "bright", "sublevel": "dark"}  # what enters first, the foreground
_SHADE = 0.4  # opacity of the voxels of a cycle


def draw_barcode(
    pairs: Any,
    ax: Any = None,
    *,
    item: int = 0,
    dims: Sequence[int] | None = (),
    min_persistence: float = 0.0,
) -> Any:
    r"""Draws the bars of one image, one line from birth to death each, by dimension and length.

    .. math:: [b, d) \text{ at height } 0, 1, 2, \dots

    A mark (circle: dimension 0; square: 1; diamond: 2) stands at the birth: on the right of the
    bars of **superlevel** sets, on the left of those of **sublevel** sets, the default of
    :func:`pyloss.persistence_pairs`. The label of the axis says which.

    Args:
        pairs: :class:`pyloss.PersistencePairs`, or values ``(P, 2)``, a tensor or an array, drawn
            as dimension 0.
        ax: matplotlib axes; None makes a figure.
        item: item of the batch; values have none.
        dims: only these dimensions; empty or None: all.
        min_persistence: only bars longer than this.

    Returns:
        The axes. A bar that never dies ends in an arrow at the edge, and one that is born at an
        infinite value begins at the edge.

    Raises:
        ImportError: without matplotlib.
        TypeError: ``dims`` is no sequence.
        ValueError: values that are not ``(P, 2)``.
        IndexError: an ``item`` outside the batch.

    Example:
        >>> import torch, pyloss
        >>> pairs = pyloss.persistence_pairs(torch.rand(1, 16, 16), spatial_dims=2)
        >>> ax = pyloss.visualize.draw_barcode(pairs, min_persistence=0.2)

    Reference:
        Stucki et al. arXiv 2211.15272.
    """
    pyplot = _pyplot()
    dims = () if dims is None else dims
    if not hasattr(dims, "__len__"):
        raise TypeError(f"dims must be a sequence of integers or None, got {dims!r}")
    if hasattr(pairs, "values") and not isinstance(pairs, Tensor):
        items = len(pairs.counts)
        if item not in range(items):
            raise IndexError(f"item must be in 0..{items - 1}, got {item}")
        mine = pairs.index[:, 0] == item
        values, dim_of = pairs.values[mine], pairs.index[mine, 1]
    else:
        values = _tensor(pairs)
        dim_of = torch.zeros(len(values), dtype=torch.int64)
    if values.dim() != 2 or values.shape[1] != 2:
        raise ValueError(f"values must have shape (P, 2), got {list(values.shape)}")
    bars = [
        (dim, birth, death)
        for dim, (birth, death) in zip(dim_of.tolist(), values.detach().double().tolist())
        if (len(dims) == 0 or dim in dims)
        and not (min_persistence > 0 and abs(death - birth) <= min_persistence)
    ]
    # The longest on top of each dimension.
    bars.sort(key=lambda bar: (bar[0], abs(bar[2] - bar[1])))
    ends = [end for _, *pair in bars for end in pair if math.isfinite(end)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.5

    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    for height, (dim, *pair) in enumerate(bars):
        color = _DIM_COLORS[dim]
        start, end = (min(max(x, low - margin), high + margin) for x in pair)
        if math.isfinite(pair[1]) or start == end:
            ax.plot([start, end], [height, height], color=color, linewidth=1.5)
        else:
            style = dict(arrowstyle="->", color=color, linewidth=1.5)
            ax.annotate("", (end, height), (start, height), arrowprops=style)
        ax.scatter(start, height, s=16, color=color, marker=_BIRTH_MARKERS[dim], zorder=3)
    ax.set(xlim=(low - margin, high + margin), ylim=(-1, max(len(bars), 1)), yticks=[])
    ax.set(xlabel=_axis_of_values(getattr(pairs, "filtration", None)), ylabel="bars")
    shown = sorted({bar[0] for bar in bars})
    handles = [
        ax.plot(
            [], [], marker=_BIRTH_MARKERS[d], markersize=4, color=_DIM_COLORS[d],
            label=f"dimension {d}: {_count(bars, d)}",
        )[0]
        for d in shown
    ]  # fmt: skip
    if handles:
        ax.legend(handles=handles, fontsize=8)
    return ax


def _axis_of_values(filtration: str | None) -> str:
    if filtration is None:
        return "value (born at the mark)"
    side = "right" if filtration == "superlevel" else "left"
    return f"value ({filtration} sets: born at the mark, on the {side})"


def draw_matching(
    image: Tensor,
    target: Tensor,
    matching: Any,
    ax: Any = None,
    dim: int | None = None,
    kind: str = "both",
    *,
    item: int = 0,
    cycles: bool = True,
    min_persistence: float = 0.0,
    cmap: str = "gray",
    legend: bool = True,
    axis: int = 0,
) -> Any:
    r"""Draws matched and unmatched features over an image and its target.

    A feature is drawn by the voxels of its birth b (circle: dimension 0; square: dimension 1; in 3D
    diamond: dimension 2) and its death d (cross), and by the voxels of a cycle that stands for it.
    Matched features have the same colour on both sides, unmatched ones are red:

    .. math:: (b, d) \leftrightarrow (b', d')

    A star marks where the component is born that never dies: in a mask one of its components, which
    has no bar and is none of the counted features. The label below the image says of which sets the
    matching is: **superlevel** sets, the default of :func:`pyloss.betti_matching`, take bright
    voxels for foreground, sublevel sets dark ones.

    A volume is looked through along one axis: of each line of sight the voxel is seen that enters
    first, the brightest one of superlevel sets; features are drawn wherever they lie on it.

    Args:
        image, target: ``(H, W)`` or ``(depth, H, W)``, the pair that was matched; tensors or
            arrays.
        matching: :class:`pyloss.BettiMatching`, or what has its ``coordinates`` and, for the
            cycles, its ``representative_cycles``.
        ax: two matplotlib axes, for image and target, or one, for the image alone; None makes a
            figure of two.
        dim: only this dimension.
        kind: ``"both" | "matched" | "unmatched"``.
        item: item of the batch that ``matching`` is of.
        cycles: shade the cycles. They cost time: about a pass over the image for each feature; for
            the loops of a volume one reduction, as the matching does.
        min_persistence: only features with ``|b - d|`` above this, a matched one on either side.
        cmap: colour map of the images.
        legend: explain the marks, below the first image.
        axis: that a volume is looked through along, 0 to 2.

    Returns:
        The axes, as given or made.

    Raises:
        ImportError: without matplotlib.
        ValueError: an image that is not 2D or 3D, a target of another shape, unknown ``kind``,
            ``dim`` or ``axis``.
        IndexError: an ``item`` outside the batch.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.rand(1, 16, 16), torch.rand(1, 16, 16) > 0.5
        >>> matching = pyloss.betti_matching(x, y, spatial_dims=2)
        >>> left, right = pyloss.visualize.draw_matching(x[0], y[0], matching, dim=1)

    Reference:
        Stucki et al. arXiv 2211.15272.
    """
    pyplot = _pyplot()
    image, target = _tensor(image), _tensor(target)
    if image.dim() not in (2, 3) or target.shape != image.shape:
        raise ValueError(
            f"image and target must be 2D or 3D and of one shape, got {list(image.shape)} and "
            f"{list(target.shape)}"
        )
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    dims = range(image.dim())
    if dim is not None and dim not in dims:
        raise ValueError(f"dim must be in 0..{len(dims) - 1} or None, got {dim!r}")
    if axis not in range(3):
        raise ValueError(f"axis must be 0, 1 or 2, got {axis!r}")
    if ax is None:
        ax = pyplot.subplots(1, 2, figsize=(9, 6.4), layout="constrained")[1]
    sides = [("input", image)]
    axes = [ax]
    if hasattr(ax, "__len__"):
        sides, axes = [*sides, ("target", target)], list(ax)
        if len(axes) != 2:
            raise ValueError(f"ax must be one axes or two, got {len(axes)}")
    cycles = cycles and hasattr(matching, "representative_cycles")
    images = [x.detach().double().cpu() for x in (image, target)]
    filtration = getattr(matching, "filtration", None)
    view = _View(tuple(image.shape), axis, filtration)

    for number, (canvas, (which, _)) in enumerate(zip(axes, sides)):
        picture = view.picture(images[number])
        canvas.imshow(picture.numpy(), cmap=cmap, interpolation="nearest")
        shade = torch.zeros(*picture.shape, 4, dtype=torch.float64)
        drawn = {"matched": 0, "unmatched": 0}
        marked: set[str] = set()
        for d in dims if dim is None else (dim,):
            for group in ("unmatched", "matched"):  # the matched stay on top
                if kind not in ("both", group):
                    continue
                rows = _rows(matching, group, which, item, d)
                all_cycles = None
                for k, row in enumerate(rows.tolist()):
                    # The target's voxels of a matched feature are the second pair.
                    pairs = [(0, row[:2]), (1, row[2:])] if len(row) == 4 else [(number, row)]
                    if not any(_length(images[i], pair) > min_persistence for i, pair in pairs):
                        continue
                    color = _UNMATCHED_COLOR
                    if group == "matched":
                        color = _MATCHED_COLORS[drawn[group] % len(_MATCHED_COLORS)]
                    drawn[group] += 1
                    if cycles:
                        asked = dict(which=which, dim=d, kind=group)
                        if 0 < d < image.dim() - 1:  # loops, all of one reduction
                            all_cycles = all_cycles or matching.representative_cycles(item, **asked)
                            cycle = all_cycles[k]
                        else:
                            (cycle,) = matching.representative_cycles(item, **asked, index=k)
                        _paint(shade, view.places(cycle.tolist()), color)
                    for voxel, marker in zip(dict(pairs)[number], (_BIRTH_MARKERS[d], "X")):
                        _mark(canvas, view.places([voxel]), marker, color)
                    marked |= {f"born {d}", "dead", group}
        canvas.imshow(shade.numpy(), interpolation="nearest")
        counts = ", ".join(f"{n} {group}" for group, n in drawn.items() if kind in ("both", group))
        canvas.set(title=f"{which}: {counts}", xticks=[], yticks=[])
        if dim in (None, 0) and hasattr(matching, "essential"):
            for row, col in view.places([matching.essential(item)[number].tolist()]):
                canvas.scatter(col, row, zorder=3, **_OLDEST)
                marked.add("oldest")
        if filtration is not None:
            canvas.set_xlabel(f"{filtration} sets: {_FIRST[filtration]} is foreground", fontsize=8)
        if legend and number == 0:
            _explain(canvas, marked, len(dims))
    return ax


class _View:
    """An image as it is, or a volume seen along an axis."""

    def __init__(self, shape: tuple[int, ...], axis: int, filtration: str | None) -> None:
        self.shape, self.axis, self.dark = shape, axis, filtration == "sublevel"

    def picture(self, image: Tensor) -> Tensor:
        if image.dim() == 2:
            return image
        return image.amin(self.axis) if self.dark else image.amax(self.axis)

    def places(self, voxels: list[list[int]]) -> list[list[int]]:
        """(row, col) of those that are not of the padding."""
        kept = [a for a in range(len(self.shape)) if len(self.shape) == 2 or a != self.axis]
        return [[voxel[a] for a in kept] for voxel in voxels if _inside(voxel, self.shape)]


def _tensor(x: Any) -> Tensor:
    """Of a tensor or of what numpy takes for an array, flipped ones included."""
    if isinstance(x, Tensor):
        return x
    return torch.as_tensor(x.copy() if hasattr(x, "strides") else x)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "pyloss.visualize needs matplotlib: pip install 'pyloss[visualize]'"
        ) from error
    return pyplot


def _count(bars, dim: int) -> int:
    return sum(bar[0] == dim for bar in bars)


def _rows(matching, group: str, which: str, item: int, dim: int) -> Tensor:
    """(bars, 2 or 4, 2) coordinates."""
    name = group if group == "matched" else f"unmatched_{which}"
    return matching.coordinates(name, item, dim).cpu()


def _inside(voxel: Sequence[int], shape: Sequence[int]) -> bool:
    """False for a voxel of the padding."""
    return all(0 <= x < size for x, size in zip(voxel, shape))


def _length(image: Tensor, pair: Sequence[Sequence[int]]) -> float:
    """|b - d|; a voxel of the padding has no value here, and its feature counts as long."""
    if not all(_inside(voxel, image.shape) for voxel in pair):
        return math.inf
    birth, death = (float(image[tuple(voxel)]) for voxel in pair)
    return abs(birth - death)


def _paint(shade: Tensor, places: list[list[int]], color: str) -> None:
    from matplotlib.colors import to_rgba

    for row, col in places:
        shade[row, col] = torch.tensor(to_rgba(color, _SHADE), dtype=torch.float64)


def _mark(canvas, places: list[list[int]], marker: str, color: str) -> None:
    for row, col in places:
        style = dict(markersize=7, markeredgecolor="white", markeredgewidth=0.6)
        canvas.plot(col, row, marker, color=color, **style)


def _explain(canvas, marked: set[str], dims: int) -> None:
    """The legend of what was drawn."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(marker: str, size: float = 7, color: str = "0.5", edge: str = "white") -> Any:
        return Line2D([], [], linestyle="", marker=marker, markersize=size, color=color,
                      markeredgecolor=edge, markeredgewidth=0.6)  # fmt: skip

    entries = {
        "born 0": (mark(_BIRTH_MARKERS[0]), "birth of a component"),
        "born 1": (mark(_BIRTH_MARKERS[1]), "birth of a hole" if dims == 2 else "birth of a loop"),
        "born 2": (mark(_BIRTH_MARKERS[2]), "birth of a cavity"),
        "dead": (mark("X"), "death"),
        "oldest": (mark("*", 10, "#ffd700", "black"), "component that never dies"),
        "matched": (Patch(color=_MATCHED_COLORS[0]), "matched: the same colour on both sides"),
        "unmatched": (Patch(color=_UNMATCHED_COLOR), "unmatched"),
    }
    shown = [entry for name, entry in entries.items() if name in marked]
    if shown:
        canvas.legend(
            *zip(*shown), loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, fontsize=7,
            frameon=False,
        )  # fmt: skip
