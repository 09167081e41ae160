"""How a module keeps the options of the function that it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional._options import check_names, names_of


class OptionsModule(nn.Module):
    """Keeps each option as an attribute of its name, which may be set between two calls."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def _options(self) -> dict[str, Any]:
        """All of them at present, in the order of the constructor."""
        return {name: getattr(self, name) for name in self._option_names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options.items())

    @classmethod
    def _check_names(
        cls, given: Iterable[str], function: Callable, without: Sequence[str] = ()
    ) -> None:
        """That each name is one of a function's options, before anything is called with it."""
        check_names(cls.__name__, given, names_of(function, without))


class LossModule(OptionsModule):
    """A loss whose constructor takes the options of its function."""

    @property
    def options(self) -> dict:
        """The options at present, as a copy: set one by its attribute, or all by assignment."""
        return self._options

    @options.setter
    def options(self, values: dict) -> None:
        check_names(type(self).__name__, values, self._option_names)
        for name, value in values.items():
            setattr(self, name, value)


class WeightedLoss(LossModule):
    """With the weight of each class beside the options: a tensor, and so a buffer."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("weight", weight)


class AveragesModule(OptionsModule):
    """With moving averages as buffers: they are no parameters of a model in half precision, and
    stay float32 at least."""

    def _apply(self, fn: Callable, recurse: bool = True) -> AveragesModule:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if now.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(now.device)
        return self
