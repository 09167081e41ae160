"""Pictures of barcodes and matchings; needs matplotlib, the extra `pyloss[visualize]`."""

from pyloss.visualize.topology import draw_barcode, draw_matching

__all__ = ["draw_barcode", "draw_matching"]
