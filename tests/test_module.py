"""BCDModule and BCDMixin in real Trainer.fit runs."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import MemoryLogger, Recorder, data, loader, mlp, same, trainer, weights
from torch import nn
from torch.nn import functional as F

from lightning_bcd import BCDCallback, BCDMixin, BCDModule, BCDStrategy

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Net(BCDModule):
    def __init__(self, net=None, **arguments):
        super().__init__(**{"optimizer": SGD, **arguments})
        self.net = mlp() if net is None else net
        self.calls = []

    def block_loss(self, batch, batch_idx):
        self.calls.append(batch_idx)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def by_hand(net, batches, inner_steps, visits_per_batch=1, clip=None, make=SGD):
    """Plain loops: one optimizer per Linear, cyclic blocks."""
    layers = [net[0], net[2], net[4]]
    optimizers = [make(layer.parameters()) for layer in layers]
    block = 0
    for x, y in batches:
        for _ in range(visits_per_batch):
            for _ in range(inner_steps):
                net.zero_grad()
                F.cross_entropy(net(x), y).backward()
                if clip:
                    nn.utils.clip_grad_norm_(layers[block].parameters(), clip)
                optimizers[block].step()
            block = (block + 1) % 3
    return weights(net)


@pytest.mark.parametrize(("sweep", "visits"), [("block", 1), ("all", 3)])
def test_inner_steps_are_steps_on_the_same_batch(sweep, visits):
    model = Net(inner_steps=3, sweep=sweep)
    fit = trainer(max_epochs=2)
    fit.fit(model, loader())
    expected = by_hand(mlp(), list(loader()) * 2, 3, visits)
    for a, b in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert fit.global_step == 12 * 3 * visits
    assert all(p.requires_grad for p in model.parameters())


def test_clipping_applies_to_the_active_block():
    model = Net(inner_steps=2, gradient_clip_val=0.05)
    trainer(max_epochs=2).fit(model, loader())
    for a, b in zip(weights(model), by_hand(mlp(), list(loader()) * 2, 2, clip=0.05), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_only_the_active_block_moves():
    recorder = Recorder()
    trainer(recorder, max_epochs=2).fit(Net(inner_steps=2), loader())
    assert recorder.moved == [{f"net.{i}.weight", f"net.{i}.bias"} for i in (0, 2, 4)] * 4


def test_accumulation_steps_on_the_mean_of_the_batches():
    results = []
    for batch_size, accumulate in ((8, 2), (16, 1)):
        model = Net(net=mlp().double(), inner_steps=3, accumulate=accumulate)
        trainer(max_epochs=2, precision="64-true").fit(model, loader(40, batch_size))
        results.append(weights(model))
    # 40 samples: two windows of 16 and a last one of 8 that takes what is left.
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_lbfgs_on_one_block_beside_sgd_on_the_others():
    model = Net(inner_steps=2, optimizer={r"net\.4": torch.optim.LBFGS, ".*": SGD}, gradient_clip_val=10.0)
    fit = trainer(max_epochs=3)
    fit.fit(model, loader(batch_size=48))
    assert fit.global_step == 6
    # LBFGS evaluates the loss up to 20 times per step, SGD once.
    assert len(model.calls) > 10
    assert F.cross_entropy(model.net(data().tensors[0]), data().tensors[1]) < 0.9


def test_max_steps_and_step_checkpoints_count_inner_steps(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit = trainer(checkpoint, max_epochs=-1, max_steps=14, enable_checkpointing=True)
    fit.fit(Net(inner_steps=4), loader())
    assert fit.global_step == 14
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=12.ckpt", "step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize(("interval", "frequency", "steps"), [("step", 1, 24), ("step", 3, 8), ("epoch", 1, 2)])
def test_schedulers_step_by_their_interval(interval, frequency, steps):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            entry = {"scheduler": schedule, "interval": interval, "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": entry}

    logger = MemoryLogger()
    fit = trainer(LearningRateMonitor(), logger=logger, log_every_n_steps=1)
    fit.fit(Scheduled(inner_steps=2), loader())
    assert {group["lr"] for group in fit.optimizers[0].param_groups} == {0.1 * 0.5**steps}
    assert logger.series("lr-BlockOptimizer/pg1")[0] == (0, 0.1)


def test_plateau_schedulers_read_their_metric():
    class Plateau(Net):
        monitor = "val_loss"

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": self.monitor}}

    fit = trainer(max_epochs=3)
    fit.fit(Plateau(), loader(), loader())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    missing = Plateau()
    missing.monitor = "accuracy"
    with pytest.raises(MisconfigurationException, match="'accuracy', which is not available"):
        trainer().fit(missing, loader(), loader())
    assert all(p.requires_grad for p in missing.parameters())


def test_hooks_of_the_user_do_not_disturb_the_books():
    class Hooked(Net):
        def on_train_start(self):
            self.seen = True

        def on_train_epoch_end(self):
            self.seen = True

        def on_train_end(self):
            self.seen = True

    model = Hooked(inner_steps=2)
    trainer().fit(model, loader())
    assert model.seen
    assert all(p.requires_grad for p in model.parameters())

    class Replaced(Net):
        def configure_callbacks(self):
            return []

    with pytest.raises(MisconfigurationException, match=r"super\(\).configure_callbacks\(\)"):
        trainer().fit(Replaced(), loader())

    class Other(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    with pytest.raises(MisconfigurationException, match=r"super\(\).configure_optimizers\(\)"):
        trainer().fit(Other(), loader())


def test_the_mixin_turns_an_existing_module_into_block_descent():
    class Existing(LightningModule):
        def __init__(self, width):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

        def training_step(self, batch, batch_idx):
            raise AssertionError("replaced by the mixin")

    class Blockwise(BCDMixin, Existing):
        def __init__(self):
            super().__init__(width=5)
            self.configure_bcd(inner_steps=2, optimizer=SGD)

        def block_loss(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    recorder = Recorder()
    trainer(recorder).fit(Blockwise(), loader())
    assert recorder.moved == [{f"net.{i}.weight", f"net.{i}.bias"} for i in (0, 2)] * 6


def test_16_mixed_updates_the_scaler_once_per_inner_step():
    scales = []

    class Watch(Net):
        def block_loss(self, batch, batch_idx):
            scales.append(scaler.get_scale())
            return super().block_loss(batch, batch_idx)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(plugins=[plugin], max_epochs=1).fit(Watch(inner_steps=2, gradient_clip_val=1.0), loader())
    # Doubled every second step.
    assert scales == [2.0 * 2 ** (i // 2) for i in range(12)]


def test_an_overflow_does_not_count_as_an_inner_step():
    class Overflow(Net):
        def block_loss(self, batch, batch_idx):
            loss = super().block_loss(batch, batch_idx)
            if len(self.calls) == 2:
                loss.register_hook(lambda grad: grad * float("inf"))
            return loss

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = Overflow(inner_steps=3)
    trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=1).fit(model, loader())
    # The third step of the first visit falls on the second batch.
    assert model.calls == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("strategy", ["greedy", "importance"])
def test_scored_strategies_measure_in_the_last_inner_step(strategy):
    model = Net(inner_steps=2, strategy=strategy)
    logger = MemoryLogger()
    trainer(max_epochs=4, logger=logger, log_every_n_steps=1).fit(model, loader())
    assert model.bcd_strategy.scores is not None
    assert min(model.bcd_strategy.visits) >= 1
    assert logger.series("bcd/probes")[-1][1] == 22


# -- the prefix cache ---------------------------------------------------------------------------------------


class Deep(BCDModule):
    def __init__(self, middle=nn.Identity, head=False, **arguments):
        super().__init__(**{"optimizer": SGD, "inner_steps": 4, **arguments})
        torch.manual_seed(5)
        layers = [nn.Linear(6, 8)]
        for _ in range(3):
            layers += [nn.Tanh(), middle(), nn.Linear(8, 8)]
        self.body = nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 3))
        self.head = nn.Linear(3, 3) if head else nn.Identity()
        self.losses = []
        self.rows = []

        def count(module, inputs):
            self.rows.append(inputs[0].shape[0])

        self.body[0].register_forward_pre_hook(count)

    def block_loss(self, batch, batch_idx):
        loss = F.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.losses.append(float(loss))
        return loss


@pytest.mark.parametrize("sweep", ["block", "all"])
@pytest.mark.parametrize("strategy", ["cyclic", "random", "greedy"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cached_prefixes_give_the_same_bits_with_less_work(sweep, strategy, accumulate):
    runs = []
    for cache in (False, True):
        model = Deep(cache_prefix=cache, sweep=sweep, strategy=strategy, accumulate=accumulate)
        trainer(max_epochs=2).fit(model, loader())
        runs.append(model)
    plain, cached = runs
    assert plain.losses == cached.losses
    assert same(weights(plain), weights(cached))
    assert len(cached.rows) < 0.7 * len(plain.rows)
    assert "forward" not in vars(cached.body)


@pytest.mark.parametrize("middle", [partial(nn.Dropout, 0.5), partial(nn.BatchNorm1d, 8)])
def test_a_prefix_that_is_not_deterministic_is_not_reused(middle):
    runs = []
    for cache in (False, True):
        model = Deep(middle=middle, cache_prefix=cache, blocks="linear")
        if cache:
            with pytest.warns(UserWarning, match="cache_prefix=True has no effect"):
                trainer().fit(model, loader())
        else:
            trainer().fit(model, loader())
        runs.append(model)
    assert runs[0].losses == runs[1].losses
    assert same(weights(runs[0]), weights(runs[1]))


def test_a_batch_that_is_changed_between_evaluations_is_computed_anew():
    class Noisy(Deep):
        def block_loss(self, batch, batch_idx):
            noise = torch.randn(batch[0].shape, generator=self.noise)
            return super().block_loss([batch[0] + noise, batch[1]], batch_idx)

    runs = []
    for cache in (False, True):
        model = Noisy(cache_prefix=cache)
        model.noise = torch.Generator().manual_seed(1)
        trainer().fit(model, loader())
        runs.append(model)
    assert runs[0].losses == runs[1].losses


def test_the_sequential_to_cache_is_found_or_named():
    model = Deep(head=True, cache_prefix=True)
    with pytest.raises(MisconfigurationException, match=r"found \[\]. Name the one"):
        trainer().fit(model, loader())
    with pytest.raises(MisconfigurationException, match="'tail' is missing"):
        trainer().fit(Deep(cache_prefix=True, prefix_module="tail"), loader())
    with pytest.raises(MisconfigurationException, match="is Identity"):
        trainer().fit(Deep(cache_prefix=True, prefix_module="head"), loader())
    model = Deep(head=True, cache_prefix=True, prefix_module="body")
    plain = Deep(head=True)
    trainer().fit(model, loader())
    trainer().fit(plain, loader())
    assert model.losses == plain.losses
    assert len(model.rows) < len(plain.rows)


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_steps": 0}, "`inner_steps`"),
        ({"accumulate": 0}, "`accumulate`"),
        ({"sweep": "both"}, "`sweep` to be one of block, all"),
        ({"gradient_clip_val": 0.0}, "`gradient_clip_val`"),
        ({"gradient_clip_algorithm": "l1"}, "`gradient_clip_algorithm`"),
        ({"optimizer_state": "lost"}, "`optimizer_state`"),
        ({"strategy": "best"}, "`strategy`"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        BCDModule(**arguments)


def test_bad_runs_end_with_a_clear_error_and_restored_flags():
    class NaN(Net):
        def block_loss(self, batch, batch_idx):
            return super().block_loss(batch, batch_idx) * (float("nan") if len(self.calls) > 3 else 1.0)

    class Detached(Net):
        def block_loss(self, batch, batch_idx):
            return super().block_loss(batch, batch_idx).detach()

    class Wrong(BCDStrategy):
        def select(self):
            return 7

    for model, message in (
        (NaN(), "got nan at step"),
        (Detached(), "No block got a gradient"),
        (Net(strategy=Wrong()), r"range\(3\), but got 7"),
        (Net(optimizer={"body": SGD}), "none of .* matches block 'net.0'"),
        (Net(blocks="transformer"), "block_type"),
    ):
        with pytest.raises((ValueError, MisconfigurationException), match=message):
            trainer().fit(model, loader())
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(NotImplementedError, match="block_loss"):
        trainer().fit(
            type("Empty", (BCDModule,), {"__init__": lambda s: (BCDModule.__init__(s), setattr(s, "net", mlp()))[0]})(),
            loader(),
        )
    with pytest.raises(MisconfigurationException, match="BCDCallback works in automatic optimization"):
        trainer(BCDCallback()).fit(Net(), loader())


def test_an_unused_block_is_named_and_skipped():
    class Unused(Net):
        def __init__(self):
            super().__init__(inner_steps=3)
            self.unused = nn.Linear(2, 2)

    model = Unused()
    with pytest.warns(UserWarning, match="Block 'unused' got no gradient"):
        trainer(max_epochs=2).fit(model, loader())
    # Cyclic: three blocks with three evaluations, the unused one with one.
    assert model.calls[:10] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert model.calls[10] == 4


def test_inner_steps_see_the_new_weights_under_a_caching_autocast():
    class Caching(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=True)

    losses = []

    class Watch(Net):
        def block_loss(self, batch, batch_idx):
            loss = super().block_loss(batch, batch_idx)
            losses.append(float(loss))
            return loss

    trainer(plugins=[Caching("bf16-mixed", "cpu")], max_epochs=1).fit(Watch(inner_steps=3), loader())
    assert len(set(losses[:3])) == 3


def test_a_block_without_gradient_does_not_stop_a_gradient_scaler():
    model = Net(inner_steps=2)
    model.unused = nn.Linear(2, 2)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    before = weights(model.unused)
    with pytest.warns(UserWarning, match="Block 'unused' got no gradient"):
        trainer(plugins=[plugin], max_epochs=2).fit(model, loader())
    assert same(before, weights(model.unused))


def test_scores_are_the_norms_of_the_last_held_batch():
    model = Net(inner_steps=1, accumulate=2, strategy="greedy")
    seen, observe = [], model.bcd_strategy.observe

    def check(norms):
        net = mlp()
        net.load_state_dict(model.net.state_dict())
        x, y = list(loader())[model.calls[-1]]
        (F.cross_entropy(net(x), y) / 2).backward()
        expected = [float(torch.cat([net[i].weight.grad.flatten(), net[i].bias.grad]).norm()) for i in (0, 2, 4)]
        seen.append((norms, expected))
        observe(norms)

    model.bcd_strategy.observe = check
    trainer(max_epochs=2).fit(model, loader())
    assert len(seen) == 4
    for norms, expected in seen:
        assert norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", ["list of dicts", "bare scheduler"])
def test_all_shapes_of_configure_optimizers_are_read(shape):
    class Shaped(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            if shape == "list of dicts":
                return [{"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}]
            return [optimizer], [schedule]

    model = Shaped()
    fit = trainer(max_epochs=2)
    fit.fit(model, loader())
    steps = 12 if shape == "list of dicts" else 2
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**steps)


def test_a_fit_that_fails_early_can_be_repeated():
    class Early(Net):
        broken = True

        def setup(self, stage):
            if self.broken:
                raise RuntimeError("not yet")

    model = Early()
    with pytest.raises(RuntimeError, match="not yet"):
        trainer().fit(model, loader())
    assert "configure_optimizers" not in vars(model)
    model.broken = False
    fit = trainer()
    fit.fit(model, loader())
    assert fit.global_step == 12


def test_a_missing_metric_of_a_scheduler_that_is_not_strict_is_a_warning():
    class Lenient(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "no", "strict": False}}

    with pytest.warns(UserWarning, match="'no', which is not available"):
        trainer().fit(Lenient(), loader())


def test_a_sequential_with_a_forward_of_its_own_is_not_cached():
    class Odd(nn.Sequential):
        def forward(self, x):
            return super().forward(x + 1)

    model = Net(net=Odd(*mlp()), cache_prefix=True)
    with pytest.raises(MisconfigurationException, match="Odd, which has its own"):
        trainer().fit(model, loader())


def test_work_in_place_behind_the_prefix_does_not_spoil_the_cache():
    runs = []
    for cache in (False, True):
        torch.manual_seed(1)
        tail = nn.Sequential(nn.SiLU(inplace=True), nn.Linear(8, 3))
        model = Deep(cache_prefix=cache, prefix_module="body")
        model.body = nn.Sequential(nn.Linear(6, 8), tail)
        trainer().fit(model, loader())
        runs.append(model.losses)
    assert runs[0] == runs[1]


def test_a_batch_changed_in_place_is_computed_anew():
    class Drift(Deep):
        def block_loss(self, batch, batch_idx):
            batch[0].mul_(1.01)
            return super().block_loss(batch, batch_idx)

    runs = []
    for cache in (False, True):
        model = Drift(cache_prefix=cache)
        trainer(max_epochs=1).fit(model, loader())
        runs.append(model.losses)
    assert runs[0] == runs[1]


def test_short_visits_are_thinned_for_the_loggers():
    logger, model = MemoryLogger(), Net(inner_steps=2)
    trainer(max_epochs=4, logger=logger, log_every_n_steps=4).fit(model, loader())
    # 24 visits, 8 of each block, every second one is written.
    for index in (0, 2, 4):
        assert len(logger.series(f"bcd/update_norm/net.{index}")) == 4
        assert len(logger.series(f"bcd/loss/net.{index}")) == 4
