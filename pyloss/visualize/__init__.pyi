from pyloss.visualize.comp_sum import draw_comp_sum
from pyloss.visualize.embeddings import draw_opis
from pyloss.visualize.inductive import draw_inductive_bias
from pyloss.visualize.optim import draw_lyapunov
from pyloss.visualize.random_features import draw_rf_risk
from pyloss.visualize.topology import draw_barcode, draw_matching

__all__ = [
    "draw_barcode",
    "draw_comp_sum",
    "draw_inductive_bias",
    "draw_lyapunov",
    "draw_matching",
    "draw_opis",
    "draw_rf_risk",
]
