"""BlockOptimizer and OptimizerStateStore."""

import io
from functools import partial

import pytest
import torch
from toolbox import data, mlp, same, weights
from torch import nn
from torch.nn import functional as F

from lightning_bcd import BlockOptimizer, LayerBlock, create_blocks_from_model
from lightning_bcd.optim.block import requires_closure
from lightning_bcd.optim.store import OptimizerStateStore

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
OPTIMIZERS = {
    "sgd": SGD,
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.5, max_iter=3),
}
EACH = {"0": SGD, "2": partial(torch.optim.Adagrad, lr=0.2), "4": OPTIMIZERS["lbfgs"]}
FACTORIES = {**OPTIMIZERS, "one per block": EACH}
LAYERS = (0, 2, 4)


def problem(factory):
    model = mlp()
    return model, BlockOptimizer(create_blocks_from_model(model, "linear"), factory)


def evaluation(model, block=None):
    """A closure that leaves gradients on one block, or on all."""
    x, y = data(16).tensors
    kept = set((model if block is None else model[LAYERS[block]]).parameters())

    def closure():
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for parameter in model.parameters():
            if parameter not in kept:
                parameter.grad = None
        return loss

    return closure


def take_step(model, optimizer, block):
    optimizer.active = block
    closure = evaluation(model, block)
    if optimizer.requires_closure:
        return optimizer.step(closure)
    closure()
    return optimizer.step()


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", FACTORIES)
def test_only_the_active_block_steps_and_as_its_own_optimizer_would(name):
    model, optimizer = problem(FACTORIES[name])
    reference = mlp()
    make = [FACTORIES[name] if name != "one per block" else EACH[str(i)] for i in LAYERS]
    separate = [factory(reference[i].parameters()) for factory, i in zip(make, LAYERS, strict=True)]
    for block in (0, 2, 1, 1, 0, 2):
        # All blocks hold gradients here: being inactive is enough to stay where one is.
        optimizer.active = block
        optimizer.step(evaluation(model))
        separate[block].step(evaluation(reference))
        assert same(weights(model), weights(reference))


def test_a_closure_is_evaluated_and_its_value_returned():
    model, optimizer = problem(SGD)
    x, y = data(16).tensors
    expected = F.cross_entropy(model(x), y)
    assert torch.equal(optimizer.step(evaluation(model)), expected)
    assert optimizer.step() is None


@pytest.mark.parametrize("name", FACTORIES)
def test_a_loaded_state_continues_with_the_same_bits(name):
    model, optimizer = problem(FACTORIES[name])
    for block in (0, 2, 0, 1):
        take_step(model, optimizer, block)
    saved = reloaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, other = problem(FACTORIES[name])
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for block in (0, 1, 2, 0):
        take_step(model, optimizer, block)
        take_step(resumed, other, block)
        assert same(weights(model), weights(resumed))


def test_groups_and_state_stay_shared_with_the_inner_optimizers_after_loading():
    model, optimizer = problem(OPTIMIZERS["adam"])
    take_step(model, optimizer, 1)
    optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    assert [inner.param_groups for inner in optimizer.optimizers] == [[group] for group in optimizer.param_groups]
    for inner, group in zip(optimizer.optimizers, optimizer.param_groups, strict=True):
        assert inner.param_groups[0] is group
        assert inner.state is optimizer.state


def test_the_state_of_other_blocks_is_refused():
    _, optimizer = problem(SGD)
    model = mlp(layers=2)
    other = BlockOptimizer(create_blocks_from_model(model, "linear"), SGD)
    with pytest.raises(ValueError, match="parameter groups"):
        other.load_state_dict(optimizer.state_dict())


def test_an_inner_optimizer_may_have_several_groups():
    def no_decay_on_biases(parameters):
        weight, bias = parameters
        return torch.optim.AdamW([{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "lr": 1.0}], lr=0.1)

    model, optimizer = problem(no_decay_on_biases)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0] * 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.01] * 3
    optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    for inner, index in zip(optimizer.optimizers, LAYERS, strict=True):
        assert [group["params"] for group in inner.param_groups] == [[model[index].weight], [model[index].bias]]
    before = weights(model)
    take_step(model, optimizer, 2)
    assert [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("after_loading", [False, True])
def test_schedulers_change_the_rate_of_every_block(after_loading):
    model, optimizer = problem({"0": SGD, ".*": partial(torch.optim.Adam, lr=0.02)})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    if after_loading:
        take_step(model, optimizer, 1)
        optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    take_step(model, optimizer, 0)
    scheduler.step()
    inner = [group["lr"] for one in optimizer.optimizers for group in one.param_groups]
    assert inner == [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01, 0.01]
    before = model[0].bias.clone()
    optimizer.state.clear()
    take_step(model, optimizer, 0)
    assert torch.allclose(model[0].bias, before - 0.05 * model[0].bias.grad)


def test_one_cycle_changes_rate_and_momentum_of_every_block():
    _, optimizer = problem(SGD)
    plain = SGD(mlp().parameters())
    for one in (optimizer, plain):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.1, total_steps=10)
        one.step()
        scheduler.step()
    assert plain.param_groups[0]["momentum"] < 0.95
    for inner in optimizer.optimizers:
        assert inner.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]
        assert inner.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_zero_grad_clears_the_gradients_of_all_blocks():
    model, optimizer = problem(OPTIMIZERS["adam"])
    evaluation(model)()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_step_hooks_run_once_per_step():
    model, optimizer = problem(SGD)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    take_step(model, optimizer, 0)
    take_step(model, optimizer, 2)
    assert seen == ["pre", "post"] * 2


def test_a_gradient_scaler_unscales_the_active_block_and_skips_overflow():
    x, y = data(16).tensors
    model, optimizer = problem(SGD)
    reference, plain = problem(SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for block in (0, 1, 2):
        take_step(reference, plain, block)
        optimizer.active = block
        optimizer.zero_grad()
        blocks = [model[i] for i in LAYERS]
        for index, layer in enumerate(blocks):
            layer.requires_grad_(index == block)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(weights(model), weights(reference))  # the scale is a power of two
    before = weights(model)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(before, weights(model))
    assert scaler.get_scale() == 512.0


def test_only_lbfgs_requires_a_closure():
    _, optimizer = problem(EACH)
    needs = []
    for block in range(3):
        optimizer.active = block
        needs.append(optimizer.requires_closure)
    assert needs == [False, False, True]

    class Line(torch.optim.SGD):
        requires_closure = True

    assert requires_closure(Line([nn.Parameter(torch.ones(1))], lr=0.1))


def test_the_first_pattern_that_matches_the_whole_name_wins():
    _, optimizer = problem({"0|2": SGD, "2|4": OPTIMIZERS["adam"]})
    assert [type(inner) for inner in optimizer.optimizers] == [torch.optim.SGD, torch.optim.SGD, torch.optim.Adam]


def test_a_list_gives_one_factory_per_block():
    _, optimizer = problem([OPTIMIZERS["adam"], SGD, SGD])
    assert [type(inner) for inner in optimizer.optimizers] == [torch.optim.Adam, torch.optim.SGD, torch.optim.SGD]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ({"0": SGD, "2": SGD}, "matches block '4'"),
        ({"[02]": SGD, ".": SGD, "5": SGD}, r"\['5'\] match none of \['0', '2', '4'\]"),
        ({".*": SGD, "0": SGD}, r"\['0'\] match none"),  # hidden behind the first
        ([SGD, SGD], "3 blocks, but got 2"),
    ],
)
def test_factories_that_do_not_fit_the_blocks_are_refused(factory, message):
    with pytest.raises(ValueError, match=message):
        problem(factory)


# -- what happens to the state of a block that leaves ----------------------------------------------------------


def visits(model, optimizer, store, order, steps=2):
    """Move from block to block as a scheduler does."""
    blocks = [list(model[i].parameters()) for i in LAYERS]
    for inactive in blocks[1:]:
        store.leave(inactive)
    active = 0
    for block in order:
        if block != active:
            store.leave(blocks[active])
            store.enter(blocks[block])
            active = block
        for _ in range(steps):
            if isinstance(optimizer, BlockOptimizer):
                take_step(model, optimizer, block)
            else:
                evaluation(model, block)()
                optimizer.step()


def holders(model, state):
    """Indices of the blocks that have state."""
    return [number for number, i in enumerate(LAYERS) if any(state.get(p) for p in model[i].parameters())]


def pairs(name, policy):
    """The same training with the user's optimizer and with a BlockOptimizer."""
    model = mlp()
    plain = OPTIMIZERS[name](model.parameters())
    blockwise_model, blockwise = problem(OPTIMIZERS[name])
    yield model, plain, OptimizerStateStore(plain, policy)
    yield blockwise_model, blockwise, OptimizerStateStore(blockwise, policy)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_reset_gives_a_returning_block_the_state_of_a_new_optimizer(name):
    reference = mlp()
    for block in (0, 1, 0, 2):
        fresh = OPTIMIZERS[name](reference[LAYERS[block]].parameters())
        for _ in range(2):
            evaluation(reference, block)()
            fresh.step()
    for model, optimizer, store in pairs(name, "reset"):
        visits(model, optimizer, store, (0, 1, 0, 2))
        assert same(weights(model), weights(reference))
        assert holders(model, optimizer.state) == [2]
        assert not store.host


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
@pytest.mark.parametrize("policy", ["keep", "offload"])
def test_keep_and_offload_go_on_where_the_block_stopped(name, policy):
    reference = mlp()
    separate = [OPTIMIZERS[name](reference[i].parameters()) for i in LAYERS]
    for block in (0, 1, 0, 2, 1):
        for _ in range(2):
            evaluation(reference, block)()
            separate[block].step()
    for model, optimizer, store in pairs(name, policy):
        visits(model, optimizer, store, (0, 1, 0, 2, 1))
        assert same(weights(model), weights(reference))
        assert holders(model, optimizer.state) == ([0, 1, 2] if policy == "keep" else [1])
        assert holders(model, store.host) == ([] if policy == "keep" else [0, 2])


def test_offload_on_the_cpu_moves_the_state_without_a_copy():
    model = mlp()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    store = OptimizerStateStore(optimizer, "offload")
    evaluation(model)()
    optimizer.step()
    weight = model[0].weight
    pointer = optimizer.state[weight]["exp_avg"].data_ptr()
    store.leave([weight])
    assert store.host[weight]["exp_avg"].data_ptr() == pointer
    store.enter([weight])
    assert optimizer.state[weight]["exp_avg"].data_ptr() == pointer
    assert not store.host


def test_the_state_of_lbfgs_leaves_and_returns_whole():
    for policy in ("keep", "offload"):
        model, optimizer = problem(OPTIMIZERS["lbfgs"])
        reference, plain = problem(OPTIMIZERS["lbfgs"])
        visits(model, optimizer, OptimizerStateStore(optimizer, policy), (0, 1, 0))
        for block in (0, 0, 1, 1, 0, 0):
            take_step(reference, plain, block)
        assert same(weights(model), weights(reference))


def test_state_bytes_count_what_stays_beside_the_weights():
    model = mlp()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    store = OptimizerStateStore(optimizer, "offload")
    assert store.state_bytes() == 0
    evaluation(model)()
    optimizer.step()
    sizes = [sum(p.numel() for p in model[i].parameters()) for i in LAYERS]
    # Two float32 moments per element and one float32 step counter per parameter.
    assert store.state_bytes() == sum(8 * size + 2 * 4 for size in sizes)
    store.leave(model[0].parameters())
    assert store.state_bytes() == sum(8 * size + 2 * 4 for size in sizes[1:])


def test_optimizers_with_early_state_are_recognised_before_the_first_step():
    parameters = [nn.Parameter(torch.ones(2))]
    assert OptimizerStateStore(OPTIMIZERS["adagrad"](parameters), "reset").early
    assert not OptimizerStateStore(OPTIMIZERS["adam"](parameters), "reset").early
    assert OptimizerStateStore(problem(OPTIMIZERS["adagrad"])[1], "reset").early


def test_only_blocks_whose_optimizer_makes_state_early_get_a_fresh_one():
    model, optimizer = problem({"0": OPTIMIZERS["adagrad"], ".*": SGD})
    take_step(model, optimizer, 0)
    store = OptimizerStateStore(optimizer, "reset", early=True)
    blocks = [list(model[i].parameters()) for i in LAYERS]
    store.leave(blocks[0])
    store.enter(blocks[1])
    assert not optimizer.state.get(blocks[1][0])
    store.enter(blocks[0])
    assert not any(optimizer.state[p]["sum"].any() for p in blocks[0])
    assert all(optimizer.state[p]["step"] == 0 for p in blocks[0])


def test_a_loaded_state_keeps_the_dtype_of_its_parameters():
    layer = nn.Linear(3, 2).to(torch.float64)
    optimizer = BlockOptimizer([LayerBlock("only", layer.parameters())], OPTIMIZERS["adam"])
    layer(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    assert optimizer.state[layer.weight]["exp_avg"].dtype == torch.float64


def test_a_fresh_state_has_the_settings_of_the_block():
    model, optimizer = problem({"0": partial(torch.optim.Adagrad, initial_accumulator_value=0.25), ".*": SGD})
    take_step(model, optimizer, 0)
    store = OptimizerStateStore(optimizer, "reset", early=True)
    blocks = [list(model[i].parameters()) for i in LAYERS]
    store.leave(blocks[0])
    store.enter(blocks[1])
    assert not optimizer.state.get(blocks[1][0])
    store.enter(blocks[0])
    assert all((optimizer.state[p]["sum"] == 0.25).all() for p in blocks[0])
    assert all(optimizer.state[p]["step"] == 0 for p in blocks[0])


def test_a_fresh_state_has_the_settings_of_a_plain_optimizer():
    model = mlp()
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.25)
    store = OptimizerStateStore(optimizer, "reset")
    store.leave(model[0].parameters())
    store.enter(list(model[0].parameters()))
    assert all((optimizer.state[p]["sum"] == 0.25).all() for p in model.parameters())


def test_groups_cannot_be_added():
    _, optimizer = problem(SGD)
    with pytest.raises(ValueError, match="Make a new BlockOptimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert len(optimizer.param_groups) == 3
