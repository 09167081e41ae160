"""Networks of the deep conjugate direction method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.functional import _checks as checks


class _Block(nn.Module):
    def __init__(self, conv: type[nn.Module], channels: int) -> None:
        super().__init__()
        self.first = conv(channels, channels, 3, padding=1)
        self.second = conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(torch.relu(x))))


class _PoissonNet(nn.Module):
    """A linear layer, residual blocks on a fine and on a coarse grid, a linear layer."""

    _dims: int
    _conv: type[nn.Module]

    def __init__(self, channels: int = 16, blocks: int = 2, levels: int = 1) -> None:
        super().__init__()
        self.channels = channels = checks.checked_count("channels", channels, 1)
        self.blocks = blocks = checks.checked_count("blocks", blocks, 1)
        self.levels = levels = checks.checked_count("levels", levels, 0)
        conv = self._conv

        def chain() -> nn.Sequential:
            return nn.Sequential(*(_Block(conv, channels) for _ in range(blocks)))

        self.first = conv(1, channels, 3, padding=1)
        self.down = nn.ModuleList(chain() for _ in range(levels))
        self.bottom = chain()
        self.up = nn.ModuleList(chain() for _ in range(levels))
        self.last = conv(channels, 1, 3, padding=1)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, blocks={self.blocks}, levels={self.levels}"

    def forward(self, residual: Tensor) -> Tensor:
        checks.check_floating("residual", residual)
        if residual.dim() != self._dims + 1:
            sizes = ", ".join("DHW"[-self._dims :])
            raise ValueError(f"residual must be (B, {sizes}), got {list(residual.shape)}")
        x = self.first(residual.unsqueeze(1))
        pool = F.avg_pool2d if self._dims == 2 else F.avg_pool3d
        fine = []
        for blocks in self.down:
            x = blocks(x)
            fine.append(x)
            # An odd last row is a cell of its own, with the mean of what there is.
            kernel = [min(2, n) for n in x.shape[2:]]
            x = pool(x, kernel, ceil_mode=True, count_include_pad=False)
        x = self.bottom(x)
        for blocks, skip in zip(self.up, reversed(fine)):
            x = blocks(skip + F.interpolate(x, size=skip.shape[2:], mode="nearest"))
        return self.last(x).squeeze(1)


class PoissonNet2d(_PoissonNet):
    r"""A small network that makes directions of residuals on a grid of two dimensions.

    A convolution, residual blocks, the same on a grid of half the size and back, a convolution: for
    :func:`pyloss.functional.dcdm_solve`, trained with
    :func:`pyloss.functional.conjugate_direction_loss`.

    .. math:: x \mapsto x + C_2\,\mathrm{relu}(C_1\,\mathrm{relu}(x))
              \quad\text{in each block, with 3 x 3 convolutions}

    Args:
        channels: >= 1.
        blocks: residual blocks before and after each change of the grid, >= 1.
        levels: how often the grid is halved, by means, >= 0; back by nearest neighbours.

    Shape:
        - residual: ``(B, H, W)``, of length 1 each
        - output: the same

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; another shape.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.PoissonNet2d()(torch.randn(4, 24, 24)).shape
        torch.Size([4, 24, 24])

    Reference:
        Kaneda et al. arXiv 2205.10763.
    """

    _dims, _conv = 2, nn.Conv2d


class PoissonNet3d(_PoissonNet):
    r"""As :class:`pyloss.nn.PoissonNet2d`, on a grid of three dimensions.

    .. math:: x \mapsto x + C_2\,\mathrm{relu}(C_1\,\mathrm{relu}(x))
              \quad\text{in each block, with 3 x 3 x 3 convolutions}

    Args:
        channels, blocks, levels: as there.

    Shape:
        - residual: ``(B, D, H, W)``, of length 1 each
        - output: the same

    Raises:
        As there.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.PoissonNet3d(channels=4)(torch.randn(2, 8, 8, 7)).shape
        torch.Size([2, 8, 8, 7])

    Reference:
        Kaneda et al. arXiv 2205.10763.
    """

    _dims, _conv = 3, nn.Conv3d
