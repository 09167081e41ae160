from pyloss.optim.lion_k import Lion, LionK

__all__ = ["Lion", "LionK"]
