from pyloss.visualize.collapse import draw_central_path, draw_collapse
from pyloss.visualize.comp_sum import draw_comp_sum
from pyloss.visualize.criticality import draw_kernel_flow
from pyloss.visualize.embeddings import draw_opis
from pyloss.visualize.inductive import draw_inductive_bias
from pyloss.visualize.invariance import draw_invariance
from pyloss.visualize.lazy import draw_alignment
from pyloss.visualize.optim import draw_lyapunov
from pyloss.visualize.random_features import draw_rf_risk
from pyloss.visualize.spectrum import draw_spectrum
from pyloss.visualize.topology import draw_barcode, draw_matching

__all__ = [
    "draw_alignment",
    "draw_barcode",
    "draw_central_path",
    "draw_collapse",
    "draw_comp_sum",
    "draw_inductive_bias",
    "draw_invariance",
    "draw_kernel_flow",
    "draw_lyapunov",
    "draw_matching",
    "draw_opis",
    "draw_rf_risk",
    "draw_spectrum",
]
