"""The compiled module and the ops' namespace, which have a name of their own in each build."""

from . import _ops

NAMESPACE = _ops.add_op_namespace_prefix("").removesuffix("::")
native = getattr(_ops, NAMESPACE)
