from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from toolbox import LiveBytes
from torch import nn

from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.layers import Abs, Residual, Sign
from lightning_bcd.lifted.residual import ResidualSplitting
from lightning_bcd.lifted.three_splitting import ThreeSplitting
from lightning_bcd.lifted.two_splitting import TwoSplitting
from lightning_bcd.prox import (
    L1,
    ElasticNet,
    GroupLasso,
    NonNegative,
    Ridge,
    RowSparse,
    UniformGrid,
    resolve_loss,
)

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden runs are not part of a clone")
F64 = torch.float64


def network(widths, activation=nn.ReLU, seed=0, bias=True, residual=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = []
        for i, (a, b) in enumerate(pairwise(widths)):
            stage = [nn.Linear(a, b, bias=bias)]
            if i < len(widths) - 2:
                stage.append(activation())
            modules += [Residual(*stage)] if residual and a == b else stage
        return nn.Sequential(*modules).double()


def problem(samples, features, outputs, loss, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator, dtype=F64)
    labels = torch.randint(outputs, (samples,), generator=generator)
    return x, loss.encode(labels, outputs, F64)


def golden(name):
    """Network, data and the stored arrays of a published run."""
    data = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    depth = len(data["dims"]) - 1
    widths = [data["w1_0"].shape[1]] + [data[f"w{i}_0"].shape[0] for i in range(1, depth + 1)]
    net = network(widths)
    for i, stage in enumerate(Chain(net), start=1):
        stage.weight.data.copy_(data[f"w{i}_0"])
        stage.bias.data.copy_(data[f"b{i}_0"])
    y = nn.functional.one_hot(data["y"], widths[-1]).to(F64)
    return net, data, data["x"], y


@needs_golden
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("name", ["three_splitting_a", "three_splitting_b"])
def test_sweeps_equal_the_published_code(name, chunk_size):
    net, data, x, y = golden(name)
    numbers = {key: float(data[key]) for key in ("gamma", "rho", "alpha")}
    algorithm = ThreeSplitting(**numbers, bias_update="reference", chunk_size=chunk_size)
    chain, loss = Chain(net), resolve_loss("squared")
    state = algorithm.start(chain, x, y, Alone())
    assert algorithm.objective(chain, state, loss) == pytest.approx(float(data["objective"][0]), rel=1e-10)
    for sweep in range(1, 11):
        report = algorithm.sweep(chain, state, loss, Alone())
        expected = float(data["objective"][sweep])
        assert float(report.objective) == pytest.approx(expected, rel=1e-9)
        if sweep not in (1, 2, 10):
            continue
        for i, stage in enumerate(chain):
            found = (stage.weight, stage.bias, state.variables["v"][i], state.variables["u"][i])
            for letter, value in zip("wbvu", found, strict=True):
                torch.testing.assert_close(value.detach(), data[f"{letter}{i + 1}_{sweep}"], rtol=1e-8, atol=1e-8)


ACTIVATIONS = [
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.Hardtanh,
    nn.ReLU6,
    Abs,
    Sign,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.GELU,
    nn.SiLU,
]
LOSSES = ["squared", "cross_entropy", "logistic", "hinge"]
SHAPES = {"thin": (40, (7, 5, 3)), "wide": (30, (4, 9, 8, 3)), "few samples": (6, (9, 12, 8, 10, 3))}


def run(algorithm, net, x, y, loss, sweeps=5):
    """Sweep; check every report against the definition; return the objectives, the first before any sweep."""
    chain = Chain(net)
    algorithm.check(chain, loss)
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, y, Alone())
    values = [float(algorithm.objective(chain, state, loss))]
    for _ in range(sweeps):
        report = algorithm.sweep(chain, state, loss, Alone())
        values.append(float(algorithm.objective(chain, state, loss)))
        assert float(report.objective) == pytest.approx(values[-1], rel=1e-9, abs=1e-11)
    return values, state


def never_rises(values):
    # A start that breaks a constraint is infinite.
    values = values if values[0] < float("inf") else values[1:]
    return all(b <= a + 1e-10 * max(1.0, abs(a)) for a, b in pairwise(values)) and values[-1] < values[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_objective_never_rises(activation, loss, shape):
    samples, widths = SHAPES[shape]
    loss = resolve_loss(loss)
    x, y = problem(samples, widths[0], widths[-1], loss)
    for bias_update, order in product(("exact", "joint"), ("backward", "forward")):
        algorithm = ThreeSplitting(gamma=0.8, rho=1.3, alpha=0.05, bias_update=bias_update, order=order)
        assert algorithm.descends
        values, _ = run(algorithm, network(widths, activation), x, y, loss)
        assert never_rises(values)


OPTIONS = {
    "prox-linear": {"update": "prox_linear"},
    "prox-linear, Lipschitz": {"update": "prox_linear", "step": "lipschitz", "inner_iterations": 3},
    "prox-linear, l1": {"update": "prox_linear", "weight_penalty": L1(0.1)},
    "prox-linear, joint bias": {"update": "prox_linear", "bias_update": "joint"},
    "ridge": {"weight_penalty": Ridge(0.7)},
    "group lasso": {"weight_penalty": GroupLasso(0.3)},
    "prox-linear, group lasso": {"weight_penalty": GroupLasso(0.3, dim=0), "update": "prox_linear"},
    "row-sparse": {"weight_penalty": RowSparse(4)},
    "prox-linear, grid": {"weight_penalty": UniformGrid(-1.0, 1.0, 9), "update": "prox_linear"},
    "l1": {"weight_penalty": L1(0.2)},
    "non-negative V": {"activation_penalty": NonNegative()},
    "elastic net on V": {"activation_penalty": ElasticNet(0.05, 0.1)},
    "mean": {"reduction": "mean", "weight_penalty": Ridge(0.01), "alpha": 1e-3},
    "mean, joint bias": {"reduction": "mean", "bias_update": "joint", "alpha": 1e-3, "weight_penalty": L1(0.01)},
    "no proximal term": {"alpha": 0.0, "weight_penalty": Ridge(0.01)},
    "per stage": {"gamma": [0.5, 1.0, 2.0], "rho": (2.0, 1.0, 0.5), "alpha": [0.0, 0.1, 1.0]},
    "fit weight and scale": {"fit_weight": 3.0, "target_scale": 5.0},
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_objective_never_rises_with(name, bias, residual):
    loss = resolve_loss("squared")
    kind = ResidualSplitting if residual else ThreeSplitting
    for widths, samples in (((6, 5, 5, 3), 40), ((6, 8, 8, 3), 5)):
        x, y = problem(samples, widths[0], widths[-1], loss)
        for order in ("backward", "forward"):
            algorithm = kind(**{"alpha": 0.1, **OPTIONS[name], "order": order})
            values, _ = run(algorithm, network(widths, nn.Tanh, bias=bias, residual=residual), x, y, loss)
            assert never_rises(values)


@pytest.mark.parametrize("update", ["proximal", "prox_linear"])
def test_chunks_change_nothing_but_rounding(update):
    loss = resolve_loss("cross_entropy")
    x, y = problem(41, 6, 3, loss)
    found = []
    for chunk_size in (None, 1, 8):
        net = network((6, 8, 5, 5, 3), residual=True)
        algorithm = ResidualSplitting(update=update, chunk_size=chunk_size)
        _, state = run(algorithm, net, x, y, loss, sweeps=4)
        found.append([*net.parameters(), *state.variables["v"], *state.variables["u"]])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_last_updates_are_stationary():
    """Gradients of the objective in the blocks just updated vanish."""
    loss = resolve_loss("cross_entropy")
    x, y = problem(20, 5, 3, loss)
    chain = Chain(network((5, 6, 4, 3), nn.Tanh))
    algorithm = ThreeSplitting(gamma=0.7, rho=1.4, alpha=0.0, weight_penalty=Ridge(0.1), order="forward")
    state = algorithm.start(chain, x, y, Alone())
    before = chain[-1].bias.detach().clone()
    algorithm.sweep(chain, state, loss, Alone())
    # After a forward sweep the last blocks are W_L and then b_L: b_L is optimal given the rest, W_L given the old b_L.
    u, v_in, b_old = state.variables["u"][-1], state.variables["v"][-2], before
    w, b = (t.detach().clone().requires_grad_() for t in (chain[-1].weight, chain[-1].bias))

    def value(bias):
        return 1.4 / 2 * (u - v_in @ w.T - bias).square().sum() + 0.1 / 2 * w.square().sum()

    for gradient in (torch.autograd.grad(value(b), b)[0], torch.autograd.grad(value(b_old), w)[0]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


def test_a_residual_sweep_equals_the_equations_written_out():
    loss = resolve_loss("squared")
    x, y = problem(12, 5, 5, loss)
    gamma, rho, alpha = 0.8, 1.3, 0.2
    net = network((5, 5, 5, 5), residual=True)
    chain = Chain(net)
    weights = [[stage.weight.detach().clone(), stage.bias.detach().clone()] for stage in chain]
    v = [x]
    u = []
    for i, (w, b) in enumerate(weights):
        u.append(v[-1] @ w.T + b)
        v.append(v[-1] + (u[-1].relu() if i < 2 else u[-1]))

    algorithm = ResidualSplitting(gamma=gamma, rho=rho, alpha=alpha)
    state = algorithm.start(chain, x, y, Alone())
    algorithm.sweep(chain, state, loss, Alone())

    eye = torch.eye(5, dtype=F64)

    def relu_problem(a, c, r):
        best = torch.full_like(a, torch.inf)
        point = a
        for candidate in (((gamma * a + r * c) / (gamma + r)).clamp_min(0), c.clamp_max(0)):
            value = gamma / 2 * (a - candidate.relu()) ** 2 + r / 2 * (candidate - c) ** 2
            point, best = torch.where(value < best, candidate, point), torch.minimum(value, best)
        return point

    def fit(u, v_in, w, b):
        right = alpha * w + rho * (u - b).T @ v_in
        w = torch.linalg.solve(alpha * eye + rho * v_in.T @ v_in, right.T).T
        return w, (alpha * b + rho * (u - v_in @ w.T).sum(0)) / (rho * len(u) + alpha)

    v[3] = (y + gamma * (v[2] + u[2]) + alpha * v[3]) / (1 + gamma + alpha)
    u[2] = (gamma * (v[3] - v[2]) + rho * (v[2] @ weights[2][0].T + weights[2][1])) / (gamma + rho)
    weights[2] = fit(u[2], v[2], *weights[2])
    for i in (1, 0):  # stage i makes v[i + 1]
        w, b = weights[i + 1]
        above = v[i + 2] - (u[i + 1] if i == 1 else u[i + 1].relu())
        right = gamma * (v[i] + u[i].relu()) + gamma * above + rho * (u[i + 1] - b) @ w
        v[i + 1] = torch.linalg.solve(2 * gamma * eye + rho * w.T @ w, right.T).T
        product_ = v[i] @ weights[i][0].T + weights[i][1]
        u[i] = relu_problem(v[i + 1] - v[i], (rho * product_ + alpha * u[i]) / (rho + alpha), rho + alpha)
        weights[i] = fit(u[i], v[i], *weights[i])
    for i, stage in enumerate(chain):
        torch.testing.assert_close(stage.weight.detach(), weights[i][0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(stage.bias.detach(), weights[i][1], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(state.variables["v"][i], v[i + 1], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(state.variables["u"][i], u[i], rtol=1e-9, atol=1e-11)


def cnn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.AvgPool2d(2)),
            nn.Conv2d(4, 6, 3, dilation=2, padding="same", padding_mode="circular"),
            nn.AvgPool2d(2),
            nn.Tanh(),
            nn.Conv2d(6, 4, 2, stride=2, bias=False),
            nn.Flatten(),
            nn.Linear(4, 3),
        ).double()


@pytest.mark.parametrize("update", ["proximal", "prox_linear"])
def test_a_convolutional_network_descends(update):
    loss = resolve_loss("cross_entropy")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(15, 2, 8, 8, generator=generator, dtype=F64)
    y = loss.encode(torch.randint(3, (15,), generator=generator), 3, F64)
    for step, penalty in (("exact", None), ("lipschitz", L1(0.01)), ("exact", GroupLasso(0.01, dim=0))):
        algorithm = ThreeSplitting(update=update, step=step, weight_penalty=penalty, alpha=0.01, chunk_size=4)
        values, _ = run(algorithm, cnn(), x, y, loss, sweeps=6)
        assert never_rises(values)


def test_weights_in_another_memory_format_train_too():
    loss = resolve_loss("cross_entropy")
    x = torch.randn(15, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = loss.encode(torch.arange(15) % 3, 3, F64)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = cnn().to(memory_format=memory_format)
        run(ThreeSplitting(alpha=0.1), net, x, y, loss, sweeps=2)
        found.append([p.detach().contiguous() for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_momentum_leaves_constraints_satisfied():
    loss = resolve_loss("squared")
    x, y = problem(30, 6, 3, loss)
    net = network((6, 8, 3))
    algorithm = ThreeSplitting(momentum=0.9, weight_penalty=NonNegative())
    chain = Chain(net)
    state = algorithm.start(chain, x, y, Alone())
    for _ in range(6):
        algorithm.sweep(chain, state, loss, Alone())
        assert all(float(stage.weight.min()) >= 0 for stage in chain)


def test_momentum_leaves_frozen_stages_alone():
    loss = resolve_loss("squared")
    x, y = problem(30, 6, 3, loss)
    net = network((6, 8, 5, 3))
    for p in net[0].parameters():
        p.requires_grad_(False)
    before = [p.clone() for p in net[0].parameters()]  # some are negative
    chain, algorithm = Chain(net), ThreeSplitting(momentum=0.9, weight_penalty=NonNegative())
    state = algorithm.start(chain, x, y, Alone())
    for _ in range(2):
        algorithm.sweep(chain, state, loss, Alone())
    assert all(torch.equal(a, b) for a, b in zip(before, net[0].parameters(), strict=True))
    assert float(chain[1].weight.min()) >= 0


def test_the_objective_of_float32_runs_is_reported_to_rounding():
    """Inputs far from zero make sums large and residuals small."""
    loss = resolve_loss("squared")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 50, generator=generator) + 3
    y = loss.encode(torch.randint(3, (3000,), generator=generator), 3, torch.float32)
    net = network((50, 60, 40, 3)).float()
    chain, algorithm = Chain(net), ThreeSplitting(init="he", alpha=0.01, bias_update="joint")
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, y, Alone())
    values = []
    for _ in range(30):
        values.append(float(algorithm.sweep(chain, state, loss, Alone()).objective))
        true = float(algorithm.objective(chain, state, loss).detach())
        assert values[-1] == pytest.approx(true, rel=1e-3)
    assert all(b <= a * (1 + 1e-4) for a, b in pairwise(values))


def test_the_step_lengths_differ():
    loss = resolve_loss("squared")
    x, y = problem(30, 6, 3, loss)
    exact, bound = (network((6, 8, 3)) for _ in range(2))
    run(ThreeSplitting(update="prox_linear"), exact, x, y, loss, sweeps=1)
    run(ThreeSplitting(update="prox_linear", step="lipschitz"), bound, x, y, loss, sweeps=1)
    assert not torch.allclose(exact[0].weight, bound[0].weight)


def test_reduced_storage_stays_close():
    loss = resolve_loss("squared")
    x, y = problem(50, 6, 3, loss)
    x, y = x.float(), y.float()
    results = []
    for storage in (None, "bfloat16"):
        net = network((6, 8, 3)).float()
        chain = Chain(net)
        algorithm = ThreeSplitting(storage_dtype=storage, alpha=1.0)
        state = algorithm.start(chain, x, y, Alone())
        for _ in range(3):
            report = algorithm.sweep(chain, state, loss, Alone())
        assert float(report.objective) == pytest.approx(float(algorithm.objective(chain, state, loss)), rel=1e-3)
        results.append((float(report.objective), state.bytes))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    assert results[1][1] * 2 == results[0][1]


def test_schedules_follow_the_sweep():
    loss = resolve_loss("squared")
    x, y = problem(20, 6, 3, loss)
    seen = []

    def grow(sweep, depth):
        seen.append(sweep)
        return [2.0**sweep] * depth

    algorithm = ThreeSplitting(gamma=grow)
    assert not algorithm.descends
    chain = Chain(network((6, 4, 3)))
    state = algorithm.start(chain, x, y, Alone())
    for _ in range(3):
        algorithm.sweep(chain, state, loss, Alone())
    assert seen == [0, 1, 2]


def test_a_restart_is_a_forward_pass_and_saves_the_product_of_the_sweep():
    loss = resolve_loss("squared")
    x, y = problem(30, 6, 3, loss)
    net, other = network((6, 8, 5, 3)), network((6, 8, 5, 3))
    algorithm = ThreeSplitting(alpha=0.3, restart_every=2)
    assert not algorithm.descends
    chain = Chain(net)
    state = algorithm.start(chain, x, y, Alone())
    plain, expected = ThreeSplitting(alpha=0.3), Chain(other)
    for sweep in range(4):
        algorithm.sweep(chain, state, loss, Alone())
        if sweep % 2 == 0:
            target = plain.start(expected, x, y, Alone())
        # Without the mark the product is computed again.
        target.fresh = False
        plain.sweep(expected, target, loss, Alone())
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_momentum_moves_hidden_weights_on():
    loss = resolve_loss("squared")
    x, y = problem(30, 6, 3, loss)
    net, other = network((6, 8, 3)), network((6, 8, 3))
    algorithm, plain = ThreeSplitting(alpha=0.3, momentum=0.8, restart_every=1), ThreeSplitting(alpha=0.3)
    chain, expected = Chain(net), Chain(other)
    state = algorithm.start(chain, x, y, Alone())
    velocity = [torch.zeros_like(p) for p in list(other.parameters())[:2]]
    for _ in range(3):
        algorithm.sweep(chain, state, loss, Alone())
        old = [p.detach().clone() for p in list(other.parameters())[:2]]
        plain.sweep(expected, plain.start(expected, x, y, Alone()), loss, Alone())
        for p, before, v in zip(other.parameters(), old, velocity, strict=False):
            v.mul_(0.8).add_(p.detach() - before)
            p.data.copy_(before + v)
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_recommended_settings_learn_hidden_features():
    loss = resolve_loss("squared")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator, dtype=F64)
    labels = (x[:, 0] * x[:, 1] > 0).long()  # no linear model does better than chance
    net = network((5, 40, 40, 40, 2))
    algorithm = ThreeSplitting(preset="recommended")
    chain = Chain(net)
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, loss.encode(labels, 2, F64), Alone())
    for _ in range(20):
        algorithm.sweep(chain, state, loss, Alone())
    with torch.no_grad():
        assert float((net(x).argmax(1) == labels).double().mean()) > 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.0}, "`gamma` to be positive"),
        ({"rho": -1.0}, "`rho` to be finite and not negative"),
        ({"alpha": float("nan")}, "`alpha` to be finite"),
        ({"fit_weight": 0.0}, "`fit_weight` to be positive"),
        ({"update": "newton"}, "`update` to be one of"),
        ({"preset": "best"}, "`preset` to be one of"),
        ({"init": "xavier"}, "`init` to be one of"),
        ({"chunk_size": 0}, "`chunk_size` to be at least 1"),
        ({"inner_iterations": 0}, "`inner_iterations` to be at least 1"),
        ({"storage_dtype": "int8"}, "`storage_dtype` to be one of"),
        ({"activation_penalty": RowSparse(2)}, "`activation_penalty` to be convex"),
        ({"restart_every": 0}, "`restart_every` to be None or at least 1"),
        ({"momentum": 1.0}, r"`momentum` to be in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThreeSplitting(**arguments)


def test_what_does_not_suit_the_network_is_named():
    chain, squared = Chain(network((4, 5, 3))), resolve_loss("squared")
    with pytest.raises(ValueError, match="`gamma` to be one number or 2, one per stage, but got 3"):
        ThreeSplitting(gamma=[1.0, 1.0, 1.0]).check(chain, squared)
    with pytest.raises(ValueError, match="`rho` to be positive"):
        ThreeSplitting(rho=[1.0, 0.0]).check(chain, squared)
    with pytest.raises(ValueError, match="`weight_penalty` to be one penalty or 2"):
        ThreeSplitting(weight_penalty=[L1(1.0)]).check(chain, squared)
    with pytest.raises(ValueError, match="Use ResidualSplitting"):
        ThreeSplitting().check(Chain(network((4, 4, 3), residual=True)), squared)
    half = network((4, 5, 3))
    half[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="stage '0' to be both trained or both frozen"):
        ThreeSplitting().check(Chain(half), squared)
    half[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\['0'\] are frozen. Use ThreeSplitting"):
        TwoSplitting().check(Chain(half), squared)
    with pytest.raises(ValueError, match="`target_scale` to be 1 with CrossEntropyLoss"):
        ThreeSplitting(target_scale=2.0).check(chain, resolve_loss("cross_entropy"))


def test_presets_fill_only_what_is_left_open():
    assert ThreeSplitting().alpha == 1.0
    reference = ThreeSplitting(preset="reference", alpha=1.0)
    assert (reference.alpha, reference.bias_update, reference.init) == (1.0, "reference", "reference")


@pytest.mark.parametrize("update", ["proximal", "prox_linear"])
def test_temporaries_of_a_chunked_sweep_are_smaller_than_one_matrix_of_the_state(update):
    loss = resolve_loss("squared")
    samples, width = 20_000, 40
    x, y = problem(samples, width, 10, loss)
    chain = Chain(network((width, width, width, 10)))
    algorithm = ThreeSplitting(update=update, chunk_size=256)
    state = algorithm.start(chain, x, y, Alone())
    algorithm.sweep(chain, state, loss, Alone())
    with LiveBytes() as live:
        algorithm.sweep(chain, state, loss, Alone())
    promised = algorithm.temporary_bytes(chain, x)
    assert promised / 4 < live.peak < promised + 40 * width**2 * 8
    assert promised < samples * width * x.element_size()
