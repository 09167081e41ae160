from pyloss.analysis.comp_sum import (
    CompSumAnalysis,
    h_consistency_bound,
    minimizability_gap,
)

__all__ = ["CompSumAnalysis", "h_consistency_bound", "minimizability_gap"]
