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
from pyloss.analysis.perturbed_collapse import (
    CentralPath,
    PerturbedUFM,
    central_path,
    perturbed_ufm,
)

__all__ = [
    "CentralPath",
    "CompSumAnalysis",
    "LinearUFMOptimum",
    "PerturbedUFM",
    "UFMSolution",
    "central_path",
    "gof",
    "h_consistency_bound",
    "linear_ufm_optimum",
    "minimizability_gap",
    "perturbed_ufm",
    "simplex_etf",
    "ufm_minimizer",
]
