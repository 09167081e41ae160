"""Modules whose buffers get their sizes from data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.nn._module import AveragesModule


class StateModule(AveragesModule):
    """Its buffers take the sizes of a state_dict that is loaded, and stay float32 at least."""

    def _takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a buffer of the name may have this shape."""
        return True

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dim() == buffer.dim():
                if given.shape != buffer.shape and self._takes(name, tuple(given.shape)):
                    self._buffers[name] = buffer.new_zeros(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def _rounded(found: Tensor, input: Tensor) -> Tensor:
        """To the dtype of the input; float32 for half types under autocast."""
        return found.to(checks.result_dtype(input.dtype, input))
