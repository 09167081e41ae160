"""The CPU implementations of the ops of segment."""

from __future__ import annotations

from functools import partial

import torch

from pyloss import _C
from pyloss.ops.segment import calls


def _fold(x, problem, kind, out):
    _C.segment_fold(problem, kind, out, torch.get_num_threads())


def _map(x, problem, kind, out):
    _C.segment_map(problem, kind, out, torch.get_num_threads())


fold = partial(calls.fold, _fold)
map_ = partial(calls.map_, _map)
