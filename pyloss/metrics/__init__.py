"""Metrics: functions without a gradient, and accumulators over batches."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "embeddings": ("alignment", "penalty_entropy", "tolerance", "uniformity"),
        "embeddings_batches": ("Alignment", "OPIS", "Tolerance", "Uniformity"),
        "embeddings_opis": ("OPISCurves", "opis"),
        "neural_collapse": ("cdnv", "equiangle", "equinorm", "nc1", "nc2", "nc3", "nc4"),
        "neural_collapse_batches": ("NeuralCollapse", "NeuralCollapseMetrics"),
        "ranking": ("mrr", "ndcg", "precision_at_k"),
        "segmentation": ("cl_dice",),
        "sorting": ("RankingAccuracy", "ranking_accuracy"),
        "topology": (
            "BettiMatchingError",
            "BettiNumberError",
            "betti_matching_error",
            "betti_number_error",
            "betti_numbers",
        ),
    },
)
