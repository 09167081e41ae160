"""Metrics: functions without a gradient, and accumulators over batches."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "embeddings": ("alignment", "penalty_entropy", "tolerance", "uniformity"),
        "embeddings_batches": ("Alignment", "OPIS", "Tolerance", "Uniformity"),
        "embeddings_opis": ("OPISCurves", "opis"),
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
