"""Pictures of barcodes, matchings, thresholds, theory; needs matplotlib, `pyloss[visualize]`."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "comp_sum": ("draw_comp_sum",),
        "embeddings": ("draw_opis",),
        "inductive": ("draw_inductive_bias",),
        "optim": ("draw_lyapunov",),
        "random_features": ("draw_rf_risk",),
        "topology": ("draw_barcode", "draw_matching"),
    },
)
