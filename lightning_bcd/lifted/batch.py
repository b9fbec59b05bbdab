"""The training batch of a lifted algorithm: checked before anything changes, recognised in the next sweep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bcd.lifted.chain import Chain
from lightning_bcd.prox.losses import Loss

#: Where Linux tells how much memory there is.
MEMORY = Path("/proc/meminfo")


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
    # One output tells two classes apart by its sign.
    classes = 2 if num_outputs == 1 and loss.targets == "sign" else num_outputs
    if low < 0 or high >= classes:
        raise ValueError(
            f"Expected class labels from 0 to {classes - 1}, one per output of the network, but got {low} to "
            f"{high}. Number the classes from 0 and give the last layer one output per class."
        )
    return loss.encode(y, num_outputs, dtype)


class Fingerprint:
    """Recognises a batch: its size and a checksum of its bits that depends on their order.

    Args:
        x: Input.
        y: Targets as the loader gives them.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._seen = _identity(x, y)
        self.value = _checksum(x, y)

    def matches(self, x: Tensor, y: Tensor) -> bool:
        """Whether these are the samples of the fingerprint."""
        if _identity(x, y) == self._seen:
            return True
        same = same_samples(_checksum(x, y), self.value)
        if same:
            self._seen = _identity(x, y)
        return same


def same_samples(first: Tensor, second: Tensor) -> bool:
    """Whether two checksums belong to the same samples."""
    return torch.equal(first.cpu(), second.cpu())


def _identity(x: Tensor, y: Tensor) -> tuple[object, ...]:
    # The tensors themselves: a freed address could be used again.
    return (_Same(x), x._version, _Same(y), y._version)


class _Same:
    """Compares by identity."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor

    __hash__ = None  # type: ignore[assignment]


def _checksum(x: Tensor, y: Tensor) -> Tensor:
    """Size and sums of the bits, each times an odd number of its place: exact, so the same on every device."""
    return torch.stack([torch.tensor(len(x), device=x.device), _bits(x), _bits(y)])


def _bits(t: Tensor) -> Tensor:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    flat = t.reshape(len(t), -1)
    columns = _odd(flat.shape[1], t.device)
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    places = _odd(len(flat), t.device)
    for rows, weights in zip(torch.split(flat, 4096), torch.split(places, 4096), strict=True):
        total += ((rows.contiguous().view(kind).long() * columns).sum(1) * weights).sum()
    return total


def _odd(count: int, device: torch.device) -> Tensor:
    # Overflow wraps around: arithmetic modulo 2⁶⁴, where odd numbers lose nothing.
    return torch.arange(count, device=device) * 0x1E3779B97F4A7C15 * 2 + 1


def check_memory(needed: int, temporary: int, device: torch.device, offload: bool) -> str:
    """Return a sentence about the memory of the auxiliary variables.

    Args:
        needed: Bytes.
        temporary: Bytes of a sweep beside them.
        device: Where the data is.
        offload: Whether they stay in host memory.

    Raises:
        ValueError: If less is available.
    """
    available = None
    if device.type == "cuda" and not offload:
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = torch.cuda.mem_get_info(device)[0] + held
    elif MEMORY.exists():  # Linux; free memory alone would leave out what the system only caches
        found = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text())
        available = int(found[1]) * 1024 if found else None
    text = f"Auxiliary variables take {needed / 2**20:,.1f} MiB"
    if available is not None and needed > available:
        raise ValueError(
            f"{text}, but only {available / 2**20:,.1f} MiB are available. Use `storage_dtype='bfloat16'`, "
            "`offload=True`, fewer samples, more processes, or mini-batches with persist=False."
        )
    place = "host memory" if offload or device.type == "cpu" else str(device)
    return f"{text} of {place}, temporaries of a sweep at most {temporary / 2**20:,.1f} MiB."
