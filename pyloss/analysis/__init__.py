"""Theory in float64: bounds, risks and closed forms. No kernels, and no gradients to train with."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "comp_sum": ("CompSumAnalysis", "h_consistency_bound", "minimizability_gap"),
        "inductive": (
            "InductiveBias",
            "chi2_mixture_logcdf",
            "gp_inductive_bias",
            "inductive_bias",
            "ncx2_logcdf",
        ),
        "random_features": (
            "KernelEigensystem",
            "RFRisk",
            "kernel_eigensystem",
            "optimal_ridge",
            "powerlaw_fit_ratio",
            "rf_risk",
        ),
    },
)
