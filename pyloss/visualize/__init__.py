"""Pictures of barcodes, matchings, thresholds and runs; needs matplotlib, `pyloss[visualize]`."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "comp_sum": ("draw_comp_sum",),
        "embeddings": ("draw_opis",),
        "lazy": ("draw_alignment",),
        "optim": ("draw_lyapunov",),
        "spectrum": ("draw_spectrum",),
        "topology": ("draw_barcode", "draw_matching"),
    },
)
