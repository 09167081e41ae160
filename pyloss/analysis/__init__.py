"""Theory in float64: bounds, risks and closed forms. No kernels, and no gradients to train with."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "collapse": (
            "LinearUFMOptimum",
            "UFMSolution",
            "gof",
            "linear_ufm_optimum",
            "simplex_etf",
            "ufm_minimizer",
        ),
        "comp_sum": ("CompSumAnalysis", "h_consistency_bound", "minimizability_gap"),
        "critical": ("Criticality", "criticality", "optimal_aspect_ratio", "optimal_depth"),
        "flow": ("KernelFlow", "kernel_flow"),
        "inductive": (
            "InductiveBias",
            "chi2_mixture_logcdf",
            "gp_inductive_bias",
            "inductive_bias",
            "ncx2_logcdf",
        ),
        "invariance": (
            "Intervention",
            "InvarianceTest",
            "LinearSEM",
            "invariance_environments_needed",
            "invariance_test",
            "linear_sem",
        ),
        "lazy": ("LazyScale", "empirical_ntk", "kernel_alignment", "scaled_mse"),
        "learning_rate": (
            "HessianNoise",
            "batch_extremal_eigenvalue",
            "effective_batch_size",
            "full_batch_eigenvalue",
            "hessian_noise",
            "max_learning_rate",
            "scale_lr",
        ),
        "perturbed_collapse": ("CentralPath", "PerturbedUFM", "central_path", "perturbed_ufm"),
        "random_features": (
            "KernelEigensystem",
            "RFRisk",
            "kernel_eigensystem",
            "optimal_ridge",
            "powerlaw_fit_ratio",
            "rf_risk",
        ),
        "spectrum": (
            "HessianOperator",
            "SpectralDensity",
            "TopEigenvalues",
            "Tridiagonal",
            "hvp",
            "lanczos",
            "slq_density",
            "top_eigenvalues",
        ),
    },
)
