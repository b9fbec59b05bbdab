"""A whole data set as one batch, and samples that are rows of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

Collate = Callable[[Any], Any]


class Rows(Dataset[Any]):
    """Samples are rows of a tensor, or of several tensors of the same length.

    Args:
        rows: The tensors.
    """

    def __init__(self, rows: Tensor | tuple[Tensor, ...]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows if isinstance(self.rows, Tensor) else self.rows[0])

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index] if isinstance(self.rows, Tensor) else tuple(tensor[index] for tensor in self.rows)

    def __getitems__(self, indices: list[int]) -> Rows:
        # torch asks for all samples of a batch at once and expects a list; this one has them already collated.
        return Rows(self[torch.as_tensor(indices)])


def collate_rows(samples: Any) -> Any:
    """Collate samples; those of `Rows` are collated already."""
    return samples.rows if isinstance(samples, Rows) else default_collate(samples)


class FullBatchLoader:
    """The loader `full_batch` returns: a sized iterable that yields one batch."""

    def __init__(self, data: Dataset[Any] | tuple[Tensor, ...], collate_fn: Collate | None) -> None:
        if isinstance(data, TensorDataset):
            data = data.tensors
        if isinstance(data, tuple):
            lengths = [len(tensor) for tensor in data]
            if not lengths or len(set(lengths)) > 1:
                raise ValueError(
                    "Expected argument `data` to hold tensors with the same number of rows, but got "
                    f"{lengths}. Pass (x, y) with one row per sample."
                )
            self._dataset: Dataset[Any] = Rows(data)
        elif isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise TypeError(
                "Expected argument `data` to be a map-style Dataset or a tuple of tensors, but got "
                f"{type(data).__name__}. Its length and its samples by index are needed."
            )
        else:
            self._dataset = data
        self._num_samples = len(self._dataset)
        self._collate = collate_fn or collate_rows
        self._batch: Any = None
        self._shard: tuple[int, int] | None = None
        self._whole = False

    def replicated(self) -> FullBatchLoader:
        """The same loader, that gives every process all samples."""
        loader = copy(self)
        loader._whole = True
        return loader

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        # The process group may come up after the loader is made, so the rank is read here.
        distributed = not self._whole and torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world_size = torch.distributed.get_world_size() if distributed else 1
        shard = (rank * self._num_samples // world_size, (rank + 1) * self._num_samples // world_size)
        if self._shard != shard:
            self._batch = self._load(shard, world_size)
            self._shard = shard
        yield self._batch

    def _load(self, shard: tuple[int, int], world_size: int) -> Any:
        # Every rank knows the total, so all raise together and none waits for the others.
        if self._num_samples < world_size:
            raise ValueError(
                f"Expected argument `data` to have at least one sample for each of {world_size} process(es), but "
                f"got {self._num_samples}. Use fewer processes or more data."
            )
        if isinstance(self._dataset, Rows):
            return self._collate(Rows(self._dataset[slice(*shard)]))  # a view: no second copy of the data
        indices = list(range(*shard))
        many = getattr(self._dataset, "__getitems__", None)
        return self._collate(many(indices) if callable(many) else [self._dataset[i] for i in indices])


def full_batch(data: Dataset[Any] | tuple[Tensor, ...], collate_fn: Collate | None = None) -> FullBatchLoader:
    """Make a loader that yields the whole data set as one batch per epoch.

    The batch is collated at the first use, kept, and yielded again every epoch: the same object (tensors are
    not even copied), so a model that writes into it changes the data. In a distributed run with R processes,
    rank r yields rows ⌊r N / R⌋ … ⌊(r + 1) N / R⌋ − 1: every sample once, nothing padded, shards differ by at
    most one row.
    As it is no `DataLoader`, a Trainer injects no sampler.

    Args:
        data: A map-style data set, or tensors with one row per sample, e.g. `(x, y)` with shapes (N, …), (N,).
        collate_fn: Turns a list of samples into a batch; torch's default collation if None.

    Returns:
        An iterable of length 1.

    Raises:
        TypeError: If `data` has no length or is iterable-style.
        ValueError: If the tensors differ in length; when iterating, if there are fewer samples than processes.

    Example:
        >>> import torch
        >>> from lightning_bcd import full_batch
        >>> loader = full_batch((torch.rand(6, 2), torch.arange(6)))
        >>> [(tuple(x.shape), tuple(y.shape)) for x, y in loader]
        [((6, 2), (6,))]
    """
    return FullBatchLoader(data, collate_fn)
