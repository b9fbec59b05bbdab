"""BlockScheduler in a plain loop: visits, state, errors."""

import io
from functools import partial

import pytest
import torch
from toolbox import data, mlp, same, weights
from torch import nn
from torch.nn import functional as F

from lightning_bcd import BCDStrategy, BlockOptimizer, CyclicStrategy, LayerBlock, create_blocks_from_model
from lightning_bcd.scheduler import BlockScheduler
from lightning_bcd.scored_strategy import STRATEGY_NAMES, resolve_strategy

ADAM = partial(torch.optim.Adam, lr=0.01)
OPTIMIZERS = {
    "adam": lambda model, blocks: ADAM(model.parameters()),
    "adagrad": lambda model, blocks: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "adam per block": lambda model, blocks: BlockOptimizer(blocks, ADAM),
    "adagrad per block": lambda model, blocks: BlockOptimizer(blocks, partial(torch.optim.Adagrad, lr=0.1)),
}


def problem(optimizer="adam", strategy="cyclic", *, steps_per_block=2, mode="freeze", policy="reset", warmup_steps=0):
    model = mlp()
    blocks = create_blocks_from_model(model, "linear")
    run = BlockScheduler(
        blocks,
        resolve_strategy(strategy),
        steps_per_block=steps_per_block,
        mode=mode,
        optimizer=OPTIMIZERS[optimizer](model, blocks),
        policy=policy,
        warmup_steps=warmup_steps,
    )
    run.listen()
    return model, run


def train(model, run, steps):
    """Take optimizer steps as the callback does; return the active block of each."""
    x, y = data(16).tensors
    active = []
    for _ in range(steps):
        if run.visit_done:
            run.begin_visit()
        measure = run.wants_scores()
        if measure:
            run.start_probe()
        run.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if measure:
            run.strategy.observe(run.finish_probe())
        run.drop_inactive_gradients()
        run.optimizer.step()
        active.append(run.active)
    return active


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mode", ["freeze", "mask"])
def test_a_visit_is_steps_per_block_optimizer_steps(mode):
    model, run = problem(steps_per_block=3, mode=mode)
    assert run.visit_done
    assert train(model, run, 10) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0]
    assert (run.active, run.steps, run.block.name) == (0, 1, "0")
    assert run.strategy.visits == [2, 1, 1]


def test_freezing_leaves_one_block_trainable_and_masking_all():
    for mode in ("freeze", "mask"):
        model, run = problem(mode=mode)
        for block in (0, 1, 2):
            run.begin_visit()
            flags = [p.requires_grad for p in model.parameters()]
            assert flags == [mode == "mask" or i // 2 == block for i in range(6)]
        run.release()
        run.release()
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_freezing_and_masking_give_the_same_bits(optimizer, policy):
    results = []
    for mode in ("freeze", "mask"):
        model, run = problem(optimizer, "greedy", mode=mode, policy=policy)
        train(model, run, 14)
        results.append((weights(model), run.strategy.visits, run.strategy.scores))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
@pytest.mark.parametrize("at", [6, 9])  # between visits, inside a visit
def test_a_saved_run_continues_with_the_same_bits(optimizer, policy, at):
    model, run = problem(optimizer, "random", policy=policy)
    train(model, run, at)
    saved = reloaded([model.state_dict(), run.state_dict(), run.optimizer.state_dict()])
    expected = train(model, run, 10)

    resumed, other = problem(optimizer, "random", policy=policy)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other.optimizer.load_state_dict(saved[2])
    if not other.visit_done:
        other.apply()
    assert train(resumed, other, 10) == expected
    assert same(weights(model), weights(resumed))
    assert other.optimizer_bytes() == run.optimizer_bytes()


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
@pytest.mark.parametrize("at", [2, 7])  # in the first cyclic pass, after it
def test_a_saved_run_goes_on_with_its_strategy(strategy, at):
    model, run = problem(strategy=strategy)
    train(model, run, at)
    saved = reloaded([model.state_dict(), run.state_dict(), run.optimizer.state_dict()])
    expected = train(model, run, 14)
    resumed, other = problem(strategy=strategy)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other.optimizer.load_state_dict(saved[2])
    if not other.visit_done:
        other.apply()
    assert train(resumed, other, 14) == expected
    assert same(weights(model), weights(resumed))


def test_a_state_before_the_first_visit_loads_too():
    _, run = problem()
    model, other = problem()
    other.load_state_dict(reloaded(run.state_dict()))
    assert other.active is None
    assert train(model, other, 4) == [0, 0, 1, 1]


def test_a_state_of_another_version_is_refused():
    _, run = problem()
    state = run.state_dict()
    for version in (0, 99, None):
        with pytest.raises(ValueError, match=f"format version 2, but got {version}"):
            run.load_state_dict({**state, "version": version})
    with pytest.raises(ValueError, match="format version 2, but got None"):
        run.load_state_dict({})


def test_a_state_of_other_blocks_is_refused_and_names_both():
    _, run = problem()
    state = run.state_dict()
    state["blocks"] = ["encoder", "decoder"]
    with pytest.raises(ValueError, match=r"Saved 2: \['encoder', 'decoder'\]\. Now 3: \['0', '2', '4'\]"):
        run.load_state_dict(state)


def test_a_state_of_another_strategy_is_refused():
    _, run = problem(strategy="random")
    with pytest.raises(ValueError, match="RandomStrategy"):
        problem(strategy="cyclic")[1].load_state_dict(run.state_dict())


def test_parameters_that_are_not_in_the_optimizer_are_counted_by_block():
    model = mlp()
    blocks = create_blocks_from_model(model, "linear")
    optimizer = ADAM([*model[0].parameters(), model[2].weight])
    with pytest.raises(ValueError, match=r"lacks those of 2 \(1 parameters\), 4 \(2 parameters\)"):
        BlockScheduler(blocks, CyclicStrategy(), steps_per_block=1, mode="freeze", optimizer=optimizer, policy="reset")


def test_lbfgs_over_everything_is_refused_and_one_per_block_is_not():
    model = mlp()
    blocks = create_blocks_from_model(model, "linear")
    make = partial(BlockScheduler, blocks, CyclicStrategy(), steps_per_block=1, mode="freeze", policy="keep")
    with pytest.raises(ValueError, match=r"optimizer=torch\.optim\.LBFGS"):
        make(optimizer=torch.optim.LBFGS(model.parameters()))
    make(optimizer=BlockOptimizer(blocks, torch.optim.LBFGS))


def test_a_strategy_out_of_range_is_refused_and_nothing_is_switched():
    class Beyond(BCDStrategy):
        def select(self):
            return self.num_visits * 3

    model, run = problem(strategy=Beyond())
    train(model, run, 2)
    with pytest.raises(IndexError, match=r"Beyond.*range\(3\)"):
        run.begin_visit()
    assert (run.active, run.steps) == (0, 2)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, False, False]


def test_warm_up_raises_the_rate_after_every_switch_and_hides_it_from_schedulers():
    model, run = problem(steps_per_block=4, warmup_steps=3)
    group = run.optimizer.param_groups[0]
    seen = []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(group["lr"]))
    outside = []
    for _ in range(8):
        train(model, run, 1)
        outside.append(group["lr"])
    assert seen == pytest.approx([0.0025, 0.005, 0.0075, 0.01] * 2)
    assert outside == [0.01] * 8


def test_release_restores_a_rate_that_a_failing_step_left_behind():
    _, run = problem(steps_per_block=4, warmup_steps=3)
    run.begin_visit()

    def fail(*_):
        raise KeyboardInterrupt

    handle = run.optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run.optimizer.step()
    handle.remove()
    run.release()
    assert run.optimizer.param_groups[0]["lr"] == 0.01
    run.optimizer.step()
    assert run.steps == 0  # nobody counts any more


def test_a_step_that_the_scaler_skips_does_not_count():
    x, y = data(16).tensors
    model, run = problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    run.begin_visit()
    for factor, steps in ((1.0, 1), (torch.inf, 1), (1.0, 2)):
        run.optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()
        assert run.steps == steps
    assert run.visit_done


def test_gradients_and_state_of_a_block_that_leaves_are_dropped():
    model, run = problem()
    train(model, run, 2)
    assert model[0].weight.grad is not None
    run.begin_visit()
    assert all(p.grad is None for p in model.parameters())
    assert not run.optimizer.state
    assert run.optimizer_bytes() == 0


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_a_block_that_follows_itself_keeps_its_state(policy):
    class Twice(BCDStrategy):
        def select(self):
            return self.num_visits // 2 % self.num_blocks

    model, run = problem(strategy=Twice(), policy=policy)
    train(model, run, 4)
    assert run.strategy.visits == [2, 0, 0]
    assert run.optimizer.state[model[0].weight]["step"] == 4


def test_optimizer_bytes_are_those_of_one_block_unless_kept():
    moments = {"reset": 1, "offload": 1, "keep": 3}
    for policy, blocks in moments.items():
        model, run = problem(policy=policy)
        train(model, run, 6)
        held = [p for i in (4, 2, 0)[:blocks] for p in model[i].parameters()]
        assert run.optimizer_bytes() == sum(8 * p.numel() + 4 for p in held)


@pytest.mark.parametrize("mode", ["freeze", "mask"])
def test_scores_are_asked_for_in_the_last_step_of_a_visit_after_the_first_pass(mode):
    model, run = problem(strategy="greedy", steps_per_block=3, mode=mode)
    wanted = []
    for step in range(12):
        if run.visit_done:
            run.begin_visit()
        wanted += [step] if run.wants_scores() else []
        train(model, run, 1)
        assert not run.probing
    assert wanted == [8, 11]


def test_release_takes_back_an_armed_probe():
    model, run = problem(strategy="greedy")
    run.begin_visit()
    run.start_probe()
    assert run.probing
    run.release()
    assert not run.probing
    model(data(4).tensors[0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_block_without_gradient_is_named_once_and_left():
    _, run = problem()
    run.begin_visit()
    with pytest.warns(UserWarning, match="Block '0' got no gradient"):
        run.note_gradient()
    assert run.steps == 1  # the step under way is the last one
    run.begin_visit()
    run.block.parameters[0].grad = torch.zeros_like(run.block.parameters[0])
    run.note_gradient()
    run.begin_visit()
    with pytest.warns(UserWarning, match="Block '4' got no gradient"):
        run.note_gradient()


@pytest.mark.filterwarnings("ignore:Block")
def test_no_block_with_gradient_is_an_error():
    _, run = problem()
    for _ in range(2):
        run.begin_visit()
        run.note_gradient()
    run.begin_visit()
    with pytest.raises(ValueError, match="No block got a gradient"):
        run.note_gradient()


def test_changed_groups_are_noticed():
    _, run = problem()
    assert not run.groups_changed()
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert run.groups_changed()


def test_parameters_that_the_user_froze_stay_frozen_and_may_be_missing_in_the_optimizer():
    model = mlp()
    model[2].bias.requires_grad_(False)
    blocks = [LayerBlock(str(i), model[i].parameters()) for i in (0, 2, 4)]
    optimizer = ADAM([p for p in model.parameters() if p.requires_grad])
    run = BlockScheduler(
        blocks, CyclicStrategy(), steps_per_block=1, mode="mask", optimizer=optimizer, policy="offload"
    )
    run.listen()
    before = model[2].bias.clone()
    train(model, run, 5)
    run.release()
    assert not model[2].bias.requires_grad
    assert torch.equal(model[2].bias, before)
