"""A user's program with every public name, for the type checker of `make lint`; nothing runs it.

It finds names that a type checker cannot see (lazy exports without a stub), arguments that the
annotations refuse, and results whose type is not the one promised.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from typing_extensions import assert_type

import pyloss
import pyloss.adversarial
import pyloss.aggregate
import pyloss.analysis
import pyloss.distributed
import pyloss.integrations.torchtitan
import pyloss.integrations.transformers
import pyloss.ops
import pyloss.optim
import pyloss.reference
import pyloss.regularizers
import pyloss.testing
import pyloss.visualize
from pyloss.analysis import comp_sum, invariance
from pyloss.functional import (
    DCDMResult,
    DPOMetrics,
    Frames,
    GRPOMetrics,
    RowSoftmaxStats,
    SegmentMoments,
    SegmentSoftmaxStats,
    SogCLRStats,
    TensorAttentionCost,
    aggregate_loss,
    approx_ndcg_loss,
    arcface_loss,
    balanced_loss_weight,
    causal_residual_loss,
    causal_weights,
    chamfer_set_loss,
    class_balanced_weight,
    cldice_loss,
    clip_schedule,
    conjugate_direction_loss,
    contrastive_pair_loss,
    cosface_loss,
    dcdm_solve,
    dcl,
    dice_cldice_loss,
    dice_cross_entropy_loss,
    dice_focal_loss,
    dpo_loss,
    ens_loss,
    ens_loss_derivatives,
    equivariance_error,
    generalized_dice_focal_loss,
    generalized_dice_loss,
    groco_from_scores,
    group_advantages,
    grpo_loss,
    hard_info_nce,
    hungarian_set_loss,
    icnn_loss,
    icnn_score,
    kl_dro_loss,
    lagrangian_residual_loss,
    lambda_loss,
    lanczos_ritz_dataset,
    linear_distillation_loss,
    lipschitz_gradient_penalty,
    list_mle,
    list_net,
    logit_adjusted_cross_entropy,
    logit_adjustment,
    margin_shift,
    mask_prediction_loss,
    mass_topk_mask,
    multi_similarity_loss,
    neural_ndcg_loss,
    neural_sort,
    normalized_logistic_loss,
    order_search_loss,
    order_search_loss_from_table,
    periodic_embedding,
    permutahedron_rank,
    permutahedron_sort,
    perturb_weights,
    proto_triplet_loss,
    prototypes,
    representative_indices,
    row_softmax_stats,
    segment_gru_reduce,
    segment_moments,
    segment_reduce,
    segment_softmax,
    segment_softmax_stats,
    segment_tree_reduce,
    segmentation_focal_loss,
    sequence_logprobs,
    sigmoid_focal_loss,
    simple_contrastive,
    sinkhorn_set_loss,
    smooth_adversarial_comp_sum,
    soft_dice_loss,
    soft_skeleton,
    soft_sort_matrix,
    sogclr_loss,
    target_surrogate_loss,
    tcm_loss,
    trajectory_matching_loss,
    triplet_margin_loss,
    tversky_loss,
)
from pyloss.metrics import (
    OPIS,
    Alignment,
    BettiMatchingError,
    BettiNumberError,
    OPISCurves,
    RankingAccuracy,
    Uniformity,
    alignment,
    cl_dice,
    mrr,
    ndcg,
    opis,
    penalty_entropy,
    precision_at_k,
    ranking_accuracy,
    tolerance,
    uniformity,
)
from pyloss.nn import DynamicGate, GatedConv, GatedFlops, gated_flops, lie
from pyloss.optim import SSO
from pyloss.optim.lr_scheduler import (
    GradNormRecorder,
    LinearDecay,
    RefinedSchedule,
    refine_schedule,
)
from pyloss.segment import (
    TreeLevel,
    check_offsets,
    from_padded,
    lengths_from_offsets,
    offsets_from_index,
    offsets_from_lengths,
    segment_ids,
    to_padded,
    tree_levels,
    unpad,
)
from pyloss.testing import Tolerance, make_logits, tolerance_for

x = torch.randn(4, 10)
y = torch.randint(10, (4,))
p = torch.rand(2, 1, 8, 8)
mask = p > 0.5


def cross_entropy() -> None:
    assert_type(pyloss.fused_cross_entropy(x, y), Tensor | tuple[Tensor, pyloss.RowStats])
    pyloss.fused_cross_entropy(
        x, (y, y, 0.3), torch.ones(10), ignore_index=0, reduction="sum", label_smoothing=0.1
    )
    pyloss.fused_cross_entropy(
        x,
        y,
        tau=0.7,
        truncate=0.1,
        z_loss=1e-4,
        softcap=30.0,
        logit_scale=2.0,
        temperature=0.5,
        token_weight=torch.ones(4),
        return_stats=("lse",),
        inplace=True,
        empty="zero",
        loss_dtype=torch.float64,
        num_items=3,
    )
    pyloss.comp_sum_loss(x, y, 0.5, z_loss=1e-4)
    pyloss.focal_loss(x, y, 2.0, reduction="none")
    pyloss.functional.poly1_loss(x, y, 2.0)
    pyloss.functional.label_relaxation_loss(x, y, 0.1)
    pyloss.ldr_loss(x, y, 10.0, 0.1, topk=2, normalize="l1")
    pyloss.aldr_loss(x, y, 10.0, 2.0, 0.1, return_lambda=True)
    pyloss.nn.Poly1Loss(2.0)(x, y)
    pyloss.nn.LabelRelaxationLoss(0.1)(x, y)
    pyloss.nn.LDRLoss(10.0, margin=0.1)(x, y)
    pyloss.nn.ALDRLoss(10.0, num_samples=4)(x, y, y)
    result = pyloss.fused_cross_entropy(x, y, return_stats=("lse", "entropy"))
    assert isinstance(result, tuple)
    assert_type(result[1].lse, Tensor | None)
    modules: list[nn.Module] = [
        pyloss.CrossEntropyLoss(),
        pyloss.CompSumLoss(0.5),
        pyloss.GeneralizedCrossEntropyLoss(0.7),
        pyloss.FocalLoss(2.0),
        pyloss.LinearCrossEntropyLoss(10, 7),
    ]
    nn.ModuleList(modules)


def linear() -> None:
    w = torch.randn(7, 10)
    pyloss.fused_linear_cross_entropy(x, w, y, shift=0, chunk=2, filter=1e-4)
    pyloss.token_logprobs(x, w, y, return_entropy=True)
    pyloss.token_logprobs(x, w, y, temperature=torch.ones(4))
    pyloss.distributed.vocab_parallel_cross_entropy(x, y, num_classes=10, first_class=[0])
    pyloss.distributed.vocab_parallel_linear_cross_entropy(x, w, y)
    linear_distillation_loss(x, w, x, w, temperature=2.0, direction="jsd")


def adversarial(model: nn.Module) -> None:
    moved = pyloss.adversarial.pgd_attack(model, x, y, 0.1, "l2", clip=(0.0, 1.0), restarts=2)
    assert_type(moved, Tensor)
    pyloss.adversarial.pgd_maximise(model, x, None, 0.1, objective="kl", start="uniform")
    pyloss.adversarial.pgd_maximise(model, x, y, 0.1, objective=lambda z, y: z.sum(1))
    assert_type(pyloss.adversarial.trades_loss(model, x, y, 0.1, beta=1.0), Tensor)
    pyloss.adversarial.mart_loss(model, x, y, 0.1, reduction="none")
    pyloss.adversarial.AdvCompSum(0.5, eps=0.1)(model, x, y)
    pyloss.adversarial.DoublyRobustATLoss(0.5, implicit=True)(model, x, y)
    assert_type(margin_shift(x, x, y, squared=True), Tensor)
    assert_type(smooth_adversarial_comp_sum(x, x, y, 0.5, 1.0, 3.0), Tensor)


def aggregation(index: Tensor) -> None:
    layer = pyloss.nn.LCMAggregation(10, 7, op="mlp", identity="zero", shuffle=True)
    assert_type(layer.combine(x, x), Tensor)
    layer(layer.elements(x), index, dim_size=4)
    cell = nn.GRUCell(10, 10)
    found = segment_gru_reduce(x, index, cell.weight_ih, cell.weight_hh, symmetric=False)
    assert_type(found, Tensor)
    pyloss.regularizers.associativity_loss(layer.combine, x, index, samples=8)
    pyloss.regularizers.commutativity_loss(torch.add, x, index, reduction="none")
    assert_type(pyloss.regularizers.identity_loss(layer.combine, x[0], x), Tensor)
    pyloss.nn.AggregateLoss(rho=0.2, loss=lambda f, y: (f - y).abs())(x[:, 0], x[:2, 0], bag_size=2)
    aggregate_loss(x, x, index, loss="ce", bag_weight="size")
    pyloss.aggregate.interpolated_least_squares(x, x[:2, 0], bag_size=2, rho=0.5)
    pyloss.aggregate.dp_aggregate(x[:, 0], index, 1.0, 2.0, torch.Generator())
    assert_type(pyloss.aggregate.aggregate_risk(60, 5, 2, 0.5, 0.1, bound=1.0, epsilon=1), Tensor)
    best = pyloss.aggregate.optimal_bag_size(60, 5, 0.5, 0.1, sizes=[1, 2])
    assert_type(best, pyloss.aggregate.OptimalBagSize)


def bounds() -> None:
    assert_type(pyloss.analysis.h_consistency_bound(0.1, "logistic"), Tensor)
    pyloss.analysis.minimizability_gap(x.softmax(1), 1.0, best_risk=0.3)
    found = comp_sum.analyze(x, y, tau=[0.0, 1.0], score_bound=3.0)
    assert_type(found, pyloss.analysis.CompSumAnalysis)
    pyloss.visualize.draw_comp_sum(found)
    comp_sum.gamma(comp_sum.t_function(0.1, 1.5, 4), 1.5, 4)
    comp_sum.gamma_bound(0.1, 0.5)
    scores = comp_sum.conditional_minimizer(x.softmax(1), 1.0)
    comp_sum.conditional_risk(scores, x.softmax(1), 1.0)
    comp_sum.conditional_minimum(x.softmax(1), 2.0, score_bound=1.0)


def regression_theory() -> None:
    system = pyloss.analysis.kernel_eigensystem(x @ x.T, x)
    assert_type(system, pyloss.analysis.KernelEigensystem)
    ridge = pyloss.analysis.optimal_ridge(
        system.eigvals, system.coeffs_sq, 5, x[0].exp(), noise=0.1
    )
    risk = pyloss.analysis.rf_risk(system.eigvals, system.coeffs_sq, n=5, k=x[0].exp(), ridge=ridge)
    assert_type(risk, pyloss.analysis.RFRisk)
    pyloss.visualize.draw_rf_risk(risk, [1.0, 2.0], ["one"], xlabel="features")
    assert_type(pyloss.analysis.powerlaw_fit_ratio(1.5, 2.2, x[0].exp()), Tensor)
    bias = pyloss.analysis.inductive_bias(x[0].exp(), 0.1, method="empirical")
    assert_type(bias, pyloss.analysis.InductiveBias)
    pyloss.analysis.gp_inductive_bias(x, x, x, x, torch.cdist, 0.1, samples=100, jitter=1e-6)
    assert_type(pyloss.analysis.chi2_mixture_logcdf(x, x[0].exp(), 0.5, offset=0.1), Tensor)
    assert_type(pyloss.analysis.ncx2_logcdf(0.1, 3, 2.0, scale=0.5), Tensor)
    pyloss.visualize.draw_inductive_bias(x[0].exp(), {"one": bias})


def spectra(model: nn.Module) -> None:
    hessian = pyloss.analysis.hvp(lambda b: model(b).sum(), model, [x], weights=[1.0])
    assert_type(hessian, pyloss.analysis.HessianOperator)
    assert_type(hessian(x[0]), Tensor)
    recursion = pyloss.analysis.lanczos(hessian, 3, 2, v0=x[0])
    assert_type(recursion, pyloss.analysis.Tridiagonal)
    assert_type(pyloss.analysis.top_eigenvalues(hessian, 2), pyloss.analysis.TopEigenvalues)
    found = pyloss.analysis.slq_density(hessian, probes=2, progress=True)
    assert_type(found, pyloss.analysis.SpectralDensity)
    assert_type(found.of(torch.exp), Tensor)
    pyloss.visualize.draw_spectrum({"a": found}, edges={"a": 1.0})
    pyloss.analysis.batch_extremal_eigenvalue(1.0, 9, x, 0.1, population=8)
    fitted = pyloss.analysis.hessian_noise(5.0, 8, 4.0)
    assert_type(fitted, pyloss.analysis.HessianNoise)
    lam, noise = fitted
    pyloss.analysis.full_batch_eigenvalue(lam, 8, noise)
    pyloss.analysis.max_learning_rate(lam, 8, noise, optimizer="momentum", momentum=0.5)
    pyloss.analysis.scale_lr(0.1, 8, pyloss.analysis.effective_batch_size(8).item(), "sqrt")
    optimizer = pyloss.optim.LanczosSGD(model.parameters(), damping=0.1, every=10)
    assert_type(optimizer.step(lambda: x.sum()), Tensor)
    assert_type(optimizer.rate(), float)
    lazy = pyloss.analysis.LazyScale(model, 2.0)
    pyloss.analysis.scaled_mse(lazy(x), x, 2.0, reduction="sum").backward()
    kernel = pyloss.analysis.empirical_ntk(lazy, x, chunk=4, outputs="trace")
    assert_type(pyloss.analysis.kernel_alignment(kernel, kernel), Tensor)
    pyloss.visualize.draw_alignment([1], [1.0], [1.0], [0.5])


def signals() -> None:
    found = pyloss.analysis.criticality(torch.tanh, kinks=(), residual=0.5)
    assert_type(found, pyloss.analysis.Criticality)
    flow = pyloss.analysis.kernel_flow("relu", x, 3, C_W=found.C_W, lam_b=[1.0, 0.5, 0.3])
    assert_type(flow, pyloss.analysis.KernelFlow)
    pyloss.visualize.draw_kernel_flow({"relu": flow}, width=100)
    assert_type(pyloss.analysis.optimal_aspect_ratio("relu", 10), Tensor)
    assert_type(pyloss.analysis.optimal_depth("gelu", 500), int)
    assert_type(pyloss.nn.init.critical_(torch.nn.Linear(3, 3), "silu"), torch.nn.Linear)
    assert_type(pyloss.nn.init.critical_(x, "leaky_relu", leaky_slope=0.1), Tensor)


def environments() -> None:
    cases = [(), pyloss.analysis.Intervention(0, variance=2.0)]
    data = pyloss.analysis.linear_sem(x, x[0], y=1, interventions=cases, n=[10, 20])
    assert_type(data, pyloss.analysis.LinearSEM)
    test = pyloss.analysis.invariance_test(data.x, data.y, data.offsets, eps=0.1)
    assert_type(test, pyloss.analysis.InvarianceTest)
    pyloss.visualize.draw_invariance(test, eps=0.1)
    covariance = invariance.sem_covariance(x, x[0], y=1, interventions=cases)
    w, gap = invariance.exact_gap(covariance, x, y=1)
    assert_type(pyloss.analysis.invariance_environments_needed(0.1, 0.05, 6), int)
    penalty = pyloss.regularizers.invariance_penalty(data.x, data.y, test.w, data.offsets)
    assert_type(penalty, Tensor)


def collapse() -> None:
    metrics = pyloss.metrics.NeuralCollapseMetrics(4, 10, "of", scatter=False)
    metrics.update(x, y)
    found = metrics.compute(x)
    assert_type(found, pyloss.metrics.NeuralCollapse)
    metrics.compare(x[:, :4], x)
    metrics.load_state_dict(metrics.state_dict())
    pyloss.visualize.draw_collapse([found], steps=[0])
    assert_type(pyloss.metrics.nc1(x, y, 4, kind="trace"), Tensor)
    pyloss.metrics.cdnv(x, y, reduction="none", ignore_index=-1)
    pyloss.metrics.nc2(x, "of", center=x[0])
    pyloss.metrics.nc3(x, x, target=x[0, :4])
    pyloss.metrics.nc4(x[:, :4], x, x)
    pyloss.metrics.equinorm(x)
    pyloss.metrics.equiangle(x, "etf")
    pyloss.functional.ufm_loss([x, x], x, y, [0.1, 0.2], 0.1, loss="ce", bias=x[0])
    best = pyloss.analysis.ufm_minimizer([3, 2], 0.1, 0.1, depth=2, loss="mse", bias=True)
    assert_type(best, pyloss.analysis.UFMSolution)
    lengths = pyloss.analysis.linear_ufm_optimum([3, 2], [0.1, 0.2], 0.1, layers=2)
    assert_type(lengths, pyloss.analysis.LinearUFMOptimum)
    assert_type(pyloss.analysis.gof(lengths.w_norm, 8), Tensor)
    pyloss.analysis.simplex_etf(4, dim=8)
    tied = pyloss.analysis.perturbed_ufm(x, y, 0.1, 0.1, num_classes=4, tol=1e-6)
    assert_type(tied, pyloss.analysis.PerturbedUFM)
    path = pyloss.analysis.central_path(x, y, 0.1, steps=3, beta=0.1)
    assert_type(path, pyloss.analysis.CentralPath)
    pyloss.visualize.draw_central_path(path)


def statistics() -> None:
    stats = row_softmax_stats(x, y, scale=torch.ones(4), margin=0.1, mask=x > 0)
    assert_type(stats, RowSoftmaxStats)
    row_softmax_stats(x, y, without_target=True)
    loss, log_u = kl_dro_loss(stats.lse, 0.5, log_u=stats.lse.mean(), eta=0.9)
    assert_type(loss, Tensor)
    pyloss.nn.KLDROLoss(0.5, eta=0.9)(stats.lse)
    assert_type(ens_loss(stats.lse, y % 2, bc_lambda=0.5), Tensor)
    assert_type(ens_loss_derivatives(stats.lse, tail=False), Tensor)
    pyloss.nn.EnsLoss(period=3).step_epoch()
    assert_type(normalized_logistic_loss(x, y), Tensor)
    pyloss.nn.NormalizedLogisticLoss(ignore_index=-1)(x, y)
    weight = class_balanced_weight([3, 1], beta=0.9)
    assert_type(logit_adjustment(weight, 0.5), Tensor)
    logit_adjusted_cross_entropy(x, y, weight, reduction="sum")
    pyloss.nn.LogitAdjustedCrossEntropyLoss([3, 1], weight=weight, z_loss=1e-4)
    head = pyloss.nn.GaussianNaiveBayes(10, 3, smoothing_mode="relative")
    assert_type(head.partial_fit(x, y).to_linear(), nn.Linear)


def preference() -> None:
    logps = sequence_logprobs(x, mask=None, average=True)
    assert_type(logps, Tensor)
    assert_type(dpo_loss(logps, logps, None, None), Tensor | tuple[Tensor, DPOMetrics])
    dpo_loss(logps, logps, logps, logps, loss_type="sigmoid", f_divergence_type="js_divergence")
    assert_type(group_advantages(torch.rand(8), 4), Tensor)
    assert_type(grpo_loss(x, None, y, kl_coef=0.1), Tensor | tuple[Tensor, GRPOMetrics])


def contrastive_state(z: Tensor) -> None:
    index = torch.arange(4)
    pyloss.nn.SogCLRLoss(10)(z, z, index)
    criterion = pyloss.nn.ISogCLRLoss(10, gamma_schedule="cosine", decay_epochs=3, bimodal=True)
    criterion.step_epoch()
    assert_type(criterion.temperature_of(index), Tensor)
    assert_type(criterion.last_value, Tensor | None)
    assert_type(sogclr_loss(z, z, index.float(), gamma=0.5), tuple[Tensor, SogCLRStats])
    assert_type(pyloss.distributed.all_gather_with_grad(z, sizes=[4]), Tensor)
    pyloss.nn.GradCache(nn.Linear(3, 2), torch.tanh, chunk_size=8)(z, z)


def attention() -> None:
    q = torch.randn(1, 2, 8, 16)
    pyloss.tensor_attention(q, q, q, q, q, window=(4, 8), scale="kronecker", softcap=30.0)
    pyloss.tensor_attention_n(q, [q, q, q], [q, q, q])
    cost = pyloss.tensor_attention_cost((1, 2, 8, 16), window=4)
    assert_type(cost, TensorAttentionCost)
    assert_type(cost.seconds, float | None)
    pyloss.tensor_attention_error(q, q, q, degree=2)["bound"]
    layer = pyloss.nn.TensorAttention(32, 2, batch_first=True, order=2)
    layer.reset_parameters()
    assert_type(
        pyloss.nn.TensorAttention.from_multihead(nn.MultiheadAttention(32, 2)),
        pyloss.nn.TensorAttention,
    )


def segmentation() -> None:
    assert_type(soft_dice_loss(p, mask, sigmoid=True, weight=[1.0], validate=False), Tensor)
    assert_type(dice_cross_entropy_loss(p, mask, sigmoid=True), Tensor)
    nn.ModuleList([pyloss.nn.SoftDiceLoss(softmax=True), pyloss.nn.DiceCELoss(empty="zero")])
    assert_type(generalized_dice_loss(p, mask, sigmoid=True, w_type="simple"), Tensor)
    assert_type(tversky_loss(p, mask, sigmoid=True, alpha=0.3, beta=0.7), Tensor)
    assert_type(sigmoid_focal_loss(p, mask, 0.25, 2.0, "sum"), Tensor)
    assert_type(segmentation_focal_loss(p, mask, alpha=[0.25]), Tensor)
    assert_type(dice_focal_loss(p, mask, sigmoid=True, lambda_focal=0.5), Tensor)
    assert_type(generalized_dice_focal_loss(p, mask, sigmoid=True, lambda_gdl=0.5), Tensor)
    assert_type(soft_skeleton(p, 2), Tensor)
    assert_type(cldice_loss(p, mask, sigmoid=True, iter_=2), Tensor)
    assert_type(dice_cldice_loss(p, mask, sigmoid=True, alpha=0.3), Tensor)
    assert_type(cl_dice(p, mask), Tensor)
    nn.ModuleList([pyloss.nn.GeneralizedDiceLoss(w_type="simple"), pyloss.nn.TverskyLoss(gamma=2)])
    nn.ModuleList([pyloss.nn.SegmentationFocalLoss(alpha=0.5), pyloss.nn.DiceFocalLoss(gamma=1.0)])
    nn.ModuleList([pyloss.nn.SoftclDiceLoss(iter_=2), pyloss.nn.SoftDiceclDiceLoss(alpha=0.3)])
    nn.ModuleList([pyloss.nn.GeneralizedDiceFocalLoss(lambda_gdl=0.3)])


def topology() -> None:
    assert_type(pyloss.betti_matching_loss(p, mask, unmatched="extreme"), Tensor)
    target = pyloss.BettiTarget.precompute(mask, ignore_index=255)
    pyloss.betti_matching_loss(p, target, ignore_index=255, spatial_dims=2)
    assert_type(target.select([0]).to("cpu").device, torch.device)
    matching = pyloss.betti_matching(p, target)
    assert_type(matching, pyloss.BettiMatching)
    assert_type(matching.counts, Tensor)
    assert_type(matching.essential(0), Tensor)
    assert_type(matching.representative_cycles(0, "input", dim=1), list[Tensor])
    pairs = pyloss.persistence_pairs(p, construction="T")
    assert_type(pairs, pyloss.PersistencePairs)
    assert_type(pairs.betti(0.5), Tensor)
    pyloss.betti_numbers(mask)
    pyloss.betti_number_error(p, mask, 0.5)
    pyloss.betti_matching_error(p, mask, normalize=True)
    for metric in (BettiNumberError(0.5), BettiMatchingError(0.5)):
        metric.update(p, mask)
        assert_type(metric(p, mask), Tensor)
        assert_type(metric.compute(), Tensor)
        assert_type(metric.aggregate(), Tensor)
        metric.reset()
    pyloss.BettiMatchingLoss(base_loss=nn.BCELoss(), alpha=0.5)
    assert_type(pairs.filtration, str)
    pyloss.visualize.draw_barcode(pairs, min_persistence=0.1)
    pyloss.visualize.draw_matching(p, mask, matching, legend=False)


def sorting() -> None:
    pyloss.soft_sort(x, network="odd_even", return_permutation=True)
    assert_type(pyloss.soft_rank(x, steepness=torch.tensor(3.0)), Tensor)
    assert_type(pyloss.soft_argsort(x), Tensor)
    assert_type(pyloss.soft_permutation(x, hard=True), Tensor)
    assert_type(pyloss.soft_permute(x, torch.randn(4, 10, 3)), Tensor)
    assert_type(pyloss.soft_topk(x, 3, largest=False), Tensor)
    assert_type(pyloss.sorting_cross_entropy(x, x, "row_ce", ties="share"), Tensor)
    assert_type(pyloss.spearman_loss(x, x, method="permutahedron"), Tensor)
    assert_type(permutahedron_rank(x, "kl"), Tensor)
    assert_type(permutahedron_sort(x, descending=True), Tensor)
    assert_type(neural_sort(x, 0.1), Tensor)
    assert_type(soft_sort_matrix(x, 0.1, 2.0), Tensor)
    assert_type(ranking_accuracy(x, x, mask=x > 0), RankingAccuracy)
    nn.ModuleList(
        [
            pyloss.DiffSortNet("bitonic", 10),
            pyloss.DiffTopkNet("splitter_selection", 16, 5),
            pyloss.SortingCrossEntropyLoss(),
            pyloss.nn.SpearmanLoss(),
            pyloss.nn.NeuralSort(0.1),
            pyloss.nn.SoftSort(0.1),
        ]
    )


def order() -> None:
    views = [torch.randn(16, 8), torch.randn(16, 8)]
    assert_type(pyloss.groco_loss(views, topk_neg=5, group=None), Tensor)
    assert_type(groco_from_scores(x[:, :1], x, steepness=2.0), Tensor)
    assert_type(pyloss.topk_cross_entropy(x, y, 3, sorter="neuralsort"), Tensor)
    assert_type(list_net(x, y.expand(4, 4), temperature=0.5), Tensor)
    assert_type(list_mle(x, x, k=3), Tensor)
    assert_type(approx_ndcg_loss(x, x, gain="linear"), Tensor)
    assert_type(neural_ndcg_loss(x, x, relaxation="neuralsort", sinkhorn=3), Tensor)
    assert_type(lambda_loss(x, x, weighting="ndcg_loss2++", mu=3.0), Tensor)
    assert_type(ndcg(x, x, 3), Tensor)
    assert_type(mrr(x, x), Tensor)
    assert_type(precision_at_k(x, x, 3), Tensor)
    nn.ModuleList(
        [
            pyloss.GroCoLoss(topk_neg=5),
            pyloss.TopKCrossEntropyLoss("bitonic", 1.0, [0.5, 0.5], 10, m=4),
            pyloss.nn.ListNetLoss(temperature=0.5),
            pyloss.nn.ListMLELoss(k=3),
            pyloss.nn.ApproxNDCGLoss(),
            pyloss.nn.NeuralNDCGLoss(k=3),
            pyloss.nn.LambdaLoss(k=3),
        ]
    )


def contrastive() -> None:
    z1, z2 = torch.randn(16, 8), torch.randn(16, 8)
    number = torch.tensor(0.2, requires_grad=True)
    assert_type(pyloss.info_nce(z1, z2, temperature=number, symmetric=True), Tensor)
    assert_type(pyloss.info_nce(z1, z2, torch.randn(64, 8), in_batch=False), Tensor)
    assert_type(pyloss.nt_xent(z1, z2), Tensor)
    assert_type(pyloss.clip_loss(z1, z2, number.exp()), Tensor)
    assert_type(pyloss.siglip_loss(z1, z2, 10.0, number), Tensor)
    assert_type(pyloss.supervised_contrastive(z1, y.repeat(4)), Tensor)
    assert_type(dcl(z1, z2, sigma=0.5), Tensor)
    assert_type(hard_info_nce(z1, z2, hard_fraction=0.2), Tensor)
    assert_type(simple_contrastive(z1, z2, weight=0.1), Tensor)
    nn.ModuleList(
        [
            pyloss.nn.InfoNCELoss(0.07, learnable=True),
            pyloss.nn.NTXentLoss(temperature=0.2),
            pyloss.nn.CLIPLoss(learnable=True),
            pyloss.nn.SupervisedContrastiveLoss(),
            pyloss.nn.DCLLoss(sigma=0.5),
            pyloss.nn.HardInfoNCELoss(hard_fraction=0.2),
            pyloss.nn.SimpleContrastiveLoss(weight=0.1),
            pyloss.nn.SigLIPLoss(10.0, -10.0),
        ]
    )


def segments() -> None:
    offsets = offsets_from_index(torch.tensor([0, 0, 1, 1]), 2)
    assert_type(offsets, Tensor)
    assert_type(segment_reduce(x, offsets, "logsumexp"), Tensor)
    assert_type(segment_softmax(x, offsets), Tensor)
    assert_type(segment_moments(x, offsets, covariance=True), SegmentMoments)
    assert_type(segment_softmax_stats(x, offsets), SegmentSoftmaxStats)
    assert_type(segment_tree_reduce(x, offsets, torch.add, identity=0.0, max_length=2), Tensor)
    check_offsets(offsets, 4)
    padded, mask = to_padded(x, offsets)
    assert_type(from_padded(padded, mask), tuple[Tensor, Tensor])
    assert_type(unpad(padded, offsets_from_lengths(lengths_from_offsets(offsets)), 4), Tensor)
    assert_type(segment_ids(offsets, 4), Tensor)
    levels, top = tree_levels(offsets, 4)
    assert_type(levels, list[TreeLevel])


def sets() -> None:
    a, b = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    assert_type(chamfer_set_loss(a, b), Tensor)
    hungarian_set_loss(a, b, cost="l2", return_matching=True)
    assert_type(sinkhorn_set_loss(a, b, epsilon=0.5), Tensor)
    loss, chosen = order_search_loss(lambda prefix: x[: len(prefix)], y.view(2, 2), mode="beam")
    assert_type(loss, Tensor)
    assert_type(order_search_loss_from_table(torch.randn(2, 3, 3)), tuple[Tensor, Tensor])
    schedule = pyloss.nn.OrderSearchSchedule(warmup_steps=3, mode="greedy")
    assert_type(schedule.step(), str)
    pyloss.nn.PointerDecoder(8, glimpses=2)
    memory, state = pyloss.nn.ReadProcess(3, 8)(a)
    assert_type(pyloss.nn.ReadProcessWrite(3, 8).forward(a, target=chosen), pyloss.nn.Pointers)
    nn.ModuleList(
        [
            pyloss.nn.ChamferSetLoss(),
            pyloss.nn.HungarianSetLoss(return_matching=True),
            pyloss.nn.SinkhornSetLoss(iterations=5),
        ]
    )


def metric_learning() -> None:
    assert_type(tcm_loss(x, y, m_pos=0.8, ref_emb=x, ref_labels=y), Tensor)
    assert_type(contrastive_pair_loss(x, y, distance="cosine"), Tensor)
    assert_type(triplet_margin_loss(x, y, mining="batch_hard", average="all"), Tensor)
    assert_type(multi_similarity_loss(x, y, epsilon=0.1), Tensor)
    assert_type(arcface_loss(x, x, y, weight=None), Tensor)
    assert_type(cosface_loss(x, x, y, scale=30.0), Tensor)
    assert_type(proto_triplet_loss(x, y, prototypes(x, y, 4), 0.5), Tensor)
    assert_type(icnn_score(x, y, k=2), Tensor)
    assert_type(icnn_loss(x, y, x, y, neighbours=5), Tensor)
    nn.ModuleList(
        [
            pyloss.nn.ThresholdConsistentMarginLoss(lam_neg=0.5),
            pyloss.nn.ContrastivePairLoss(neg_margin=0.5),
            pyloss.nn.TripletMarginLoss(mining="semihard"),
            pyloss.nn.MultiSimilarityLoss(alpha=1.0),
            pyloss.nn.ProtoTripletLoss(0.5),
            pyloss.nn.ICNNLoss(k=3),
            pyloss.nn.ArcFaceLoss(10, 4, margin=0.5, device="cpu"),
            pyloss.nn.CosFaceLoss(10, 4, label_smoothing=0.1),
        ]
    )
    assert_type(uniformity(x, max_pairs=100), Tensor)
    assert_type(tolerance(x, y, over="all"), Tensor)
    assert_type(alignment(x, x, 1.0), Tensor)
    assert_type(penalty_entropy(x, temperature=0.1, reduction="none"), Tensor)
    assert_type(opis(x, y, far=(0.1, 0.2)), Tensor | OPISCurves)
    metric = OPIS(num_thresholds=11)
    metric.update(x, y)
    assert_type(metric.compute(), Tensor | OPISCurves)
    Uniformity(t=2.0).update(x)
    pyloss.metrics.Tolerance().update(x, y)
    Alignment().update(x, x)
    curves = opis(x, y, return_curves=True)
    if isinstance(curves, OPISCurves):
        pyloss.visualize.draw_opis(curves, worst=1)


def schedules(optimizer: torch.optim.Optimizer) -> None:
    recorder = GradNormRecorder(optimizer, norm="l1")
    assert_type(recorder.norms, Tensor)
    recorder.load_state_dict(recorder.state_dict())
    recorder.remove()
    assert_type(refine_schedule(recorder.norms, norm="l1", mode="optimal"), Tensor)
    LinearDecay(optimizer, 100, warmup_steps=10, final=0.1).step()
    schedule = RefinedSchedule(optimizer, [3.0, 1.0, 1.0], 100, smoothing=0.2)
    assert_type(schedule.multiplier(3), float)


def surrogates(model: nn.Module) -> None:
    assert_type(target_surrogate_loss(x, x, x, 0.5, divergence="kl", reduction="mean"), Tensor)
    optimizer = SSO(model.parameters(), "armijo", inner_steps=5, eta=4.0, eta_schedule="adagrad")
    assert_type(optimizer.step(lambda: (model(x), torch.sum)), Tensor)
    SSO([{"params": [x]}], torch.optim.LBFGS, eta_schedule=lambda t: 0.9**t)


def gates(model: nn.Module) -> None:
    mask = mass_topk_mask(x, 0.9, rule="uniform", min_channels=2, inclusive=True)
    assert_type(mask, Tensor)
    assert_type(mask_prediction_loss([x, x], [mask, mask]), Tensor)
    layer = GatedConv(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), gate=DynamicGate(3, 8, embedding=12))
    assert_type(layer.mask_loss(), Tensor)
    assert_type(gated_flops(model, x, masks="predicted"), GatedFlops)


def symmetries(layer: nn.Linear) -> None:
    types = pyloss.regularizers.SymmetryType.O(3), pyloss.regularizers.SymmetryType("swap", [x])
    rep = [(1, "scalar"), (2, (1, 0))]
    penalty = pyloss.regularizers.EquivarianceRegularizer(
        [(layer, rep, rep)], types, strength=[1.0, 0.5], reduction="mean"
    )
    assert_type(penalty.per_type(), Tensor)
    assert_type(penalty.retune_(2), Tensor)
    rho = (types[0] * types[1]).sample(rep, rep, n=4)
    assert_type(equivariance_error(layer, x, rho[0], rho[1]), Tensor)


def lie_layers(images: Tensor) -> None:
    group = lie.GL(2, variance=0.2, weighting="haar")
    assert_type(group.sample(5), lie.GroupSample)
    assert_type(lie.polar(lie.xi(lie.SL(2).xi_inv(x))), lie.Polar)
    lie.xi_inv(lie.warp(images, x, translation=x))
    lift = lie.LiftConv2d(group, 1, 8, 5, samples=4, padding="same", mask="bump")
    layers = nn.Sequential(lift, lie.GroupConv2d(lie.SO(2, rotations="grid"), 8, 8, 5))
    assert_type(lie.resample_(layers, share=False), nn.Module)


def optimisers(model: nn.Module) -> None:
    optimizer = pyloss.optim.LionK(
        model.parameters(), 1e-3, kappa="lp", kappa_args={"p": 2}, group="row", momentum_dtype=None
    )
    pyloss.optim.LionK([dict(params=[x])], torch.tensor(1e-3), kappa=torch.tanh)
    pyloss.optim.Lion(
        model.parameters(), weight_decay=0.1, rounding="stochastic", fused=True
    ).step()
    found = pyloss.optim.lion_k_lyapunov(
        0.5, [x], [x], betas=(0.9, 0.99), lr=1e-3, weight_decay=0.1
    )
    assert_type(found, pyloss.optim.LionKLyapunov)
    assert_type(found.rate, Tensor | None)
    monitor = pyloss.optim.LyapunovMonitor(optimizer)
    assert_type(monitor.record(torch.tensor(1.0)).H, Tensor)
    pyloss.visualize.draw_lyapunov(monitor.records)


def physics() -> None:
    assert_type(causal_weights(x, 0.1), Tensor)
    assert_type(causal_residual_loss(x, 0.1, ic_weight=10.0), tuple[Tensor, Tensor])
    criterion = pyloss.nn.CausalResidualLoss(eps=[0.1, 1.0], threshold=0.9)
    assert_type(criterion.eps, float)
    assert_type(criterion.step(0.5), bool)
    assert_type(periodic_embedding(x, x, 2.0, 3), Tensor)
    model = pyloss.nn.LagrangianPINN(nn.Linear(3, 1), nn.Linear(3, 1), 2.0, 6.28)
    assert_type(lagrangian_residual_loss(model, x, x, velocity=lambda u: u, nu=0.1), Tensor)
    loss = conjugate_direction_loss(x, x, lambda v: 2 * v, reduction="none")
    assert_type(loss, Tensor)
    assert_type(dcdm_solve(lambda v: 2 * v, x, lambda r: r, tol=1e-3), DCDMResult)
    assert_type(lanczos_ritz_dataset(lambda v: 2 * v, (3,), 5), Tensor)
    nn.ModuleList([pyloss.nn.PoissonNet2d(8, blocks=1), pyloss.nn.PoissonNet3d(8, levels=2)])


def dataset_distillation(net: nn.Module) -> None:
    parameters = perturb_weights(net.parameters(), 0.5, min_dim=2)
    assert_type(parameters, list[Tensor])
    assert_type(trajectory_matching_loss(parameters, parameters, net.parameters()), Tensor)
    trajectory_matching_loss(x, x, x, [(x, x)], mid_weight="adaptive")
    assert_type(lipschitz_gradient_penalty(x, net, dims=(1,)), Tensor)
    assert_type(clip_schedule(3), float)
    assert_type(balanced_loss_weight(3, 10), float)
    assert_type(representative_indices(x, y, 1), Tensor)


def frames() -> None:
    assert_type(pyloss.functional.pca_frames(x, group="E", weight=x), Frames)
    assert_type(pyloss.functional.laplacian_sort_frame(y, 3), Tensor)
    assert_type(pyloss.nn.FrameAverage(nn.Flatten(), "SE", out_type="position").forward(x), Tensor)
    pyloss.reference.frame_pca(x)


def spherical() -> None:
    assert_type(pyloss.functional.spherical_z_loss(x, y, 0.5, b=3.0), Tensor)
    assert_type(pyloss.functional.one_hot_mse_loss(x, y, reduction="none"), Tensor)
    assert_type(pyloss.functional.taylor_softmax_loss(x, y), Tensor)
    assert_type(pyloss.functional.spherical_softmax_loss(x, y, eps=0.1), Tensor)
    assert_type(pyloss.functional.spherical_loss(x, y, lambda o, s, q: q - o), Tensor)
    nn.ModuleList(
        [
            pyloss.nn.SphericalZLoss(a=0.5),
            pyloss.nn.OneHotMSELoss(),
            pyloss.nn.TaylorSoftmaxLoss(reduction="sum"),
            pyloss.nn.SphericalSoftmaxLoss(eps=0.1),
            pyloss.nn.SphericalLoss(lambda o, s, q: q - o),
        ]
    )
    layer = pyloss.nn.SphericalLinear(4, 10, "taylor", stabilize_every=10)
    layer.step(0.1, weight_decay=1e-3)
    assert_type(layer.gradient_norm(), Tensor)
    assert_type(layer.logits(x), Tensor)
    assert_type(layer.weight, Tensor)


def transformers(model: nn.Module) -> None:
    module = pyloss.integrations.transformers
    module.unpatch_loss(module.patch_loss(model, z_loss=1e-4))
    module.convert(model, layers=slice(0, 2), window=None)
    module.from_pretrained("folder")
    with module.enable(strict=True, z_loss=1e-4):
        module.disable()
    loss = pyloss.integrations.torchtitan.ChunkedLMHeadLoss(metrics=("accuracy",), z_loss=1e-4)
    loss.set_lm_head(model)


def tools() -> None:
    assert_type(pyloss.show_config(), str)
    pyloss.ops.load_all()
    program = export(nn.ReLU(), (torch.zeros(2),))
    assert_type(pyloss.ops.decompose(program), ExportedProgram)
    program.run_decompositions(pyloss.ops.decompositions())
    with pyloss.backend("reference"):
        pass
    assert_type(make_logits((4, 10)), Tensor)
    assert_type(tolerance_for(torch.float32), Tolerance)
    pyloss.testing.assert_matches_reference(x, x, rtol=1e-3)
    pyloss.reference.row_softmax(x, y)
    pyloss.reference.tensor_attention(x, [x, x], [x, x])
