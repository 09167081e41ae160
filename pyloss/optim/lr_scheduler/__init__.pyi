from pyloss.optim.lr_scheduler.recorder import GradNormRecorder
from pyloss.optim.lr_scheduler.refinement import refine_schedule
from pyloss.optim.lr_scheduler.schedules import LinearDecay, RefinedSchedule

__all__ = ["GradNormRecorder", "LinearDecay", "RefinedSchedule", "refine_schedule"]
