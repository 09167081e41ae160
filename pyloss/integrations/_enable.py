"""`enable`: the patch for every Trainer, as long as it trains.

transformers has three places where a loss could be exchanged. `LOSS_MAPPING` and the kernels of
`use_kernels` take the place of the loss function, which is called when the logits are already
there. `use_liger_kernel` is applied to the model in `Trainer.train`, before the optimizer is made
and the model is wrapped: it can reach the output layer. `enable` works in that third place. It
exchanges one method of one class, `Trainer._inner_training_loop`, and so it makes no difference
whether trainer and model are made before or after; outside of that method nothing is changed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOOP = "_inner_training_loop"
_MARK = "_pyloss_original"


class Settings:
    """What `enable` was called with; as a context manager it brings the settings before back."""

    current: Settings | None = None

    def __init__(self, strict: bool, options: dict[str, Any]) -> None:
        self.strict, self.options = strict, options
        self.before = Settings.current

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: Any) -> None:
        use(self.before)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"enable({options}{', ' * bool(options)}strict={self.strict})"


def use(settings: Settings | None) -> None:
    """Make these the settings of all trainers; None: no trainer is patched."""
    from transformers import Trainer

    Settings.current = settings
    loop = vars(Trainer)[_LOOP]
    original = getattr(loop, _MARK, None)
    if settings is None and original is not None:
        setattr(Trainer, _LOOP, original)
    elif settings is not None and original is None:
        setattr(Trainer, _LOOP, _patching(loop))


def _patching(loop: Callable) -> Callable:
    @functools.wraps(loop)  # accelerate looks at the signature
    def wrapped(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        with _patched(trainer, Settings.current):
            return loop(trainer, *args, **kwargs)

    setattr(wrapped, _MARK, loop)
    return wrapped


@contextmanager
def _patched(trainer: Any, settings: Settings | None) -> Iterator[None]:
    undo = None
    if settings is not None:
        try:
            undo = _patch(trainer, settings.options)
        except (TypeError, ValueError) as error:
            if settings.strict:
                raise
            warnings.warn(
                f"this {type(trainer).__name__} trains with its own loss, though "
                f"pyloss.integrations.transformers.enable() was called: {error}",
                stacklevel=4,
            )
    try:
        yield
    finally:
        if undo is not None:
            undo(trainer)


def _patch(trainer: Any, options: dict[str, Any]) -> Callable | None:
    """Patch a trainer that is not patched; returns what undoes it."""
    if any(cls.__module__.partition(".")[0] == "trl" for cls in type(trainer).__mro__):
        from pyloss.integrations import trl

        if trl.is_patched(trainer):
            return None
        trl.patch_trainer(trainer, **options)
        return trl.unpatch_trainer
    from pyloss.integrations import transformers

    if transformers.is_patched(trainer.model):
        return None
    transformers.patch_loss(trainer, **options)
    return transformers.unpatch_loss
