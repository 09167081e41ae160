"""Options and state that belong to an optimizer as a whole, and to no parameter."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class WholeOptimizer(Optimizer):
    """Its attributes named in ``_options`` are pickled, too. The number of steps and what else
    belongs to no parameter are kept with the first one, as torch's LBFGS does."""

    _options: tuple[str, ...] = ()
    _wide: tuple[str, ...] = ()  # of that state: tensors that are no narrower beside half types

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; but what belongs to no parameter keeps its dtype beside narrower ones."""
        seen: dict[str, Any] = {}
        # After the hooks of the user, which may put another state_dict in its place.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: seen.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for saved in seen["state"].values():
            for name in self._wide:
                if name in saved:
                    own = self._progress()
                    own[name] = saved[name].to(own[name].device)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in self._options}

    def _progress(self) -> dict[str, Any]:
        state = self.state[self.param_groups[0]["params"][0]]
        state.setdefault("step", 0)
        return state
