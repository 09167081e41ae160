from pyloss.ops.margin_shift.reference import backward, forward  # noqa: F401
