"""Lion-K."""

from __future__ import annotations

import torch


class LionK(torch.optim.Optimizer):
    """Lion-K. Under construction."""


class Lion(LionK):
    """Lion. Under construction."""
