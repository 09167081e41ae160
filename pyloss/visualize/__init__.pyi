from pyloss.visualize.topology import draw_barcode, draw_matching

__all__ = ["draw_barcode", "draw_matching"]
