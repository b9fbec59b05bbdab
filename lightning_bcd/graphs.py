"""Citation graphs as ordinary rows of features: the input of a graph-augmented MLP, and the Planetoid data sets.

    [X, ÂX, Â²X, …, Â^K X]   with   Â = D̃^-½ (A + I) D̃^-½,   D̃ = the degrees of A + I

Once these rows are computed, a node is a sample like any other and an MLP trains on them without the graph [1, 2].

| letter | meaning | shape |
|---|---|---|
| N, d | nodes, features of a node | |
| X | features | N × d |
| A | adjacency matrix, 0 or 1, symmetric | N × N |
| K | `hops` | |

[1] Chen, Chen, Bruna. On graph neural networks versus graph-augmented MLPs. ICLR 2021, arXiv:2010.15116.
[2] Wang, Li, Chai, Wang, Cheng, Zhao. Towards quantized model parallelism for graph-augmented MLPs based on
    gradient-free ADMM framework. TNNLS 2022, arXiv:2105.09837.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_bcd.full_batch import FullBatchLoader, Rows, full_batch

_SPLITS = ("train_mask", "val_mask", "test_mask")
_CSR = ("feature_data", "feature_indices", "feature_indptr", "feature_shape")
_KEYS = (*_CSR, "labels", "labelled", "edge_index", *_SPLITS)


def graph_augment(features: Tensor, edge_index: Tensor, hops: int = 4) -> Tensor:
    """Append to every node's features those of its neighbourhoods up to `hops` steps away.

        [X, ÂX, Â²X, …, Â^K X],   Â = D̃^-½ (A + I) D̃^-½

    A is read from the edges as an undirected graph without weights: an edge counts in both directions, once,
    however often and in whichever direction it is listed, and a listed self loop adds nothing to I. A node
    without edges keeps its own features in every block. All products are sparse; no N × N matrix is formed.

    Args:
        features: X, N × d, float32 or float64, finite.
        edge_index: 2 × E, int64; column e joins the nodes `edge_index[0, e]` and `edge_index[1, e]`, 0 … N − 1.
        hops: K, at least 0; 0 gives a copy of the features. The published code of [2] uses 4.

    Returns:
        N × (K + 1)d, with the dtype and on the device of `features`; columns kd … (k + 1)d − 1 are Â^k X.

    Raises:
        ValueError: If `features` is no finite float matrix, `edge_index` no 2 × E int64 tensor of node numbers,
            or `hops` negative.

    Example:
        >>> import torch
        >>> from lightning_bcd.graphs import graph_augment
        >>> graph_augment(torch.tensor([[2.0], [4.0], [5.0]]), torch.tensor([[0], [1]]), hops=1)
        tensor([[2., 3.],
                [4., 3.],
                [5., 5.]])
    """
    _check_hops(hops)
    if features.ndim != 2 or features.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "Expected argument `features` to be an N × d matrix of float32 or float64, but got "
            f"{_describe(features)}. Pass one row per node."
        )
    if not bool(features.isfinite().all()):
        raise ValueError(
            "Expected argument `features` to be finite, but got NaN or infinity. One such value would spread to "
            "all nodes nearby: replace it first."
        )
    if edge_index.ndim != 2 or len(edge_index) != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"Expected argument `edge_index` to be a 2 × E tensor of int64, but got {_describe(edge_index)}. "
            "Pass one column (node, node) per edge."
        )
    outside = edge_index[(edge_index < 0) | (edge_index >= len(features))]
    if len(outside):
        raise ValueError(
            f"Expected argument `edge_index` to hold nodes 0 … {len(features) - 1}, one for each row of `features`, "
            f"but got {int(outside[0])}. Number the nodes by their rows."
        )
    propagate = _normalized_adjacency(edge_index.to(features.device), len(features), features.dtype)
    blocks = [features]
    for _ in range(hops):
        blocks.append(torch.sparse.mm(propagate, blocks[-1]))
    return torch.cat(blocks, dim=1)


def _normalized_adjacency(edge_index: Tensor, num_nodes: int, dtype: torch.dtype) -> Tensor:
    """Return Â as a sparse tensor of N × N in coordinate format."""
    size = (num_nodes, num_nodes)
    loops = torch.arange(num_nodes, device=edge_index.device).expand(2, -1)
    listed = torch.cat([edge_index, edge_index.flip(0), loops], dim=1)
    # Coalescing merges repeated entries. It adds up their values, so these are set afterwards.
    repeats = torch.ones(listed.shape[1], dtype=dtype, device=listed.device)
    rows, columns = torch.sparse_coo_tensor(listed, repeats, size, check_invariants=True).coalesce().indices()
    degree = rows.bincount(minlength=num_nodes)
    values = (degree[rows] * degree[columns]).to(dtype).rsqrt()
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, size, check_invariants=True, is_coalesced=True)


class PlanetoidDataModule(LightningDataModule):
    """A Planetoid citation graph, Cora or Citeseer, with the public split, as input of a graph-augmented MLP.

    A node is a paper, an edge a citation, the features say which words the paper contains. The split is the
    public one: 20 training nodes per class, 500 for validation, 1,000 for testing; the other nodes enter through
    their neighbours' features alone. Every set is one batch, see `full_batch`.

    The file `<name>.npz`, in `data_dir` or its sub-folder `planetoid`, holds these arrays and no pickled objects:
    the CSR matrix `feature_data`, `feature_indices`, `feature_indptr`, `feature_shape` (N, d); `labels` (N,);
    `labelled` (N,), false for nodes without a label; `edge_index` (2, E); `train_mask`, `val_mask`, `test_mask` (N,).

    Args:
        data_dir: The folder with the file.
        name: `"cora"` or `"citeseer"`.
        hops: Powers of Â that follow the features themselves, see `graph_augment`.
        normalize: Whether to divide the words of every node by their sum; a node without words keeps its zeros.

    Attributes:
        train_set: Training nodes `(features, label)`, float32 and int64, after `setup`.
        val_set: Validation nodes.
        test_set: Test nodes.

    Raises:
        ValueError: If `name` is unknown or `hops` negative; in `setup`, if the file is damaged, lacks an array or
            contradicts itself, or if a node of the split has no label.
        FileNotFoundError: In `setup`, if the file is missing.
    """

    names: ClassVar[tuple[str, ...]] = ("cora", "citeseer")
    homepage: ClassVar[str] = "https://github.com/kimiyoung/planetoid"

    def __init__(self, data_dir: str | Path, name: str = "cora", hops: int = 4, normalize: bool = False) -> None:
        super().__init__()
        if name not in self.names:
            raise ValueError(
                f"Expected argument `name` to be one of {', '.join(self.names)}, but got {name!r}. "
                "Choose one of these graphs."
            )
        _check_hops(hops)
        self.data_dir = Path(data_dir)
        self.name = name
        self.hops = hops
        self.normalize = normalize
        self.train_set: TensorDataset | None = None
        self.val_set: TensorDataset | None = None
        self.test_set: TensorDataset | None = None
        self._num_classes = 0

    @property
    def num_features(self) -> int:
        """Number of features of a node with its neighbourhoods, (hops + 1)d; after `setup`."""
        return int(self._ready(self.train_set).tensors[0].shape[1])

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 … num_classes − 1; after `setup`."""
        self._ready(self.train_set)
        return self._num_classes

    def setup(self, stage: str | None = None) -> None:
        """Read the graph and augment its features; all stages need the whole graph, so it is done once."""
        if self.train_set is not None:
            return
        path = self._find()
        arrays = _read_arrays(path)
        labels = arrays["labels"].long()
        for split in _SPLITS:
            blank = (arrays[split] & (~arrays["labelled"] | (labels < 0))).nonzero()
            if len(blank):
                raise ValueError(
                    f"Expected `{split}` in {path} to select nodes with a label, but got node {int(blank[0])}, which "
                    f"has none. Use the public split of {self.homepage}."
                )
        features = self._augmented(arrays)
        # Indexing copies: only the rows of the split outlive this method, not the whole matrix.
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(features[arrays[split]], labels[arrays[split]]) for split in _SPLITS
        )
        self._num_classes = int(labels[arrays["labelled"]].max()) + 1

    def train_dataloader(self) -> FullBatchLoader:
        """One batch (x, y) of all training nodes; x is float32, (B, num_features), y int64, (B,)."""
        return full_batch(self._ready(self.train_set))

    def val_dataloader(self) -> FullBatchLoader:
        """One batch (x, y) of all validation nodes."""
        return full_batch(self._ready(self.val_set))

    def test_dataloader(self) -> FullBatchLoader:
        """One batch (x, y) of all test nodes."""
        return full_batch(self._ready(self.test_set))

    def predict_dataloader(self) -> FullBatchLoader:
        """One batch x of all N nodes in their order, without labels; computed anew, as only the loader keeps it."""
        self._ready(self.train_set)
        return full_batch(Rows(self._augmented(_read_arrays(self._find()))))

    def _augmented(self, arrays: dict[str, Tensor]) -> Tensor:
        num_nodes, num_words = arrays["feature_shape"].tolist()
        rows = torch.arange(num_nodes).repeat_interleave(arrays["feature_indptr"].diff())
        words = torch.zeros(num_nodes, num_words)
        words.index_put_((rows, arrays["feature_indices"].long()), arrays["feature_data"].float(), accumulate=True)
        if self.normalize:
            words = F.normalize(words, p=1.0, dim=1)
        return graph_augment(words, arrays["edge_index"].long(), self.hops)

    def _find(self) -> Path:
        for path in (self.data_dir / f"{self.name}.npz", self.data_dir / "planetoid" / f"{self.name}.npz"):
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"Planetoid file {self.name}.npz is not in the folder {self.data_dir.absolute()} or its sub-folder "
            f"planetoid. Make it from the files of {self.homepage} as the docstring of PlanetoidDataModule says and "
            "pass its folder as `data_dir`."
        )

    def _ready(self, data: TensorDataset | None) -> TensorDataset:
        if data is None:
            raise RuntimeError(f"{type(self).__name__} has no data yet. Call setup() before asking for it.")
        return data


def _check_hops(hops: int) -> None:
    if hops < 0:
        raise ValueError(f"Expected argument `hops` to be at least 0, but got {hops}. Choose another value.")


def _describe(tensor: Tensor) -> str:
    return f"the shape {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Read the arrays of one graph and check that they fit each other; the masks become bool."""
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no zip file")
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in _KEYS if key not in archive]
            arrays = {key: torch.from_numpy(archive[key]) for key in _KEYS if key in archive}
    except (ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Expected {path} to be a complete npz file of numbers, but got: {error}. Make it again."
        ) from error
    if missing:
        raise ValueError(
            f"Expected {path} to hold the arrays {', '.join(_KEYS)}, but got none named {', '.join(missing)}. "
            "Make the file again with all of them."
        )
    contradiction = _contradiction(arrays)
    if contradiction:
        raise ValueError(f"Expected the arrays in {path} to fit each other, but got {contradiction}. Make it again.")
    return arrays | {key: arrays[key].bool() for key in ("labelled", *_SPLITS)}


def _contradiction(arrays: dict[str, Tensor]) -> str:
    """Return what is wrong with a graph file, empty if nothing is; `graph_augment` checks the edges."""
    data, indices, indptr, shape = (arrays[key] for key in _CSR)
    if shape.shape != (2,) or int(shape.min()) < 1:
        return f"feature_shape {shape.tolist()} instead of (N, d)"
    num_nodes, num_words = shape.tolist()
    for key in ("labels", "labelled", *_SPLITS):
        if arrays[key].shape != (num_nodes,):
            return f"the shape {tuple(arrays[key].shape)} of {key} for {num_nodes} nodes"
    if indptr.shape != (num_nodes + 1,) or indptr[0] != 0 or bool((indptr.diff() < 0).any()):
        return f"a feature_indptr that does not divide the entries among {num_nodes} nodes"
    if data.shape != indices.shape or indices.shape != (int(indptr[-1]),):
        return f"{len(data)} values and {len(indices)} feature indices for {int(indptr[-1])} feature entries"
    if bool(((indices < 0) | (indices >= num_words)).any()):
        return f"a feature index outside 0 … {num_words - 1}"
    shared = torch.stack([arrays[split].bool() for split in _SPLITS]).sum(0).gt(1).nonzero()
    return f"node {int(shared[0])} in two parts of the split" if len(shared) else ""
