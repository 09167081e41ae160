"""What the CPU and the CUDA implementation do alike: arrange the arrays, pack the record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES
from pyloss.ops.lion_k.records import Options, Problem


class Lists(NamedTuple):
    """One entry for each parameter; the last two are empty where nothing reads them."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    given: list[Tensor]
    compensation: list[Tensor]


class Arranged:
    """Arrays whose elements lie in one order without gaps. Leaving it writes copies back."""

    def __init__(self, lists: Lists):
        self.lists = lists
        self._copied: list[tuple[Tensor, Tensor]] = []
        if not all(all(map(Tensor.is_contiguous, part)) for part in lists):
            self.lists = Lists(*([*part] for part in lists))
            for at in range(len(lists.params)):
                self._arrange(at)

    def _arrange(self, at: int) -> None:
        parts = [part[at] for part in self.lists if part]
        strides = parts[0].stride()
        if _is_dense(parts[0]) and all(t.stride() == strides for t in parts):
            return
        for part, written in zip(self.lists, (True, False, True, False, True)):
            if part and not part[at].is_contiguous():
                copy = part[at].contiguous()
                if written:
                    self._copied.append((part[at], copy))
                part[at] = copy

    def __enter__(self) -> Lists:
        return self.lists

    def __exit__(self, *error) -> None:
        for original, copy in self._copied:
            original.copy_(copy)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory: a permuted contiguous tensor."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def problem(lists: Lists, options: Options, positions: list[int]) -> Problem:
    x, g, m = lists.params[0], lists.grads[0], lists.momenta[0]
    return Problem(
        *(DTYPE_CODES[t.dtype] for t in (x, g, m)),
        tuple(map(Tensor.numel, lists.params)),
        *(tuple(map(Tensor.data_ptr, part)) for part in lists),
        tuple(positions),
        options,
    )
