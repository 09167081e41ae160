"""What a forward leaves of each row: one buffer `saved`, and the names of what lies in it.

One allocation instead of three: they cost as much as a small call's arithmetic. The items stand in
csrc/common/row_softmax.h (NormItem, StatRow, ExtraRow).
"""

from __future__ import annotations

from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.row_softmax.records import MIX, Codes, Options, is_soft

_NORM = 3  # factors of the loss and of the z-loss, sum of the class weights
_MAX, _REST, _TARGET, _LOSS, _TARGET2, _SOFT = range(6)
EXTRA_ROWS = 4
_LSE, _LOGPROB, _ENTROPY, _Z_LOSS = range(EXTRA_ROWS)


def stat_rows(codes: Codes, options: Options) -> int:
    """Rows of the statistics proper."""
    return 6 if codes.kind == MIX or is_soft(codes.kind, options) else 4


def saved_size(rows: int, height: int, with_extras: int | bool) -> int:
    """Elements of a buffer of `height` statistics."""
    return _NORM + (height + (EXTRA_ROWS if with_extras else 0)) * rows


def extras_of(saved: Tensor, rows: int) -> Tensor:
    """View [4, rows] of the extras, which end the buffer: lse, logprob, entropy, z-loss."""
    return saved[saved.shape[0] - EXTRA_ROWS * rows :].view(EXTRA_ROWS, rows)


class RowStatistics:
    """A typed view of a buffer."""

    __slots__ = ("height", "rows", "saved", "with_extras")

    def __init__(self, saved: Tensor, rows: int, height: int, with_extras: int | bool):
        self.saved, self.rows = saved, rows
        self.height, self.with_extras = height, with_extras

    @classmethod
    def empty(cls, like: Tensor, rows: int, codes: Codes, options: Options, with_extras):
        """With a buffer of its own, on the device of `like`, in its accumulator's dtype."""
        height = stat_rows(codes, options)
        size = saved_size(rows, height, with_extras)
        saved = like.new_empty((size,), dtype=accumulator_dtype(like.dtype))
        return cls(saved, rows, height, with_extras)

    @classmethod
    def of_part(cls, saved: Tensor, begin: int, count: int, number: int, height: int, with_extras):
        """In a buffer of all rows: part `number`, its rows begin, begin + 1, ..; every part has a
        norm of its own."""
        start = saved_size(begin, height, with_extras) + _NORM * (number - 1)
        size = saved_size(count, height, with_extras)
        return cls(saved[start : start + size], count, height, with_extras)

    def addresses(self) -> tuple[int, int, int]:
        """Of (stats, norm, extras)."""
        base, size = self.saved.data_ptr(), self.saved.element_size()
        stats = base + _NORM * size
        extras = stats + self.height * self.rows * size if self.with_extras else 0
        return stats, base, extras

    def _row(self, i: int) -> Tensor:
        return self.saved[_NORM + i * self.rows : _NORM + (i + 1) * self.rows]

    @property
    def norm(self) -> Tensor:
        return self.saved[:_NORM]

    @property
    def m(self) -> Tensor:
        """The largest logit of each row."""
        return self._row(_MAX)

    @property
    def rest(self) -> Tensor:
        """The sum of exp(z - m) without the target."""
        return self._row(_REST)

    @property
    def zy(self) -> Tensor:
        """The target's logit."""
        return self._row(_TARGET)

    @property
    def loss(self) -> Tensor:
        return self._row(_LOSS)

    @property
    def zy2(self) -> Tensor:
        """The second target's logit; only where there are more than four rows, as the next."""
        return self._row(_TARGET2)

    @property
    def soft(self) -> Tensor:
        """The sum of r_c p_c^(tau-1)."""
        return self._row(_SOFT)

    @property
    def extras(self) -> Tensor:
        """[4, rows]"""
        return extras_of(self.saved, self.rows)

    @property
    def entropy(self) -> Tensor:
        return self.extras[_ENTROPY]
