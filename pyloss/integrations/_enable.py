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
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOOP = "_inner_training_loop"
_lock = threading.Lock()


class Settings:
    """What `enable` was called with; as a context manager, for as long as the block lasts.

    Each knows what was in force before it. Blocks of several threads overlap and end in any order,
    so an end is only noted, and what is in force is found by walking back from the latest.
    """

    latest: Settings | None = None

    def __init__(self, strict: bool, options: dict[str, Any]) -> None:
        self.strict, self.options = strict, options
        self.before: Settings | None = None
        self.thread: int | None = None  # whose block it is; None: not a block
        self.ended = False

    def __enter__(self) -> None:
        self.thread = threading.get_ident()

    def __exit__(self, *error: Any) -> None:
        with _lock:
            self.ended = True
            while Settings.latest is not None and not Settings.latest.holds():
                Settings.latest = Settings.latest.before
            _install(Settings.latest is not None)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"enable({options}{', ' * bool(options)}strict={self.strict})"

    def holds(self) -> bool:
        """A block until its end; a call that is none as long as the block that it was made in."""
        block: Settings | None = self
        while block is not None and block.thread is None:
            block = block.before
        return block is None or not block.ended


def use(settings: Settings | None) -> None:
    """Make these the settings of all trainers; None: no trainer is patched."""
    with _lock:
        if settings is not None:
            settings.before = Settings.latest
        Settings.latest = settings
        _install(settings is not None)


def _current() -> Settings | None:
    """The latest settings, but those of this thread's own block before those of another's."""
    found = latest = Settings.latest
    while found is not None:
        if found.holds():
            if found.thread is None:
                return latest
            if found.thread == threading.get_ident():
                return found
        found = found.before
    return latest


_ours: Callable | None = None  # what stands in the place of Trainer's loop


def _install(wanted: bool) -> None:
    from transformers import Trainer

    global _ours
    loop = vars(Trainer)[_LOOP]
    # Another package may have put a wrapper around ours. Ours then stays, and does nothing.
    if not wanted and loop is _ours:
        setattr(Trainer, _LOOP, loop.__wrapped__)
    elif wanted and (_ours is None or inspect.unwrap(loop, stop=lambda f: f is _ours) is not _ours):
        _ours = _patching(loop)
        setattr(Trainer, _LOOP, _ours)


def _patching(loop: Callable) -> Callable:
    @functools.wraps(loop)  # accelerate looks at the signature
    def wrapped(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        with _patched(trainer, _current()):
            return loop(trainer, *args, **kwargs)

    return wrapped


@contextmanager
def _patched(trainer: Any, settings: Settings | None) -> Iterator[None]:
    undo = None
    if settings is not None:
        try:
            undo = _patch(trainer, settings)
        except (TypeError, ValueError) as error:
            if settings.strict:
                raise
            warn_of_own_loss(trainer, error)
    try:
        yield
    finally:
        if undo is not None:
            undo()


def warn_of_own_loss(trainer: Any, error: Exception) -> None:
    """Warn that a trainer, or a model, trains as without `enable`."""
    warnings.warn(
        f"this {type(trainer).__name__} trains with its own loss, though "
        f"pyloss.integrations.transformers.enable() was called: {error}",
        stacklevel=5,
    )


def _patch(trainer: Any, settings: Settings) -> Callable[[], None] | None:
    """Patch a trainer that is not patched; returns what undoes it."""
    model = trainer.model  # FSDP puts a wrapper in its place
    if any(cls.__module__.partition(".")[0] == "trl" for cls in type(trainer).__mro__):
        from pyloss.integrations import trl

        if trl.is_patched(trainer):
            return None
        models = trl.models_of(trainer)
        trl.patch_trainer(trainer, **settings.options)
        return lambda: trl.restore_all(trainer, models)
    from pyloss.integrations import transformers

    if transformers.is_patched(model):
        return None
    transformers.patch_loss(trainer, **settings.options)
    if not settings.strict:
        transformers.tolerate(model)

    def undo() -> None:
        transformers.unpatch_loss(trainer)
        transformers.unpatch_loss(model)

    return undo
