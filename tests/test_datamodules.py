import gzip
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from toolbox import run_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset

from lightning_bcd import DigitsDataModule, FashionMNISTDataModule, MNISTDataModule, full_batch

SHARED = Path(__file__).parents[2] / "shared" / "data"


class Classifier(LightningModule):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(num_features, 10))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        self.seen.append(y)
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.validation_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def quiet_trainer(**arguments: object) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **arguments},
    )


def idx_bytes(values: Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + bytes(values.flatten().tolist())


def write_idx_files(folder: Path, *, train: int = 40, test: int = 20, zipped: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    files = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        files |= {f"{prefix}-images-idx3-ubyte": images, f"{prefix}-labels-idx1-ubyte": labels}
    for name, values in files.items():
        content = idx_bytes(values)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return files


# -- digits -----------------------------------------------------------------------------------------------


def digits(**arguments: object) -> DigitsDataModule:
    pytest.importorskip("sklearn")
    data = DigitsDataModule(**arguments)
    data.setup("fit")
    return data


def test_digits_batches_are_flat_float32_pixels_between_0_and_1_and_int64_labels() -> None:
    data = digits(batch_size=32)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (32, data.num_features) == (32, 64)
    assert (x.dtype, y.dtype, y.shape) == (torch.float32, torch.int64, (32,))
    everything = torch.cat([x for x, _ in data.train_dataloader()])
    assert everything.min() == 0
    assert everything.max() == 1


def test_digits_keep_the_shape_of_images_without_flatten() -> None:
    x, _ = next(iter(digits(flatten=False).val_dataloader()))
    assert x.shape[1:] == DigitsDataModule.image_shape == (1, 8, 8)


def test_digits_split_is_stratified_disjoint_and_complete() -> None:
    data = digits(test_fraction=0.2, val_fraction=0.1)
    parts = [data.train_set[:], data.val_set[:], data.test_set[:]]
    assert sum(len(y) for _, y in parts) == 1797
    from sklearn.datasets import load_digits

    original = torch.as_tensor(load_digits().data / 16, dtype=torch.float32)
    together = torch.cat([x for x, _ in parts])
    # The same rows, in another order.
    assert torch.equal(together.double().sum(0), original.double().sum(0))
    assert torch.equal(together.unique(dim=0), original.unique(dim=0))
    counts = torch.stack([y.bincount(minlength=10) for _, y in parts])
    for part, share in zip(counts, (0.7, 0.1, 0.2), strict=True):
        assert (part - share * counts.sum(0)).abs().max() <= 1


def test_digits_split_depends_on_the_seed_alone() -> None:
    first, again, other = digits(seed=1), digits(seed=1), digits(seed=2)
    assert torch.equal(first.test_set[:][0], again.test_set[:][0])
    assert not torch.equal(first.test_set[:][1], other.test_set[:][1])


def test_a_split_that_leaves_almost_nothing_still_adds_up() -> None:
    data = digits(test_fraction=0.5, val_fraction=0.495)
    assert [len(part) for part in (data.test_set, data.val_set, data.train_set)] == [898, 890, 9]


def test_train_order_changes_every_epoch_and_repeats_with_a_new_loader_whatever_the_global_random_state() -> None:
    data = digits()
    loader = data.train_dataloader()
    first, second = (torch.cat([y for _, y in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    torch.rand(7)
    assert torch.equal(first, torch.cat([y for _, y in data.train_dataloader()]))


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-bcd\[data\]'"):
        DigitsDataModule().setup("fit")


def test_a_trainer_fits_validates_tests_and_predicts_digits() -> None:
    pytest.importorskip("sklearn")
    data, model = DigitsDataModule(), Classifier(64)
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(model, data)
    assert trainer.test(model, data, verbose=False)[0]["accuracy"] > 0.85
    predictions = trainer.predict(model, data)
    assert sum(len(batch) for batch in predictions) == len(data.test_set)


def test_no_validation_set_means_no_validation() -> None:
    data = digits(val_fraction=0.0)
    assert data.val_dataloader() == []
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Classifier(64), data)
    assert "accuracy" not in trainer.callback_metrics


def test_worker_processes_give_the_same_batches() -> None:
    here = torch.cat([x for x, _ in digits().train_dataloader()])
    there = torch.cat([x for x, _ in digits(num_workers=1).train_dataloader()])
    assert torch.equal(here, there)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"test_fraction": 0.95}, "test_fraction"),
        ({"test_fraction": -0.1}, "test_fraction"),
    ],
)
def test_sizes_out_of_range_are_refused_by_name(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        DigitsDataModule(**arguments)


def test_a_loader_before_setup_says_so() -> None:
    for make in (DigitsDataModule().train_dataloader, DigitsDataModule().val_dataloader):
        with pytest.raises(RuntimeError, match=r"setup\(\)"):
            make()


# -- MNIST ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read_bit_for_bit(tmp_path: Path, zipped: bool) -> None:
    files = write_idx_files(tmp_path, zipped=zipped)
    data = MNISTDataModule(tmp_path, val_fraction=0.0)
    data.setup()
    for prefix, part in (("train", data.train_set), ("t10k", data.test_set)):
        x, y = part[:]
        assert torch.equal(x, files[f"{prefix}-images-idx3-ubyte"].float()[:, None] / 255)
        assert torch.equal(y, files[f"{prefix}-labels-idx1-ubyte"].long())


def test_mnist_shapes(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    for flatten, shape in ((False, (8, 1, 28, 28)), (True, (8, 784))):
        data = MNISTDataModule(str(tmp_path), batch_size=8, flatten=flatten)
        data.setup("fit")
        x, y = next(iter(data.train_dataloader()))
        assert (x.shape, x.dtype, y.shape, y.dtype) == (shape, torch.float32, (8,), torch.int64)


def test_mnist_stages_read_only_the_files_they_need(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    for path in tmp_path.glob("t10k*"):
        path.unlink()
    data = MNISTDataModule(tmp_path)
    data.setup("fit")
    assert len(data.train_set) == 36
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        data.setup("test")


def test_mnist_validation_takes_the_same_share_of_every_class(tmp_path: Path) -> None:
    write_idx_files(tmp_path, train=200)
    data = MNISTDataModule(tmp_path, val_fraction=0.25)
    data.setup("fit")
    assert data.val_set[:][1].bincount().tolist() == [5] * 10
    assert data.train_set[:][1].bincount().tolist() == [15] * 10


@pytest.mark.parametrize(("kind", "title"), [(MNISTDataModule, "MNIST"), (FashionMNISTDataModule, "Fashion-MNIST")])
def test_a_missing_file_names_file_folder_and_source(tmp_path: Path, kind: type[MNISTDataModule], title: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        kind(tmp_path).setup("fit")
    for part in (f"{title} file train-images-idx3-ubyte.gz", str(tmp_path), kind.homepage):
        assert part in str(caught.value)


def damage(content: bytes, kind: str) -> bytes:
    match kind:
        case "magic":
            return b"\x00\x00\x0d\x03" + content[4:]
        case "short header":
            return content[:6]
        case "empty":
            return b""
        case "cut":
            return content[:-1]
        case "longer":
            return content + b"\x00"
        case "shape":
            return content[:8] + (14).to_bytes(4, "big") + (56).to_bytes(4, "big") + content[16:]
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("magic", r"start with 00 00 08 03 \(IDX bytes\), but got 00 00 0d 03"),
        ("short header", "IDX bytes"),
        ("empty", "an empty file"),
        ("cut", "31360 values after its header, but got 31359"),
        ("longer", "31360 values after its header, but got 31361"),
        ("shape", r"the shape \(None, 28, 28\), but got \(40, 14, 56\) in its header"),
    ],
)
def test_damaged_image_files_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    write_idx_files(tmp_path, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(ValueError, match=message) as caught:
        MNISTDataModule(tmp_path).setup("fit")
    assert str(path) in str(caught.value)


def test_an_incomplete_gzip_file_is_refused(tmp_path: Path) -> None:
    write_idx_files(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for content in (path.read_bytes()[:-20], b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="complete gzip file"):
            MNISTDataModule(tmp_path).setup("fit")


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_idx_files(tmp_path, zipped=False)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(torch.zeros(39, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"shape \(40,\), but got \(39,\)"):
        MNISTDataModule(tmp_path).setup("fit")
    path.write_bytes(idx_bytes(torch.full((40,), 10, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="got the label 10"):
        MNISTDataModule(tmp_path).setup("fit")


@pytest.mark.parametrize(("kind", "folder"), [(MNISTDataModule, "mnist"), (FashionMNISTDataModule, "fashion-mnist")])
def test_the_real_files_have_the_sizes_and_pixel_statistics_stated(kind: type[MNISTDataModule], folder: str) -> None:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"no {folder} files beside the repository")
    data = kind(SHARED / folder, normalize=True, val_fraction=1 / 12)
    data.setup()
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [55_000, 5_000, 10_000]
    assert data.test_set[:][1].unique().tolist() == list(range(10))
    x = data.train_set[:][0]
    assert x.mean().item() == pytest.approx(0, abs=0.005)
    assert x.std().item() == pytest.approx(1, abs=0.005)


# -- full_batch -------------------------------------------------------------------------------------------


class Squares(Dataset):
    """A data set that only knows one sample at a time, as dictionaries, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked += 1
        return {"x": torch.tensor([float(index)]), "y": torch.tensor(index**2)}


def test_full_batch_collates_once_and_yields_the_same_batch_every_epoch() -> None:
    data = Squares()
    loader = full_batch(data)
    assert len(loader) == 1
    (first,), (second,) = list(loader), list(loader)
    assert first is second
    assert data.asked == 5
    assert torch.equal(first["y"], torch.tensor([0, 1, 4, 9, 16]))
    assert first["x"].shape == (5, 1)


def test_full_batch_takes_tensors_without_copying_them() -> None:
    x, y = torch.rand(6, 2), torch.arange(6)
    for data in ((x, y), TensorDataset(x, y)):
        ((bx, by),) = full_batch(data)
        assert torch.equal(bx, x)
        assert torch.equal(by, y)
        assert bx.data_ptr() == x.data_ptr()


def test_full_batch_of_a_data_module_or_a_subset_of_it_is_all_its_rows() -> None:
    train = digits().train_set
    ((x, _),) = full_batch(train)
    assert torch.equal(x, train[:][0])
    ((x, _),) = full_batch(Subset(train, [5, 3]))
    assert torch.equal(x, train[:][0][[5, 3]])


def test_rows_also_work_with_a_default_data_loader() -> None:
    train = digits().train_set
    x, y = next(iter(DataLoader(train, batch_size=7)))
    assert torch.equal(x, train[:][0][:7])
    assert torch.equal(y, train[:][1][:7])


def test_full_batch_uses_the_collate_function_given() -> None:
    assert list(full_batch(Squares(), collate_fn=len)) == [5]
    assert list(full_batch((torch.rand(4, 2),), collate_fn=len)) == [4]


def test_full_batch_refuses_what_it_cannot_index() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(TypeError, match=r"map-style Dataset .* got Stream"):
        full_batch(Stream())
    with pytest.raises(ValueError, match=r"same number of rows, but got \[3, 4\]"):
        full_batch((torch.rand(3), torch.rand(4)))
    with pytest.raises(ValueError, match="at least one sample"):
        list(full_batch((torch.rand(0, 2),)))


def test_full_batch_shards_of_all_ranks_are_the_rows_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(7)
    loader = full_batch((x,))
    ((everything,),) = loader
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shards = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        ((shard,),) = loader
        shards.append(shard)
    assert torch.equal(torch.cat(shards), everything)
    assert sorted(map(len, shards)) == [2, 2, 3]
    with pytest.raises(ValueError, match=r"3 process\(es\)"):
        list(full_batch((torch.rand(2),)))


def test_a_trainer_takes_a_full_batch_as_one_step_per_epoch() -> None:
    data = digits()
    model = Classifier(64)
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(model, full_batch(data.train_set), full_batch(data.val_set))
    assert trainer.global_step == 3
    assert all(torch.equal(y, data.train_set[:][1]) for y in model.seen)


def run_rank(rank: int, folder: Path) -> tuple[bool, torch.Tensor, list[torch.Tensor]]:
    """Fit digits and one full batch in two processes; return what this rank saw."""
    data = DigitsDataModule(batch_size=50)
    data.setup("fit")
    sharded, whole = Classifier(64), Classifier(64)
    trainer = quiet_trainer(max_epochs=1, devices=2, strategy="ddp")
    trainer.fit(sharded, data)
    injected = isinstance(trainer.train_dataloader.sampler, DistributedSampler)
    quiet_trainer(max_epochs=2, devices=2, strategy="ddp").fit(whole, full_batch(data.train_set[:101]))
    return injected, torch.cat(sharded.seen), whole.seen


def test_two_processes_share_the_data(tmp_path: Path) -> None:
    data = digits()
    (injected, first, first_full), (_, second, second_full) = run_processes(run_rank, tmp_path)
    assert injected
    labels = data.train_set[:][1]
    # The sampler pads an odd number of samples by one; full_batch pads nothing.
    assert len(first) == len(second) == (len(labels) + 1) // 2
    assert [len(y) for y in first_full] == [50, 50]
    for one, other in zip(first_full, second_full, strict=True):
        assert torch.equal(torch.cat([one, other]), labels[:101])
