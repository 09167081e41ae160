"""Aggregations of pyloss as those of torch_geometric, for its message-passing layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch_geometric.nn.aggr import Aggregation

from pyloss.nn import LCMAggregation as _LCMAggregation

__all__ = ["LCMAggregation"]


class LCMAggregation(_LCMAggregation, Aggregation):
    r""":class:`pyloss.nn.LCMAggregation` as a ``torch_geometric.nn.aggr.Aggregation``.

    In the place of torch_geometric's own of that name, whose weights it takes by
    ``load_state_dict(..., strict=False)``: without padding, so that what a node gets does not
    depend on the largest neighbourhood of the batch, and an empty neighbourhood gives ``identity``.
    As there, edges must be sorted by destination.

    Args:
        in_channels, out_channels, op, project, identity, shuffle: as for
            :class:`pyloss.nn.LCMAggregation`.

    Raises:
        As :class:`pyloss.nn.LCMAggregation`; ImportError without torch_geometric.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import SimpleConv
        >>> from pyloss.integrations.torch_geometric import LCMAggregation
        >>> layer = SimpleConv(aggr=LCMAggregation(8, 8))
        >>> edges = torch.tensor([[0, 2, 1], [0, 0, 2]])  # sorted by their second row
        >>> layer(torch.randn(3, 8), edges).shape
        torch.Size([3, 8])

    Reference:
        Ong, Veličković. Learnable Commutative Monoids for Graph Neural Networks. arXiv 2212.08541.
    """

    __repr__ = nn.Module.__repr__  # Aggregation's has no options

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
    ) -> Tensor:
        return super().forward(x, index, ptr, dim_size, dim)
