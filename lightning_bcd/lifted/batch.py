"""The training batch of a lifted algorithm: checked before anything changes, recognised in the next sweep."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from lightning_bcd.lifted.chain import Chain
from lightning_bcd.prox.losses import Loss


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Return input and targets of a batch.

    Raises:
        TypeError: If it is not a pair of tensors.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        got = [type(t).__name__ for t in batch] if isinstance(batch, list | tuple) else type(batch).__name__
        raise TypeError(f"Expected a batch to be a pair (x, y) of tensors, but got {got}. Make the loader yield pairs.")
    return batch[0], batch[1]


def check_input(x: Tensor, chain: Chain) -> None:
    """Raise a ValueError unless x is not empty, finite, of the weights' precision and fits the network."""
    dtype = chain[0].weight.dtype
    if len(x) == 0:
        raise ValueError("Expected at least one sample in a batch, but got none. Check the loader.")
    if x.dtype != dtype:
        raise ValueError(f"Expected the input in the weights' precision {dtype}, but got {x.dtype}. Convert the data.")
    # The sum is finite unless an entry is not, or all are absurdly large.
    if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
        raise ValueError("Expected finite input, but it holds NaN or infinity. Clean the data.")
    chain.check_input(x)


def encode_targets(y: Tensor, samples: int, dtype: torch.dtype, num_outputs: int, loss: Loss) -> Tensor:
    """Return the targets the loss works on: class labels encoded, real targets checked.

    Args:
        y: Class labels (N,) of an integer type, or real targets (N, num_outputs).
        samples: N.
        dtype: Precision of the network.
        num_outputs: Outputs of the network.
        loss: The loss.

    Raises:
        ValueError: If labels are out of range, or the shape or values do not suit the loss.
    """
    if y.is_floating_point():
        if y.shape != (samples, num_outputs):
            raise ValueError(
                f"Expected real targets of shape {(samples, num_outputs)}, one column per output, but got "
                f"{tuple(y.shape)}. Reshape them, or give class labels as integers of shape ({samples},)."
            )
        loss.check_targets(y)
        return y.to(dtype)
    if y.shape != (samples,):
        raise ValueError(
            f"Expected class labels of shape ({samples},), one per sample, but got {tuple(y.shape)}. Give one integer "
            "per sample, or real targets with one column per output."
        )
    low, high = (int(v) for v in torch.stack([y.min(), y.max()]).tolist())
    if low < 0 or high >= num_outputs:
        raise ValueError(
            f"Expected class labels from 0 to {num_outputs - 1}, one per output of the network, but got {low} to "
            f"{high}. Number the classes from 0 and give the last layer one output per class."
        )
    return loss.encode(y, num_outputs, dtype)


class Fingerprint:
    """Recognises a batch: its size and a checksum that depends on the order of its samples.

    Args:
        x: Input.
        y: Targets as the loader gives them.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._seen = _identity(x, y)
        self.value = _checksum(x, y)

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raise a ValueError if these are not the samples of the fingerprint."""
        if _identity(x, y) == self._seen:
            return
        value = _checksum(x, y)
        if not same_samples(value, self.value):
            raise ValueError(
                f"Expected the same {int(self.value[0])} samples in the same order in every sweep, because each has "
                f"auxiliary variables of its own, but the batch of {int(value[0])} samples changed. Use "
                "full_batch(train_set): no shuffling, no random augmentation, no drop_last. Or use persist=False."
            )
        self._seen = _identity(x, y)


def same_samples(first: Tensor, second: Tensor) -> bool:
    """Whether two checksums belong to the same samples; devices sum in different orders."""
    return bool(torch.allclose(first.cpu(), second.cpu(), rtol=1e-5, atol=1e-8))


def _identity(x: Tensor, y: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), x._version, len(x), y.data_ptr(), y._version)


def _checksum(x: Tensor, y: Tensor) -> Tensor:
    # Fixed irregular weights for rows and columns: a permutation of either changes the sum.
    rows = _weights(len(x), x)
    flat = x.flatten(1)
    per_row = flat @ _weights(flat.shape[1], x)
    targets = y.flatten(1).to(x.dtype).sum(1) if y.dim() > 1 else y.to(x.dtype)
    sums = [(rows * per_row).sum(dtype=torch.float64), (rows * targets).sum(dtype=torch.float64)]
    return torch.stack([torch.tensor(float(len(x)), dtype=torch.float64, device=x.device), *sums])


def _weights(count: int, like: Tensor) -> Tensor:
    steps = torch.arange(1, count + 1, dtype=torch.float64, device=like.device)
    return (1 + torch.frac(steps * 0.6180339887498949)).to(like.dtype)


def check_memory(needed: int, device: torch.device, offload: bool) -> str:
    """Return a sentence about the memory of the auxiliary variables.

    Args:
        needed: Bytes.
        device: Where the data is.
        offload: Whether they stay in host memory.

    Raises:
        ValueError: If less is available.
    """
    available = None
    if device.type == "cuda" and not offload:
        available = torch.cuda.mem_get_info(device)[0]
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"Auxiliary variables take {needed / 2**20:,.1f} MiB"
    if available is not None and needed > available:
        raise ValueError(
            f"{text}, but only {available / 2**20:,.1f} MiB are available. Use `storage_dtype='bfloat16'`, "
            "`offload=True`, fewer samples, more processes, or mini-batches with persist=False."
        )
    return text + (" of host memory." if offload or device.type == "cpu" else f" of {device}.")
