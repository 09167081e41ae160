"""A device without a kernel of pyloss, in Python: torch's PrivateUse1 over memory of the CPU.

Its tensors say that they are on `fakedev`, and hold numbers. Like the devices it stands for, it
refuses to mix its tensors with those of the CPU, and it can be one without float64, as Apple's MPS
is. What is read back on the host is counted. Importing this registers the device for the whole
process, which has an accelerator from then on: tests import it in a process of their own.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakedev"


class _Module:
    """What torch and its users ask of `torch.fakedev`."""

    is_initialized = is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    is_in_bad_fork = _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=0: torch.get_rng_state())


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)

settings = {"float64": True}
read_back: list[str] = []  # operations whose result is on the host
# Between devices by their purpose.
KERNEL = torch._C.DispatchKey.CompositeExplicitAutograd
_outermost = (
    torch._C._dispatch_tls_local_include_set(),
    torch._C._dispatch_tls_local_exclude_set(),
)
COPIES = ("aten::_to_copy", "aten::copy_")


class DeviceTensor(torch.Tensor):
    """Wraps the CPU tensor that holds the numbers."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        self.inner = inner
        return self

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, *, dtype=None, device=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op.namespace == "pyloss":
            # What the dispatcher takes for a device that has no kernel of its own; autograd works
            # in it, as in a kernel that is called from outside.
            with torch._C._ForceDispatchKeyGuard(*_outermost):
                return op._op_dk(KERNEL, *args, **kwargs or {})
        return run(op, *args, **kwargs or {})


def run(op, *args, **kwargs):
    """Any operation, by that of the CPU."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    ours = {id(t.inner): t for t in leaves if isinstance(t, DeviceTensor)}
    if ours and op.name() not in COPIES:
        for t in leaves:
            if isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor) and t.dim():
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {op} got one on {t.device}, "
                    f"of shape {tuple(t.shape)}"
                )
    args, kwargs = pytree.tree_unflatten([_inside(t) for t in leaves], spec)
    outputs = op(*args, **kwargs)
    to = kwargs.get("device") is not None and not any(_is_device(t) for t in leaves)
    on_host = to or any(isinstance(t, (bool, int, float)) for t in pytree.tree_leaves(outputs))
    if ours and on_host:
        read_back.append(op.name())
    return outputs if to else pytree.tree_map(lambda t: _outside(t, ours, op), outputs)


def _is_device(value) -> bool:
    return isinstance(value, torch.device) and value.type == NAME


def _inside(value):
    if isinstance(value, DeviceTensor):
        return value.inner
    return torch.device("cpu") if _is_device(value) else value


def _outside(value, ours: dict[int, DeviceTensor], op):
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in ours:  # written to
        return ours[id(value)]
    if value.dtype in (torch.float64, torch.complex128) and not settings["float64"]:
        raise TypeError(f"{op}: {NAME} has no {value.dtype}")
    return DeviceTensor(value)


# Both reach the device past the dispatcher of Python, whose keys they exclude.
def _by_copy(make):
    def made(data, *, device=None, **options):
        on_device = device is not None and torch.device(device).type == NAME
        made = make(data, device="cpu" if on_device else device, **options)
        return made.to(DEVICE) if on_device else made

    return made


torch.tensor, torch.as_tensor = _by_copy(torch.tensor), _by_copy(torch.as_tensor)
_lib = torch.library.Library("_", "IMPL")
_lib.fallback(run, "PrivateUse1")  # operations without a tensor of the device: torch.zeros
