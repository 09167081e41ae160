"""GroCo, classification by the top k, ranking and sets."""

from __future__ import annotations

import numpy
import torch

import pyloss
from messages._table import accepted, refused
from pyloss import functional as F
from pyloss import metrics, nn

VIEWS = torch.arange(24.0).cos().view(2, 6, 2)
SCORES, LABELS = torch.linspace(-1.0, 1.0, 12).sin().view(3, 4), torch.tensor([0, 3, 1])
RELEVANCE = torch.arange(12).view(3, 4) % 3
SETS, OTHERS = VIEWS, VIEWS.flip(1)[:, :3]
NUMBERS = torch.linspace(0.0, 1.0, 10).view(2, 5, 1)
MODEL = nn.ReadProcessWrite(1, 4, steps=1)
TOPK = pyloss.topk_cross_entropy


def by_nothing(prefix: torch.Tensor) -> torch.Tensor:
    """Ten elements, each as probable as the next."""
    return torch.full((len(prefix), 10), 0.1).log()


ROWS = (
    # Group ordering
    refused(ValueError, "topk_neg must be below the number of images, 6, got 10",
            pyloss.groco_loss, VIEWS),
    refused(ValueError, "views must be (V, B, D), or a sequence of (B, D), got [6, 2]",
            pyloss.groco_loss, VIEWS[0], topk_neg=3),
    refused(ValueError, "views must be at least two: one alone has no positive",
            pyloss.groco_loss, VIEWS[:1], topk_neg=3),
    refused(ValueError, "views must be alike, but views[1] is torch.float32 [5, 2] on cpu",
            pyloss.groco_loss, [VIEWS[0], VIEWS[1, :5]], topk_neg=3),
    refused(ValueError, "n_pos must be at most 2, the number of views, got 3",
            pyloss.groco_loss, VIEWS, n_pos=3, topk_neg=3),
    refused(TypeError, "topk_neg must be an integer, got float", nn.GroCoLoss, topk_neg=3.0),
    accepted(pyloss.groco_loss, VIEWS, topk_neg=(numpy.int64(3), 3)),
    refused(ValueError, "neg must hold at least one score, got [3, 0]",
            F.groco_from_scores, SCORES[:, :1], SCORES[:, :0]),
    # Top k
    refused(ValueError, "p_k must sum to 1, got [0.5, 0.4], which sum to 0.9",
            TOPK, SCORES, LABELS, p_k=[0.5, 0.4]),
    refused(TypeError, "p_k must be the shares of k = 1, 2, ..., or one k, got float",
            TOPK, SCORES, LABELS, p_k=0.5),
    refused(ValueError, "p_k has shares up to k = 5, of 4 classes", TOPK, SCORES, LABELS),
    refused(ValueError, "m must be above 2, the largest k of p_k, got 2",
            TOPK, SCORES, LABELS, p_k=2, m=2),
    refused(ValueError, "n must be at least 12 for these p_k and m, got 10",
            nn.TopKCrossEntropyLoss, "odd_even", 1.0, [0.5, 0.5], 10, 11),
    accepted(TOPK, SCORES, LABELS, p_k=(torch.tensor([0.5, 0.5]), [0.5, 0.5]),
             m=(numpy.int32(3), 3)),
    accepted(TOPK, SCORES, LABELS, p_k=(2, [0.0, 1.0])),
    # Ranking
    refused(ValueError, "relevance must have the shape [3, 4] of scores, got [3, 3]",
            F.list_net, SCORES, RELEVANCE[:, :3]),
    refused(ValueError, "mask must be bool, True at what counts, of the shape [3, 4]; got "
            "torch.float32 of shape [3, 4]", F.list_mle, SCORES, RELEVANCE, mask=torch.ones(3, 4)),
    refused(ValueError, "offsets must start at 0 and end at the number of values, 12",
            F.list_mle, SCORES.flatten(), RELEVANCE.flatten(), offsets=torch.tensor([0, 4, 11])),
    refused(ValueError, "scores must be (P,) with offsets, one list behind the other, got [3, 4]",
            F.approx_ndcg_loss, SCORES, RELEVANCE, offsets=torch.tensor([0, 4, 12])),
    refused(ValueError, "relaxation must be one of network, neuralsort, got 'softsort'",
            F.neural_ndcg_loss, SCORES, RELEVANCE, relaxation="softsort"),
    refused(ValueError, "weighting must be one of lambdarank, ranknet, ndcg_loss1, ndcg_loss2, "
            "ndcg_loss2++, got 'lambda'", nn.LambdaLoss, weighting="lambda"),
    # scikit-learn has the truth first
    refused(TypeError, "scores must be float16, bfloat16, float32 or float64, got torch.int64",
            metrics.ndcg, RELEVANCE, SCORES),
    accepted(metrics.ndcg, SCORES, RELEVANCE, k=(numpy.int64(2), 2)),
    # Sets
    refused(ValueError, "input must hold sets, (B, n, ...), got [6, 2]",
            F.chamfer_set_loss, SETS[0], OTHERS[0]),
    refused(TypeError, "target must hold classes with cost='nll', got torch.float32",
            F.hungarian_set_loss, SETS, OTHERS, cost="nll"),
    refused(ValueError, "give input_mask or input_offsets, not both",
            F.sinkhorn_set_loss, SETS.flatten(0, 1), OTHERS, input_mask=torch.ones(2, 6).bool(),
            input_offsets=torch.tensor([0, 4, 12])),
    refused(TypeError, "step_logprob must be a function of the prefix, got Tensor",
            F.order_search_loss, SCORES, LABELS[None]),
    refused(ValueError, "step_logprob must return (1, vocabulary), got [10]",
            F.order_search_loss, lambda prefix: by_nothing(prefix)[0], LABELS[None]),
    refused(ValueError, "mode='exhaustive' is for at most 7 elements, got 8; take 'beam'",
            F.order_search_loss, by_nothing, torch.arange(8)[None], mode="exhaustive"),
    refused(ValueError, "mode must be one of exact, uniform, got 'sample'",
            F.order_search_loss_from_table, SCORES[None], LABELS[None], mode="sample"),
    refused(ValueError, "x must be (B, n, 1), got [2, 5]", MODEL, NUMBERS.squeeze(2)),
    refused(TypeError, "target must hold places in the set, int64, got torch.float32",
            MODEL, NUMBERS, target=NUMBERS.squeeze(2)),
)  # fmt: skip
