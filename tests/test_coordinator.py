"""BlockCoordinateDescentCoordinator in a plain PyTorch loop."""

import io
import math

import pytest
import torch
from toolbox import data, mlp, same, weights
from torch import nn
from torch.nn import functional as F

from lightning_bcd import BlockCoordinateDescentCoordinator, LayerBlock, create_blocks_from_model

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "lbfgs": (torch.optim.LBFGS, {"lr": 0.5, "max_iter": 3}),
}


def problem(name="adam", **arguments):
    model = mlp()
    blocks = create_blocks_from_model(model, "linear")
    optimizer_class, optimizer_kwargs = OPTIMIZERS[name]
    return model, BlockCoordinateDescentCoordinator(blocks, optimizer_class, optimizer_kwargs, **arguments)


@pytest.fixture
def batch():
    return data(16).tensors


def flags(model):
    return [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_separate_optimizers_written_by_hand(name, batch):
    x, y = batch
    model, coordinator = problem(name)
    reference = mlp()
    layers = [reference[i] for i in (0, 2, 4)]
    optimizer_class, optimizer_kwargs = OPTIMIZERS[name]
    optimizers = [optimizer_class(layer.parameters(), **optimizer_kwargs) for layer in layers]
    for index in (0, 1, 2, 0, 2, 1, 1, 0):

        def closure(optimizer=optimizers[index]):
            reference.zero_grad()
            loss = F.cross_entropy(reference(x), y)
            loss.backward()
            return loss

        expected = optimizers[index].step(closure)
        assert coordinator.step(index, model, x, y, F.cross_entropy) == expected.item()
        assert same(weights(model), weights(reference))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inactive_blocks_do_not_move_by_one_bit(name, batch):
    model, coordinator = problem(name)
    for index in (0, 1, 2, 1, 0):
        before = weights(model)
        coordinator.step(index, model, *batch, F.cross_entropy)
        moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
        assert moved == [i // 2 == index for i in range(6)]


def test_only_the_active_block_requires_grad_while_the_loss_is_computed(batch):
    model, coordinator = problem()
    seen = []

    def criterion(prediction, y):
        seen.append(flags(model))
        return F.cross_entropy(prediction, y)

    for index in range(3):
        coordinator.step(index, model, *batch, criterion)
    assert seen == [[i // 2 == index for i in range(6)] for index in range(3)]
    assert flags(model) == [True] * 6
    assert all(p.grad is None for p in model.parameters())


def test_parameters_that_the_user_froze_stay_frozen(batch):
    model = mlp()
    model[0].bias.requires_grad_(False)
    blocks = [LayerBlock(str(i), model[i].parameters()) for i in (0, 2, 4)]
    coordinator = BlockCoordinateDescentCoordinator(blocks, torch.optim.Adam, {"lr": 0.1})
    before = model[0].bias.clone()
    for index in (0, 1, 0):
        coordinator.step(index, model, *batch, F.cross_entropy)
        assert flags(model) == [True, False, True, True, True, True]
    assert torch.equal(model[0].bias, before)


def test_everything_is_restored_when_the_loss_raises(batch):
    model, coordinator = problem()
    before = weights(model)

    def criterion(prediction, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coordinator.step(1, model, *batch, criterion)
    assert flags(model) == [True] * 6
    assert all(p.grad is None for p in model.parameters())
    assert same(before, weights(model))
    coordinator.step(1, model, *batch, F.cross_entropy)


def test_a_closure_may_make_any_forward_pass(batch):
    x, y = batch
    models = [problem("sgd") for _ in range(2)]
    (first, plain), (second, closed) = models
    for index in (2, 0, 1):
        loss = plain.step(index, first, x, y, F.cross_entropy)
        assert closed.step(index, closure=lambda: F.cross_entropy(second(x), y)) == loss
    assert same(weights(first), weights(second))


def test_a_step_works_inside_no_grad(batch):
    model, coordinator = problem()
    before = weights(model)
    with torch.no_grad():
        coordinator.step(0, model, *batch, F.cross_entropy)
    assert not torch.equal(before[0], model[0].weight)


def test_the_loss_falls_over_cyclic_passes(batch):
    model = mlp()
    blocks = create_blocks_from_model(model, "linear")
    coordinator = BlockCoordinateDescentCoordinator(blocks, torch.optim.Adam, {"lr": 0.05})
    losses = [coordinator.step(number % 3, model, *batch, F.cross_entropy) for number in range(60)]
    assert all(isinstance(loss, float) for loss in losses)
    assert losses[-1] < 0.5 * losses[0]


def test_per_block_arguments_override_the_common_ones():
    blocks = create_blocks_from_model(mlp(), "linear")
    special = {"2": {"lr": 0.5, "momentum": 0.0}}
    coordinator = BlockCoordinateDescentCoordinator(
        blocks, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, per_block_kwargs=special
    )
    groups = coordinator.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.5, 0.1]
    assert [group["momentum"] for group in groups] == [0.9, 0.0, 0.9]


def test_a_saved_coordinator_continues_with_the_same_bits(batch):
    model, coordinator = problem("adam")
    for index in (0, 1, 0):
        coordinator.step(index, model, *batch, F.cross_entropy)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "coordinator": coordinator.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = problem("adam")
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["coordinator"])
    for index in (0, 1, 2, 0):
        coordinator.step(index, model, *batch, F.cross_entropy)
        other.step(index, resumed, *batch, F.cross_entropy)
    assert same(weights(model), weights(resumed))


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda prediction, y: F.cross_entropy(prediction, y) * math.nan, "finite, but got nan"),
        (lambda prediction, y: F.cross_entropy(prediction, y) * math.inf, "finite, but got inf"),
        (lambda prediction, y: F.cross_entropy(prediction, y, reduction="none"), "scalar tensor"),
        (lambda prediction, y: 1.5, "scalar tensor"),
        (lambda prediction, y: F.cross_entropy(prediction, y).detach(), "depend on block '2'"),
    ],
)
@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_a_bad_loss_is_refused_before_anything_changes(name, criterion, message, batch):
    model, coordinator = problem(name)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        coordinator.step(1, model, *batch, criterion)
    assert same(before, weights(model))
    assert flags(model) == [True] * 6
    assert all(p.grad is None for p in model.parameters())


def test_a_failure_inside_lbfgs_puts_the_weights_back(batch):
    model, coordinator = problem("lbfgs")
    coordinator.step(0, model, *batch, F.cross_entropy)
    before = weights(model)
    calls = []

    def criterion(prediction, y):
        calls.append(weights(model))
        return F.cross_entropy(prediction, y) * (1 if len(calls) < 3 else math.nan)

    with pytest.raises(ValueError, match="finite"):
        coordinator.step(0, model, *batch, criterion)
    assert not same(before, calls[-1])  # it had moved
    assert same(before, weights(model))
    fresh_model, fresh = problem("lbfgs")
    fresh_model.load_state_dict(model.state_dict())
    # The history is gone: the next step is the one of a new optimizer.
    assert coordinator.step(0, model, *batch, F.cross_entropy) == fresh.step(0, fresh_model, *batch, F.cross_entropy)
    assert same(weights(model), weights(fresh_model))


def test_a_block_that_the_loss_does_not_use_is_named(batch):
    x, y = batch
    model, coordinator = problem()
    with pytest.raises(ValueError, match="depend on block '0'"):
        coordinator.step(0, closure=lambda: F.cross_entropy(model[2:](torch.ones(len(x), 8)), y))


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_refused(index, batch):
    model, coordinator = problem()
    with pytest.raises(IndexError, match=rf"range\(3\), but got {index}"):
        coordinator.step(index, model, *batch, F.cross_entropy)


def test_a_mixture_of_both_forms_or_half_of_one_is_refused(batch):
    x, y = batch
    model, coordinator = problem()
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    for arguments in (
        {},
        {"model": model},
        {"model": model, "x": x, "y": y},
        {"model": model, "x": x, "y": y, "criterion": F.cross_entropy, "closure": closure},
    ):
        with pytest.raises(ValueError, match="Expected either"):
            coordinator.step(0, **arguments)


def test_no_block_shared_parameters_and_unknown_names_are_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="at least one LayerBlock"):
        BlockCoordinateDescentCoordinator([], torch.optim.SGD)
    blocks = [LayerBlock("a", layer.parameters()), LayerBlock("b", [layer.weight])]
    with pytest.raises(ValueError, match="'a' and 'b' share"):
        BlockCoordinateDescentCoordinator(blocks, torch.optim.SGD)
    with pytest.raises(ValueError, match=r"`per_block_kwargs`.*\['typo'\]"):
        BlockCoordinateDescentCoordinator(blocks[:1], torch.optim.SGD, {"lr": 0.1}, {"typo": {"lr": 0.2}})
