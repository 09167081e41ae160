"""Run by test_first_use.py: headline names used first inside a compiled function; all with --all.

The process imports torch and pyloss and warms Dynamo up, then forks a child per case, so that each
meets the names as a new process does, but need not import torch. Prints {case: "" or the error}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch
import torch._dynamo

import pyloss

X = torch.randn(4, 6)
Y = torch.tensor([0, 1, 2, 3])
W = torch.randn(5, 6)
IMAGE = torch.rand(2, 1, 6, 6)
Q, K1, K2, V1, V2 = torch.randn(5, 1, 2, 4, 8)


def local_import():
    from pyloss.functional import soft_rank

    return soft_rank(X)


def submodule():
    import pyloss.nn

    return pyloss.nn.SoftDiceLoss()(IMAGE, (IMAGE > 0.5).float())


CASES = {
    "betti_matching": lambda: pyloss.betti_matching(IMAGE, IMAGE, spatial_dims=2).loss(),
    "betti_matching_loss": lambda: pyloss.betti_matching_loss(IMAGE, IMAGE),
    "betti_numbers": lambda: pyloss.betti_numbers(IMAGE > 0.5),
    "clip_loss": lambda: pyloss.clip_loss(X, X.flip(1)),
    "comp_sum_loss": lambda: pyloss.comp_sum_loss(X, Y, 1.5),
    "focal_loss": lambda: pyloss.focal_loss(X, Y),
    "ldr_loss": lambda: pyloss.ldr_loss(X, Y),
    "aldr_loss": lambda: pyloss.aldr_loss(X, Y),
    "LDRLoss": lambda: pyloss.LDRLoss()(X, Y),
    "ALDRLoss": lambda: pyloss.ALDRLoss()(X, Y),
    "fused_cross_entropy": lambda: pyloss.fused_cross_entropy(X, Y),
    "fused_linear_cross_entropy": lambda: pyloss.fused_linear_cross_entropy(X, W, Y),
    "groco_loss": lambda: pyloss.groco_loss([X, X + 1], topk_neg=2),
    "info_nce": lambda: pyloss.info_nce(X, X.flip(1)),
    "nt_xent": lambda: pyloss.nt_xent(X, X.flip(1)),
    "persistence_pairs": lambda: pyloss.persistence_pairs(IMAGE, spatial_dims=2).values,
    "siglip_loss": lambda: pyloss.siglip_loss(X, X.flip(1)),
    "soft_argsort": lambda: pyloss.soft_argsort(X),
    "soft_permutation": lambda: pyloss.soft_permutation(X),
    "soft_permute": lambda: pyloss.soft_permute(X, X.unsqueeze(-1)),
    "soft_rank": lambda: pyloss.soft_rank(X),
    "soft_sort": lambda: pyloss.soft_sort(X),
    "soft_topk": lambda: pyloss.soft_topk(X, 2),
    "sorting_cross_entropy": lambda: pyloss.sorting_cross_entropy(X, X.argsort(-1)),
    "spearman_loss": lambda: pyloss.spearman_loss(X, X),
    "supervised_contrastive": lambda: pyloss.supervised_contrastive(X, Y % 2),
    "tensor_attention": lambda: pyloss.tensor_attention(Q, K1, K2, V1, V2),
    "tensor_attention_n": lambda: pyloss.tensor_attention_n(Q, [K1, K2], [V1, V2]),
    "token_logprobs": lambda: pyloss.token_logprobs(X, W, Y),
    "topk_cross_entropy": lambda: pyloss.topk_cross_entropy(X, Y, 2),
    "BettiMatchingLoss": lambda: pyloss.BettiMatchingLoss()(IMAGE, IMAGE),
    "CompSumLoss": lambda: pyloss.CompSumLoss(1.5)(X, Y),
    "CrossEntropyLoss": lambda: pyloss.CrossEntropyLoss()(X, Y),
    "DiffSortNet": lambda: pyloss.DiffSortNet("bitonic", 6)(X),
    "DiffTopkNet": lambda: pyloss.DiffTopkNet("bitonic", 6, 2)(X),
    "FocalLoss": lambda: pyloss.FocalLoss()(X, Y),
    "GeneralizedCrossEntropyLoss": lambda: pyloss.GeneralizedCrossEntropyLoss()(X, Y),
    "LinearCrossEntropyLoss": lambda: pyloss.LinearCrossEntropyLoss(6, 5)(X, Y),
    "GroCoLoss": lambda: pyloss.GroCoLoss(topk_neg=2)([X, X + 1]),
    "TopKCrossEntropyLoss": lambda: pyloss.TopKCrossEntropyLoss("odd_even", 1.0, 2, 6)(X, Y),
    "SortingCrossEntropyLoss": lambda: pyloss.SortingCrossEntropyLoss()(X, X.argsort(-1)),
    # other ways to a name
    "from pyloss.functional import": local_import,
    "import pyloss.nn": submodule,
}

# One function and one layer of each kind of family: the others take the same ways.
QUICK = {
    *{"betti_matching", "betti_matching_loss", "fused_cross_entropy", "aldr_loss", "groco_loss"},
    *{"fused_linear_cross_entropy", "info_nce", "nt_xent", "soft_permutation", "soft_rank"},
    *{"soft_sort", "soft_topk", "spearman_loss", "tensor_attention", "topk_cross_entropy"},
    *{"BettiMatchingLoss", "CompSumLoss", "DiffTopkNet", "LinearCrossEntropyLoss"},
    *{"from pyloss.functional import", "import pyloss.nn"},
}
BREAKS = {"LinearCrossEntropyLoss"}  # makes parameters, which no graph holds


def first_use(case: str) -> str:
    families = [n for n in sys.modules if n.startswith("pyloss.") and n.count(".") > 1]
    assert not families, families
    torch.manual_seed(0)
    got = torch.compile(CASES[case], fullgraph=case not in BREAKS, backend="eager")()
    torch.manual_seed(0)
    torch.testing.assert_close(got, CASES[case]())
    return ""


def in_a_child(case: str) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = first_use(case)
        except BaseException:
            answer = traceback.format_exc()
        with os.fdopen(write, "w") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return answer or (f"status {status}" if status else "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Tables of pairs have as many rows as there are: older torch traces such ops when asked to.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch.compile(lambda: (X.exp() @ W.T).float().sum(), fullgraph=True, backend="eager")()
    cases = CASES if "--all" in sys.argv else QUICK
    print(json.dumps({case: in_a_child(case) for case in sorted(cases)}))
