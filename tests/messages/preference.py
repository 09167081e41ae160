"""DPO, GRPO and their helpers."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.functional import dpo_loss, group_advantages, grpo_loss, sequence_logprobs

A, B = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-3.0, -1.0, -4.0])
PAIR = (A, B, B, A)
T = torch.linspace(-2.0, -1.0, 12).view(3, 4)
TOKENS = (T, T - 0.1, A)

ROWS = (
    refused(ValueError, "policy_chosen_logps must have one entry per pair, (B,), got [3, 4]; "
            "sequence_logprobs sums those of tokens", dpo_loss, T, T, T, T),
    refused(TypeError, "policy_chosen_logps must be floating, got torch.int64",
            dpo_loss, A.long(), B, B, A),
    refused(TypeError, "beta must be a number, got Tensor",
            dpo_loss, *PAIR, beta=torch.tensor(0.1)),
    refused(TypeError, "return_metrics must be a bool, got 'no'",
            dpo_loss, *PAIR, return_metrics="no"),
    accepted(dpo_loss, *PAIR, beta=(np.float64(0.2), 0.2), label_smoothing=(np.float64(0.1), 0.1),
             return_metrics=(np.bool_(True), True)),
    refused(TypeError, "clip_low must be a number, got NoneType",
            grpo_loss, *TOKENS, clip_low=None),
    refused(TypeError, "max_length must be an integer, got float",
            grpo_loss, *TOKENS, loss_type="dr_grpo", max_length=4.0),
    refused(TypeError, "return_metrics must be a bool, got 2",
            grpo_loss, *TOKENS, return_metrics=2),
    refused(TypeError, "mask must be a Tensor, got ndarray",
            grpo_loss, *TOKENS, mask=np.ones((3, 4), bool)),
    accepted(grpo_loss, *TOKENS, loss_type=("dr_grpo", "dr_grpo"), max_length=(np.int32(4), 4)),
    accepted(grpo_loss, *TOKENS, num_items=(np.int64(5), 5),
             return_metrics=(np.bool_(False), False)),
    accepted(group_advantages, A, group_size=(np.int64(3), 3), normalise=(np.bool_(False), False)),
    refused(TypeError, "group_size must be an integer, got float",
            group_advantages, A, group_size=3.0),
    refused(TypeError, "normalise must be a bool, got 'group'",
            group_advantages, A, 3, normalise="group"),
    accepted(sequence_logprobs, T, average=(np.bool_(True), True)),
    refused(TypeError, "average must be a bool, got 'mean'", sequence_logprobs, T, average="mean"),
)  # fmt: skip
