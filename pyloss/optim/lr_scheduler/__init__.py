"""Schedules of learning rates, and the gradient norms that one of them is made from."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "recorder": ("GradNormRecorder",),
        "refinement": ("refine_schedule",),
        "schedules": ("LinearDecay", "RefinedSchedule"),
    },
)
