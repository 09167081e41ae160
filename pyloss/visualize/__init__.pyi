from pyloss.visualize.comp_sum import draw_comp_sum
from pyloss.visualize.embeddings import draw_opis
from pyloss.visualize.lazy import draw_alignment
from pyloss.visualize.optim import draw_lyapunov
from pyloss.visualize.spectrum import draw_spectrum
from pyloss.visualize.topology import draw_barcode, draw_matching

__all__ = [
    "draw_alignment",
    "draw_barcode",
    "draw_comp_sum",
    "draw_lyapunov",
    "draw_matching",
    "draw_opis",
    "draw_spectrum",
]
