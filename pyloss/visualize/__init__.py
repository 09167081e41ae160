"""Pictures of barcodes and matchings; needs matplotlib, the extra `pyloss[visualize]`."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "topology": ("draw_barcode", "draw_matching"),
    },
)
