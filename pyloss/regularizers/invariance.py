"""How far one linear head is from the best in each of several environments, as a penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._environments import check_environments, gradients
from pyloss.functional._sums import reduced

KINDS = ("gap", "irmv1")


def invariance_penalty(
    features: Tensor,
    target: Tensor,
    head: Tensor,
    env_offsets: Tensor,
    *,
    kind: str = "gap",
    reduction: str = "mean",
) -> Tensor:
    r"""How far a linear head is from being the least-squares solution in every environment at once.

    .. math::
        G_e = \frac{1}{n_e} \sum_{i \in e} \phi_i (\phi_i^\top w - y_i), \qquad
        \|G_e\|^2 \quad\text{or}\quad \Big(\frac{\partial}{\partial s} R_e(s w)
        \Big|_{s = 1}\Big)^2 = (2\, w^\top G_e)^2

    :math:`G_e` is half the gradient of the squared error :math:`R_e` of environment e: where it is
    0 for all e, the representation is invariant, and its head need not know the environment. Added
    to a loss it asks for that. It is 0 at w = 0 and a representation that is 0, too: the loss must
    speak against those.

    Args:
        features: :math:`\phi`, ``(N, k)``, floating, one environment behind the other.
        target: ``(N,)``, or ``(N, m)`` for several responses.
        head: w, ``(k,)``, or ``(k, m)``.
        env_offsets: ``(E + 1,)``, int32 or int64: environment e is the rows from
            ``env_offsets[e]`` to ``env_offsets[e + 1]``; ``pyloss.segment`` makes offsets.
        kind: ``"gap"``, or ``"irmv1"`` for the second, the penalty of invariant risk minimization.
        reduction: ``"mean"`` or ``"sum"`` over environments, or ``"none"``.

    Returns:
        0-d, or ``(E,)``; no less than float32, also under autocast. NaN for an environment without
        rows, and for the mean of none.

    Raises:
        TypeError, RuntimeError: tensors of a wrong type, dtype or device.
        ValueError: shapes that do not fit, an option out of range; on the CPU offsets that do not
            cut the rows into environments.

    Example:
        >>> import torch, pyloss
        >>> features = torch.tensor([[1.0], [2.0], [1.0], [3.0]])
        >>> offsets = torch.tensor([0, 2, 4])
        >>> target = 2 * features[:, 0]
        >>> pyloss.regularizers.invariance_penalty(features, target, torch.tensor([2.0]), offsets)
        tensor(0.)

    Reference:
        Parulekar, Shanmugam, Shakkottai. PAC Generalization via Invariant Representations. arXiv
        2205.15196. Arjovsky et al. Invariant Risk Minimization. arXiv 1907.02893.
    """
    checks.check_one_of("kind", kind, KINDS)
    checks.check_reduction(reduction)
    check_environments(features, target, env_offsets)
    checks.check_floating("head", head)
    checks.check_device("head", head, features, "features")
    if head.shape != (features.shape[1], *target.shape[1:]):
        raise ValueError(
            f"head must have the shape {[features.shape[1], *target.shape[1:]]}, got "
            f"{list(head.shape)}"
        )
    work = torch.promote_types(features.dtype, torch.float32)
    with checks.without_autocast(features):
        phi, y = features.to(work), target.to(work)
        each = gradients(phi, y, head.to(work), env_offsets)  # (E, k, *)
        if kind == "irmv1":
            each = 2 * each * head.to(work)
            return reduced(each.flatten(1).sum(1).square(), reduction)
        return reduced(each.flatten(1).square().sum(1), reduction)
