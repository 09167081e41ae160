"""A simulator of federated learning whose clients see their data, and whose server sees its
clients, in an order of difficulty."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pyloss.functional import _checks as checks
from pyloss.functional import fused_cross_entropy
from pyloss.functional._row_checks import check_integers
from pyloss.research.curriculum import ORDERS, CurriculumSampler, difficulty_scores

__all__ = ["FederatedRun", "dirichlet_split", "simulate"]

_SCORES = ("G", "L", "LG", "E")
_REDRAWS = 1000
_EVALUATION_BATCH = 1024

Samples = tuple[Tensor, Tensor]
Schedule = Callable[[int, int], int]


class FederatedRun(NamedTuple):
    """What :func:`simulate` returns.

    Example:
        >>> import torch
        >>> from pyloss.research.federated import simulate
        >>> samples = (torch.randn(40, 3), torch.arange(40) % 2)
        >>> run = simulate(torch.nn.Linear(3, 2), [samples], samples, rounds=2, clients_per_round=1)
        >>> run.selected
        tensor([[0],
                [0]])
    """

    model: nn.Module  #: the global model after the last round, in evaluation mode
    accuracy: Tensor  #: (rounds,), float64: on the test samples after each round
    loss: Tensor  #: (rounds,), float64: mean cross entropy, likewise
    selected: Tensor  #: (rounds, K), int64: the clients of each round


def dirichlet_split(
    labels: Tensor,
    clients: int,
    alpha: float = 0.2,
    *,
    min_size: int = 1,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    r"""Deals samples out to clients so that each has other shares of the classes.

    The samples of a class go to the clients in shares that are drawn from a Dirichlet distribution
    with all parameters alpha: a small alpha gives most of a class to few clients.

    Args:
        labels: ``(N,)``, integers >= 0.
        clients: >= 1.
        alpha: > 0.
        min_size: the shares are drawn again, up to 1000 times, until each client has so many
            samples.
        generator: of random numbers, on the CPU.

    Returns:
        Indices of the samples of each client, in random order; each sample is in one of them.

    Raises:
        TypeError: an argument of the wrong type. ValueError: one out of range; too few samples, or
            no draw that gives each client enough.

    Example:
        >>> import torch
        >>> from pyloss.research.federated import dirichlet_split
        >>> parts = dirichlet_split(torch.arange(100) % 4, clients=5)
        >>> sorted(torch.cat(parts).tolist()) == list(range(100))
        True

    Reference:
        Hsu, Qi, Brown. Measuring the Effects of Non-Identical Data Distribution for Federated
        Visual Classification. arXiv 1909.06335.
    """
    checks.check_tensor("labels", labels)
    if labels.dim() != 1:
        raise ValueError(f"labels must be (N,), got {list(labels.shape)}")
    check_integers("labels", labels, len(labels))
    clients = checks.checked_count("clients", clients, 1)
    checks.check_range("alpha", alpha, 0.0, open_low=True)
    min_size = checks.checked_count("min_size", min_size)
    checks.check_generator(generator)
    if len(labels) < clients * min_size:
        raise ValueError(
            f"{len(labels)} samples are too few for {clients} clients with {min_size} at least"
        )
    classes = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    for _ in range(_REDRAWS):
        shares = _dirichlet(alpha, (len(classes), clients), generator)
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for members, share in zip(classes, shares):
            members = members[torch.randperm(len(members), generator=generator)]
            cuts = (share.cumsum(0)[:-1] * len(members)).round().long().clamp(max=len(members))
            for part, piece in zip(parts, members.tensor_split(cuts.cpu())):
                part.append(piece)
        found = [torch.cat(part) if part else labels.new_zeros(0).long() for part in parts]
        if min(map(len, found)) >= min_size:
            return [part[torch.randperm(len(part), generator=generator)] for part in found]
    raise ValueError(
        f"no draw gave each of {clients} clients {min_size} samples: raise alpha or lower min_size"
    )


def _dirichlet(alpha: float, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Rows that add up to 1. As logarithms, so that a small alpha underflows nowhere: a gamma
    variable is one of alpha + 1, times a uniform one to the power of 1 / alpha."""
    # What torch.distributions calls, which takes no generator.
    shapes = torch.full(shape, alpha + 1.0, dtype=torch.float64)
    gamma = torch._standard_gamma(shapes, generator)  # pyright: ignore[reportPrivateImportUsage]
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
    return torch.softmax(gamma.log() + torch.log1p(-uniform) / alpha, 1)


class _Options(NamedTuple):
    """How a client trains, and what it is ranked by."""

    local_epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    pacing: Schedule
    order: str
    min_size: int
    generator: torch.Generator | None


def simulate(
    model: nn.Module,
    clients: Sequence[Samples],
    test: Samples,
    *,
    rounds: int = 30,
    clients_per_round: int = 2,
    local_epochs: int = 1,
    batch_size: int = 10,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    pacing: Schedule | None = None,
    order: str = "curriculum",
    score: str = "G",
    expert: nn.Module | None = None,
    client_pacing: Schedule | None = None,
    min_size: int = 32,
    server_momentum: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> FederatedRun:
    r"""Federated averaging with ordered samples and ordered clients.

    In a round the server sends its model w to ``clients_per_round`` clients. Each ranks its samples
    by their cross entropy, takes SGD steps on batches out of the first ``pacing(round, N)`` of
    them, as many steps as ``local_epochs`` passes over all its N samples have, and sends its
    weights back. The server takes

    .. math:: w \leftarrow m\, w + (1 - m) \sum_k \frac{N_k}{\sum_j N_j}\, w_k

    Args:
        model: takes inputs, gives logits. It is not changed.
        clients: samples ``(input, labels)`` of each client, at least one each, on the model's
            device.
        test: samples that the global model is evaluated on after each round.
        rounds: >= 1.
        clients_per_round: K, at most the number of clients.
        local_epochs, batch_size, lr, momentum, weight_decay: of SGD at the clients.
        pacing: a :class:`pyloss.research.curriculum.Pacing`, or another function, of the round and
            the number of samples; None: all samples.
        order: ``"curriculum"``, easy samples first; ``"anti"``, hard ones first; ``"random"``.
        score: the model that ranks: ``"G"``, the global one that has been received; ``"L"``, the
            client's own of its last round, the global one in its first; ``"LG"``, the sum of both
            losses; ``"E"``, ``expert``.
        expert: for ``score="E"``.
        client_pacing: of the round and the number of clients: the K clients are drawn from the
            first so many, at least K, in ``order`` of the mean loss of their samples; None: from
            all.
        min_size: least number of samples in use at a client; all if it has fewer.
        server_momentum: m, in [0, 1).
        generator: for the choice of clients, orders and batches, on the CPU. What the model draws
            itself, as dropout does, is not under it.
        progress: called with each round, from 1 on, and the accuracy after it.

    Buffers that are no floating numbers are those of the first client of a round.

    Returns:
        :class:`FederatedRun`.

    Raises:
        TypeError: an argument of the wrong type. ValueError: one out of range, samples that do not
            fit.

    Example:
        >>> import torch
        >>> from pyloss.research.curriculum import Pacing
        >>> from pyloss.research.federated import dirichlet_split, simulate
        >>> y = torch.arange(400) % 4
        >>> x = torch.nn.functional.one_hot(y, 4) + 0.3 * torch.randn(400, 4)
        >>> clients = [(x[part], y[part]) for part in dirichlet_split(y[:300], 6)]
        >>> run = simulate(torch.nn.Linear(4, 4), clients, (x[300:], y[300:]), rounds=4,
        ...                pacing=Pacing(total_steps=4), client_pacing=Pacing(total_steps=4))
        >>> run.accuracy.shape, run.selected.shape
        (torch.Size([4]), torch.Size([4, 2]))

    Reference:
        Vahidian et al. When Do Curricula Work in Federated Learning? arXiv 2212.12712. McMahan et
        al. Communication-Efficient Learning of Deep Networks from Decentralized Data. arXiv
        1602.05629.
    """
    _check_models(model, score, expert)
    _check_clients(clients, test)
    rounds = checks.checked_count("rounds", rounds, 1)
    clients_per_round = checks.checked_count("clients_per_round", clients_per_round, 1)
    if clients_per_round > len(clients):
        raise ValueError(
            f"clients_per_round must be at most the {len(clients)} clients, got {clients_per_round}"
        )
    checks.check_one_of("order", order, ORDERS)
    for name, value in (("pacing", pacing), ("client_pacing", client_pacing)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a Pacing or a function, got {type(value).__name__}")
    checks.check_range("lr", lr, 0.0)
    checks.check_range("weight_decay", weight_decay, 0.0)
    _check_share("momentum", momentum)
    _check_share("server_momentum", server_momentum)
    checks.check_generator(generator)
    options = _Options(
        local_epochs=checks.checked_count("local_epochs", local_epochs, 1),
        batch_size=checks.checked_count("batch_size", batch_size, 1),
        lr=lr, momentum=momentum, weight_decay=weight_decay,
        pacing=pacing or _all, order=order,
        min_size=checks.checked_count("min_size", min_size, 1), generator=generator,
    )  # fmt: skip

    server, local = copy.deepcopy(model), copy.deepcopy(model)
    last: dict[int, dict[str, Tensor]] = {}  # states of the clients that have trained

    def scores(client: int) -> Tensor:
        """Of its samples, under the models that `score` names."""
        x, y = clients[client]
        models = [server] if "G" in score or score == "L" and client not in last else []
        if expert is not None:
            models.append(expert)
        found = [_each_loss(m, x, y) for m in models]
        if "L" in score and client in last:
            local.load_state_dict(last[client])
            found.append(_each_loss(local, x, y))
        return torch.stack(found).sum(0)

    accuracy, losses, selected = [], [], []
    for at in range(rounds):
        pool = torch.arange(len(clients))
        if client_pacing is not None:
            means = torch.stack([scores(k).double().mean().cpu() for k in pool.tolist()])
            ranking = CurriculumSampler(means, client_pacing, order, clients_per_round, generator)
            ranking.set_step(at)
            chosen = list(ranking)[:clients_per_round]
        else:
            chosen = torch.randperm(len(clients), generator=generator)[:clients_per_round].tolist()
        states, sizes = [], []
        for k in chosen:
            ranks = scores(k)
            local.load_state_dict(server.state_dict())
            _train(local, clients[k], ranks, at, options)
            states.append({name: t.clone() for name, t in local.state_dict().items()})
            sizes.append(len(clients[k][1]))
            if "L" in score:
                last[k] = states[-1]
        server.load_state_dict(_averaged(server.state_dict(), states, sizes, server_momentum))
        right, loss = _evaluated(server, *test)
        accuracy.append(right)
        losses.append(loss)
        selected.append(chosen)
        if progress is not None:
            progress(at + 1, right)
    return FederatedRun(
        server, torch.tensor(accuracy, dtype=torch.float64),
        torch.tensor(losses, dtype=torch.float64), torch.tensor(selected),
    )  # fmt: skip


def _all(step: int, n: int) -> int:
    return n


def _batches(x: Tensor, y: Tensor) -> list[Samples]:
    return list(zip(x.split(_EVALUATION_BATCH), y.split(_EVALUATION_BATCH)))


def _each_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return difficulty_scores(model, _batches(x, y))


@torch.enable_grad()
def _train(model: nn.Module, samples: Samples, ranks: Tensor, at: int, options: _Options) -> None:
    x, y = samples
    sampler = CurriculumSampler(
        ranks, options.pacing, options.order, options.min_size, options.generator
    )
    sampler.set_step(at)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=options.momentum,
        weight_decay=options.weight_decay,
    )  # fmt: skip
    model.train()
    batches: list[Tensor] = []
    for _ in range(options.local_epochs * -(-len(y) // options.batch_size)):
        if not batches:
            batches = list(torch.tensor(list(sampler)).split(options.batch_size))
        batch = batches.pop(0)
        optimizer.zero_grad()
        cast(Tensor, fused_cross_entropy(model(x[batch]), y[batch])).backward()
        optimizer.step()


def _averaged(
    old: dict[str, Tensor], states: list[dict[str, Tensor]], sizes: list[int], momentum: float
) -> dict[str, Tensor]:
    total = sum(sizes)
    found = {}
    for name, before in old.items():
        each = [state[name] for state in states]
        if not before.is_floating_point():
            found[name] = each[0]
            continue
        mean = torch.stack([t.double() * (size / total) for t, size in zip(each, sizes)]).sum(0)
        found[name] = torch.lerp(mean, before.double(), momentum).to(before.dtype)
    return found


@torch.no_grad()
def _evaluated(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    right, loss = 0, 0.0
    for inputs, labels in _batches(x, y):
        logits = model(inputs)
        right += int((logits.argmax(1) == labels).sum())
        loss += float(cast(Tensor, fused_cross_entropy(logits.double(), labels, reduction="sum")))
    return right / len(y), loss / len(y)


def _check_models(model, score: str, expert) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    checks.check_one_of("score", score, _SCORES)
    if (score == "E") != (expert is not None):
        raise ValueError("expert is for score='E', which needs it")
    if expert is not None and not isinstance(expert, nn.Module):
        raise TypeError(f"expert must be a Module, got {type(expert).__name__}")


def _check_clients(clients: Sequence[Samples], test: Samples) -> None:
    if len(clients) == 0:
        raise ValueError("clients must hold at least one client")
    for name, (x, y) in [*((f"clients[{k}]", c) for k, c in enumerate(clients)), ("test", test)]:
        checks.check_tensor(f"the input of {name}", x)
        checks.check_has_dimension(f"the input of {name}", x)
        if len(x) == 0:
            raise ValueError(f"{name} must hold at least one sample")
        check_integers(f"the labels of {name}", y, len(x))


def _check_share(name: str, value: float) -> None:
    checks.check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
