from pyloss.analysis.comp_sum import (
    CompSumAnalysis,
    h_consistency_bound,
    minimizability_gap,
)
from pyloss.analysis.inductive import (
    InductiveBias,
    chi2_mixture_logcdf,
    gp_inductive_bias,
    inductive_bias,
    ncx2_logcdf,
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
    "CompSumAnalysis",
    "InductiveBias",
    "KernelEigensystem",
    "RFRisk",
    "chi2_mixture_logcdf",
    "gp_inductive_bias",
    "h_consistency_bound",
    "inductive_bias",
    "kernel_eigensystem",
    "minimizability_gap",
    "ncx2_logcdf",
    "optimal_ridge",
    "powerlaw_fit_ratio",
    "rf_risk",
]
