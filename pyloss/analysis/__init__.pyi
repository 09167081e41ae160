from pyloss.analysis.comp_sum import (
    CompSumAnalysis,
    h_consistency_bound,
    minimizability_gap,
)
from pyloss.analysis.lazy import LazyScale, empirical_ntk, kernel_alignment, scaled_mse
from pyloss.analysis.learning_rate import (
    HessianNoise,
    batch_extremal_eigenvalue,
    effective_batch_size,
    full_batch_eigenvalue,
    hessian_noise,
    max_learning_rate,
    scale_lr,
)
from pyloss.analysis.spectrum import (
    HessianOperator,
    SpectralDensity,
    TopEigenvalues,
    Tridiagonal,
    hvp,
    lanczos,
    slq_density,
    top_eigenvalues,
)

__all__ = [
    "CompSumAnalysis",
    "HessianNoise",
    "HessianOperator",
    "LazyScale",
    "SpectralDensity",
    "TopEigenvalues",
    "Tridiagonal",
    "batch_extremal_eigenvalue",
    "effective_batch_size",
    "empirical_ntk",
    "full_batch_eigenvalue",
    "h_consistency_bound",
    "hessian_noise",
    "hvp",
    "kernel_alignment",
    "lanczos",
    "max_learning_rate",
    "minimizability_gap",
    "scale_lr",
    "scaled_mse",
    "slq_density",
    "top_eigenvalues",
]
