import copy

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import Classifier, MemoryLogger, loader, run_processes, same, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bcd import DigitsDataModule, LiftedModule, ResidualSplitting, ThreeSplitting, TwoSplitting, full_batch
from lightning_bcd.distributed.all_reduce import AllReduce
from lightning_bcd.lifted.layers import MLP
from lightning_bcd.prox import L1

FEATURES, OUTPUTS = 6, 3


def samples(count=40, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()


def module(algorithm=None, *, seed=0, loss="squared", dtype=torch.float64, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLP([FEATURES, 8, 7, OUTPUTS]).to(dtype)
    return LiftedModule(network, algorithm or ThreeSplitting(alpha=0.1), loss, **arguments)


def fit(model, sweeps, data=None, batches=None, **arguments):
    runner = trainer(max_epochs=sweeps, **arguments)
    runner.fit(model, batches or full_batch(data or samples()))
    return runner


def test_a_sweep_per_step_on_the_users_own_parameters():
    model = module()
    parameters = list(model.network.parameters())
    logger = MemoryLogger()
    runner = fit(model, 5, logger=logger)
    assert (runner.global_step, model.sweeps) == (5, 5)
    assert all(p is q for p, q in zip(parameters, model.network.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in parameters)
    objective = [value for _, value in logger.series("lifted/objective")]
    assert len(objective) == 5
    assert objective == sorted(objective, reverse=True)
    keys = set(logger.rows[-1][1])
    for stage in ("1", "3", "5"):
        assert {f"lifted/penalty/{stage}", f"lifted/residual/{stage}", f"lifted/activation_residual/{stage}"} <= keys
    report = model.report
    assert objective[-1] == pytest.approx(float(report.objective), rel=1e-6)
    assert not [name for name in model.state_dict() if "auxiliary" in name]


def test_the_trainer_changes_nothing_about_the_mathematics():
    model, plain = module(), module()
    fit(model, 3)
    x, y = samples()
    target = plain.loss.encode(y, OUTPUTS, x.dtype)
    comm = plain.communicator
    state = plain.algorithm.start(plain.chain, x, target, comm)
    for _ in range(3):
        report = plain.algorithm.sweep(plain.chain, state, plain.loss, comm)
    assert same(weights(model.network), weights(plain.network))
    assert torch.equal(model.report.objective, report.objective)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "hinge", "logistic"])
def test_digits_are_learned_validated_tested_and_predicted(loss):
    data = DigitsDataModule(batch_size=None)
    torch.manual_seed(0)
    algorithm = ThreeSplitting(init="he", alpha=0.01, bias_update="joint")
    model = LiftedModule(MLP([64, 100, 10]), algorithm, loss, log_train_accuracy=True)
    runner = trainer(max_epochs=15)
    runner.fit(model, data)
    assert {"val_loss", "val_acc", "train_acc", "lifted/objective"} <= set(runner.callback_metrics)
    (result,) = runner.test(model, data, verbose=False)
    assert result["test_acc"] > 0.85
    outputs = torch.cat(runner.predict(model, data))
    x, y = data.test_set[:]
    torch.testing.assert_close(outputs, model.network(x).detach())
    assert float((outputs.argmax(1) == y).float().mean()) == pytest.approx(result["test_acc"], abs=1e-6)


def test_a_second_fit_continues_with_the_auxiliary_variables():
    model, whole = module(), module()
    fit(model, 2)
    model.to("cpu")
    fit(model, 3)
    fit(whole, 5)
    assert model.sweeps == 5
    assert same(weights(model.network), weights(whole.network))


@pytest.mark.parametrize("storage", [{}, {"storage_dtype": "float32"}, {"offload": True}, {"momentum": 0.5}])
def test_a_checkpoint_with_auxiliary_variables_resumes_bit_for_bit(tmp_path, storage):
    def algorithm():
        return ThreeSplitting(
            alpha=0.1, gamma=lambda sweep, depth: 1 + sweep / 10, update="prox_linear", step="lipschitz", **storage
        )

    whole = module(algorithm(), save_auxiliary=True)
    fit(whole, 6)
    part = module(algorithm(), save_auxiliary=True)
    fit(part, 3).save_checkpoint(tmp_path / "part.ckpt")
    resumed = module(algorithm(), save_auxiliary=True, seed=1)
    trainer(max_epochs=6).fit(resumed, full_batch(samples()), ckpt_path=tmp_path / "part.ckpt")
    assert resumed.sweeps == 6
    assert same(weights(resumed.network), weights(whole.network))
    for name, tensors in whole._current().variables.items():
        assert same(tensors, resumed._current().variables[name])


def test_other_samples_are_refused_on_resume(tmp_path):
    part = module(save_auxiliary=True)
    fit(part, 2).save_checkpoint(tmp_path / "part.ckpt")
    for other in (samples(seed=1), samples(count=39)):
        fresh = module(save_auxiliary=True)
        before = weights(part.network)
        with pytest.raises(MisconfigurationException, match="training samples of the checkpoint"):
            trainer(max_epochs=4).fit(fresh, full_batch(other), ckpt_path=tmp_path / "part.ckpt")
        assert same(weights(fresh.network), before)


def test_without_auxiliary_variables_a_resumed_run_starts_from_a_forward_pass(tmp_path):
    part = module(ThreeSplitting(alpha=0.1, init="he"))
    fit(part, 2).save_checkpoint(tmp_path / "part.ckpt")
    resumed = module(ThreeSplitting(alpha=0.1, init="he"), seed=1)
    trainer(max_epochs=3).fit(resumed, full_batch(samples()), ckpt_path=tmp_path / "part.ckpt")
    # Neither the weights nor the count of sweeps start again.
    expected = copy.deepcopy(part)
    x, y = samples()
    targets = expected.loss.encode(y, OUTPUTS, x.dtype)
    state = expected.algorithm.start(expected.chain, x, targets, expected.communicator)
    expected.algorithm.sweep(expected.chain, state, expected.loss, expected.communicator)
    assert resumed.sweeps == 3
    assert same(weights(resumed.network), weights(expected.network))


def test_mini_batches_start_from_a_forward_pass_each():
    x, y = samples()
    model, expected = module(ThreeSplitting(alpha=5.0)), module(ThreeSplitting(alpha=5.0))
    runner = fit(model, 2, batches=DataLoader(TensorDataset(x, y), batch_size=16))
    assert (runner.global_step, model.sweeps) == (6, 6)
    for _ in range(2):
        for rows, labels in zip(x.split(16), y.split(16), strict=True):
            target = expected.loss.encode(labels, OUTPUTS, x.dtype)
            state = expected.algorithm.start(expected.chain, rows, target, expected.communicator)
            expected.algorithm.sweep(expected.chain, state, expected.loss, expected.communicator)
    assert same(weights(model.network), weights(expected.network))


def test_momentum_goes_on_from_batch_to_batch_and_through_checkpoints(tmp_path):
    x, y = samples()

    def make(seed=0):
        return module(ThreeSplitting(alpha=5.0, momentum=0.7), seed=seed)

    def batches():
        return DataLoader(TensorDataset(x, y), batch_size=16)

    whole, plain, part, resumed = make(), module(ThreeSplitting(alpha=5.0)), make(), make(seed=1)
    fit(whole, 2, batches=batches())
    fit(plain, 2, batches=batches())
    assert not same(weights(whole.network), weights(plain.network))
    fit(part, 1, batches=batches()).save_checkpoint(tmp_path / "part.ckpt")
    trainer(max_epochs=2).fit(resumed, batches(), ckpt_path=tmp_path / "part.ckpt")
    assert same(weights(resumed.network), weights(whole.network))


def test_callbacks_of_lightning_see_sweeps_and_the_objective(tmp_path):
    stop = EarlyStopping("lifted/objective", min_delta=1e-3, patience=2)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    model = module(ThreeSplitting(alpha=0.1))
    runner = trainer(stop, save, max_epochs=500, enable_checkpointing=True)
    runner.fit(model, full_batch(samples()))
    assert stop.stopped_epoch > 3
    assert runner.global_step == stop.stopped_epoch + 1
    steps = sorted(int(path.stem.split("=")[1]) for path in tmp_path.glob("*.ckpt"))
    assert steps == list(range(2, runner.global_step + 1, 2))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_autocast_stays_outside(precision):
    arguments = {"precision": precision}
    if precision == "16-mixed":
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        arguments = {"plugins": [plugin]}
    data = samples(dtype=torch.float32)
    plain, mixed = module(dtype=torch.float32), module(dtype=torch.float32)
    fit(plain, 3, data)
    runner = fit(mixed, 3, data, **arguments)
    assert runner.global_step == 3
    assert same(weights(plain.network), weights(mixed.network))


def test_half_weights_are_refused():
    with pytest.raises(MisconfigurationException, match="weights in float32 or float64"):
        fit(module(dtype=torch.float32), 1, samples(dtype=torch.float32), precision="bf16-true")


def with_entry(data, value):
    x, y = data
    x[3, 2] = value
    return x, y


BAD = {
    "labels": (lambda x, y: (x, y + 1), r"class labels from 0 to 2.*but got \d to 3"),
    "negative": (lambda x, y: (x, y - 1), r"class labels from 0 to 2.*but got -1"),
    "columns": (lambda x, y: (x, y.unsqueeze(1)), r"class labels of shape \(40,\)"),
    "real": (lambda x, y: (x, torch.zeros(40, 2, dtype=x.dtype)), r"real targets of shape \(40, 3\)"),
    "nan": (lambda x, y: with_entry((x, y), torch.nan), "finite input"),
    "infinite": (lambda x, y: with_entry((x, y), -torch.inf), "finite input"),
    "features": (lambda x, y: (x[:, :4], y), r"fit stage '1'.* got shape \(4,\)"),
    "precision": (lambda x, y: (x.float(), y), "weights' precision torch.float64, but got torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_before_anything_changes(name):
    change, message = BAD[name]
    model = module(ThreeSplitting(init="he"))
    before = weights(model.network)
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, 1, change(*samples()))
    assert same(weights(model.network), before)
    assert model.sweeps == 0


def test_a_batch_that_is_no_pair_is_refused():
    with pytest.raises(MisconfigurationException, match=r"pair \(x, y\) of tensors"):
        fit(module(), 1, batches=[samples()[0]])


def test_real_targets_train_a_regression():
    x, _ = samples()
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2].abs()], 1)
    model = module()
    runner = fit(model, 20, (x, y))
    (result,) = runner.validate(model, full_batch((x, y)), verbose=False)
    assert set(result) == {"val_loss"}
    assert result["val_loss"] == pytest.approx(float(0.5 * (model(x) - y).square().sum() / 40), rel=1e-5)


def test_mini_batches_cannot_persist():
    x, y = samples()
    with pytest.raises(MisconfigurationException, match=r"one training batch per epoch with persist=True, but got 3"):
        fit(module(persist=True), 1, batches=DataLoader(TensorDataset(x, y), batch_size=16))


class Changing:
    """One batch per epoch whose samples change."""

    def __init__(self, *batches):
        self.batches = list(batches)

    def __len__(self):
        return 1

    def __iter__(self):
        yield self.batches.pop(0)


def test_samples_that_change_between_sweeps_are_noticed():
    x, y = samples()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    swapped = torch.arange(40)
    swapped[[3, 7]] = swapped[[7, 3]]
    noisy = x.clone()
    noisy[7, 1] *= 1 + 1e-15
    for other in ((x[order], y[order]), (x[swapped], y[swapped]), (x[:30], y[:30]), (noisy, y), (x.flip(1), y)):
        model = module()
        with pytest.raises(MisconfigurationException, match="same 40 samples in the same order"):
            fit(model, 3, batches=Changing((x, y), (x.clone(), y.clone()), other))
        assert model.sweeps == 2


def test_a_rising_objective_is_reported_once_with_stage_and_term():
    class Rising(ThreeSplitting):
        def sweep(self, chain, state, loss, comm):
            report = super().sweep(chain, state, loss, comm)
            report.linear[1] = report.linear[1] + 10.0 * state.sweep
            return report

    model = module(Rising(alpha=0.1))
    with pytest.warns(UserWarning, match=r"objective rose .* linear term of stage '3'") as caught:
        fit(model, 4)
    assert sum("objective rose" in str(w.message) for w in caught) == 1


def test_an_objective_that_is_not_finite_stops_the_run():
    class Broken(ThreeSplitting):
        def sweep(self, chain, state, loss, comm):
            report = super().sweep(chain, state, loss, comm)
            report.data_fit = report.data_fit * torch.nan
            return report

    with pytest.raises(MisconfigurationException, match="objective is nan after sweep 1"):
        fit(module(Broken()), 2)


def test_auxiliary_variables_that_do_not_fit_are_refused(monkeypatch, tmp_path):
    available = tmp_path / "meminfo"
    available.write_text("MemTotal: 9 kB\nMemAvailable:       1 kB\n")
    monkeypatch.setattr("lightning_bcd.lifted.batch.MEMORY", available)
    model = module()
    with pytest.raises(MisconfigurationException, match=r"take .* MiB, but only .* `storage_dtype='bfloat16'`"):
        fit(model, 1)
    assert model.sweeps == 0


def test_the_bytes_announced_are_the_bytes_used():
    model = module(ThreeSplitting(storage_dtype="bfloat16"))
    fit(model, 1)
    x, _ = samples()
    announced = model.algorithm.bytes_per_sample(model.chain, x) * len(x)
    assert announced == model._current().bytes == 2 * 2 * 40 * (8 + 7 + 3)


def test_other_samples_in_a_second_fit_start_again():
    model, fresh = module(), module()
    fit(model, 2)
    fit(fresh, 2)
    fit(model, 2, samples(30, seed=1))
    fresh.reset_auxiliary()
    fit(fresh, 2, samples(30, seed=1))
    assert len(model._current().x) == 30
    assert same(weights(model.network), weights(fresh.network))
    fit(model, 1, batches=DataLoader(TensorDataset(*samples()), batch_size=16))
    assert not [name for name, _ in model.named_buffers() if name.startswith("auxiliary")]


def test_what_a_checkpoint_held_is_saved_again_before_it_is_used(tmp_path):
    part, between = module(save_auxiliary=True), module(save_auxiliary=True, seed=1)
    fit(part, 2).save_checkpoint(tmp_path / "part.ckpt")
    runner = trainer()
    runner.validate(between, full_batch(samples()), ckpt_path=tmp_path / "part.ckpt", verbose=False)
    runner.save_checkpoint(tmp_path / "again.ckpt")
    first, second = (torch.load(tmp_path / name)["lifted"] for name in ("part.ckpt", "again.ckpt"))
    for name, tensors in first["variables"].items():
        assert same(tensors, second["variables"][name])


def test_frozen_stages_stay_frozen_and_the_rest_still_descends():
    model = module()
    frozen = model.chain[1]
    frozen.weight.requires_grad_(False)
    frozen.bias.requires_grad_(False)
    before = [frozen.weight.clone(), frozen.bias.clone()]
    values = []
    for _ in range(4):
        fit(model, 1)
        values.append(float(model.report.objective))
    assert same(before, [frozen.weight, frozen.bias])
    assert values == sorted(values, reverse=True)


def test_one_output_tells_two_classes_apart():
    x, _ = samples()
    torch.manual_seed(0)
    algorithm = ThreeSplitting(alpha=0.01, init="he", bias_update="joint")
    model = LiftedModule(MLP([FEATURES, 20, 1]).double(), algorithm, "hinge")
    fit(model, 60, (x, (x[:, 0] > 0).long()))
    assert float(((model(x)[:, 0] > 0) == (x[:, 0] > 0)).double().mean()) > 0.9


def test_the_learning_rate_monitor_finds_nothing_to_stumble_over():
    model = module()
    trainer(LearningRateMonitor(), max_epochs=1, logger=MemoryLogger()).fit(model, full_batch(samples()))
    assert model.sweeps == 1


def test_scaled_targets_are_scaled_in_validation_too():
    x, y = samples()
    model = module(ThreeSplitting(target_scale=5.0))
    (result,) = fit(model, 2).validate(model, full_batch((x, y)), verbose=False)
    target = 5 * nn.functional.one_hot(y, OUTPUTS)
    expected = 0.5 * (model(x) - target).square().sum() / len(x)
    assert result["val_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_trained_network_exports_and_goes_on_with_adam():
    model = module()
    fit(model, 5)
    x, y = samples()
    exported = torch.export.export(model.network, (x,)).module()
    torch.testing.assert_close(exported(x), model.network(x))
    optimizer = torch.optim.Adam(model.network.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# -- two processes ------------------------------------------------------------------------------------------------


def algorithms():
    return {
        "proximal": ThreeSplitting(alpha=0.1, init="he"),
        "joint bias, mean": ThreeSplitting(alpha=1e-3, bias_update="joint", reduction="mean"),
        "recommended": ThreeSplitting(preset="recommended"),
        "l1": ThreeSplitting(alpha=0.1, weight_penalty=L1(0.1)),
        "two-splitting": TwoSplitting(alpha=0.1),
        "prox-linear": ResidualSplitting(alpha=0.1, update="prox_linear", order="forward"),
    }


def distributed(rank, directory):
    found = {}
    for count in (40, 41):
        for name, algorithm in algorithms().items():
            torch.manual_seed(rank)  # the random initial weights must come from one rank
            model = module(algorithm, save_auxiliary=True, seed=rank)
            runner = trainer(max_epochs=3, devices=2, strategy="ddp")
            runner.fit(model, full_batch(samples(count)))
            found[name, count] = (weights(model.network), float(model.report.objective), model.communicator.bytes)
            runner.save_checkpoint(directory / f"{name}-{count}.ckpt")
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lifted")
    return directory, *run_processes(distributed, directory)


def test_two_processes_equal_one(two_processes):
    directory, first, second = two_processes
    for (name, count), (found, objective, _) in first.items():
        assert same(found, second[name, count][0])
        torch.manual_seed(0)
        model = module(algorithms()[name])
        fit(model, 3, samples(count))
        for a, b in zip(found, weights(model.network), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert objective == pytest.approx(float(model.report.objective), rel=1e-9)
        # A checkpoint of two processes goes on in one.
        resumed = module(algorithms()[name], save_auxiliary=True, seed=5)
        trainer(max_epochs=5).fit(resumed, full_batch(samples(count)), ckpt_path=directory / f"{name}-{count}.ckpt")
        fit(model, 2, samples(count))
        for a, b in zip(weights(resumed.network), weights(model.network), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def afterwards(rank, directory):
    """Fit a lifted module, then an ordinary one with the same Trainer; then give one rank bad data."""
    runner = trainer(max_epochs=1, devices=2, strategy="ddp")
    runner.fit(module(), full_batch(samples()))
    torch.manual_seed(rank)
    ordinary = Classifier()
    runner.fit(ordinary, loader())
    x, y = samples()
    if rank == 1:
        x[-1, 0] = torch.nan
    try:
        fit(module(), 1, (x, y), devices=2, strategy="ddp")
    except MisconfigurationException as error:
        return weights(ordinary), str(error)
    return None


def test_the_next_module_is_wrapped_again_and_bad_data_of_one_process_stops_all(tmp_path):
    (first, other), (second, own) = run_processes(afterwards, tmp_path)
    assert same(first, second)
    assert "Another process was given data" in other
    assert "finite input" in own


def traffic(rank, directory):
    found = []
    for count in (40, 4000):
        model = module(ThreeSplitting(alpha=0.1))
        runner = trainer(max_epochs=2, devices=2, strategy="ddp")
        runner.fit(model, full_batch(samples(count)))
        assert isinstance(model.communicator, AllReduce)
        found.append(model.communicator.bytes)
    return found


def test_what_travels_does_not_depend_on_the_number_of_samples(tmp_path):
    for few, many in run_processes(traffic, tmp_path):
        assert few == many > 0
