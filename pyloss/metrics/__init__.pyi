from pyloss.metrics.embeddings import (
    alignment,
    penalty_entropy,
    tolerance,
    uniformity,
)
from pyloss.metrics.embeddings_batches import OPIS, Alignment, Tolerance, Uniformity
from pyloss.metrics.embeddings_opis import OPISCurves, opis
from pyloss.metrics.neural_collapse import (
    cdnv,
    equiangle,
    equinorm,
    nc1,
    nc2,
    nc3,
    nc4,
)
from pyloss.metrics.neural_collapse_batches import NeuralCollapse, NeuralCollapseMetrics
from pyloss.metrics.ranking import (
    mrr,
    ndcg,
    precision_at_k,
)
from pyloss.metrics.segmentation import cl_dice
from pyloss.metrics.sorting import RankingAccuracy, ranking_accuracy
from pyloss.metrics.topology import (
    BettiMatchingError,
    BettiNumberError,
    betti_matching_error,
    betti_number_error,
    betti_numbers,
)

__all__ = [
    "Alignment",
    "BettiMatchingError",
    "BettiNumberError",
    "NeuralCollapse",
    "NeuralCollapseMetrics",
    "OPIS",
    "OPISCurves",
    "RankingAccuracy",
    "Tolerance",
    "Uniformity",
    "alignment",
    "betti_matching_error",
    "betti_number_error",
    "betti_numbers",
    "cdnv",
    "cl_dice",
    "equiangle",
    "equinorm",
    "mrr",
    "nc1",
    "nc2",
    "nc3",
    "nc4",
    "ndcg",
    "opis",
    "penalty_entropy",
    "precision_at_k",
    "ranking_accuracy",
    "tolerance",
    "uniformity",
]
