"""Networks grown layer by layer: what is kept, what is trained, and that a resumed run continues exactly."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import Classifier, Recorder, loader, run_processes, same, trainer, weights
from torch import nn

from lightning_bcd import (
    MLP,
    PDADMM,
    PDADMMG,
    PDADMMGQ,
    DenseReLU,
    LayerParallelStrategy,
    LiftedModule,
    ResidualSplitting,
    ThreeSplitting,
    full_batch,
)
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.growth import GrowLayers, check_growth, keeps, renew, shallow_chain
from lightning_bcd.prox import activations as sigma

FEATURES, WIDTH, OUTPUTS, DEPTH = 6, 8, 3, 5
EVERY = 3


def samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, FEATURES, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()


def module(algorithm=None, seed=0, network=None, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = network or MLP([FEATURES, *[WIDTH] * (DEPTH - 1), OUTPUTS])
    return LiftedModule(network.double(), algorithm or PDADMM(rho=0.1), "cross_entropy", **arguments)


def grow(algorithms=None, stages=(2, 3, 5)):
    return GrowLayers(stages, EVERY, algorithms)


def fit(model, callback, sweeps, ckpt_path=None, **arguments):
    torch.manual_seed(3)
    runner = trainer(callback, max_epochs=sweeps, **arguments)
    runner.fit(model, full_batch(samples()), ckpt_path=ckpt_path)
    return runner


def linears(model):
    return [m for m in model.network.modules() if isinstance(m, nn.Linear)]


def is_identity(linear):
    return torch.equal(linear.weight, torch.eye(WIDTH).double()) and not linear.bias.any()


@pytest.mark.parametrize("make", [lambda: PDADMM(rho=0.1), lambda: ThreeSplitting(alpha=0.1, momentum=0.5)])
def test_stages_train_the_first_layers_and_the_last_and_keep_the_others_identities(make):
    every = 8  # enough for what the last layer is told to reach the first
    model, callback, recorder = module(make()), GrowLayers([2, 3, 5], every), Recorder()
    first = linears(model)
    torch.manual_seed(3)
    trainer(callback, recorder, max_epochs=3 * every).fit(model, full_batch(samples()))
    names = {module: name for name, module in model.named_modules()}
    moved = [{name.rpartition(".")[0] for name in batch} for batch in recorder.moved]
    for index, layers in enumerate([2, 3, 5]):
        trained = set().union(*moved[index * every : (index + 1) * every])
        assert trained == {names[m] for m in [*first[: layers - 1], first[-1]]}
    assert (model.sweeps, callback.stage) == (3 * every, 2)
    assert [stage.operator for stage in model.chain] == first


def test_the_deep_network_is_the_shallow_one_until_layers_are_trained():
    model, callback = module(), grow()
    fit(model, callback, EVERY)
    assert [is_identity(m) for m in linears(model)] == [False, True, True, True, False]
    assert len(model.chain) == 2
    shallow = MLP([FEATURES, WIDTH, OUTPUTS]).double()
    shallow.load_state_dict(dict(zip(shallow.state_dict(), trained(model), strict=True)))
    x, _ = samples()
    assert torch.equal(model(x), shallow(x))
    # By itself the shallow network learns the same.
    alone = module(network=MLP([FEATURES, WIDTH, OUTPUTS]))
    alone.network.load_state_dict(dict(zip(shallow.state_dict(), trained(module()), strict=True)))
    trainer(max_epochs=EVERY).fit(alone, full_batch(samples()))
    assert same(weights(alone.network), weights(shallow))


def trained(model):
    first, *_, last = linears(model)
    return [first.weight, first.bias, last.weight, last.bias]


def test_a_new_stage_keeps_trained_layers_and_draws_a_new_head():
    model, callback = module(), grow()
    fit(model, callback, EVERY)
    first, *_, head = [[p.detach().clone() for p in m.parameters()] for m in linears(model)]
    state, velocity = model._state, {"rho": torch.ones(3)}
    model._velocity = velocity
    seen = {}

    class Look(GrowLayers):
        def on_train_batch_start(self, runner, model, batch, batch_idx):
            super().on_train_batch_start(runner, model, batch, batch_idx)
            seen.setdefault("now", [[p.detach().clone() for p in m.parameters()] for m in linears(model)])
            seen.setdefault("state", (model._state, model._velocity, model.report))

    later = Look(callback.grow, EVERY)
    later.load_state_dict(callback.state_dict())
    trainer(later, max_epochs=EVERY).fit(model, full_batch(samples()))
    now = seen["now"]
    assert same(now[0], first)
    assert not torch.equal(now[-1][0], head[0])
    assert not torch.equal(now[-1][1], head[1])
    assert all(float(p.abs().max()) <= WIDTH**-0.5 for p in now[-1])
    assert seen["state"] == (None, {}, None)
    assert state is not model._state
    assert len(model.chain) == 3
    assert [is_identity(m) for m in linears(model)[1:4]] == [False, True, True]


def test_a_renewed_layer_has_the_distribution_of_torch():
    chain = Chain(nn.Sequential(nn.Linear(400, 300)))
    expected = weights(nn.Linear(400, 300))
    renew(chain[0], torch.Generator().manual_seed(0))
    found = [chain[0].weight, chain[0].bias]
    for p, t in zip(found, expected, strict=True):
        assert float(p.detach().std() / t.std()) == pytest.approx(1, abs=0.1)
        assert float(p.detach().abs().max()) == pytest.approx(1 / 20, rel=0.02)


def test_every_stage_has_its_algorithm():
    algorithms = [PDADMMG(rho=0.1 * 2**k, mu=10.0**-k, nu=0.01) for k in range(3)]
    model, callback = module(algorithms[0]), grow(algorithms)
    for index, algorithm in enumerate(algorithms):
        fit(model, callback, EVERY)
        assert model.algorithm is algorithm
        assert callback.stage == index


@pytest.mark.parametrize("sweeps", [EVERY - 1, EVERY, 2 * EVERY, 2 * EVERY + 2])
@pytest.mark.parametrize("name", ["published", "quantized", "three"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, sweeps, name):
    def algorithms():
        if name == "three":
            return [ThreeSplitting(alpha=0.1 + k, momentum=0.5) for k in range(3)]
        kind = {"published": PDADMMG, "quantized": PDADMMGQ}[name]
        options = {"bits": 5} if name == "quantized" else {}
        return [kind(rho=0.1, mu=10.0**-k, nu=0.05, rho_schedule="published", **options) for k in range(3)]

    def make(seed=0):
        return module(algorithms()[0], seed=seed, save_auxiliary=True)

    whole, part, resumed = make(), make(), make(seed=1)
    fit(whole, grow(algorithms()), 3 * EVERY)
    fit(part, grow(algorithms()), sweeps).save_checkpoint(tmp_path / "part.ckpt")
    torch.manual_seed(11)  # other numbers than those of the first run
    callback = grow(algorithms())
    runner = trainer(callback, max_epochs=3 * EVERY)
    runner.fit(resumed, full_batch(samples()), ckpt_path=tmp_path / "part.ckpt")
    assert resumed.sweeps == 3 * EVERY
    assert callback.stage == 2
    assert same(weights(resumed.network), weights(whole.network))
    for name, tensors in whole._current().variables.items():
        assert same(tensors, resumed._current().variables[name])
    assert torch.equal(resumed.report.objective, whole.report.objective)


def test_checkpoints_of_lightning_hold_the_stage_in_plain_types(tmp_path):
    model, save = module(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    trainer(grow(), save, max_epochs=EVERY + 1, enable_checkpointing=True).fit(model, full_batch(samples()))
    stages = []
    for step in range(1, EVERY + 2):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"]["GrowLayers"]
        assert set(saved) == {"grow", "stage", "begun", "seed"}
        stages.append(saved["stage"])
    assert stages == [0] * EVERY + [1]


def test_a_module_that_has_trained_before_starts_to_grow_from_there():
    model, callback = module(), grow()
    trainer(max_epochs=2).fit(model, full_batch(samples()))
    assert len(model.chain) == DEPTH
    fit(model, callback, EVERY)
    assert (callback.stage, len(model.chain)) == (0, 2)
    # A callback that grew one network serves the next.
    other = module(seed=4)
    fit(other, callback, EVERY + 1)
    assert (callback.stage, len(other.chain)) == (1, 3)


def test_mini_batches_grow_too():
    x, y = samples()
    model, callback = module(ThreeSplitting(alpha=5.0)), grow()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    trainer(callback, max_epochs=3).fit(model, batches)  # three sweeps per epoch
    assert (model.sweeps, callback.stage, len(model.chain)) == (9, 2, DEPTH)


def layer_parallel(rank, directory):
    model = module(PDADMM(rho=0.1), save_auxiliary=True)
    torch.manual_seed(3)
    fitting = {"devices": 2, "strategy": "layer_parallel"}
    runner = trainer(grow(), max_epochs=2 * EVERY + 1, **fitting)
    runner.fit(model, full_batch(samples()))
    runner.save_checkpoint(directory / "grown.ckpt")
    held = model.communicator.layers(DEPTH)
    fixed = trainer(grow(), devices=2, strategy=LayerParallelStrategy(layers=[2, 3]))
    with pytest.raises(MisconfigurationException, match="2 layers of the network"):
        fixed.fit(module(), full_batch(samples()))
    return {"weights": weights(model.network), "layers": [held.start, held.stop]}


def test_processes_that_share_layers_grow_like_one(tmp_path):
    results = run_processes(layer_parallel, tmp_path)
    model = module(PDADMM(rho=0.1))
    fit(model, grow(), 2 * EVERY + 1)
    (first, middle), (again, last) = (result["layers"] for result in results)
    assert (first, last) == (0, DEPTH)
    assert middle == again
    for result in results:
        for a, b in zip(result["weights"], weights(model.network), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    resumed = module(PDADMM(rho=0.1), save_auxiliary=True, seed=5)
    fit(resumed, grow(), 3 * EVERY, ckpt_path=tmp_path / "grown.ckpt")
    fit(model, callback_at(model), EVERY - 1)
    for a, b in zip(weights(resumed.network), weights(model.network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def callback_at(model):
    callback = grow()
    callback.load_state_dict({"grow": callback.grow, "stage": 2, "begun": 0, "seed": 0})
    return callback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grow": []}, "`grow`"),
        ({"grow": [1, 3]}, "`grow`"),
        ({"grow": [2, 2, 5]}, "`grow`"),
        ({"grow": [5, 2]}, "`grow`"),
        ({"grow": [2, 5], "every": 0}, "`every`"),
        ({"grow": [2, 5], "algorithms": [PDADMM()]}, r"`algorithms` .* \(2\), but got 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GrowLayers(**arguments)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (MLP([FEATURES, 8, 8, OUTPUTS]), "`grow` to end with 3"),
        (MLP([FEATURES, 8, 8, 7, 7, OUTPUTS]), r"stage '5' to be a square .* from '3' on the width"),
        (MLP([FEATURES, *[8] * 4, OUTPUTS], residual=True), "stage '3.stage.0' to be a square .* in a Residual"),
        (MLP([FEATURES, *[8] * 4, OUTPUTS], activation="Tanh"), "activation of stage '3' .* Tanh changes"),
        (MLP([FEATURES, *[8] * 4, OUTPUTS], activation="LeakyReLU"), "activation of stage '3' .* LeakyReLU changes"),
        (
            nn.Sequential(
                nn.Linear(FEATURES, 8),
                nn.Identity(),
                nn.Linear(8, 8),
                nn.ReLU(),
                *(m for _ in range(2) for m in (nn.Linear(8, 8), nn.ReLU())),
                nn.Linear(8, OUTPUTS),
            ),
            "activation of stage '2' .* ReLU changes values of Identity",
        ),
    ],
)
def test_networks_that_cannot_grow_are_refused(network, message):
    before = weights(network.double())
    model = module(ResidualSplitting(alpha=1.0), network=network)
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, grow(stages=(2, 3, 5)), 1)
    assert same(weights(network), before)


def test_a_layer_that_reads_another_than_the_one_before_does_not_grow():
    chain = Chain(DenseReLU([8, 8, 8, 8, OUTPUTS], [[0], [0], [0]]))
    with pytest.raises(ValueError, match=r"stage 'hidden\.2' to be a square"):
        check_growth(chain, 3)
    check_growth(Chain(DenseReLU([8, 8, 8, 8, OUTPUTS], "chain")), 3)


def test_algorithms_that_do_not_suit_their_stage_are_refused_before_the_first_sweep():
    with pytest.raises(MisconfigurationException, match="z_rule"):
        fit(
            module(network=MLP([FEATURES, *[8] * 4, OUTPUTS], activation="Abs")),
            grow([PDADMM(), PDADMM(), PDADMM(z_rule="reference")]),
            1,
        )
    with pytest.raises(MisconfigurationException, match="LiftedModule"):
        trainer(grow()).fit(Classifier(), loader())


def test_other_stages_than_those_of_the_checkpoint_are_refused(tmp_path):
    fit(module(), grow(), 2).save_checkpoint(tmp_path / "part.ckpt")
    with pytest.raises(MisconfigurationException, match=r"\[2, 3, 5\], but got \[2, 5\]"):
        fit(module(), grow(stages=(2, 5)), 4, ckpt_path=tmp_path / "part.ckpt")


@pytest.mark.parametrize(
    ("after", "before", "expected"),
    [
        (sigma.ReLU(), sigma.ReLU(), True),
        (sigma.ClippedReLU(max_val=2.0), sigma.ClippedReLU(max_val=2.0), True),
        (sigma.ReLU(), sigma.ClippedReLU(max_val=2.0), True),
        (sigma.ClippedReLU(max_val=2.0), sigma.ReLU(), False),
        (sigma.HardTanh(), sigma.HardTanh(), True),
        (sigma.Abs(), sigma.ReLU(), True),
        (sigma.ReLU(), sigma.Abs(), True),
        (sigma.Sign(), sigma.Sign(), True),
        (sigma.Identity(), sigma.Sigmoid(), True),
        (sigma.Sigmoid(), sigma.Sigmoid(), False),
        (sigma.GELU(), sigma.GELU(), False),
        (sigma.Softplus(), sigma.ReLU(), False),
    ],
)
def test_which_activations_keep_values(after, before, expected):
    assert keeps(after, before) is expected


def test_a_shallow_chain_shares_the_stages():
    chain = Chain(MLP([FEATURES, *[WIDTH] * (DEPTH - 1), OUTPUTS]))
    shallow = shallow_chain(chain, 3)
    assert [stage.name for stage in shallow] == ["1", "3", "9"]
    assert len(chain) == DEPTH
    assert shallow[2] is chain[4]
