"""mDLAM against its constraint, its definition and a naive loop."""

import copy
from itertools import pairwise

import pytest
import torch
from toolbox import begin, run_processes
from torch import nn
from torch.distributed import init_process_group
from torch.utils.flop_counter import FlopCounterMode

from lightning_bcd.communicator import Alone
from lightning_bcd.distributed.all_reduce import AllReduce
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.layers import MLP, Residual
from lightning_bcd.lifted.mdlam import MDLAM, preimage
from lightning_bcd.linalg import power_iteration
from lightning_bcd.prox import activations as sigma
from lightning_bcd.prox import resolve_loss

F64 = torch.float64
LOSSES = ["squared", "cross_entropy", "logistic", "hinge"]
ACTIVATIONS = ["Identity", "ReLU", "LeakyReLU", "Hardtanh", "ReLU6", "Sign", "Sigmoid", "Tanh", "Softplus"]
SHAPES = {"shallow": (7, 5, 3), "wide": (4, 9, 8, 3), "deep": (5, 6, 7, 6, 5, 3)}
STEPS = [
    ("exact", True, 0.3),
    ("backtracking", False, 0.02),
    ("lipschitz", True, 10.0),
    ("exact", False, 0.02),
    ("backtracking", True, 0.3),
    ("lipschitz", False, 0.3),
]
CONSTANT = {"epsilon_decay": 1.0}
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")


def network(widths, activation="ReLU", seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(widths, activation, bias).double()


def problem(samples, widths, loss="cross_entropy", seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, widths[0], generator=generator, dtype=F64)
    loss = resolve_loss(loss)
    return x, loss.encode(torch.randint(widths[-1], (samples,), generator=generator), widths[-1], F64), loss


def violation(chain, state, epsilon):
    """How far the largest entry of |A − σ(Z)| exceeds ε."""
    pairs = zip(chain, state.variables["a"], state.variables["z"], strict=False)
    return max(float((a - stage.activation(z)).abs().max() - epsilon) for stage, a, z in pairs)


def run(algorithm, net, x, y, loss, sweeps):
    """Sweep; check reports and constraints; return the objectives, the first before any sweep."""
    chain, state = begin(algorithm, net, x, y, loss)
    values = [float(algorithm.objective(chain, state, loss))]
    for sweep in range(sweeps):
        report = algorithm.sweep(chain, state, loss, Alone())
        values.append(float(algorithm.objective(chain, state, loss)))
        assert float(report.objective) == pytest.approx(values[-1], rel=1e-9, abs=1e-12)
        assert violation(chain, state, algorithm.widths(sweep, len(chain))[0]) <= 1e-12
    return values


def never_rises(values):
    return all(b <= a + 1e-10 * abs(a) for a, b in pairwise(values)) and values[-1] < values[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_objective_never_rises_and_the_constraint_holds(activation, loss, shape):
    widths = SHAPES[shape]
    x, y, loss = problem(25, widths, loss)
    for step, momentum, epsilon in STEPS[ACTIVATIONS.index(activation) % 2 :: 2]:
        algorithm = MDLAM(rho=0.3, mu=0.01, epsilon=epsilon, step=step, momentum=momentum, **CONSTANT)
        assert algorithm.descends
        assert never_rises(run(algorithm, network(widths, activation), x, y, loss, 30))


OPTIONS = {
    "mean": {"reduction": "mean", "mu": 1e-3},
    "labels": {"init_output": "labels"},
    "nu": {"nu": 2.0, "rho": 0.5},
    "no ridge": {"mu": 0.0},
    "strong ridge": {"mu": 3.0},
    "large rho": {"rho": 50.0},
    "small rho": {"rho": 1e-4},
    "width per stage": {"epsilon": [0.1, 1.0, 5.0, 1.0]},
    "search from below": {"step": "backtracking", "search_start": 1e-6},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_objective_never_rises_with_options(name, bias):
    widths = (6, 9, 7, 8, 3)
    x, y, loss = problem(30, widths)
    options = {"rho": 0.3, "epsilon": 0.2} | OPTIONS[name]
    chain, state = begin(algorithm := MDLAM(**options, **CONSTANT), network(widths, bias=bias), x, y, loss)
    values = [float(algorithm.objective(chain, state, loss))]
    for _ in range(30):
        report = algorithm.sweep(chain, state, loss, Alone())
        values.append(float(algorithm.objective(chain, state, loss)))
        assert float(report.objective) == pytest.approx(values[-1], rel=1e-9)
    assert never_rises(values)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_constraint_holds_while_epsilon_shrinks(activation, momentum):
    widths = SHAPES["wide"]
    x, y, loss = problem(25, widths)
    algorithm = MDLAM(rho=0.3, epsilon=10.0, epsilon_decay=0.6, epsilon_min=1e-3, momentum=momentum)
    assert not algorithm.descends
    values = run(algorithm, network(widths, activation), x, y, loss, 40)
    assert never_rises(values[20:])  # ε is constant since sweep 19: 10 · 0.6¹⁹ < 1e-3


def test_epsilon_halves_down_to_its_minimum_or_follows_a_function():
    algorithm = MDLAM()
    assert [algorithm.widths(sweep, 2) for sweep in (0, 1, 3, 500)] == [[100.0] * 2, [50.0] * 2, [12.5] * 2, [1e-3] * 2]
    assert MDLAM(epsilon=1e-5, **CONSTANT).widths(7, 1) == [1e-5]
    follows = MDLAM(epsilon=lambda sweep, depth: [2.0 - sweep] * depth, **CONSTANT)
    assert follows.widths(1, 3) == [1.0, 1.0, 1.0]
    assert not follows.descends
    with pytest.raises(ValueError, match="`epsilon` to be positive"):
        follows.widths(2, 3)


def test_a_function_for_epsilon_that_shrinks_it_is_obeyed():
    x, y, loss = problem(25, SHAPES["wide"])
    algorithm = MDLAM(rho=0.3, epsilon=lambda sweep, depth: 1.0 / (1 + sweep) ** 2, **CONSTANT)
    run(algorithm, network(SHAPES["wide"]), x, y, loss, 15)  # `widths` holds what the constraint is checked against


# -- the equations ----------------------------------------------------------------------------------------------


def naive_sweep(weights, biases, z, a, x, y, loss, rho, mu, epsilon, step):
    """Algorithm 1 without momentum, ReLU: everything dense and multiplied anew, trial points of W tried one by one."""
    last = len(weights) - 1
    a[:] = [t.clamp(min=-epsilon) for t in a]

    def coupling(layer, inputs, w):
        return rho / 2 * (z[layer] - inputs @ w.T - biases[layer]).square().sum()

    for layer in range(last + 1):
        inputs = a[layer - 1] if layer else x

        def ridged(w, layer=layer, inputs=inputs):
            return coupling(layer, inputs, w) + mu / 2 * w.square().sum()

        old = weights[layer]
        g = rho * (inputs @ old.T + biases[layer] - z[layer]).T @ inputs + mu * old
        if step == "exact":
            theta = (rho * (inputs @ g.T).square().sum() + mu * g.square().sum()) / g.square().sum()
        else:
            theta = 1.0
            while ridged(old - g / theta) > ridged(old) - g.square().sum() / (2 * theta):
                theta *= 2
        weights[layer] = old - g / theta
        biases[layer] = (z[layer] - inputs @ weights[layer].T).mean(0)
        product = inputs @ weights[layer].T + biases[layer]
        if layer == last:
            z[layer] = loss.prox(product, 1 / rho, y)
            break
        z[layer] = torch.minimum(product, a[layer] + epsilon)
        z[layer] = torch.where(a[layer] > epsilon, torch.maximum(z[layer], a[layer] - epsilon), z[layer])
        w, start = weights[layer + 1], a[layer]
        g = rho * (start @ w.T + biases[layer + 1] - z[layer + 1]) @ w
        tau = rho * power_iteration(lambda v, w=w: w.T @ (w @ v), w.square().sum(0), iterations=8)[0]
        if step == "backtracking":
            tau = 1.0
            while rho * torch.linalg.eigvalsh(w @ w.T)[-1] > tau:
                tau *= 2
        trial = torch.clamp(start - g / tau, z[layer].relu() - epsilon, z[layer].relu() + epsilon)
        rise = coupling(layer + 1, trial, w) - coupling(layer + 1, start, w)
        slope = (g * (trial - start)).sum()
        # The parabola through the values at both ends with this slope: its lowest point, or the far end.
        share = min(1.0, float(-slope / (2 * (rise - slope)))) if rise - slope > 0 else 1.0
        a[layer] = start + share * (trial - start)


@pytest.mark.parametrize("step", ["exact", "backtracking"])
@pytest.mark.parametrize(("epsilon", "decay"), [(100.0, 1.0), (0.05, 1.0), (0.05, 0.25)])
def test_sweeps_without_momentum_equal_a_naive_loop(epsilon, decay, step):
    widths = (6, 9, 7, 8, 3)
    x, y, loss = problem(30, widths)
    net = network(widths)
    options = {"epsilon": epsilon, "epsilon_decay": decay, "epsilon_min": 1e-6, "step": step}
    algorithm = MDLAM(rho=0.05, mu=0.02, momentum=False, **options)
    chain, state = begin(algorithm, net, x, y, loss)
    weights = [stage.weight.detach().clone() for stage in chain]
    biases = [stage.bias.detach().clone() for stage in chain]
    z, a = ([t.clone() for t in state.variables[name]] for name in ("z", "a"))
    for sweep in range(4):
        naive_sweep(weights, biases, z, a, x, y, loss, 0.05, 0.02, epsilon * decay**sweep, step)
        algorithm.sweep(chain, state, loss, Alone())
        found = [*(s.weight for s in chain), *(s.bias for s in chain), *state.variables["z"], *state.variables["a"]]
        for tensor, wanted in zip(found, [*weights, *biases, *z, *a], strict=True):
            torch.testing.assert_close(tensor.detach(), wanted, rtol=1e-9, atol=1e-10)


def test_an_extrapolated_step_starts_where_nesterov_says_and_is_taken_back_where_it_rises():
    """Of the second sweep's first update: W_1, from products that are multiplied anew."""
    widths, rho, taken = (6, 5, 3), 0.4, []
    for seed in range(12):
        x, y, loss = problem(30, widths, seed=seed)
        algorithm = MDLAM(rho=rho, mu=0.0, epsilon=0.5, epsilon_decay=0.7)
        chain, state = begin(algorithm, network(widths, seed=seed), x, y, loss)
        stage, seen = chain[0], []
        for _ in range(5):
            seen.append(stage.weight.detach().clone())
            algorithm.sweep(chain, state, loss, Alone())
        before = copy.deepcopy((state.variables["z"][0], stage.bias.detach()))
        old = stage.weight.detach().clone()
        algorithm.sweep(chain, state, loss, Alone())

        def value(w, before=before, x=x):
            return rho / 2 * (before[0] - x @ w.T - before[1]).square().sum()

        def step(w, before=before, x=x):
            g = rho * (x @ w.T + before[1] - before[0]).T @ x
            return w - g * g.square().sum() / (rho * (x @ g.T).square().sum())

        t = [1.0]
        for _ in range(6):
            t.append((1 + (1 + 4 * t[-1] ** 2) ** 0.5) / 2)
        fast, plain = step(old + (t[5] - 1) / t[6] * (old - seen[-1])), step(old)
        taken.append(bool(value(fast) <= value(old)))
        torch.testing.assert_close(stage.weight.detach(), fast if taken[-1] else plain, rtol=1e-8, atol=1e-10)
    assert any(taken)


def test_hidden_weights_move_where_epsilon_shrinks_and_stay_where_it_does_not():
    widths = (6, 9, 7, 3)
    x, y, loss = problem(30, widths)
    for decay in (1.0, 0.5):
        net = network(widths)
        algorithm = MDLAM(rho=0.3, mu=0.0, epsilon=0.5, epsilon_decay=decay)
        chain, state = begin(algorithm, net, x, y, loss)
        before = [stage.weight.detach().clone() for stage in chain]
        for _ in range(10):
            algorithm.sweep(chain, state, loss, Alone())
        moved = [float((stage.weight.detach() - w).abs().max()) for stage, w in zip(chain, before, strict=True)]
        assert moved[-1] > 1e-3
        assert (max(moved[:2]) < 1e-12) if decay == 1 else (min(moved[:2]) > 1e-3)


@pytest.mark.parametrize("activation", ["ReLU", "Tanh"])
def test_momentum_goes_further(activation):
    widths = (8, 12, 12, 3)
    x, y, loss = problem(60, widths)
    reached = {}
    for momentum in (True, False):
        algorithm = MDLAM(rho=0.05, mu=0.01, epsilon=0.05, momentum=momentum, **CONSTANT)
        reached[momentum] = run(algorithm, network(widths, activation), x, y, loss, 40)[-1]
    assert reached[True] < 0.97 * reached[False]


@pytest.mark.parametrize("momentum", [True, False])
def test_a_sweep_multiplies_no_more_than_announced(momentum):
    widths, samples = (12, 17, 9, 13, 4), 200
    x, y, loss = problem(samples, widths)
    chain, state = begin(algorithm := MDLAM(momentum=momentum), network(widths), x, y, loss)
    first, *others = [2 * a * b * samples for a, b in pairwise(widths)]
    factor = 5 if momentum else 2
    wanted = factor * first + 2 * factor * sum(others)
    for sweep in range(3):
        with FlopCounterMode(display=False) as counter:
            algorithm.sweep(chain, state, loss, Alone())
        # Matrices times vectors for λ_max; while ε shrinks a product more.
        least, most = wanted, 1.1 * wanted + (sum(others) if sweep else 0)
        assert 0.99 * least <= counter.get_total_flops() <= most


# -- intervals --------------------------------------------------------------------------------------------------

MONOTONE = [
    sigma.Identity(),
    sigma.ReLU(),
    sigma.LeakyReLU(0.1),
    sigma.LeakyReLU(0.0),
    sigma.HardTanh(-0.5, 2.0),
    sigma.ClippedReLU(),
    sigma.Sign(),
    sigma.Sigmoid(),
    sigma.Tanh(),
    sigma.Softplus(),
    sigma.Softplus(beta=3.0, threshold=15.0),
]


@pytest.mark.parametrize("activation", MONOTONE, ids=repr)
def test_the_interval_holds_what_is_allowed_and_nothing_else(activation):
    u = torch.linspace(-12, 12, 4801, dtype=F64)
    centre, width = torch.linspace(-1.5, 7, 35, dtype=F64), 0.6
    value = activation(u)
    # Only a that some u allows: others have no interval.
    a = centre[((centre[:, None] - value).abs() <= width).any(1)]
    least, greatest = preimage(activation, a - width, a + width)
    allowed = (a[:, None] - value).abs() <= width
    margin = 1e-9
    inside = (u >= least[:, None] - margin) & (u <= greatest[:, None] + margin)
    clearly = (u > least[:, None] + margin) & (u < greatest[:, None] - margin)
    assert not (allowed & ~inside & (u.abs() > 2e-6)).any()
    assert not (clearly & ~allowed).any()
    assert len(a) > 4


# -- what else sweeps must do -----------------------------------------------------------------------------------


def test_activations_that_are_not_monotone_are_refused_by_name():
    loss = resolve_loss("squared")
    for name in ("GELU", "SiLU", "Abs"):
        with pytest.raises(ValueError, match=f"has {name}"):
            MDLAM().check(Chain(network((4, 3, 2), name)), loss)


def test_other_networks_are_refused():
    loss = resolve_loss("squared")
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    skip = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Residual(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))
    for net in (conv, skip):
        with pytest.raises(ValueError, match=r"nn\.Linear stages"):
            MDLAM().check(Chain(net), loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": -1.0}, "`mu`"),
        ({"epsilon_decay": 0.0}, "`epsilon_decay`"),
        ({"epsilon_decay": 1.5}, "`epsilon_decay`"),
        ({"epsilon_min": 0.0}, "`epsilon_min`"),
        ({"rho": 0.0}, "`rho`"),
        ({"step": "newton"}, "`step`"),
        ({"preset": "paper"}, "`preset`"),
        ({"offload": True}, "`offload`"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MDLAM(**options)


def test_bad_widths_are_refused_by_check():
    chain, loss = Chain(network((4, 3, 2))), resolve_loss("squared")
    for epsilon, message in ((0.0, "positive"), ([1.0] * 3, "one number or 2"), (float("nan"), "finite")):
        with pytest.raises(ValueError, match=message):
            MDLAM(epsilon=epsilon).check(chain, loss)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_stage_stays_as_it_is_and_the_others_move(frozen):
    widths = (6, 9, 7, 3)
    x, y, loss = problem(30, widths)
    net = network(widths)
    algorithm = MDLAM(rho=0.3, epsilon=0.3, **CONSTANT)
    stages = list(Chain(net))
    stages[frozen].operator.requires_grad_(False)
    before = copy.deepcopy([(s.weight.detach(), s.bias.detach()) for s in stages])
    assert never_rises(run(algorithm, net, x, y, loss, 10))
    for index, (stage, (weight, bias)) in enumerate(zip(stages, before, strict=True)):
        same = torch.equal(stage.weight, weight) and torch.equal(stage.bias, bias)
        assert same == (index == frozen)


def test_a_copy_of_weights_and_state_continues_identically():
    widths = (6, 9, 7, 3)
    x, y, loss = problem(30, widths)
    algorithm = MDLAM(rho=0.3, epsilon=1.0, epsilon_decay=0.9)
    net = network(widths)
    chain, state = begin(algorithm, net, x, y, loss)
    for sweep in range(14):
        if sweep == 6:
            other = copy.deepcopy(net)
            resumed = algorithm.start(other_chain := Chain(other), x, y, Alone())
            resumed.variables, resumed.velocity = copy.deepcopy((state.variables, state.velocity))
            resumed.sweep, resumed.fresh = state.sweep, state.fresh
        algorithm.sweep(chain, state, loss, Alone())
        if sweep >= 6:
            algorithm.sweep(other_chain, resumed, loss, Alone())
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, tensors in state.variables.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, resumed.variables[name], strict=True))
    assert all(isinstance(key, str) for key in state.velocity)


def test_a_new_batch_starts_without_a_move_of_a():
    x, y, loss = problem(30, (6, 9, 7, 3))
    net = network((6, 9, 7, 3))
    algorithm = MDLAM(rho=0.3, epsilon=0.02, **CONSTANT)
    chain, state = begin(algorithm, net, x, y, loss)
    for _ in range(3):
        algorithm.sweep(chain, state, loss, Alone())
    assert all(t.abs().max() > 0 for t in state.variables["move"])
    algorithm.restart(chain, state)
    assert all(t.abs().max() == 0 for t in state.variables["move"])
    assert violation(chain, state, 0.0) == 0


@pytest.mark.parametrize("activation", ["Tanh", "ReLU"])
def test_float32_keeps_the_constraint_and_descends(activation):
    widths = (6, 30, 30, 3)
    x, y, loss = problem(80, widths)
    x, y = 10 * x.float(), y.float()  # saturates tanh
    algorithm = MDLAM(rho=0.1, epsilon=0.1, **CONSTANT)
    chain, state = begin(algorithm, network(widths, activation).float(), x, y, loss)
    values = [float(algorithm.objective(chain, state, loss))]
    for _ in range(30):
        values.append(float(algorithm.sweep(chain, state, loss, Alone()).objective))
        assert violation(chain, state, 0.1) <= 1e-6
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(values))
    assert values[-1] < 0.9 * values[0]


def test_residuals_are_root_mean_squares_and_the_presets_are_what_they_say():
    x, y, loss = problem(20, (6, 5, 3))
    chain, state = begin(algorithm := MDLAM(rho=0.5, epsilon=0.2), network((6, 5, 3)), x, y, loss)
    report = algorithm.sweep(chain, state, loss, Alone())
    z, a = state.variables["z"], state.variables["a"]
    linear = [(z[0] - chain[0].forward(x)), (z[1] - chain[1].forward(a[0]))]
    wanted = torch.stack([e.detach().square().mean().sqrt() for e in linear])
    torch.testing.assert_close(torch.stack(report.residuals["linear"]), wanted)
    gap = (a[0] - z[0].relu()).square().mean().sqrt()
    assert float(report.residuals["activation"][0]) == pytest.approx(float(gap))
    assert MDLAM().momentum
    reference = MDLAM(preset="reference")
    assert not reference.momentum
    assert (reference.step, reference.output_solver, reference.init_output) == ("backtracking", "fista", "labels")


def shared(rank, directory):
    init_process_group("gloo")
    widths = (6, 8, 7, 3)
    x, y, loss = problem(23, widths)
    rows, net = (slice(0, 15), slice(15, 23))[rank], network(widths)
    algorithm = MDLAM(rho=0.3, epsilon=1.0, epsilon_decay=0.8, epsilon_min=0.01, reduction="mean", mu=1e-3)
    chain, state = begin(algorithm, net, x[rows], y[rows], loss, comm := AllReduce())
    values = [float(algorithm.sweep(chain, state, loss, comm).objective.detach()) for _ in range(8)]
    return values, [p.detach() for p in net.parameters()], state.variables, state.velocity


def test_two_processes_equal_one(tmp_path):
    (values, parameters, variables, velocity), other = run_processes(shared, tmp_path)
    assert values == other[0]
    assert all(torch.equal(a, b) for a, b in zip(parameters, other[1], strict=True))
    assert velocity.keys() == other[3].keys()
    assert all(torch.equal(velocity[key], other[3][key]) for key in velocity)
    widths = (6, 8, 7, 3)
    x, y, loss = problem(23, widths)
    algorithm = MDLAM(rho=0.3, epsilon=1.0, epsilon_decay=0.8, epsilon_min=0.01, reduction="mean", mu=1e-3)
    chain, state = begin(algorithm, net := network(widths), x, y, loss)
    wanted = [float(algorithm.sweep(chain, state, loss, Alone()).objective) for _ in range(8)]
    assert values == pytest.approx(wanted, rel=1e-9)
    for a, b in zip(parameters, net.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9)
    for name, tensors in state.variables.items():
        for layer, tensor in enumerate(tensors):
            both = torch.cat([variables[name][layer], other[2][name][layer]])
            torch.testing.assert_close(both, tensor, rtol=1e-9, atol=1e-9)
