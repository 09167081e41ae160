"""Many threads meet pyloss at once: first uses, caches, registries, ops; each result is that of one
thread alone. A process of its own, in which nothing has been used. With a free-threaded Python it
also asserts that importing pyloss has left the GIL off."""

from __future__ import annotations

import sys
import threading

import torch

import pyloss

THREADS, ROUNDS = 8, 3
sys.setswitchinterval(1e-5)
torch.set_num_threads(2)


def inputs(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 16, generator=generator)
    return x.requires_grad_(), torch.randint(16, (6,), generator=generator), x.detach().roll(1, 0)


def formulas(x, y, z):
    """The counter is imported while others register formulas. (Its mode is of all threads.)"""
    from torch.utils.flop_counter import flop_registry

    pyloss.fused_linear_cross_entropy(x, z[:4], y % 4)
    return torch.tensor(float(torch.ops.pyloss.linear_cross_entropy_fwd in flop_registry))


def on_reference(x, y, z):  # a setting of one thread, which no other may see
    with pyloss.backend("reference"):
        assert pyloss.backends.forced() == "reference"
        return pyloss.fused_cross_entropy(x, y)


CASES = {
    "cross entropy": lambda x, y, z: pyloss.fused_cross_entropy(x, y),
    "linear": lambda x, y, z: pyloss.fused_linear_cross_entropy(x, z[:5], y % 5),
    "reference": on_reference,
    "soft rank": lambda x, y, z: pyloss.soft_rank(x).square().mean(),
    "permutahedron": lambda x, y, z: pyloss.soft_rank(x, method="permutahedron").sum(),
    "attention": lambda x, y, z: pyloss.tensor_attention(
        *(t[None, :, None, :4] for t in (x, z, z, z, z))
    ).sum(),
    "info_nce": lambda x, y, z: pyloss.functional.info_nce(x, z),
    "betti": lambda x, y, z: pyloss.nn.BettiMatchingLoss()(x[None, None], z[None, None]),
    "segments": lambda x, y, z: pyloss.functional.segment_reduce(x, torch.tensor([0, 2, 6])).sum(),
    "metric": lambda x, y, z: pyloss.metrics.uniformity(x.detach()) + 0 * x.sum(),
    "module": lambda x, y, z: pyloss.nn.SpearmanLoss()(x, z),
    "formulas": formulas,
}


def results(seed: int, order: list[str]) -> dict[str, list[torch.Tensor]]:
    found = {}
    for name in order:
        x, y, z = inputs(seed)
        loss = CASES[name](x, y, z)
        assert pyloss.backends.forced() is None
        grads = torch.autograd.grad(loss, x) if loss.requires_grad else ()
        found[name] = [loss.detach(), *grads]
    return found


def main() -> None:
    start, found, failed = threading.Barrier(THREADS), {}, []

    def work(number: int) -> None:
        names = list(CASES)
        names = names[number % len(names) :] + names[: number % len(names)]
        start.wait()
        try:
            found[number] = [results(seed, names) for seed in range(ROUNDS)]
        except BaseException as error:
            failed.append((number, error))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if failed:
        raise failed[0][1]
    assert len(found) == THREADS, "a thread hangs"
    expected = [results(seed, list(CASES)) for seed in range(ROUNDS)]
    for number, rounds in found.items():
        for seed, cases in enumerate(rounds):
            for name, tensors in cases.items():
                for a, b in zip(tensors, expected[seed][name]):
                    assert torch.equal(a, b), (number, seed, name, a, b)
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    free_threaded = "free-threading" in sys.version
    assert not (free_threaded and enabled), "importing pyloss has switched the GIL on"
    print(f"{THREADS} threads, GIL {'on' if enabled else 'off'}")


if __name__ == "__main__":
    main()
