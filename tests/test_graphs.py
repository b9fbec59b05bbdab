import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_bcd.graphs import PlanetoidDataModule, graph_augment

PLANETOID = Path(__file__).parents[2] / "shared" / "data" / "planetoid"


# -- graph_augment ----------------------------------------------------------------------------------------


def dense_reference(features: Tensor, edges: list[tuple[int, int]], hops: int) -> Tensor:
    """The definition, with dense matrices and a loop over edges."""
    adjacency = torch.eye(len(features), dtype=torch.float64)
    for i, j in edges:
        adjacency[i, j] = adjacency[j, i] = 1
    root = torch.diag(adjacency.sum(1) ** -0.5)
    propagate = root @ adjacency @ root
    return torch.cat([torch.linalg.matrix_power(propagate, k) @ features.double() for k in range(hops + 1)], dim=1)


def random_edges(kind: str, seed: int, nodes: int = 12) -> list[tuple[int, int]]:
    """Edges among all nodes but the last three."""
    pairs = torch.randint(nodes - 3, (20, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    simple = sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})
    match kind:
        case "one direction":
            return simple
        case "both directions":
            return simple + [(j, i) for i, j in simple]
        case "mixed directions":
            return [(j, i) if (i + j) % 2 else (i, j) for i, j in simple]
        case "duplicates":
            return simple + simple[:7] + [(j, i) for i, j in simple[3:9]]
        case "self loops":
            return [*simple, (0, 0), (2, 2), (2, 2), (nodes - 1, nodes - 1)]
        case "no edges":
            return []
    raise AssertionError(kind)


def as_index(edges: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T


KINDS = ["one direction", "both directions", "mixed directions", "duplicates", "self loops", "no edges"]


@pytest.mark.parametrize("hops", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_augmented_features_are_the_dense_definition(kind: str, seed: int, hops: int) -> None:
    x = torch.randn(12, 5, dtype=torch.float64)
    edges = random_edges(kind, seed)
    result = graph_augment(x, as_index(edges), hops)
    assert result.shape == (12, 5 * (hops + 1))
    torch.testing.assert_close(result, dense_reference(x, edges, hops), rtol=1e-12, atol=1e-14)


def test_no_way_of_listing_the_same_edges_changes_a_bit() -> None:
    x = torch.randn(12, 5)
    listings = [as_index(random_edges(kind, seed=0)) for kind in KINDS if kind != "no edges"]
    first, *others = [graph_augment(x, edge_index) for edge_index in listings]
    assert all(torch.equal(first, other) for other in others)


def test_a_node_without_edges_keeps_its_features_in_every_block() -> None:
    x = torch.randn(12, 5)
    result = graph_augment(x, as_index(random_edges("one direction", seed=0)), hops=3)
    assert torch.equal(result[-3:], x[-3:].repeat(1, 4))


def test_no_hops_give_a_copy_of_the_features() -> None:
    x = torch.randn(4, 3)
    result = graph_augment(x, as_index([(0, 1)]), hops=0)
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


def test_float32_stays_float32_and_is_close() -> None:
    x = torch.randn(12, 5)
    edges = random_edges("duplicates", seed=2)
    result = graph_augment(x, as_index(edges))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), dense_reference(x, edges, 4), rtol=1e-5, atol=1e-6)


def test_a_graph_without_nodes_has_no_rows() -> None:
    assert graph_augment(torch.zeros(0, 3), as_index([]), hops=2).shape == (0, 9)


def test_gradients_pass_through_the_propagation() -> None:
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: graph_augment(x, as_index([(0, 1), (2, 1)]), hops=2), (x,))


def test_a_large_sparse_graph_needs_no_dense_matrix_and_warns_of_nothing() -> None:
    nodes = 200_000  # a dense matrix would take 160 GB
    ring = torch.stack([torch.arange(nodes), torch.arange(1, nodes + 1) % nodes])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = graph_augment(torch.ones(nodes, 1), ring, hops=2)
    torch.testing.assert_close(result, torch.ones(nodes, 3))  # all degrees are equal: rows of Â add up to 1


X, EDGES = torch.ones(3, 2), torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("features", "edge_index", "hops", "message"),
    [
        (X, EDGES, -1, r"`hops` to be at least 0, but got -1"),
        (X[0], EDGES, 1, r"`features` to be an N × d matrix .* got the shape \(2,\) of float32"),
        (X.long(), EDGES, 1, r"`features` .* of int64"),
        (X.half(), EDGES, 1, r"`features` .* of float16"),
        (X * torch.nan, EDGES, 1, r"`features` to be finite"),
        (X / 0, EDGES, 1, r"`features` to be finite"),
        (X, EDGES[0], 1, r"`edge_index` to be a 2 × E tensor of int64, but got the shape \(2,\)"),
        (X, torch.zeros(3, 2, dtype=torch.int64), 1, r"`edge_index` .* got the shape \(3, 2\)"),
        (X, EDGES.int(), 1, r"`edge_index` .* of int32"),
        (X, EDGES.float(), 1, r"`edge_index` .* of float32"),
        (X, EDGES + 1, 1, r"`edge_index` to hold nodes 0 … 2, .* but got 3"),
        (X, EDGES - 1, 1, r"`edge_index` to hold nodes 0 … 2, .* but got -1"),
    ],
)
def test_arguments_that_are_no_graph_are_refused(features: Tensor, edge_index: Tensor, hops: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph_augment(features, edge_index, hops)


# -- PlanetoidDataModule ----------------------------------------------------------------------------------

NODES, WORDS = 10, 4


def small_graph() -> dict[str, np.ndarray]:
    """Ten nodes on a path, three classes; node 9 has no label, node 8 no words, node 7 is in no set."""
    words = (np.arange(NODES * WORDS).reshape(NODES, WORDS) % 3 == 0).astype(np.float32)
    words[8] = 0
    rows, columns = words.nonzero()
    parts = np.array([0, 0, 0, 1, 1, 2, 2, 3, 2, 3])
    masks = {f"{name}_mask": parts == part for part, name in enumerate(("train", "val", "test"))}
    return {
        "feature_data": words[rows, columns],
        "feature_indices": columns.astype(np.int32),
        "feature_indptr": np.concatenate([[0], (words != 0).sum(1).cumsum()]).astype(np.int32),
        "feature_shape": np.array(words.shape),
        "labels": np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], dtype=np.int32),
        "labelled": np.arange(NODES) != 9,
        "edge_index": np.stack([np.arange(NODES - 1), np.arange(1, NODES)]).astype(np.int32),
        **masks,
    }


def dense_words(graph: dict[str, np.ndarray]) -> Tensor:
    words = torch.zeros(NODES, WORDS)
    for node in range(NODES):
        for entry in range(graph["feature_indptr"][node], graph["feature_indptr"][node + 1]):
            words[node, graph["feature_indices"][entry]] += float(graph["feature_data"][entry])
    return words


def write(folder: Path, name: str = "cora", **changes: np.ndarray) -> Path:
    path = folder / f"{name}.npz"
    np.savez(path, **(small_graph() | changes))
    return path


def planetoid(folder: Path, **arguments: object) -> PlanetoidDataModule:
    data = PlanetoidDataModule(folder, **arguments)
    data.setup("fit")
    return data


@pytest.mark.parametrize("normalize", [False, True])
def test_every_loader_yields_its_nodes_in_one_batch(tmp_path: Path, normalize: bool) -> None:
    write(tmp_path)
    data = planetoid(str(tmp_path), hops=2, normalize=normalize)
    words = dense_words(small_graph())
    if normalize:
        words = words / words.sum(1, keepdim=True).clamp(min=1)
    edges = [(node, node + 1) for node in range(NODES - 1)]
    everything = dense_reference(words, edges, hops=2).float()
    assert (data.num_features, data.num_classes) == (3 * WORDS, 3)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for loader, nodes in zip(loaders, ([0, 1, 2], [3, 4], [5, 6, 8]), strict=True):
        ((x, y),) = loader
        torch.testing.assert_close(x, everything[nodes])
        assert y.dtype == torch.int64
        assert y.tolist() == [node % 3 for node in nodes]
    (x,) = data.predict_dataloader()
    torch.testing.assert_close(x, everything)


def test_entries_of_the_same_word_add_up(tmp_path: Path) -> None:
    graph = small_graph()
    graph["feature_indices"][1] = graph["feature_indices"][0]
    write(tmp_path, feature_indices=graph["feature_indices"])
    (x,) = planetoid(tmp_path, hops=0).predict_dataloader()
    assert x[0].max() == 2
    assert torch.equal(x, dense_words(graph))


def test_the_file_may_lie_in_a_sub_folder(tmp_path: Path) -> None:
    (tmp_path / "planetoid").mkdir()
    write(tmp_path / "planetoid", "citeseer")
    assert len(planetoid(tmp_path, name="citeseer").train_set) == 3


def test_only_the_rows_of_the_split_stay_in_memory(tmp_path: Path) -> None:
    write(tmp_path)
    data = planetoid(tmp_path)
    sets = (data.train_set, data.val_set, data.test_set)
    held = sum(part.tensors[0].untyped_storage().nbytes() for part in sets)
    assert held == (3 + 2 + 3) * data.num_features * 4
    assert not [name for name, value in vars(data).items() if isinstance(value, Tensor)]


def test_a_second_setup_does_no_work_again(tmp_path: Path) -> None:
    path = write(tmp_path)
    data = planetoid(tmp_path)
    before = data.train_set
    path.unlink()
    data.setup("test")
    assert data.train_set is before


class Classifier(LightningModule):
    def __init__(self, data: PlanetoidDataModule) -> None:
        super().__init__()
        self.net = nn.Linear(data.num_features, data.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.validation_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def quiet_trainer(max_epochs: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_a_trainer_fits_one_step_per_epoch_and_tests_and_predicts(tmp_path: Path) -> None:
    write(tmp_path)
    data = planetoid(tmp_path)
    model, trainer = Classifier(data), quiet_trainer(max_epochs=3)
    trainer.fit(model, data)
    assert trainer.global_step == 3
    assert "accuracy" in trainer.callback_metrics
    assert trainer.test(model, data, verbose=False)[0].keys() == {"accuracy"}
    (logits,) = trainer.predict(model, data)
    assert logits.shape == (NODES, 3)


def test_unknown_names_and_negative_hops_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`name` to be one of cora, citeseer, but got 'pubmed'"):
        PlanetoidDataModule(tmp_path, name="pubmed")
    with pytest.raises(ValueError, match="`hops`"):
        PlanetoidDataModule(tmp_path, hops=-1)


def test_everything_before_setup_says_so(tmp_path: Path) -> None:
    data = PlanetoidDataModule(tmp_path)
    loaders = [data.train_dataloader, data.val_dataloader, data.test_dataloader, data.predict_dataloader]
    for ask in (*loaders, lambda: data.num_features, lambda: data.num_classes):
        with pytest.raises(RuntimeError, match=r"setup\(\)"):
            ask()


def test_a_missing_file_names_file_folder_and_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        planetoid(tmp_path, name="citeseer")
    for part in ("citeseer.npz", str(tmp_path), PlanetoidDataModule.homepage):
        assert part in str(caught.value)


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    kept = {key: value for key, value in small_graph().items() if key not in ("labelled", "val_mask")}
    np.savez(tmp_path / "cora.npz", **kept)
    with pytest.raises(ValueError, match="got none named labelled, val_mask") as caught:
        planetoid(tmp_path)
    assert str(tmp_path / "cora.npz") in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "npy", "flipped", "deflated"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[:-30])
        case "text":
            path.write_text("404: not found")
        case "npy":
            with path.open("wb") as file:
                np.save(file, np.zeros(3))
        case "flipped":  # the last byte of the labels: only the checksum of the archive notices
            end = content.index(b"labelled.npy") - 30
            path.write_bytes(content[: end - 1] + bytes([content[end - 1] ^ 1]) + content[end:])
        case "deflated":
            np.savez_compressed(path, **small_graph())
            content = path.read_bytes()
            start = content.index(b"labels.npy") + len(b"labels.npy") + 20  # after name and extra field
            path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
    with pytest.raises(ValueError, match=r"complete npz file of numbers") as caught:
        planetoid(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [(np.array([{}] * NODES), "allow_pickle=False"), (np.array(["a"] * NODES), "can't convert np.ndarray")],
)
def test_pickled_objects_are_never_loaded_and_texts_are_refused(
    tmp_path: Path, labels: np.ndarray, reason: str
) -> None:
    write(tmp_path, labels=labels)
    with pytest.raises(ValueError, match=f"complete npz file of numbers, but got: .*{reason}"):
        planetoid(tmp_path)


@pytest.mark.parametrize("split", ["train_mask", "val_mask", "test_mask"])
def test_a_node_without_a_label_in_the_split_is_refused(tmp_path: Path, split: str) -> None:
    mask = small_graph()[split]
    mask[9] = True
    write(tmp_path, **{split: mask})
    with pytest.raises(ValueError, match=f"`{split}` in .* got node 9"):
        planetoid(tmp_path)


def test_a_negative_label_in_the_split_is_refused(tmp_path: Path) -> None:
    labels = small_graph()["labels"]
    labels[4] = -1
    write(tmp_path, labels=labels)
    with pytest.raises(ValueError, match=r"`val_mask` in .* got node 4"):
        planetoid(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("feature_shape", lambda a: a[:1], r"feature_shape \[10\] instead of"),
        ("feature_shape", lambda a: a * 0, r"feature_shape \[0, 0\] instead of"),
        ("labels", lambda a: a[1:], r"the shape \(9,\) of labels for 10 nodes"),
        ("test_mask", lambda a: a[None], r"the shape \(1, 10\) of test_mask"),
        ("feature_indptr", lambda a: a[1:], "feature_indptr"),
        ("feature_indptr", lambda a: a + 1, "feature_indptr"),
        ("feature_indptr", lambda a: np.concatenate([a[:2], a[4:0:-1], a[6:]]), "feature_indptr"),
        ("feature_data", lambda a: a[1:], "values and"),
        ("feature_indices", lambda a: a[1:], "values and"),
        ("feature_indices", lambda a: a + 1, "a feature index outside 0 … 3"),
        ("feature_indices", lambda a: a - 1, "a feature index outside 0 … 3"),
        ("val_mask", lambda a: a | (np.arange(NODES) == 2), "node 2 in two parts"),
        ("edge_index", lambda a: a + 1, r"`edge_index` .* got 10"),
        ("feature_data", lambda a: a * np.nan, "`features` to be finite"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(tmp_path: Path, key: str, change, message: str) -> None:
    write(tmp_path, **{key: change(small_graph()[key])})
    with pytest.raises(ValueError, match=message):
        planetoid(tmp_path)


# -- the real graphs --------------------------------------------------------------------------------------


def real(name: str) -> PlanetoidDataModule:
    if not (PLANETOID / f"{name}.npz").is_file():
        pytest.skip(f"no {name}.npz beside the repository")
    return planetoid(PLANETOID.parent, name=name)


@pytest.mark.parametrize(("name", "words", "classes", "nodes"), [("cora", 1433, 7, 2708), ("citeseer", 3703, 6, 3327)])
def test_the_real_graphs_have_the_public_split(name: str, words: int, classes: int, nodes: int) -> None:
    data = real(name)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [20 * classes, 500, 1000]
    assert (data.num_features, data.num_classes) == (5 * words, classes)
    ((x, y),) = data.train_dataloader()
    assert x.shape == (20 * classes, 5 * words)
    assert y.bincount().tolist() == [20] * classes
    (x,) = data.predict_dataloader()
    assert x.shape == (nodes, 5 * words)
    assert x[:, :words].unique().tolist() == [0, 1]


def test_a_linear_model_on_the_augmented_features_of_cora_is_well_above_words_alone() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    data = real("cora")
    ((x, y),), ((x_test, y_test),) = data.train_dataloader(), data.test_dataloader()

    def accuracy(columns: int) -> float:
        model = linear_model.LogisticRegression(max_iter=1000).fit(x[:, :columns].numpy(), y.numpy())
        return float(model.score(x_test[:, :columns].numpy(), y_test.numpy()))

    assert accuracy(data.num_features) > 0.76
    assert accuracy(data.num_features // 5) < 0.65
