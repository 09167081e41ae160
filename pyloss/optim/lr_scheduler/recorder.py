"""The norms of the gradients of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyloss.functional import _checks as checks
from pyloss.optim.lr_scheduler.refinement import NORMS

_FIRST_CAPACITY = 1024

# On the CPU torch adds up the numbers of a tensor one after the other: the L1 norm of 5e7 float32
# numbers is a third too small. Blocks of this many are right to 1e-5, and their norms are few. A
# block is also too short for torch to wake threads, which wait for each other after each call.
_BLOCK = 1 << 14
# From this many numbers on the threads are worth waiting for: once for many blocks.
_LONG = 1 << 20
_BLOCKS_A_CALL = 256  # of half types torch makes a copy of so many


class GradNormRecorder:
    r"""Records the norm of all gradients together at every step of an optimizer.

    One multi-tensor norm a step, written to a tensor on the device of the gradients: nothing waits
    for that device. It is what :class:`RefinedSchedule` and :func:`refine_schedule` are made from.

    Args:
        optimizer: whose ``step`` is watched. With a closure, the gradients are those of its last
            call.
        norm: ``"l2"``, for SGD, or ``"l1"``, for Adam and its like.

    Attributes:
        norms: one number for each step so far, a view: float32, float64 with the first gradient.

    Gradients of half types are summed in float32, and those that are split over processes (FSDP2,
    tensor parallel: DTensors) over all of them. A gradient scaler skips steps with infinite
    gradients, and so does the record; of a fused optimizer, which it does not stop, the record is
    infinite there, and divided by the scale elsewhere. Clip gradients and the record is of the
    clipped ones: record a run without.

    Raises:
        TypeError: no optimizer.
        ValueError: an unknown norm.
        RuntimeError: at a step, for sparse gradients.

    Example:
        >>> import torch
        >>> from pyloss.optim.lr_scheduler import GradNormRecorder
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> recorder = GradNormRecorder(optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().div(2).backward()
        ...     optimizer.step()
        >>> recorder.norms
        tensor([5.0000, 2.5000, 1.2500])
        >>> recorder.remove()
    """

    def __init__(self, optimizer: Optimizer, norm: str = "l2") -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {type(optimizer).__name__}")
        checks.check_one_of("norm", norm, NORMS)
        self.norm = norm
        self._count = 0
        self._buffer: Tensor | None = None  # twice as long whenever it is full
        # With a closure the gradients come while the step is made.
        self._handles = (
            optimizer.register_step_pre_hook(lambda o, a, k: None if _closed(a, k) else self(o)),
            optimizer.register_step_post_hook(lambda o, a, k: self(o) if _closed(a, k) else None),
        )

    @property
    def norms(self) -> Tensor:
        """Those of the steps so far."""
        return torch.empty(0) if self._buffer is None else self._buffer[: self._count]

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer) -> None:
        total = total_norm(
            (p.grad for group in optimizer.param_groups for p in group["params"]), self.norm
        )
        scale = getattr(optimizer, "grad_scale", None)  # from a GradScaler to a fused optimizer
        if isinstance(scale, Tensor):
            total = total / scale.to(total.device)
        self._append(total)

    def _append(self, total: Tensor) -> None:
        if self._buffer is None:
            dtype = torch.float64 if total.dtype == torch.float64 else torch.float32
            self._buffer = torch.zeros(_FIRST_CAPACITY, dtype=dtype, device=total.device)
        elif self._count == len(self._buffer):
            self._buffer = torch.cat([self._buffer, torch.zeros_like(self._buffer)])
        if self._buffer.device != total.device:  # as it was loaded
            self._buffer = self._buffer.to(total.device)
        self._buffer[self._count].copy_(total, non_blocking=True)
        self._count += 1

    def remove(self) -> None:
        """Stops recording; the norms stay."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The norm and the numbers so far, as a copy."""
        return {"norm": self.norm, "norms": self.norms.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the numbers of an earlier recorder of the same norm.

        Raises:
            ValueError: another norm.
        """
        if state_dict["norm"] != self.norm:
            raise ValueError(f"norm is {self.norm!r} here and {state_dict['norm']!r} in state_dict")
        norms = state_dict["norms"]
        self._count = len(norms)
        room = norms.new_zeros(max(_FIRST_CAPACITY, self._count))
        self._buffer = torch.cat([norms, room]) if self._count else None


def _closed(args: tuple, kwargs: dict) -> bool:
    """Whether step() got a closure; the first argument is the optimizer."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


def total_norm(gradients: Iterable[Tensor | None], norm: str = "l2") -> Tensor:
    """Of all of them as one vector, 0-d, no less than float32; without any, 0."""
    order = int(norm[1])
    alike: dict[Any, list[Tensor]] = {}
    for grad in gradients:
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(f"gradients must be dense, got one of layout {grad.layout}")
        split = (grad.device_mesh, grad.placements) if checks.is_dtensor(grad) else None
        alike.setdefault((grad.device, grad.dtype, split), []).append(grad)
    if not alike:
        return torch.zeros(())
    parts = [
        _norm(grads, order) if split is None else _norm_of_split(grads, order, *split)
        for (_, _, split), grads in alike.items()
    ]
    wide = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
    parts = [p.to(parts[0].device, wide, non_blocking=True) for p in parts]
    return torch.linalg.vector_norm(torch.stack(parts), order)


def _norm(grads: list[Tensor], order: int) -> Tensor:
    """Of tensors of one dtype on one device."""
    half = grads[0].dtype in (torch.float16, torch.bfloat16)
    wide = dict(dtype=torch.float32) if half else {}
    short, long = _blocks(grads) if grads[0].is_cpu else (grads, [])
    parts = [torch.stack(torch._foreach_norm(short, order, **wide))]
    parts += [torch.linalg.vector_norm(rows, order, 1, **wide) for rows in long]
    return torch.linalg.vector_norm(torch.cat(parts), order)


def _blocks(grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Blocks by themselves, one or more, and those of long tensors as the rows of matrices."""
    short, long = [], []
    for g in grads:
        if g.numel() <= _BLOCK:
            short.append(g)
        elif g.numel() < _LONG:
            short += g.flatten().split(_BLOCK)
        else:
            flat = g.flatten()
            whole = len(flat) - len(flat) % _BLOCK
            long += flat[:whole].view(-1, _BLOCK).split(_BLOCKS_A_CALL)
            short.append(flat[whole:])
    return short, long


def _norm_of_split(grads: list[Any], order: int, mesh: Any, placements: Any) -> Tensor:
    """Of DTensors that are split alike: the sum of powers over the processes that hold parts."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if any(p.is_partial() for p in placements):  # sums that are still to come
        return _norm([grad.full_tensor() for grad in grads], order)
    power = _norm([grad.to_local() for grad in grads], order) ** order
    summed = [Replicate() if p.is_replicate() else Partial() for p in placements]
    return DTensor.from_local(power, mesh, summed, run_check=False).full_tensor() ** (1 / order)
