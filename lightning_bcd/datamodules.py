"""Data for examples, tests and benchmarks: digits, MNIST, Fashion-MNIST, and a whole data set as one batch.

All images stay in memory as one tensor, and a mini-batch is one indexing operation instead of a loop over
samples. The loaders are ordinary `DataLoader`s, so a Trainer can put its distributed sampler into them.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bcd.full_batch import FullBatchLoader, Rows, collate_rows, full_batch


class _ImageDataModule(LightningDataModule):
    """Splits, shapes and loaders that all image data sets share.

    Attributes:
        num_classes: Number of classes; labels are 0 … num_classes − 1.
        image_shape: (channels, height, width).
        num_features: Number of pixels of an image.
        train_set: Training samples `(image, label)`, after `setup`.
        val_set: Validation samples.
        test_set: Test samples.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]]

    def __init__(
        self, *, batch_size: int | None, val_fraction: float, seed: int, num_workers: int, flatten: bool
    ) -> None:
        super().__init__()
        _check("batch_size", batch_size, batch_size is None or batch_size >= 1, "at least 1, or None for full batches")
        _check("num_workers", num_workers, num_workers >= 0, "at least 0")
        _check("val_fraction", val_fraction, 0 <= val_fraction < 1, "in [0, 1)")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.flatten = flatten
        self.train_set: Dataset[Any] | None = None
        self.val_set: Dataset[Any] | None = None
        self.test_set: Dataset[Any] | None = None

    @property
    def num_features(self) -> int:
        """Number of pixels of an image."""
        return math.prod(self.image_shape)

    def _shaped(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), *((self.num_features,) if self.flatten else self.image_shape))

    def _loader(self, data: Dataset[Any] | None, *, shuffle: bool = False) -> DataLoader[Any] | FullBatchLoader:
        if data is None:
            raise RuntimeError(f"{type(self).__name__} has no data yet. Call setup() before asking for a loader.")
        if self.batch_size is None:
            return full_batch(data)
        return DataLoader(
            data,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate_rows,
            persistent_workers=self.num_workers > 0,
            # A generator of its own: the order of the samples does not depend on what else draws numbers.
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
        )

    def train_dataloader(self) -> DataLoader[Any] | FullBatchLoader:
        """Shuffled batches (x, y); x is float32 of shape (B, …), y int64 of shape (B,)."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | FullBatchLoader | list[Any]:
        """Batches (x, y) of the validation set; an empty list, which means no validation, without one."""
        empty = self.val_fraction == 0 and self.train_set is not None
        return [] if empty else self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any] | FullBatchLoader:
        """Batches (x, y) of the test set."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any] | FullBatchLoader:
        """Batches x of the test set, without labels: what Lightning's default `predict_step` expects."""
        if self.test_set is None:
            return self._loader(None)
        images, _ = self.test_set[:]
        return self._loader(Rows(images))


class DigitsDataModule(_ImageDataModule):
    """The 1,797 handwritten digits of 8×8 pixels that come with scikit-learn; nothing is downloaded.

    Pixels are scaled from 0 … 16 to [0, 1]. The split is stratified: every class gives the same share.

    Args:
        batch_size: Samples per mini-batch; None makes every set one batch, see `full_batch`.
        test_fraction: Share of all samples that form the test set, in [0, 1).
        val_fraction: Share of all samples that form the validation set, in [0, 1); 0 for none.
        seed: Seed of the split and of the shuffling.
        num_workers: Worker processes of each loader.
        flatten: Whether images are rows of 64 pixels, shape (B, 64), instead of (B, 1, 8, 8).

    Raises:
        ValueError: If a size or fraction is out of range.
        ModuleNotFoundError: In `setup`, if scikit-learn is not installed.
    """

    image_shape = (1, 8, 8)

    def __init__(
        self,
        batch_size: int | None = 64,
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        flatten: bool = True,
    ) -> None:
        super().__init__(
            batch_size=batch_size, val_fraction=val_fraction, seed=seed, num_workers=num_workers, flatten=flatten
        )
        together = test_fraction >= 0 and test_fraction + val_fraction < 1
        _check("test_fraction", test_fraction, together, f"at least 0 and, with val_fraction={val_fraction}, below 1")
        self.test_fraction = test_fraction

    def setup(self, stage: str | None = None) -> None:
        """Load and split the digits; all stages need the same split, so it is made once."""
        if self.train_set is not None:
            return
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "DigitsDataModule reads the digits that come with scikit-learn, which is not installed. "
                "Run: pip install 'lightning-bcd[data]'"
            ) from error
        pixels, targets = load_digits(return_X_y=True)
        images = self._shaped(torch.as_tensor(pixels, dtype=torch.float32) / 16)
        labels = torch.as_tensor(targets, dtype=torch.int64)
        parts = _stratified_split(labels, (self.test_fraction, self.val_fraction), self.seed)
        self.test_set, self.val_set, self.train_set = (Rows((images[rows], labels[rows])) for rows in parts)


class MNISTDataModule(_ImageDataModule):
    """The MNIST digits from the four IDX files in a folder: 60,000 training and 10,000 test images of 28×28 pixels.

    The files are `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and the same with `t10k`; their
    unzipped versions (no `.gz`) are read too. Pixels are scaled from 0 … 255 to [0, 1].

    Args:
        data_dir: The folder with the files.
        batch_size: Samples per mini-batch; None makes every set one batch, see `full_batch`.
        val_fraction: Share of the training images that form the validation set, in [0, 1), the same share of
            every class; 0 trains on all of them without validation.
        seed: Seed of the split and of the shuffling.
        num_workers: Worker processes of each loader.
        normalize: Whether to subtract the mean pixel of the training set and divide by the standard deviation.
        flatten: Whether images are rows of 784 pixels, shape (B, 784), instead of (B, 1, 28, 28).

    Raises:
        ValueError: If a size or fraction is out of range; in `setup`, if a file is not what its name says.
        FileNotFoundError: In `setup`, if a file is missing.
    """

    image_shape = (1, 28, 28)
    title: ClassVar[str] = "MNIST"
    homepage: ClassVar[str] = "http://yann.lecun.com/exdb/mnist/"
    #: Mean and standard deviation of all training pixels in [0, 1].
    pixel_statistics: ClassVar[tuple[float, float]] = (0.1307, 0.3081)

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int | None = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        normalize: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size, val_fraction=val_fraction, seed=seed, num_workers=num_workers, flatten=flatten
        )
        self.data_dir = Path(data_dir)
        self.normalize = normalize

    def setup(self, stage: str | None = None) -> None:
        """Read the training files for `"fit"` and `"validate"`, the test files for `"test"` and `"predict"`."""
        if stage in (None, "fit", "validate") and self.train_set is None:
            images, labels = self._read("train")
            val, train = _stratified_split(labels, (self.val_fraction,), self.seed)
            self.val_set = Rows((images[val], labels[val]))
            self.train_set = Rows((images[train], labels[train]))
        if stage in (None, "test", "predict") and self.test_set is None:
            self.test_set = Rows(self._read("t10k"))

    def _read(self, prefix: str) -> tuple[Tensor, Tensor]:
        pixels = _read_idx(self._find(f"{prefix}-images-idx3-ubyte"), (None, *self.image_shape[1:]))
        label_file = self._find(f"{prefix}-labels-idx1-ubyte")
        labels = _read_idx(label_file, (len(pixels),)).long()
        if len(labels) == 0 or int(labels.max()) >= self.num_classes:
            found = f"the label {int(labels.max())}" if len(labels) else "none"
            raise ValueError(
                f"Expected labels 0 … {self.num_classes - 1} in {label_file}, but got {found}. Get the file from "
                f"{self.homepage}."
            )
        images = self._shaped(pixels).float().div_(255)
        if self.normalize:
            mean, deviation = self.pixel_statistics
            images.sub_(mean).div_(deviation)
        return images, labels

    def _find(self, name: str) -> Path:
        for path in (self.data_dir / f"{name}.gz", self.data_dir / name):
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"{self.title} file {name}.gz (or {name}) is not in the folder {self.data_dir.absolute()}. Get the four "
            f"IDX files from {self.homepage} and pass their folder as `data_dir`."
        )


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST, articles of clothing (Xiao, Rasul, Vollgraf, arXiv:1708.07747), in files named like MNIST's.

    The arguments and errors are those of `MNISTDataModule`.
    """

    title = "Fashion-MNIST"
    homepage = "https://github.com/zalandoresearch/fashion-mnist"
    pixel_statistics = (0.2860, 0.3530)


def _check(name: str, value: float | None, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueError(f"Expected argument `{name}` to be {wanted}, but got {value}. Choose another value.")


def _stratified_split(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Return the row indices of one part per fraction and of the rest; each takes its share of every class."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in (*fractions, "rest")]
    before = 0
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        # Rounded ends, not rounded sizes: then the sizes of a part add up to its rounded share of everything.
        end = before + len(rows)
        sizes = [round(fraction * end) - round(fraction * before) for fraction in fractions]
        sizes = [min(size, len(rows) - sum(sizes[:i])) for i, size in enumerate(sizes)]
        before = end
        for part, piece in zip(parts, torch.split(rows, [*sizes, len(rows) - sum(sizes)]), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


def _read_idx(path: Path, shape: tuple[int | None, ...]) -> Tensor:
    """Read a file of bytes: 0 0 8 ndim, the sizes as big-endian uint32 (`shape`; None is any), the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"Expected {path} to be a complete gzip file, but got: {error}. Get it again.") from error
    start = 4 + 4 * len(shape)
    magic = bytes((0, 0, 8, len(shape)))
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) < start or content[:4] != magic:
        wanted, got = f"start with {magic.hex(' ')} (IDX bytes)", content[:4].hex(" ") or "an empty file"
    elif any(wanted not in (None, size) for wanted, size in zip(shape, sizes, strict=True)):
        wanted, got = f"have the shape {tuple(shape)}", f"{tuple(sizes)} in its header"
    elif len(content) - start != math.prod(sizes):
        wanted, got = f"hold {math.prod(sizes)} values after its header", str(len(content) - start)
    else:
        wanted = got = ""
    if wanted:
        raise ValueError(f"Expected {path} to {wanted}, but got {got}. Get the file again and keep its name.")
    if math.prod(sizes) == 0:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(sizes)
