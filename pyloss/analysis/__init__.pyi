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

__all__ = [
    "CompSumAnalysis",
    "Criticality",
    "Intervention",
    "InvarianceTest",
    "KernelFlow",
    "LinearSEM",
    "criticality",
    "h_consistency_bound",
    "invariance_environments_needed",
    "invariance_test",
    "kernel_flow",
    "linear_sem",
    "minimizability_gap",
    "optimal_aspect_ratio",
    "optimal_depth",
]
