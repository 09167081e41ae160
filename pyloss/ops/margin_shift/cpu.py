"""The CPU implementations of the ops of margin_shift."""

from __future__ import annotations

from functools import partial

import torch

from pyloss import _C
from pyloss.ops.margin_shift import calls


def _launch(kernel, *records):
    run = _C.margin_shift_fwd if kernel == "fwd" else _C.margin_shift_bwd
    run(*records, torch.get_num_threads())


forward = partial(calls.forward, _launch)
backward = partial(calls.backward, _launch)
