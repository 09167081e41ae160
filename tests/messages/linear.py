"""Losses of a linear layer's output, whole or split; distillation."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

import pyloss
from messages._table import accepted, refused
from pyloss import fused_linear_cross_entropy, token_logprobs
from pyloss.functional import linear_distillation_loss

H, W = torch.linspace(-1.0, 2.0, 24).view(2, 4, 3), torch.linspace(-2.0, 1.0, 15).view(5, 3)
Y = torch.tensor([[0, 3, 1, 2], [4, 0, 2, 2]])
ROW = (H[0, 0], W)
TWO = (H[0], W)  # as torch knows it: rows and features
KINDS = (np.int64, np.int32, np.uint8)


def of_class_scores(h, w, y, **options):
    return pyloss.fused_cross_entropy(F.linear(h, w), y, **options)


def _as_torch_says():
    """Bad targets: the layer's loss in the words of the plain one."""
    targets = {
        (ValueError, "For 1D input, 1D target must have size 1, but got target size: 3"): (
            (*ROW, Y[0, :3]),
        ),
        (RuntimeError, "0D or 1D target expected for 1D input"): ((*ROW, Y),),
        (ValueError, "Expected input batch_size (4) to match target batch_size (3)"): (
            (*TWO, Y[0, :3]), (*TWO, torch.full((3, 5), 0.2)),
        ),
        (ValueError, "Expected input batch_size (4) to match target batch_size (1)"): (
            (*TWO, Y[0, 0]),
        ),
        (RuntimeError, "Expected target size [4], got [4, 2]"): ((*TWO, Y.t()),),
        (RuntimeError, "target with class probabilities, got Long"): (
            (*TWO, torch.ones(4, 5).long()),
        ),
        (RuntimeError, "[4, 5], got [4, 4]"): ((*TWO, torch.full((4, 4), 0.25)),),
        (RuntimeError, "got [4]; class labels must be integers, target.long()"): (
            (*TWO, Y[0].float()),
        ),
        (RuntimeError, "target dtype to be Long or Byte, but got Bool"): ((*TWO, Y[0] > 1),),
    }  # fmt: skip
    for (error, words), calls in targets.items():
        for call in calls:
            yield refused(error, words, fused_linear_cross_entropy, *call)
            yield refused(error, words, of_class_scores, *call)
    # The number before the target, as there.
    words = "label_smoothing must be between 0.0 and 1.0. Got: 1.2"
    for target in (Y[0, :3], Y[0].float(), torch.full((4, 4), 0.25)):
        for function in (fused_linear_cross_entropy, of_class_scores):
            yield refused(RuntimeError, words, function, *TWO, target, label_smoothing=1.2)


ROWS = (
    *_as_torch_says(),
    # -- labels
    refused(RuntimeError, "[2, 4, 5], got [2, 4]; class labels must be integers, target.long()",
            fused_linear_cross_entropy, H, W, Y.float()),
    refused(RuntimeError, "tokens must hold class indices, integers, got torch.float32",
            token_logprobs, H, W, Y.float()),
    refused(RuntimeError, "but got Float; class labels must be integers, target.long()",
            linear_distillation_loss, H, W, H, W, target=Y.float()),
    refused(TypeError, "ignore_index must be an integer, got -100.0 (float)",
            fused_linear_cross_entropy, H, W, Y, ignore_index=-100.0),
    refused(TypeError, "ignore_index must be an integer, got NoneType",
            linear_distillation_loss, H, W, H, W, target=Y, ignore_index=None),
    refused(TypeError, "ignore_index must be an integer, got float",
            linear_distillation_loss, H, W, H, W, target=Y, ignore_index=-100.0),
    accepted(fused_linear_cross_entropy, H, W, Y, ignore_index=(None, -100)),
    accepted(token_logprobs, H, W, Y, ignore_index=(None, -100)),
    # -- temperature
    accepted(token_logprobs, H, W, Y, temperature=(torch.tensor(2.0), 2.0)),
    accepted(token_logprobs, H, W, Y, temperature=(torch.full((2, 4), 2.0), 2.0)),
    accepted(fused_linear_cross_entropy, H, W, Y, temperature=(torch.tensor(2), 2.0)),
    accepted(fused_linear_cross_entropy, H, W, Y, temperature=(np.float16(2.0), 2.0)),
    refused(RuntimeError, "0-d tensor or have the targets' shape [2, 4], got [4]",
            token_logprobs, H, W, Y, temperature=torch.ones(4)),
    refused(ValueError, "temperature must be > 0, got 0.0",
            fused_linear_cross_entropy, H, W, Y, temperature=torch.tensor(0.0)),
    refused(TypeError, "temperature must hold numbers, got torch.bool",
            fused_linear_cross_entropy, H, W, Y, temperature=torch.tensor(True)),
    refused(ValueError, "a tensor temperature needs a weight of two dimensions, got 3",
            fused_linear_cross_entropy, H[0], W.view(5, 1, 3), Y[0].view(4, 1),
            temperature=torch.ones(4)),
    refused(TypeError, "temperature must be a number, got Tensor",
            linear_distillation_loss, H, W, H, W, temperature=torch.tensor(2.0)),
    *(refused(TypeError, f"{name} must be a number, got Tensor",
              of_class_scores, *TWO, Y[0], **{name: value})
      for name in ("temperature", "z_loss", "tau", "logit_scale")
      for value in (torch.tensor(2.0), torch.ones(4))),
    # -- the layer
    refused(RuntimeError, "expected linear_weight with dimensionality at least 2, got 0",
            token_logprobs, H, torch.tensor(1.0), Y),
    refused(RuntimeError, "student_weight must have shape (V, 3) for student_hidden of shape [2, "
            "4, 3], got []", linear_distillation_loss, H, torch.tensor(1.0), H, W),
    refused(RuntimeError, "weight tensor should be defined either for all 5 classes or no classes "
            "but got weight tensor of shape: []", fused_linear_cross_entropy, H, W, Y,
            weight=torch.tensor(1.0)),
    refused(RuntimeError, "expected input and linear_weight to have the same dtype, but got: Float "
            "and Double", token_logprobs, H, W.double(), Y),
    refused(RuntimeError, "student_weight must have the dtype of student_hidden, torch.float32, got"
            " torch.float64", linear_distillation_loss, H, W.double(), H, W),
    refused(RuntimeError, "expected scalar type Float for weight but found Double",
            fused_linear_cross_entropy, H, W, Y, weight=torch.ones(5).double()),
    refused(RuntimeError, "expected scalar type BFloat16 or Float for weight but found Double",
            fused_linear_cross_entropy, H.bfloat16(), W.bfloat16(), Y,
            weight=torch.ones(5).double()),
    refused(NotImplementedError, "not implemented for 'Long': input must be floating",
            fused_linear_cross_entropy, H.long(), W, Y),
    refused(NotImplementedError, "not implemented for 'Long' (teacher_hidden)",
            linear_distillation_loss, H, W, H.long(), W),
    # -- numbers and flags, of numpy too
    *(accepted(fused_linear_cross_entropy, H, W, Y, shift=(k(1), 1)) for k in KINDS),
    *(accepted(token_logprobs, H, W, Y, chunk=(k(2), 2)) for k in KINDS),
    *(accepted(linear_distillation_loss, H, W, -H, W, shift=(k(1), 1), chunk=(k(2), 2))
      for k in KINDS),
    accepted(linear_distillation_loss, H, W, -H, W, target=(Y, Y), ignore_index=(np.int64(2), 2)),
    accepted(linear_distillation_loss, H, W, -H, W, temperature=(np.float64(2.0), 2.0),
             scale_by_temperature=(np.bool_(False), False)),
    accepted(fused_linear_cross_entropy, H, W, Y, num_items=(np.float64(3.0), 3.0),
             label_smoothing=(np.float64(0.1), 0.1), z_loss=(np.float64(0.1), 0.1)),
    accepted(token_logprobs, H, W, Y, return_entropy=(np.bool_(True), True)),
    accepted(token_logprobs, H, W, Y, return_entropy=(0, False)),
    refused(TypeError, "return_entropy must be a bool, got 'yes'",
            token_logprobs, H, W, Y, return_entropy="yes"),
    refused(TypeError, "scale_by_temperature must be a bool, got None",
            linear_distillation_loss, H, W, H, W, scale_by_temperature=None),
    refused(TypeError, "shift must be an integer, got bool",
            fused_linear_cross_entropy, H, W, Y, shift=np.bool_(True)),
    refused(TypeError, "shift must be an integer, got float",
            linear_distillation_loss, H, W, H, W, shift=1.0),
    refused(TypeError, "chunk must be 'auto' or a number of rows, got 2.0",
            linear_distillation_loss, H, W, H, W, chunk=2.0),
)  # fmt: skip
