from pyloss.optim.lion_k import Lion, LionK
from pyloss.optim.lyapunov import LionKLyapunov, LyapunovMonitor, lion_k_lyapunov

__all__ = ["Lion", "LionK", "LionKLyapunov", "LyapunovMonitor", "lion_k_lyapunov"]
