"""Groups of matrices of positive determinant, and convolutions over them."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "convolution": ("GroupConv2d", "LiftConv2d", "resample_"),
        "decomposition": ("Polar", "polar", "xi", "xi_inv"),
        "groups": ("GL", "SL", "SO", "GroupSample", "warp"),
    },
)
