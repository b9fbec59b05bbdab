import threading
from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.layers import Abs, Residual, Sign
from lightning_bcd.lifted.two_splitting import TwoSplitting
from lightning_bcd.prox import L1, Box, ElasticNet, GroupLasso, NonNegative, Ridge, RowSparse, resolve_loss

F64 = torch.float64


def network(widths, activation=nn.ReLU, seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = []
        for a, b in pairwise(widths):
            modules += [nn.Linear(a, b, bias=bias), activation()]
        return nn.Sequential(*modules[:-1]).double()


def cnn(activation=nn.ReLU, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            activation(),
            nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
            nn.AvgPool2d(2),
            activation(),
            nn.Flatten(),
            nn.Linear(6, 5),
            activation(),
            nn.Linear(5, 3),
        ).double()


def problem(samples, features, outputs, loss, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = features if isinstance(features, tuple) else (features,)
    x = torch.randn(samples, *shape, generator=generator, dtype=F64)
    labels = torch.randint(outputs, (samples,), generator=generator)
    return x, loss.encode(labels, outputs, F64)


def run(algorithm, net, x, y, loss, sweeps=4):
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
    return all(b <= a + 1e-10 * abs(a) for a, b in pairwise(values)) and values[-1] < values[0]


ACTIVATIONS = [nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, Abs, nn.Hardtanh]
LOSSES = ["squared", "cross_entropy", "logistic", "hinge"]
SHAPES = {"thin": (40, (7, 5, 3)), "wide": (30, (4, 9, 8, 3)), "few samples": (6, (9, 12, 8, 10, 3))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_objective_never_rises(activation, loss, shape):
    samples, widths = SHAPES[shape]
    loss = resolve_loss(loss)
    x, y = problem(samples, widths[0], widths[-1], loss)
    for bias_update, alpha in (("exact", 0.05), ("joint", 1.0)):
        algorithm = TwoSplitting(gamma=0.8, alpha=alpha, bias_update=bias_update)
        assert algorithm.descends
        values, _ = run(algorithm, network(widths, activation), x, y, loss)
        assert never_rises(values)


OPTIONS = {
    "ridge": {"weight_penalty": Ridge(0.7)},
    "l1": {"weight_penalty": L1(0.2)},
    "group lasso": {"weight_penalty": GroupLasso(0.1)},
    "box": {"weight_penalty": Box(-0.5, 0.5)},
    "row sparse": {"weight_penalty": RowSparse(2)},
    "non-negative V": {"activation_penalty": NonNegative()},
    "elastic net on V": {"activation_penalty": ElasticNet(0.05, 0.1)},
    "mean": {"reduction": "mean", "weight_penalty": Ridge(0.01), "alpha": 1e-3},
    "mean, l1": {"reduction": "mean", "weight_penalty": L1(0.01), "alpha": 1e-3, "bias_update": "joint"},
    "no proximal term": {"alpha": 0.0},
    "per stage": {"gamma": [0.5, 1.0, 2.0], "alpha": [0.0, 0.1, 1.0]},
    "fit weight and scale": {"fit_weight": 3.0, "target_scale": 5.0},
    "one step": {"inner_iterations": 1},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_objective_never_rises_with_options(options, activation, bias):
    loss = resolve_loss("squared")
    x, y = problem(25, 6, 3, loss)
    values, _ = run(TwoSplitting(**OPTIONS[options]), network((6, 8, 7, 3), activation, bias=bias), x, y, loss, 8)
    assert never_rises(values)


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.GELU])
@pytest.mark.parametrize("options", [{}, {"weight_penalty": L1(0.05)}, {"activation_penalty": L1(0.05)}])
def test_a_convolutional_network_descends(options, activation):
    loss = resolve_loss("cross_entropy")
    x, y = problem(12, (2, 6, 6), 3, loss)
    values, _ = run(TwoSplitting(alpha=0.1, **options), cnn(activation), x, y, loss)
    assert never_rises(values)
    assert values[-1] < 0.7 * values[0]


def test_every_sub_problem_falls_by_the_proximal_term():
    """Sufficient decrease: the objective falls by at least α/2 ‖Δ‖² of all blocks in a sweep."""
    loss, alpha = resolve_loss("squared"), 0.5
    x, y = problem(20, 6, 3, loss)
    net = network((6, 8, 7, 3), nn.Tanh)
    algorithm, chain = TwoSplitting(alpha=alpha), Chain(net)
    state = algorithm.start(chain, x, y, Alone())
    for _ in range(5):
        before = algorithm.objective(chain, state, loss)
        old = [t.detach().clone() for t in [*net.parameters(), *state.variables["v"]]]
        report = algorithm.sweep(chain, state, loss, Alone())
        new = [*net.parameters(), *state.variables["v"]]
        moved = sum((a - b).square().sum() for a, b in zip(new, old, strict=True))
        assert moved > 0
        assert report.objective <= before - alpha / 2 * moved + 1e-10 * before


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.Tanh])
def test_chunks_change_nothing(activation, reduction):
    loss, results = resolve_loss("squared"), []
    x, y = problem(23, 6, 3, loss)
    for chunk_size in (None, 5):
        net = network((6, 8, 7, 3), activation)
        values, state = run(TwoSplitting(chunk_size=chunk_size, reduction=reduction), net, x, y, loss)
        results.append([torch.tensor(values, dtype=F64), *net.parameters(), *state.variables["v"]])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("widths", [(6, 4, 9, 5), (6, 9, 4, 3)])
def test_linear_stages_are_solved_in_closed_form(widths):
    """V_2 minimises γ/2 ‖V − σ(P_2)‖² + γ/2 ‖V_3 − V Wᵀ − b‖² + α/2 ‖V − V_old‖²; W_3, V_3 are new, W_2 is old."""
    loss, alpha = resolve_loss("squared"), 0.3
    gamma = [0.5, 0.7, 1.3]
    x, y = problem(11, widths[0], widths[-1], loss)
    net = network(widths, nn.Tanh)
    algorithm, chain = TwoSplitting(gamma=gamma, alpha=alpha), Chain(net)
    state = algorithm.start(chain, x, y, Alone())
    state.variables["v"][1].add_(torch.randn(11, widths[2], dtype=F64))
    old = [v.clone() for v in state.variables["v"]]
    with torch.no_grad():
        centre = torch.tanh(net[2](old[0]))
    algorithm.sweep(chain, state, loss, Alone())
    w, b, last = net[4].weight.detach(), net[4].bias.detach(), state.variables["v"][2]
    hessian = (gamma[1] + alpha) * torch.eye(widths[2], dtype=F64) + gamma[2] * w.T @ w
    right = gamma[1] * centre + alpha * old[1] + gamma[2] * (last - b) @ w
    torch.testing.assert_close(state.variables["v"][1], torch.linalg.solve(hessian, right.T).T, rtol=1e-10, atol=1e-10)


def test_the_last_stage_is_solved_exactly():
    loss = resolve_loss("squared")
    x, y = problem(15, 4, 3, loss)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    w, b = (p.detach().clone() for p in net.parameters())
    algorithm, chain = TwoSplitting(gamma=2.0, alpha=0.5, bias_update="joint"), Chain(net)
    state = algorithm.start(chain, x, y, Alone())
    algorithm.sweep(chain, state, loss, Alone())
    v = (y + 2.5 * (x @ w.T + b)) / 3.5
    inputs, start = torch.cat([x, torch.ones(15, 1)], 1), torch.cat([w, b[:, None]], 1)
    matrix = 2 * inputs.T @ inputs + 0.5 * torch.eye(5)
    expected = torch.linalg.solve(matrix, (2 * v.T @ inputs + 0.5 * start).T).T
    torch.testing.assert_close(state.variables["v"][0], v)
    torch.testing.assert_close(torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach(), expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus])
def test_many_steps_reach_a_stationary_point_of_the_sub_problem_of_the_weights(activation):
    loss, gamma, alpha = resolve_loss("squared"), 1.4, 0.3
    x, y = problem(30, 6, 3, loss)
    net = network((6, 5, 3), activation)
    algorithm, chain = TwoSplitting(gamma=gamma, alpha=alpha, inner_iterations=200), Chain(net)
    state = algorithm.start(chain, x, y, Alone())
    w_old, b_old = (p.detach().clone() for p in net[0].parameters())
    algorithm.sweep(chain, state, loss, Alone())
    w, b = net[0].parameters()
    value = gamma / 2 * (state.variables["v"][0] - net[1](net[0](x))).square().sum()
    value = value + alpha / 2 * ((w - w_old).square().sum() + (b - b_old).square().sum())
    moved = float((w - w_old).detach().norm())
    assert moved > 1e-3
    # A minimum may lie on a kink of ReLU, where no gradient vanishes.
    gradients = torch.autograd.grad(value, (w, b))
    assert activation is nn.ReLU or max(float(g.abs().max()) for g in gradients) < 1e-5


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_every_sample_descends_to_a_stationary_point(activation):
    """Each row's sub-problem of V_1 falls, not only their sum; V_2 and W_2 are new in it, W_1 is old."""
    loss, gamma, alpha, sigma = resolve_loss("squared"), 0.9, 0.2, activation()
    x, y = problem(50, 6, 3, loss)
    net = network((6, 8, 7, 3), activation)
    old = sigma(net[0](x)).detach() + torch.randn(50, 8, dtype=F64)
    centre = sigma(net[0](x)).detach()

    def rows(v):
        above = sigma(v @ net[2].weight.detach().T + net[2].bias.detach())
        terms = (gamma * (v - centre).square().sum(1), gamma * (state.variables["v"][1] - above).square().sum(1))
        return (sum(terms) + alpha * (v - old).square().sum(1)) / 2

    for steps in (1, 3, 100):
        net.load_state_dict(network((6, 8, 7, 3), activation).state_dict())
        algorithm, chain = TwoSplitting(gamma=gamma, alpha=alpha, inner_iterations=steps), Chain(net)
        state = algorithm.start(chain, x, y, Alone())
        state.variables["v"][0].copy_(old)
        algorithm.sweep(chain, state, loss, Alone())
        new = state.variables["v"][0].clone().requires_grad_()
        assert (rows(new) <= rows(old) + 1e-12).all()
        assert (rows(new) < rows(old)).any()
    gradient = torch.autograd.grad(rows(new).sum(), new)[0]
    assert activation is nn.ReLU or gradient.abs().max() < 1e-6


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, Abs])
@pytest.mark.parametrize("penalty", [None, L1(0.1)])
def test_steps_of_the_weights_that_are_too_long_are_undone(activation, penalty):
    loss = resolve_loss("squared")
    x, y = problem(30, 6, 3, loss)
    for steps in (1, 40):
        net = network((6, 8, 3), activation)
        algorithm, chain = TwoSplitting(alpha=1e-3, inner_iterations=steps, weight_penalty=penalty), Chain(net)
        state = algorithm.start(chain, x, y, Alone())
        state.variables["v"][0].add_(torch.randn(30, 8, dtype=F64))
        state.cache["bound_0"] = torch.tensor(1e-4, dtype=F64)
        old = net[0].weight.detach().clone()
        values = [float(algorithm.objective(chain, state, loss))]
        values.append(float(algorithm.sweep(chain, state, loss, Alone()).objective))
        assert never_rises(values)
        # One step is too long and undone; of many, the later ones are short enough.
        assert torch.equal(net[0].weight.detach(), old) == (steps == 1)


class Threads:
    """Adds up over states that sweep in threads of their own."""

    def __init__(self, size):
        self.size, self.local = size, threading.local()
        self.barrier, self.given = threading.Barrier(size), [None] * size

    def sum(self, tensors):
        self.given[self.local.rank] = [t.clone() for t in tensors]
        self.barrier.wait(timeout=60)
        totals = [torch.stack(parts).sum(0) for parts in zip(*self.given, strict=True)]
        self.barrier.wait(timeout=60)
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total)


SHARDS = (slice(0, 17), slice(17, 23))
SHARED = [
    (lambda: network((6, 8, 7, 3)), 6, {}),
    (lambda: network((6, 8, 7, 3), nn.Tanh), 6, {"reduction": "mean", "alpha": 0.01}),
    (lambda: network((6, 8, 7, 3), nn.Identity), 6, {"weight_penalty": Ridge(0.1)}),
    (lambda: network((30, 8, 3)), 30, {"weight_penalty": Ridge(0.1)}),
    (cnn, (2, 6, 6), {"activation_penalty": NonNegative()}),
]


@pytest.mark.parametrize("case", range(len(SHARED)))
def test_two_processes_equal_one(case):
    build, features, options = SHARED[case]
    loss, algorithm = resolve_loss("squared"), TwoSplitting(**options)
    x, y = problem(23, features, 3, loss)
    comm = Threads(len(SHARDS))
    nets, values, states = [build() for _ in SHARDS], [None, None], [None, None]

    def work(rank):
        comm.local.rank = rank
        chain, rows = Chain(nets[rank]), SHARDS[rank]
        states[rank] = algorithm.start(chain, x[rows], y[rows], comm)
        values[rank] = [float(algorithm.sweep(chain, states[rank], loss, comm).objective) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(SHARDS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    net = build()
    expected, state = run(algorithm, net, x, y, loss)
    assert values[0] == values[1] == pytest.approx(expected[1:], rel=1e-9)
    for mine, other, one in zip(*(n.parameters() for n in (*nets, net)), strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, one, rtol=1e-9, atol=1e-9)
    for layer, v in enumerate(state.variables["v"]):
        both = torch.cat([s.variables["v"][layer] for s in states])
        torch.testing.assert_close(both, v, rtol=1e-9, atol=1e-9)


def test_residuals_are_root_mean_squares():
    loss = resolve_loss("squared")
    x, y = problem(20, 6, 3, loss)
    net = network((6, 5, 3))
    chain, algorithm = Chain(net), TwoSplitting()
    state = algorithm.start(chain, x, y, Alone())
    report = algorithm.sweep(chain, state, loss, Alone())
    v = state.variables["v"]
    with torch.no_grad():
        errors = [v[0] - net[:2](x), v[1] - net[2](v[0])]
    expected = torch.stack([e.square().mean().sqrt() for e in errors])
    torch.testing.assert_close(torch.stack(report.residuals["activation"]), expected)
    assert [float(t) for t in report.linear] == [0.0, 0.0]


def test_only_activations_are_auxiliary_variables():
    net = network((6, 5, 3))
    x = torch.randn(4, 6, dtype=F64)
    first, last = TwoSplitting().variables(Chain(net), x)
    assert set(first) == set(last) == {"v"}
    assert torch.equal(first["v"], net[:2](x))
    assert torch.equal(last["v"], net(x))


def test_half_precision_variables_and_offload_train():
    loss = resolve_loss("squared")
    x, y = problem(40, 6, 3, loss)
    for dtype, options in ((torch.float32, {}), (torch.float32, {"storage_dtype": "bfloat16", "offload": True})):
        net, algorithm = network((6, 8, 7, 3)).to(dtype), TwoSplitting(**options)
        chain = Chain(net)
        state = algorithm.start(chain, x.to(dtype), y.to(dtype), Alone())
        values = [float(algorithm.sweep(chain, state, loss, Alone()).objective) for _ in range(20)]
        assert values[-1] < 0.2 * values[0]
        if not options:
            assert all(b <= a * (1 + 1e-5) for a, b in pairwise(values))


def test_it_stays_at_a_stationary_point():
    """Long after convergence nothing breaks down, and nothing moves."""
    loss = resolve_loss("squared")
    x, y = problem(12, 4, 2, loss)
    for alpha in (0.0, 0.1):
        values, _ = run(TwoSplitting(alpha=alpha, inner_iterations=20), network((4, 3, 2), nn.Tanh), x, y, loss, 80)
        assert all(b <= a + 1e-10 * a for a, b in pairwise(values))
        assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_it_learns_digits(activation):
    data, labels = (torch.from_numpy(a)[:600] for a in load_digits(return_X_y=True))
    x, loss = data / 16, resolve_loss("squared")
    net = network((64, 32, 32, 10), activation)
    run(TwoSplitting(init="orthogonal", alpha=0.01), net, x, loss.encode(labels, 10, F64), loss, sweeps=8)
    assert (net(x).argmax(1) == labels).double().mean() > 0.9


def test_presets():
    reference = TwoSplitting(preset="reference", alpha=0.5)
    assert (reference.gamma, reference.alpha, reference.init) == (1.0, 0.5, "reference")
    assert (TwoSplitting().gamma, TwoSplitting().alpha, TwoSplitting().init) == (1.0, 1.0, None)
    with pytest.raises(ValueError, match="preset"):
        TwoSplitting(preset="paper")


def test_descent_is_promised_only_where_it_holds():
    assert not TwoSplitting(gamma=lambda sweep, depth: 1.0 + sweep).descends
    assert not TwoSplitting(bias_update="reference").descends


def test_what_it_cannot_train_is_refused():
    loss = resolve_loss("squared")
    with pytest.raises(ValueError, match=r"Sign after \['0'\].*Use ThreeSplitting"):
        TwoSplitting().check(Chain(network((4, 3, 2), Sign)), loss)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Residual(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Use ResidualSplitting"):
        TwoSplitting().check(Chain(net), loss)
    with pytest.raises(ValueError, match="inner_iterations"):
        TwoSplitting(inner_iterations=0)
    with pytest.raises(ValueError, match="gamma"):
        TwoSplitting(gamma=[1.0, 2.0]).check(Chain(network((4, 3, 3, 2))), loss)
