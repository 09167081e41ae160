"""Pictures of barcodes, matchings, thresholds and runs; needs matplotlib, `pyloss[visualize]`."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "collapse": ("draw_central_path", "draw_collapse"),
        "comp_sum": ("draw_comp_sum",),
        "criticality": ("draw_kernel_flow",),
        "embeddings": ("draw_opis",),
        "inductive": ("draw_inductive_bias",),
        "invariance": ("draw_invariance",),
        "lazy": ("draw_alignment",),
        "optim": ("draw_lyapunov",),
        "random_features": ("draw_rf_risk",),
        "spectrum": ("draw_spectrum",),
        "topology": ("draw_barcode", "draw_matching"),
    },
)
