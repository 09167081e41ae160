"""The CUDA half of every op from Python, on the stand-in for a GPU: python shim_worker.py MODULE.

Values against the CPU kernels; equal bits in three orders of blocks and threads; launches on the
tensor's device and stream; each call of the runtime that fails is an error that leaves nothing.
"""

from __future__ import annotations

import sys

import shim_device

shim = shim_device.install(sys.argv[1])

import torch  # noqa: E402

import pyloss  # noqa: E402
from pyloss import functional as F  # noqa: E402

torch.manual_seed(0)


def with_gradients(loss, *inputs):
    """Results of a function, and the gradients and one second derivative of a sum of them."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    found = loss(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    total = sum((f * torch.linspace(0.5, 1.5, f.numel()).view_as(f)).sum() for f in found)
    return [*found, *torch.autograd.grad(total, inputs)]


def twice(loss, x):
    x = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return [g, *torch.autograd.grad((g * g).sum(), x)]


def steps_of_lion_k(*parameters):
    """Parameters, one of a half type, after two steps."""
    moved = [p.clone().requires_grad_() for p in parameters]
    moved.append(parameters[0].bfloat16().requires_grad_())
    optimizer = pyloss.optim.LionK(moved, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for p in moved:
            p.grad = p.detach().cos()
        optimizer.step()
    return [p.detach() for p in moved]


def problems():
    """name -> a function without arguments that returns tensors."""
    rows, labels = torch.randn(5, 40), torch.randint(40, (5,))
    images, classes = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    hidden, weight = torch.randn(7, 6), torch.randn(11, 6)
    words = torch.randint(11, (7,))
    scores = torch.randn(3, 12)
    a, b = torch.rand(2, 1, 6, 7), (torch.rand(2, 1, 6, 7) > 0.5).float()

    cuts, long = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 10, 300])

    def of(function, *inputs):
        return lambda: with_gradients(function, *inputs)

    return {
        "rows, mean": of(
            lambda x: pyloss.fused_cross_entropy(x, labels, label_smoothing=0.1), rows
        ),
        "rows, half": of(lambda x: pyloss.fused_cross_entropy(x, labels), rows.bfloat16()),
        "rows, none": of(lambda x: F.comp_sum_loss(x, labels, 1.5, reduction="none"), rows),
        "rows, second": lambda: twice(lambda x: pyloss.fused_cross_entropy(x, labels), rows),
        "rows, long": of(
            lambda x: pyloss.fused_cross_entropy(x, labels[:2]), torch.randn(2, 70001)
        ),
        "images": of(lambda x: pyloss.fused_cross_entropy(x, classes), images),
        "moments": of(lambda x: F.spherical_z_loss(x, labels), rows),
        "moments, images": of(lambda x: F.taylor_softmax_loss(x, classes), images),
        "label distribution": of(lambda x: F.aldr_loss(x, labels), rows),
        "linear": of(
            lambda h, w: pyloss.fused_linear_cross_entropy(h, w, words, label_smoothing=0.1),
            hidden,
            weight,
        ),
        "sort": of(pyloss.soft_sort, scores),
        "sort, long": of(pyloss.soft_sort, torch.randn(1, 300)),
        "ranks": of(pyloss.soft_rank, scores),
        "permutation": of(lambda s: pyloss.soft_permutation(s)[1], scores),
        "margin shift": of(lambda x: F.margin_shift(x, x.flip(1), labels), rows),
        "segments": of(lambda x: F.segment_reduce(x, cuts, "max"), rows),
        "segments, long": of(lambda x: tuple(F.segment_moments(x, long)[1:]), torch.randn(300, 65)),
        "segments, softmax": of(lambda x: F.segment_softmax(x, cuts), rows),
        "permutahedron": of(lambda s: F.permutahedron_rank(s), scores),
        "betti": of(lambda x: pyloss.betti_matching_loss(x, b, reduction="none"), a),
        "optimizer": lambda: steps_of_lion_k(hidden, weight),
    }


def check_values(name, run):
    shim.launches()
    found = run()
    assert shim.launches() > 0, f"{name}: no kernel was launched"
    with pyloss.backend("cpu"):
        wanted = run()
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            f, w, rtol=2e-2 if f.dtype == torch.bfloat16 else 1e-4, atol=1e-5
        )
    return found


def check_orders(name, run, found):
    for order, poison in ((1, 0x00), (2, 0x7F)):
        shim.configure(order=order, seed=7, poison=poison)
        for f, again in zip(found, run(), strict=True):
            assert torch.equal(f, again), f"{name}: depends on the order of threads or on memory"
    shim.configure(order=0, seed=0)


def check_failures(name, run, found, most=40):
    """Each of the first calls of the runtime fails once."""
    for calls in range(most):
        shim.fail_after(calls)
        try:
            run()
        except RuntimeError as error:
            assert "cudaErrorMemoryAllocation: out of memory" in str(error), f"{name}: {error}"
        else:
            break
        finally:
            shim.fail_after(-1)
    assert calls > 0, f"{name}: asked the runtime for nothing"
    for f, again in zip(found, run(), strict=True):
        assert torch.equal(f, again), f"{name}: differs after {calls} failures"
    return calls


failures = 0
for name, run in problems().items():
    found = check_values(name, run)
    check_orders(name, run, found)
    failures += check_failures(name, run, found)
print(f"{len(problems())} problems, {failures} failing calls")
