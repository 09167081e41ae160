"""similarity_topk in C++: products by tiles that are looked through in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES

# A list of the largest is sorted by insertion; longer ones are better selected from whole rows.
MOST = 64
_VECTORS = "-v" in _C.simd_level()  # else the products of torch are the faster ones


def takes(queries: Tensor, keys: Tensor, k: int) -> bool:
    return (
        _VECTORS
        and k <= MOST
        and keys.shape[0] < 2**31
        and queries.device.type == "cpu"
        and queries.dtype in (torch.float32, torch.float64)
    )


def _rows(x: Tensor) -> Tensor:
    return x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()


def forward(queries: Tensor, keys: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    queries, keys = _rows(queries), _rows(keys)
    (count, depth), others = queries.shape, keys.shape[0]
    values = queries.new_empty((count, k))
    indices = torch.empty((count, k), dtype=torch.int64)
    _C.similarity_topk(
        DTYPE_CODES[queries.dtype], count, others, depth, queries.data_ptr(), queries.stride(0),
        keys.data_ptr(), keys.stride(0), k, max(first, -1), values.data_ptr(), indices.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return values, indices
