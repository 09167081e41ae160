from pyloss.analysis.collapse import (
    LinearUFMOptimum,
    UFMSolution,
    gof,
    linear_ufm_optimum,
    simplex_etf,
    ufm_minimizer,
)
from pyloss.analysis.comp_sum import CompSumAnalysis, h_consistency_bound, minimizability_gap
from pyloss.analysis.critical import Criticality, criticality, optimal_aspect_ratio, optimal_depth
from pyloss.analysis.flow import KernelFlow, kernel_flow
from pyloss.analysis.inductive import (
    InductiveBias,
    chi2_mixture_logcdf,
    gp_inductive_bias,
    inductive_bias,
    ncx2_logcdf,
)
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
from pyloss.analysis.random_features import (
    KernelEigensystem,
    RFRisk,
    kernel_eigensystem,
    optimal_ridge,
    powerlaw_fit_ratio,
    rf_risk,
)

__all__ = [
    "CentralPath",
    "CompSumAnalysis",
    "Criticality",
    "InductiveBias",
    "Intervention",
    "InvarianceTest",
    "KernelEigensystem",
    "KernelFlow",
    "LinearSEM",
    "LinearUFMOptimum",
    "PerturbedUFM",
    "RFRisk",
    "UFMSolution",
    "central_path",
    "chi2_mixture_logcdf",
    "criticality",
    "gof",
    "gp_inductive_bias",
    "h_consistency_bound",
    "inductive_bias",
    "invariance_environments_needed",
    "invariance_test",
    "kernel_eigensystem",
    "kernel_flow",
    "linear_sem",
    "linear_ufm_optimum",
    "minimizability_gap",
    "ncx2_logcdf",
    "optimal_aspect_ratio",
    "optimal_depth",
    "optimal_ridge",
    "perturbed_ufm",
    "powerlaw_fit_ratio",
    "rf_risk",
    "simplex_etf",
    "ufm_minimizer",
]
