"""A run that is cut in two gives the bits of the run that was not."""

from collections import UserDict
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import Classifier, MemoryLogger, StatefulLoader, loader, same, trainer, weights
from torch import nn

from lightning_bcd import BCDCallback, BCDModule, BlockOptimizer, GreedyStrategy


class SaveAfterBatch(Callback):
    """Saves after a given batch, accumulation window open or not, as a crash would leave it."""

    def __init__(self, batch, path):
        self.batch, self.path, self.seen = batch, path, 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen += 1
        if self.seen == self.batch:
            trainer.save_checkpoint(self.path)

    @property
    def state_key(self):
        return "save"


def interrupted(make_model, make_callbacks, batch, path, **arguments):
    """Return the weights of the whole run and of the run resumed from the checkpoint after `batch`."""
    model = make_model()
    trainer(*make_callbacks(), SaveAfterBatch(batch, path), **arguments).fit(model, StatefulLoader())
    resumed = make_model()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    trainer(*make_callbacks(), **arguments).fit(resumed, StatefulLoader(), ckpt_path=path)
    return weights(model), weights(resumed), model, resumed


@pytest.mark.parametrize("strategy", ["cyclic", "backward", "random", "uniform", "greedy", "importance"])
@pytest.mark.parametrize("batch", [1, 3, 8, 9, 13])
def test_resume_at_any_step_is_bit_identical(strategy, batch, tmp_path):
    full, resumed, *_ = interrupted(
        Classifier,
        lambda: [BCDCallback(strategy=strategy, steps_per_block=2, warmup_steps=1)],
        batch,
        tmp_path / "run.ckpt",
        max_epochs=4,
    )
    assert same(full, resumed)


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.Adagrad, partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
@pytest.mark.parametrize("own", [False, True])
def test_resume_keeps_the_optimizer_state_of_every_policy(policy, optimizer, own, tmp_path):
    full, resumed, *_ = interrupted(
        lambda: Classifier(optimizer),
        lambda: [
            BCDCallback(
                strategy="random", steps_per_block=2, optimizer_state=policy, optimizer=optimizer if own else None
            )
        ],
        9,
        tmp_path / "run.ckpt",
        max_epochs=4,
    )
    assert same(full, resumed)


@pytest.mark.parametrize("batch", [2, 4, 7, 10, 20, 25, 26])
@pytest.mark.parametrize("mode", ["freeze", "mask"])
@pytest.mark.parametrize("strategy", ["random", "greedy"])
def test_resume_inside_an_accumulation_window_loses_nothing(batch, mode, strategy, tmp_path):
    made = []

    def callbacks():
        made.append(BCDCallback(strategy=strategy, steps_per_block=2, mode=mode))
        return [made[-1]]

    # 6 batches per epoch: windows of 4 and 2.
    full, resumed, *_ = interrupted(
        Classifier, callbacks, batch, tmp_path / "run.ckpt", max_epochs=6, accumulate_grad_batches=4
    )
    assert same(full, resumed)
    assert made[0].tracker.losses == made[1].tracker.losses


def test_testing_a_checkpoint_leaves_the_finished_run_alone(tmp_path):
    path, callback = tmp_path / "run.ckpt", BCDCallback(steps_per_block=2)
    model, fit = Classifier(), trainer(callback, SaveAfterBatch(3, path), max_epochs=3)
    fit.fit(model, loader())
    visits, losses = list(callback.strategy.visits), dict(callback.tracker.losses)
    fit.test(model, loader(), ckpt_path=path, verbose=False)
    fit.validate(model, loader(), ckpt_path=path, verbose=False)
    assert callback.strategy.visits == visits
    assert callback.tracker.losses == losses


@pytest.mark.parametrize(("old", "new"), [("keep", "reset"), ("offload", "reset"), ("keep", "offload")])
def test_state_of_another_policy_is_not_dragged_along(old, new, tmp_path):
    path = tmp_path / "run.ckpt"
    trainer(BCDCallback(steps_per_block=2, optimizer_state=old), SaveAfterBatch(11, path)).fit(Classifier(), loader())
    callback, model = BCDCallback(steps_per_block=2, optimizer_state=new), Classifier()
    fit = trainer(callback, max_epochs=3)
    fit.fit(model, loader(), ckpt_path=path)
    held = [p for p, state in fit.optimizers[0].state.items() if state]
    assert {id(p) for p in held} == {id(p) for p in callback.blocks[callback.state_dict()["run"]["active"]].parameters}
    assert bool(callback.state_dict()["run"]["offloaded"]) == (new == "offload")


def test_batches_of_a_library_are_saved_as_plain_containers(tmp_path):
    class Held(Net):
        def block_loss(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    class Batches:
        def __len__(self):
            return 6

        def __iter__(self):
            return (UserDict(x=x, y=y) for x, y in loader())

    path = tmp_path / "run.ckpt"
    trainer(SaveAfterBatch(3, path), max_epochs=1).fit(Held(accumulate=2), Batches())
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["callbacks"]["Sweep"]["held"][0][0].keys() == {"x", "y"}


def test_resume_continues_the_curves_of_the_tracker(tmp_path):
    callbacks = []

    def make_callbacks():
        callbacks.append(BCDCallback(strategy="random", steps_per_block=3))
        return [callbacks[-1]]

    interrupted(Classifier, make_callbacks, 7, tmp_path / "run.ckpt", max_epochs=3, logger=MemoryLogger())
    first, second = (callback.tracker for callback in callbacks)
    assert first.losses == second.losses
    assert first.get_epoch_summary() == pytest.approx(second.get_epoch_summary(), nan_ok=True)
    # The visit that was cut in two has no update norm in the second run.
    cut = [b != b for _, _, b in second.update_norms]
    assert cut == [False, False, True, False, False, False]
    assert [e[:2] for e in first.update_norms] == [e[:2] for e in second.update_norms]


def test_checkpoint_after_fit_continues_too(tmp_path):
    def fit(epochs, model, path=None):
        run = trainer(BCDCallback(strategy="greedy", steps_per_block=4), max_epochs=epochs)
        # In fixed order: Lightning saves the position of a loader only during fit.
        run.fit(model, loader(), ckpt_path=path)
        return run

    whole, half = Classifier(), Classifier()
    fit(4, whole)
    fit(2, half).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Classifier()
    fit(4, resumed, tmp_path / "half.ckpt")
    assert same(weights(whole), weights(resumed))


def test_random_numbers_of_dropout_are_restored_on_request(tmp_path):
    def make():
        torch.manual_seed(3)
        return Classifier(net=nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))

    def run(save_rng, batch):
        return interrupted(
            make,
            lambda: [BCDCallback(steps_per_block=2, save_rng=save_rng)],
            batch,
            tmp_path / "run.ckpt",
            max_epochs=3,
        )[:2]

    # In the middle and at the end of a visit.
    assert same(*run(True, 5))
    assert same(*run(True, 8))
    assert not same(*run(False, 5))


def test_resume_with_other_blocks_strategy_or_format_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    trainer(BCDCallback(steps_per_block=2), SaveAfterBatch(5, path)).fit(Classifier(), StatefulLoader())
    for callback, message in (
        (BCDCallback(steps_per_block=2, num_blocks=2), "Saved 3"),
        (BCDCallback(steps_per_block=2, strategy="cyclic"), "a RandomStrategy state"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            trainer(callback).fit(Classifier(), StatefulLoader(), ckpt_path=path)
    checkpoint = torch.load(path)
    checkpoint["callbacks"]["BCDCallback"]["run"]["version"] = 99
    torch.save(checkpoint, path)
    with pytest.raises(MisconfigurationException, match="version 2, but got 99"):
        trainer(BCDCallback(steps_per_block=2)).fit(Classifier(), StatefulLoader(), ckpt_path=path)


def test_a_checkpoint_of_plain_training_starts_the_blocks_anew(tmp_path):
    path = tmp_path / "plain.ckpt"
    trainer(SaveAfterBatch(6, path)).fit(Classifier(), StatefulLoader())
    callback = BCDCallback(steps_per_block=2)
    trainer(callback, max_epochs=2).fit(Classifier(), StatefulLoader(), ckpt_path=path)
    assert sum(callback.strategy.visits) == 3


def test_a_strategy_object_resumes_like_a_named_one(tmp_path):
    full, resumed, *_ = interrupted(
        Classifier,
        lambda: [BCDCallback(strategy=GreedyStrategy(refresh_every=2), steps_per_block=1)],
        11,
        tmp_path / "run.ckpt",
        max_epochs=4,
    )
    assert same(full, resumed)


class Net(BCDModule):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.net = Classifier().net

    def block_loss(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        assert isinstance(optimizer, BlockOptimizer)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("batch", [2, 5, 8])
@pytest.mark.parametrize("strategy", ["random", "greedy"])
@pytest.mark.parametrize("policy", ["keep", "reset", "offload"])
def test_manual_module_resumes_bit_identically(batch, strategy, policy, tmp_path):
    full, resumed, *_ = interrupted(
        lambda: Net(strategy=strategy, inner_steps=3, optimizer_state=policy, accumulate=2),
        list,
        batch,
        tmp_path / "run.ckpt",
        max_epochs=3,
    )
    assert same(full, resumed)


def test_manual_module_stops_inside_a_visit_and_goes_on_there(tmp_path):
    def run(max_steps, path=None, save=None):
        model = Net(inner_steps=4, strategy="random")
        fit = trainer(max_epochs=-1, max_steps=max_steps)
        fit.fit(model, StatefulLoader(), ckpt_path=path)
        assert fit.global_step == max_steps
        if save:
            fit.save_checkpoint(save)
        return model

    first = run(6, save=tmp_path / "six.ckpt")
    # The second visit has done 2 of its 4 steps: its other two fall on the next batch.
    second = run(10, path=tmp_path / "six.ckpt")
    assert sum(first.bcd_strategy.visits) == 2
    assert sum(second.bcd_strategy.visits) == 3
