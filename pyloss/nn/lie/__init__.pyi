from pyloss.nn.lie.convolution import GroupConv2d, LiftConv2d, resample_
from pyloss.nn.lie.decomposition import Polar, polar, xi, xi_inv
from pyloss.nn.lie.groups import GL, SL, SO, GroupSample, warp

__all__ = [
    "GL",
    "GroupConv2d",
    "GroupSample",
    "LiftConv2d",
    "Polar",
    "SL",
    "SO",
    "polar",
    "resample_",
    "warp",
    "xi",
    "xi_inv",
]
