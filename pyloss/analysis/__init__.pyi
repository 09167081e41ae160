from pyloss.analysis.collapse import (
    LinearUFMOptimum,
    UFMSolution,
    gof,
    linear_ufm_optimum,
    simplex_etf,
    ufm_minimizer,
)
from pyloss.analysis.comp_sum import (
    CompSumAnalysis,
    h_consistency_bound,
    minimizability_gap,
)
from pyloss.analysis.critical import (
    Criticality,
    criticality,
    optimal_aspect_ratio,
    optimal_depth,
)
from pyloss.analysis.flow import KernelFlow, kernel_flow
from pyloss.analysis.invariance import (
    Intervention,
    InvarianceTest,
    LinearSEM,
    invariance_environments_needed,
    invariance_test,
    linear_sem,
)
from pyloss.analysis.perturbed_collapse import (
    CentralPath,
    PerturbedUFM,
    central_path,
    perturbed_ufm,
)

__all__ = [
    "CentralPath",
    "CompSumAnalysis",
    "Criticality",
    "Intervention",
    "InvarianceTest",
    "KernelFlow",
    "LinearSEM",
    "LinearUFMOptimum",
    "PerturbedUFM",
    "UFMSolution",
    "central_path",
    "criticality",
    "gof",
    "h_consistency_bound",
    "invariance_environments_needed",
    "invariance_test",
    "kernel_flow",
    "linear_sem",
    "linear_ufm_optimum",
    "minimizability_gap",
    "optimal_aspect_ratio",
    "optimal_depth",
    "perturbed_ufm",
    "simplex_etf",
    "ufm_minimizer",
]
