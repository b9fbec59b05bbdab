"""Gram matrices by half of their products."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Columns per block of a Gram matrix: blocks below the diagonal are mirrored, not multiplied.
GRAM_BLOCK = 200


def gram(v: Tensor) -> Tensor:
    """Return VᵀV of an N × d matrix by half of its products.

    NumPy hands a matrix times its own transpose to the symmetric rank-k update of BLAS, which torch does not offer.
    On other devices and for other types only blocks on and above the diagonal are multiplied.
    """
    if v.device.type == "cpu" and v.dtype in (torch.float32, torch.float64):
        matrix = v.numpy(force=True)
        return torch.from_numpy(np.matmul(matrix.T, matrix))
    d = v.shape[1]
    parts = max(1, round(d / GRAM_BLOCK))
    if parts == 1:
        product: Tensor = v.T @ v
        return product
    edges = [d * i // parts for i in range(parts + 1)]
    result: Tensor = v.new_empty(d, d)
    for i in range(parts):
        rows = slice(edges[i], edges[i + 1])
        block = v[:, rows].T @ v[:, edges[i] :]
        result[rows, edges[i] :] = block
        result[edges[i + 1] :, rows] = block[:, edges[i + 1] - edges[i] :].T
    return result
