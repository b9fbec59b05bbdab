"""BCDCallback in real Trainer.fit runs."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import Classifier, MemoryLogger, Recorder, loader, mlp, same, trainer, weights
from torch import nn
from torch.nn import functional as F

from lightning_bcd import BCDCallback, BCDStrategy, BlockOptimizer, LayerBlock, create_blocks_from_model

BLOCK_NAMES = [{f"net.{i}.weight", f"net.{i}.bias"} for i in (0, 2, 4)]

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["freeze", "mask"])
@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_only_the_active_block_moves_whatever_the_optimizer(name, mode, policy):
    recorder = Recorder()
    callback = BCDCallback(strategy="cyclic", steps_per_block=2, mode=mode, optimizer_state=policy)
    trainer(recorder, callback, max_epochs=3).fit(Classifier(OPTIMIZERS[name]), loader())
    assert recorder.moved == [BLOCK_NAMES[i // 2 % 3] for i in range(18)]
    if policy == "keep":
        assert recorder.held[-1] == set.union(*BLOCK_NAMES)
    else:
        assert recorder.held == recorder.moved


def test_offloaded_state_comes_back_and_reset_state_starts_anew():
    steps = {}
    for policy in ("reset", "offload"):
        model = Classifier()
        fit = trainer(BCDCallback(strategy="cyclic", steps_per_block=2, optimizer_state=policy), max_epochs=3)
        fit.fit(model, loader())
        state = fit.optimizers[0].state
        steps[policy] = [float(state[p]["step"]) for p in model.net[4].parameters()]
    # Three visits of two steps each: the last one counts from its own start, or from the first.
    assert steps == {"reset": [2.0, 2.0], "offload": [6.0, 6.0]}


def test_freezing_and_masking_give_the_same_bits():
    results = []
    for mode in ("freeze", "mask"):
        model = Classifier()
        trainer(BCDCallback(steps_per_block=2, mode=mode), max_epochs=4, gradient_clip_val=0.1).fit(model, loader())
        results.append(weights(model))
    assert same(*results)


def test_backward_stops_at_the_active_block_in_freeze_mode():
    recorder = Recorder()
    trainer(recorder, BCDCallback(strategy="cyclic", steps_per_block=3), max_epochs=2).fit(Classifier(), loader())
    assert recorder.trainable == [BLOCK_NAMES[i // 3 % 3] for i in range(12)]


@pytest.mark.parametrize("mode", ["freeze", "mask"])
def test_one_block_of_everything_is_plain_training(mode):
    plain, blocked = Classifier(OPTIMIZERS["adamw"]), Classifier(OPTIMIZERS["adamw"])
    trainer(max_epochs=3, gradient_clip_val=0.5).fit(plain, loader())
    with pytest.warns(UserWarning, match="only block"):
        trainer(
            BCDCallback(blocks={"all": ".*"}, steps_per_block=1, mode=mode), max_epochs=3, gradient_clip_val=0.5
        ).fit(blocked, loader())
    assert same(weights(plain), weights(blocked))


def test_blocks_change_between_accumulation_windows_only():
    # 6 batches, windows of 4: a full one and, at the end of the epoch, one of 2.
    recorder = Recorder()
    callback = BCDCallback(strategy="cyclic", steps_per_block=3)
    fit = trainer(recorder, callback, max_epochs=6, accumulate_grad_batches=4)
    fit.fit(Classifier(), loader())
    assert fit.global_step == 12
    finished = [moved for moved in recorder.moved if moved]
    assert finished == [BLOCK_NAMES[i // 3 % 3] for i in range(12)]
    assert [bool(moved) for moved in recorder.moved] == [False, False, False, True, False, True] * 6


def test_an_accumulated_step_is_the_step_on_the_joined_batch():
    results = []
    for batch_size, accumulate in ((8, 3), (24, 1)):
        model = Classifier(partial(torch.optim.SGD, lr=0.1)).double()
        model.net.double()
        fit = trainer(
            BCDCallback(strategy="cyclic", steps_per_block=1),
            max_epochs=3,
            accumulate_grad_batches=accumulate,
            precision="64-true",
        )
        fit.fit(model, loader(batch_size=batch_size))
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_clipping_sees_the_norm_of_the_active_block():
    norms = []

    class Watch(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norms.append((len(grads), float(torch.stack([g.norm() for g in grads]).norm())))

    trainer(BCDCallback(steps_per_block=2, mode="mask"), gradient_clip_val=1e-3).fit(Watch(), loader())
    assert {count for count, _ in norms} == {2}
    assert [norm for _, norm in norms] == pytest.approx([1e-3] * 12, rel=1e-3)


def test_schedulers_groups_and_monitor_work_as_in_plain_training():
    def optimizers(model):
        first, second = list(model.net[0].parameters()), list(model.net[2:].parameters())
        optimizer = torch.optim.AdamW(
            [{"params": first, "lr": 0.1, "weight_decay": 0.5}, {"params": second, "lr": 0.01}]
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    rates = []
    for callbacks in ([], [BCDCallback(steps_per_block=2, warmup_steps=1)]):
        model, logger = Classifier(), MemoryLogger()
        model.configure_optimizers = partial(optimizers, model)
        fit = trainer(LearningRateMonitor("step"), *callbacks, logger=logger, log_every_n_steps=1)
        fit.fit(model, loader())
        assert fit.optimizers[0].param_groups[0]["weight_decay"] == 0.5
        rates.append([logger.series(f"lr-AdamW/pg{i}") for i in (1, 2)])
    assert rates[0] == rates[1]
    assert len(rates[0][0]) == 12


def test_warm_up_scales_the_step_after_a_switch():
    moves = []

    class Watch(Recorder):
        def on_train_batch_end(self, trainer, pl_module, *args):
            moves.append(
                sum(
                    float((p - self.before[n]).detach().abs().max())
                    for n, p in pl_module.named_parameters()
                    if "bias" in n
                )
            )

    # SGD on a loss with constant gradient 1 for every bias.
    class Slope(Classifier):
        def training_step(self, batch, batch_idx):
            return sum(p.sum() for n, p in self.named_parameters() if "bias" in n)

    callback = BCDCallback(strategy="cyclic", steps_per_block=4, warmup_steps=3)
    trainer(Watch(), callback, max_epochs=2).fit(Slope(partial(torch.optim.SGD, lr=0.4)), loader())
    assert moves == pytest.approx([0.1, 0.2, 0.3, 0.4] * 3, rel=1e-4)


def test_bf16_mixed_and_the_usual_callbacks_work_together(tmp_path):
    model, callback = Classifier(), BCDCallback(steps_per_block=2)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    fit = trainer(
        callback,
        EarlyStopping("val_loss", patience=5),
        checkpoint,
        EMAWeightAveraging(decay=0.9),
        precision="bf16-mixed",
        enable_checkpointing=True,
        max_epochs=3,
    )
    fit.fit(model, loader(), loader())
    assert (tmp_path / "last.ckpt").exists()
    assert sum(callback.strategy.visits) == 9
    assert fit.validate(model, loader(), verbose=False)[0]["val_loss"] < 1.2
    assert fit.test(model, loader(), verbose=False)[0]["test_loss"] < 1.2
    assert len(fit.predict(model, loader())) == 6
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_16_mixed_steps_the_scaler_once_and_does_not_count_skipped_steps(fused):
    make = partial(torch.optim.Adam, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    updates = []

    class Overflow(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 1:
                # A gradient that overflows while the loss is finite.
                loss = loss + 0 * loss + (1e38 * self.net[0].weight.sum() * 1e3 - 1e38 * self.net[0].weight.sum() * 1e3)
                loss.register_hook(lambda grad: grad * float("inf"))
            updates.append(scaler.get_scale())
            return loss

    recorder = Recorder()
    callback = BCDCallback(strategy="cyclic", steps_per_block=2, nan_check=False)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(recorder, callback, plugins=[plugin], max_epochs=1).fit(Classifier(), loader())
    assert recorder.moved == [BLOCK_NAMES[i // 2 % 3] for i in range(6)]
    recorder, callback = Recorder(), BCDCallback(strategy="cyclic", steps_per_block=2, nan_check=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    trainer(recorder, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=1).fit(
        Overflow(make), loader()
    )
    # The second step is skipped: the first block then has one step more to go.
    assert recorder.moved == [BLOCK_NAMES[0], set(), BLOCK_NAMES[0], BLOCK_NAMES[1], BLOCK_NAMES[1], BLOCK_NAMES[2]]
    assert updates == [4.0, 4.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("strategy", ["greedy", "importance"])
@pytest.mark.parametrize("mode", ["freeze", "mask"])
def test_scores_are_the_gradient_norms_of_all_blocks(strategy, mode):
    seen = []

    class Check(BCDCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            net = mlp()
            net.load_state_dict(pl_module.net.state_dict())
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            self.expected = [
                float(torch.cat([net[i].weight.grad.flatten(), net[i].bias.grad]).norm()) for i in (0, 2, 4)
            ]
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            assert sum(p.grad is not None for p in pl_module.parameters()) == 2

    callback = Check(strategy=strategy, steps_per_block=2, mode=mode)
    observe = callback.strategy.observe
    callback.strategy.observe = lambda norms: (seen.append((norms, callback.expected)), observe(norms))
    recorder = Recorder()
    trainer(recorder, callback, max_epochs=3).fit(Classifier(), loader())
    # 9 visits; measured at the end of the first pass and of every later visit.
    assert len(seen) == 7
    for norms, expected in seen:
        assert norms == pytest.approx(expected, rel=1e-5)
    assert callback.strategy.visits != [9, 0, 0]
    assert all(moved in BLOCK_NAMES for moved in recorder.moved)


def test_measuring_scores_does_not_change_the_steps():
    class Follow(BCDStrategy):
        needs_scores = True

        def select(self):
            return self.num_visits % self.num_blocks

    results = []
    for strategy in (Follow(), "cyclic"):
        model = Classifier()
        fit = trainer(BCDCallback(strategy=strategy, steps_per_block=2), max_epochs=3, accumulate_grad_batches=2)
        fit.fit(model, loader())
        results.append(weights(model))
    assert same(*results)


def test_user_frozen_parameters_stay_frozen_during_and_after():
    model = Classifier()
    model.net[2].requires_grad_(False)
    before, recorder = weights(model.net[2]), Recorder()
    trainer(recorder, BCDCallback(steps_per_block=2)).fit(model, loader())
    assert same(before, weights(model.net[2]))
    assert not any("net.2" in name for names in recorder.trainable for name in names)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("strategy", ["cyclic", "greedy"])
def test_requires_grad_is_restored_when_training_breaks_off(error, strategy):
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 11:
                raise error("stop")
            return loss

    model = Broken()
    callback = BCDCallback(strategy=strategy, steps_per_block=2, warmup_steps=1)
    fit = trainer(callback, max_epochs=3)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit.fit(model, loader())
    assert all(p.requires_grad for p in model.parameters())
    assert fit.optimizers[0].param_groups[0]["lr"] == 1e-2
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_one_callback_serves_several_fits():
    callback = BCDCallback(steps_per_block=2)
    results = []
    for _ in range(2):
        model = Classifier()
        trainer(callback).fit(model, loader())
        results.append(weights(model))
    assert same(*results)
    assert sum(callback.strategy.visits) == 6


def test_on_block_switch_is_told_every_visit():
    switches = []

    class Watch(BCDCallback):
        def on_block_switch(self, trainer, pl_module, old, new):
            switches.append((trainer.global_step, old, new))

    trainer(Watch(strategy="backward", steps_per_block=4)).fit(Classifier(), loader())
    assert switches == [(0, None, 2), (4, 2, 1), (8, 1, 0)]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_names_the_active_block(bar):
    shown = []

    class Bar(bar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            shown.append(self.get_metrics(trainer, pl_module)["block"])
            super().on_train_batch_end(trainer, pl_module, *args)

    instance = Bar()
    fit = trainer(instance, BCDCallback(strategy="cyclic", steps_per_block=4), enable_progress_bar=True)
    fit.fit(Classifier(), loader())
    assert shown == ["net.0"] * 4 + ["net.2"] * 4 + ["net.4"] * 4
    assert "get_metrics" not in vars(instance)


# -- optimizers of its own ----------------------------------------------------------------------------------


def test_a_factory_gives_every_block_its_own_optimizer():
    recorder = Recorder()
    factories = {r"net\.4": partial(torch.optim.SGD, lr=0.1), ".*": partial(torch.optim.Adam, lr=1e-2)}
    callback = BCDCallback(strategy="cyclic", steps_per_block=2, optimizer=factories)
    fit = trainer(recorder, callback, max_epochs=2)
    fit.fit(Classifier(), loader())
    optimizer = fit.optimizers[0]
    assert isinstance(optimizer, BlockOptimizer)
    assert [type(o).__name__ for o in optimizer.optimizers] == ["Adam", "Adam", "SGD"]
    assert recorder.moved == [BLOCK_NAMES[i // 2 % 3] for i in range(12)]


def test_a_factory_of_adam_is_the_users_adam():
    results = []
    for factory in (None, partial(torch.optim.Adam, lr=1e-2)):
        model = Classifier()
        trainer(BCDCallback(steps_per_block=2, optimizer=factory), max_epochs=4).fit(model, loader())
        results.append(weights(model))
    assert same(*results)


def test_lbfgs_works_on_a_block():
    model = Classifier()
    callback = BCDCallback(strategy="cyclic", steps_per_block=1, optimizer=torch.optim.LBFGS)
    recorder = Recorder()
    fit = trainer(recorder, callback, max_epochs=4)
    fit.fit(model, loader(batch_size=48))
    assert recorder.moved == [BLOCK_NAMES[i % 3] for i in range(4)]
    assert fit.callback_metrics["train_loss"] < 0.9


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps_per_block": 0}, "`steps_per_block` to be an integer of at least 1, but got 0"),
        ({"steps_per_block": 1.5}, "`steps_per_block`"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"mode": "frozen"}, "`mode` to be one of auto, freeze, mask, but got 'frozen'"),
        ({"optimizer_state": "drop"}, "`optimizer_state`"),
        ({"strategy": "best"}, "`strategy` to be one of cyclic"),
        ({"coverage": 0}, "`coverage`"),
    ],
)
def test_arguments_out_of_range_are_refused_at_construction(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        BCDCallback(**arguments)


def expect(message, model=None, *callbacks, **arguments):
    model = model or Classifier()
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trainer(*(callbacks or [BCDCallback(steps_per_block=1)]), **arguments).fit(model, loader())
    assert all(p.requires_grad for p in model.parameters())
    return model


def test_an_optimizer_without_the_blocks_parameters_is_refused():
    model = Classifier()
    model.make_optimizers = lambda params: torch.optim.Adam(model.net[0].parameters())
    expect(r"lacks those of net\.2 \(2 parameters\), net\.4", model)


def test_no_optimizer_and_lbfgs_over_everything_are_refused():
    expect("lacks those of net.0", Classifier(lambda params: None))
    expect("Give each block its own", Classifier(torch.optim.LBFGS))


def test_a_strategy_out_of_range_is_refused():
    class Wrong(BCDStrategy):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def select(self):
            return self.answer

    for answer in (3, -1):
        expect(
            rf"select\(\) to return an index in range\(3\), but got {answer}", None, BCDCallback(strategy=Wrong(answer))
        )
    expect("to return an int", None, BCDCallback(strategy=Wrong(torch.tensor(1))))


def test_two_callbacks_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `BCDCallback`"):
        trainer(BCDCallback(), BCDCallback())

    class Other(BCDCallback):
        pass

    expect("Expected one BCDCallback", None, BCDCallback(), Other())


def test_manual_optimization_is_refused():
    model = Classifier()
    model.automatic_optimization = False
    expect("Derive it from BCDModule", model)


def test_a_scheduler_beside_a_factory_is_refused():
    def both(params):
        optimizer = torch.optim.Adam(params)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    expect("bound to the old one", Classifier(both), BCDCallback(optimizer=torch.optim.Adam))


def test_groups_that_change_during_training_are_refused():
    class Grow(Classifier):
        def on_train_batch_end(self, *args):
            if self.trainer.global_step == 3:
                self.trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    expect("groups of the optimizer changed", Grow())


class Branches(Classifier):
    """A model with a branch that no batch uses."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize("mode", ["freeze", "mask"])
def test_a_block_without_gradient_is_named_once_and_left_after_one_step(mode):
    recorder = Recorder()
    callback = BCDCallback(strategy="cyclic", steps_per_block=3, mode=mode)
    with pytest.warns(UserWarning, match="Block 'unused' got no gradient") as caught:
        trainer(recorder, callback, max_epochs=4).fit(Branches(), loader())
    assert sum("got no gradient" in str(w.message) for w in caught) == 1
    expected = [BLOCK_NAMES[0]] * 3 + [BLOCK_NAMES[1]] * 3 + [BLOCK_NAMES[2]] * 3 + [set()]
    assert recorder.moved == (expected * 3)[:24]


@pytest.mark.parametrize("mode", ["freeze", "mask"])
def test_a_detached_loss_is_an_error(mode):
    class Detached(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return (loss.detach() * 1.0).requires_grad_(mode == "mask")

    with pytest.warns(UserWarning, match="got no gradient") if mode == "freeze" else pytest.MonkeyPatch.context():
        expect("No block got a gradient", Detached(), BCDCallback(mode=mode))


def test_a_loss_that_is_not_finite_stops_before_anything_changes():
    class Diverged(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 4:
                self.kept = weights(self)
                return loss * float("nan")
            return loss

    model = expect(
        r"got nan at step 4 while block 'net\.4'", Diverged(), BCDCallback(strategy="cyclic", steps_per_block=2)
    )
    assert same(model.kept, weights(model))
    trainer(BCDCallback(steps_per_block=2, nan_check=False)).fit(Diverged(), loader())


def test_a_run_that_is_too_short_is_announced():
    with pytest.warns(UserWarning, match=r"takes 12 optimizer steps, but 3 blocks × 50 steps per block = 150"):
        trainer(BCDCallback()).fit(Classifier(), loader())


def test_blocks_that_miss_a_parameter_are_refused():
    model = Classifier()
    blocks = [LayerBlock("first", model.net[0].parameters())]
    expect(r"net\.2\.weight", model, BCDCallback(blocks=blocks))
    blocks = create_blocks_from_model(model, "linear", num_blocks=2)
    trainer(BCDCallback(blocks=blocks, steps_per_block=6)).fit(model, loader())


def test_a_batch_without_loss_leaves_the_books_right():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    # The last batch of every accumulation window has no loss; the step still ends the window.
    recorder = Recorder()
    callback = BCDCallback(strategy="cyclic", steps_per_block=1)
    trainer(recorder, callback, max_epochs=2, accumulate_grad_batches=2, logger=MemoryLogger()).fit(Skips(), loader())
    assert [moved for moved in recorder.moved if moved] == [BLOCK_NAMES[i % 3] for i in range(6)]
    assert {name: len(curve) for name, curve in callback.tracker.losses.items()} == {"net.0": 2, "net.2": 2, "net.4": 2}


def test_a_batch_without_loss_in_the_measured_step_ends_the_measurement():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.global_step == 5 else super().training_step(batch, batch_idx)

    recorder = Recorder()
    callback = BCDCallback(strategy="greedy", steps_per_block=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Block")
        trainer(recorder, callback, max_epochs=2).fit(Skips(), loader())
    assert recorder.moved[5] == set()
    assert all(moved in BLOCK_NAMES for moved in recorder.moved[6:])


@pytest.mark.parametrize("mode", ["freeze", "mask"])
def test_a_block_without_gradient_does_not_stop_a_gradient_scaler(mode):
    recorder = Recorder()
    callback = BCDCallback(strategy="cyclic", steps_per_block=1, mode=mode)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    with pytest.warns(UserWarning, match="Block 'unused' got no gradient"):
        trainer(recorder, callback, plugins=[plugin], max_epochs=2).fit(Branches(), loader())
    assert recorder.moved == [*BLOCK_NAMES, set()] * 3


def test_probed_norms_are_those_of_the_unscaled_loss():
    scores = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]):
        callback = BCDCallback(strategy="greedy", steps_per_block=2)
        trainer(callback, plugins=plugins, max_epochs=1).fit(Classifier(), loader())
        scores.append(callback.strategy.scores)
    assert scores[1] == pytest.approx(scores[0], rel=0.2)


def test_a_loss_that_diverges_inside_lbfgs_puts_the_weights_back():
    class Diverges(Classifier):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            if self.calls == 1:
                self.kept = weights(self)
            return super().training_step(batch, batch_idx) * (float("nan") if self.calls == 3 else 1.0)

    model = expect("finite loss", Diverges(), BCDCallback(optimizer=torch.optim.LBFGS, steps_per_block=1))
    assert model.calls == 3
    assert same(model.kept, weights(model))


def test_parameters_frozen_after_a_fit_stay_frozen():
    model, callback = Classifier(), BCDCallback(steps_per_block=2)
    fit = trainer(callback)
    fit.fit(model, loader())
    model.net[0].requires_grad_(False)
    callback.on_exception(fit, model, RuntimeError("of a later test"))
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_an_open_window_ends_with_its_epoch():
    class Cut(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 and self.current_epoch == 0 else None

    curves = []
    for model, batches in ((Cut(), 6), (Classifier(), 2)):
        callback = BCDCallback(strategy="cyclic", steps_per_block=1)
        trainer(callback, accumulate_grad_batches=2, limit_train_batches=batches).fit(model, loader())
        curves.append(callback.tracker.losses["net.2"][0][1])
    # Epoch 0 is cut inside the second window, which is thrown away: epoch 1 begins like that of a run of one window.
    assert curves[0] == curves[1]
