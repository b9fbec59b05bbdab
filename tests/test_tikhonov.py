"""Tikhonov BCD against a loop over samples, numeric minimisers and its own definition."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy.optimize import minimize, nnls
from toolbox import LiveBytes, begin, run_processes, same, trainer, weights
from torch import nn
from torch.distributed import init_process_group

from lightning_bcd import (
    MLP,
    DenseReLU,
    DigitsDataModule,
    LiftedModule,
    ThreeSplitting,
    TikhonovBCD,
    full_batch,
    linalg,
)
from lightning_bcd.communicator import Alone
from lightning_bcd.distributed.all_reduce import AllReduce
from lightning_bcd.lifted import nonnegative, tikhonov, tikhonov_sweep
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.nonnegative import NonnegativeQuadratic
from lightning_bcd.lifted.tikhonov_sweep import Sweep
from lightning_bcd.prox import L1, Ball, Ridge, RowSparse, resolve_loss

F64 = torch.float64
WIDTHS = (6, 8, 7, 5, 3)
CONNECTIONS = ["dense", "chain", [[0], [0, 1], [1, 2]]]
LOSSES = ["squared", "cross_entropy", "hinge"]


def network(widths=WIDTHS, connections="dense", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DenseReLU(widths, connections).double()


def problem(samples=30, widths=WIDTHS, loss="squared", seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, widths[0], generator=generator, dtype=F64)
    loss = resolve_loss(loss)
    return x, loss.encode(torch.randint(widths[-1], (samples,), generator=generator), widths[-1], F64), loss


# -- the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", CONNECTIONS)
def test_a_layer_reads_the_layers_it_is_connected_to(connections):
    net, (x, _, _) = network(connections=connections), problem()
    sources = {"dense": [[0], [0, 1], [0, 1, 2]], "chain": [[0], [1], [2]]}.get(str(connections), connections)
    values = [x]
    for reads, linear in zip(sources, net.hidden, strict=True):
        blocks = linear.weight.split([values[m].shape[1] for m in reads], dim=1)
        values.append(torch.relu(sum(values[m] @ w.T for m, w in zip(reads, blocks, strict=True))))
    torch.testing.assert_close(net(x), values[-1] @ net.output.weight.T)
    chain = Chain(net)
    for (_, v), wanted in zip(chain.forward(x), [*values[1:], net(x)], strict=True):
        torch.testing.assert_close(v, wanted.detach())
    chain.check_input(x)
    assert [stage.name for stage in chain] == ["hidden.0", "hidden.1", "hidden.2", "output"]


@pytest.mark.parametrize(
    "connections", ["full", [[0], [0]], [[0], [0, 1], []], [[0], [1, 0], [0]], [[0], [2], [0]], [[0], [0, 0], [1]]]
)
def test_connections_that_cannot_be_are_refused(connections):
    with pytest.raises(ValueError, match="`connections` to be 'dense', 'chain', or 3 lists"):
        DenseReLU(WIDTHS, connections)
    with pytest.raises(ValueError, match="`widths` to be at least three"):
        DenseReLU([4, 3])


def test_other_algorithms_refuse_several_inputs_and_take_chains():
    x, y, loss = problem()
    with pytest.raises(ValueError, match=r"stage 'hidden\.1' reads several. Use TikhonovBCD"):
        begin(ThreeSplitting(), network(), x, y, loss)
    chain, state = begin(ThreeSplitting(), network(connections="chain"), x, y, loss)
    before = float(ThreeSplitting().objective(chain, state, loss))
    assert float(ThreeSplitting().sweep(chain, state, loss, Alone()).objective) < before
    with pytest.raises(ValueError, match="'1' to be the whole network"):
        Chain(nn.Sequential(nn.Flatten(), network()))


# -- blocks -----------------------------------------------------------------------------------------------------


def quadratic(algorithm, chain, state, loss):
    """H and the rows g of the problem of U, from per-sample sums written out."""
    sweep = Sweep(algorithm.numbers(chain, state), chain, state, loss, Alone())
    widths = [len(stage.weight) for stage in chain][:-1]
    offsets = np.cumsum([0, *widths])
    size, x, v = offsets[-1], state.x.numpy(), chain[-1].weight.detach().numpy()
    hessian, rows = np.eye(size) * (sweep.numbers.pull + sweep.numbers.damping), []
    old = torch.cat(state.variables["u"], 1).numpy()
    for i in range(len(x)):
        a, b = [], []  # the residuals of a sample are a u + b, each weighted by √γ
        for n, (stage, gamma) in enumerate(zip(sweep.hidden, sweep.numbers.gamma, strict=True)):
            of_u, of_x = np.zeros((widths[n], size)), np.zeros(widths[n])
            of_u[:, offsets[n] : offsets[n + 1]] = np.eye(widths[n])
            column, weight = 0, stage.weight.detach().numpy()
            for m in stage.sources or (n,):
                width = x.shape[1] if m == 0 else widths[m - 1]
                block = weight[:, column : column + width]
                if m == 0:
                    of_x -= block @ x[i]
                else:
                    of_u[:, offsets[m - 1] : offsets[m]] -= block
                column += width
            a.append(np.sqrt(gamma) * of_u)
            b.append(np.sqrt(gamma) * of_x)
        a, b = np.concatenate(a), np.concatenate(b)
        rows.append(sweep.numbers.pull * old[i] - a.T @ b)
        if i == 0:
            hessian += a.T @ a
    return torch.from_numpy(hessian), torch.from_numpy(np.stack(rows)), torch.from_numpy(v), sweep


@pytest.mark.parametrize("connections", CONNECTIONS)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_activations_solve_their_problem_sample_by_sample(loss_name, connections):
    x, y, loss = problem(4, loss=loss_name)
    algorithm = TikhonovBCD(gamma=[0.7, 1.0, 1.6], relaxation=lambda t: 1.0, proximal=0.3, iterations=400)
    chain, state = begin(algorithm, network(connections=connections), x, y, loss)
    hessian, g, v, sweep = quadratic(algorithm, chain, state, loss)
    with torch.no_grad():
        sweep.update_u()
    u = torch.cat(state.variables["u"], 1)
    assert (u >= 0).all()
    last = slice(len(hessian) - v.shape[1], None)
    for i in range(len(x)):
        if loss_name == "squared":
            full, right = hessian.clone(), g[i].clone()
            full[last, last] += v.T @ v
            right[last] += v.T @ y[i]
            lower = torch.linalg.cholesky(full)
            wanted, _ = nnls(
                lower.T.numpy(), torch.linalg.solve_triangular(lower, right[:, None], upper=False)[:, 0].numpy()
            )
            torch.testing.assert_close(u[i], torch.from_numpy(wanted), rtol=0, atol=1e-7)
            gradient = full @ u[i] - right
            assert gradient.clamp_max(0).abs().max() < 1e-6  # KKT
            assert (gradient * u[i]).abs().max() < 1e-6
        else:

            def value(point, i=i):
                point = torch.as_tensor(point)
                fit = loss.value((v @ point[last])[None], y[i : i + 1])
                return float(0.5 * point @ hessian @ point - g[i] @ point + fit)

            start = u[i].numpy()
            found = minimize(value, start, bounds=[(0, None)] * len(start), method="L-BFGS-B", options={"ftol": 1e-15})
            assert value(start) <= found.fun + 1e-7
            generator = torch.Generator().manual_seed(i)
            for scale in (1e-3, 1e-2, 0.1):
                moves = scale * torch.randn(40, len(start), generator=generator, dtype=F64)
                assert all(value(start) <= value((u[i] + move).clamp_min(0)) + 1e-9 for move in moves)


def test_a_quadratic_without_constraint_at_work_is_solved_like_a_linear_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(9, 9, generator=generator, dtype=F64)
    hessian, wanted = root @ root.T + torch.eye(9), torch.rand(5, 9, generator=generator, dtype=F64) + 0.5
    found = NonnegativeQuadratic(hessian.double(), F64)(wanted @ hessian, torch.zeros(5, 9, dtype=F64), None, 400)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    # From a solution the iteration does not move, on the boundary neither.
    g = wanted @ hessian - torch.eye(9)[:5].double() * 100
    solution = NonnegativeQuadratic(hessian, F64)(g, torch.zeros_like(g), None, 2000)
    assert (solution == 0).any()
    again = NonnegativeQuadratic(hessian, F64)(g, solution, None, 3)
    torch.testing.assert_close(again, solution, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("loss_name", "penalty"),
    [("squared", None), ("squared", Ball(0.8)), ("squared", L1(0.5)), ("cross_entropy", Ridge(0.3)), ("hinge", None)],
)
def test_weights_solve_their_problems(loss_name, penalty):
    x, y, loss = problem(40, loss=loss_name)
    algorithm = TikhonovBCD(
        gamma=1.3, relaxation=1.0, proximal=0.2, damping=0.1, iterations=800, weight_penalty=penalty
    )
    chain, state = begin(algorithm, network(), x, y, loss)
    with torch.no_grad():
        for stage in chain:  # inside of the ball
            stage.weight.mul_(0.3)
        for u in state.variables["u"]:
            u.add_(torch.rand(u.shape, generator=torch.Generator().manual_seed(3), dtype=F64))
    old = [stage.weight.detach().clone() for stage in chain]
    sweep = Sweep(algorithm.numbers(chain, state), chain, state, loss, Alone())
    sweep.sums.add(torch.cat([x, *state.variables["u"]], 1), y)
    sweep.comm.sum(sweep.sums.totals)
    with torch.no_grad():
        sweep.update_v()
        sweep.update_w()
    values = [x, *state.variables["u"]]

    def objective(layer, weight):
        inputs = values[-1] if layer == 3 else torch.cat(values[: layer + 1], 1)
        image = inputs @ weight.T
        fit = loss.value(image, y) if layer == 3 else 0.65 * (values[layer + 1] - image).square().sum()
        total = fit + 0.1 * (weight - old[layer]).square().sum() + 0.05 * weight.square().sum()
        return float(total + (penalty.value(weight) if penalty else 0))

    generator = torch.Generator().manual_seed(7)
    for layer, stage in enumerate(chain):
        best = stage.weight.detach()
        lowest = objective(layer, best)
        assert lowest < objective(layer, old[layer]) - 1e-3
        for scale in (1e-4, 1e-3, 1e-2, 0.1):
            for _ in range(10):
                trial = best + scale * torch.randn(best.shape, generator=generator, dtype=F64)
                trial = penalty.prox(trial, 1.0) if isinstance(penalty, Ball) else trial
                assert lowest <= objective(layer, trial) + 1e-8


# -- sweeps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1.0])
@pytest.mark.parametrize("nonnegative", ["exact", "project"])
@pytest.mark.parametrize("connections", CONNECTIONS)
def test_sweeps_equal_a_loop_over_samples(connections, nonnegative, damping):
    x, y, loss = problem(60)
    algorithm = TikhonovBCD(gamma=[0.7, 1.0, 1.6], damping=damping, nonnegative=nonnegative, iterations=800)
    chain, state = begin(algorithm, network(connections=connections), x, y, loss)
    other, expected = begin(algorithm, network(connections=connections), x, y, loss)
    sizes = [8, 7, 5]
    for t in range(1, 5):
        report = algorithm.sweep(chain, state, loss, Alone())
        expected.sweep = t - 1
        theta, c = t**-2, (1 - t**-2) ** 2
        hessian, g, v, _ = quadratic(algorithm, other, expected, loss)
        last = slice(len(hessian) - 5, None)
        hessian[last, last] += v.T @ v
        for i in range(len(x)):
            right = g[i].clone()
            right[last] += v.T @ y[i]
            if nonnegative == "exact":
                lower = torch.linalg.cholesky(hessian)
                half = torch.linalg.solve_triangular(lower, right[:, None], upper=False)[:, 0]
                star = torch.from_numpy(nnls(lower.T.numpy(), half.numpy())[0])
            else:
                star = torch.linalg.solve(hessian, right).clamp_min(0)
            for u, part in zip(expected.variables["u"], star.split(sizes), strict=True):
                u[i] += theta * (part - u[i])
        values = [x, *expected.variables["u"]]
        with torch.no_grad():
            for layer, stage in enumerate(other):
                inputs = values[-1] if layer == 3 else torch.cat([values[m] for m in stage.sources or (layer,)], 1)
                gamma, target = (1.0, y) if layer == 3 else ([0.7, 1.0, 1.6][layer], values[layer + 1])
                matrix, right = (c + damping) * torch.eye(inputs.shape[1], dtype=F64), c * stage.weight.clone()
                for row, goal in zip(inputs, target, strict=True):
                    matrix += gamma * torch.outer(row, row)
                    right += gamma * torch.outer(goal, row)
                star = right @ torch.linalg.pinv(matrix, rtol=1e-10, hermitian=True)
                stage.weight.add_(star - stage.weight, alpha=theta)
        for a, b in zip(chain, other, strict=True):
            torch.testing.assert_close(a.weight, b.weight, rtol=1e-5, atol=2e-6)
        for a, b in zip(state.variables["u"], expected.variables["u"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        assert float(report.objective) == pytest.approx(float(algorithm.objective(chain, state, loss)), rel=1e-9)


@pytest.mark.parametrize("relaxation", [1.0, 0.6, 0.2, "1/t^2", "1/t", lambda t: 0.9**t])
@pytest.mark.parametrize(
    ("loss_name", "penalty"), [*((name, None) for name in LOSSES), ("squared", Ridge(0.1)), ("squared", Ball(3.0))]
)
def test_the_objective_never_rises_with_exact_steps(penalty, loss_name, relaxation):
    x, y, loss = problem(25, loss=loss_name)
    algorithm = TikhonovBCD(
        gamma=0.5, relaxation=relaxation, iterations=120, weight_penalty=penalty, proximal=None if penalty else 0.1
    )
    chain, state = begin(algorithm, network(connections="dense"), x, y, loss)
    if isinstance(penalty, Ball):
        with torch.no_grad():
            for stage in chain:
                stage.weight.copy_(penalty.prox(stage.weight, 1.0))
    values = [float(algorithm.objective(chain, state, loss))]
    for _ in range(12):
        report = algorithm.sweep(chain, state, loss, Alone())
        values.append(float(report.objective))
        assert values[-1] == pytest.approx(float(algorithm.objective(chain, state, loss)), rel=1e-8)
    assert all(b <= a + 1e-6 * abs(a) for a, b in pairwise(values))
    assert values[-1] < 0.9 * values[0]


def fit_output(chain, x, y, ridge):
    """V by ridge regression on the last hidden activations of a forward pass."""
    *_, (_, features), _ = chain.forward(x)
    matrix = features.T @ features + ridge * torch.eye(features.shape[1], dtype=F64)
    with torch.no_grad():
        chain[-1].weight.copy_(torch.linalg.solve(matrix, features.T @ y).T)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("connections", CONNECTIONS)
def test_refit_is_ridge_regression_on_a_forward_pass_before_and_after_a_sweep(connections, chunk_size):
    x, y, loss = problem(40)
    shared = {"weight_penalty": Ridge(0.3), "relaxation": 0.5, "damping": 0.2, "chunk_size": chunk_size}
    algorithm, plain = TikhonovBCD(refit=True, **shared), TikhonovBCD(**shared)
    chain, state = begin(algorithm, network(connections=connections), x, y, loss)
    other, expected = begin(plain, network(connections=connections), x, y, loss)
    other[-1].weight.requires_grad_(False)  # V moves by `fit_output` alone
    fit_output(other, x, y, 0.5)
    for _ in range(3):
        report = algorithm.sweep(chain, state, loss, Alone())
        plain.sweep(other, expected, loss, Alone())
        fit_output(other, x, y, 0.5)
        for a, b in zip(chain, other, strict=True):
            torch.testing.assert_close(a.weight, b.weight, rtol=1e-8, atol=1e-10)
        for a, b in zip(state.variables["u"], expected.variables["u"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert float(report.objective) == pytest.approx(float(algorithm.objective(chain, state, loss)), rel=1e-9)


def test_refit_names_the_remedy_where_no_activation_is_left():
    x, y, loss = problem()
    chain, state = begin(TikhonovBCD(refit=True), network(connections="chain"), x, y, loss)
    with torch.no_grad():
        chain[0].weight.zero_()
    with pytest.raises(torch.linalg.LinAlgError, match=r"`weight_penalty=Ridge\(...\)` or `damping`"):
        TikhonovBCD(refit=True).sweep(chain, state, loss, Alone())


def test_a_preset_leaves_frozen_layers_as_they_are():
    net, (x, _, _) = network(), problem()
    net.hidden[1].weight.requires_grad_(False)
    chain = Chain(net)
    before = [stage.weight.clone() for stage in chain]
    TikhonovBCD(preset="recommended").initialise(chain, x, Alone())
    same_as_before = [torch.equal(a, stage.weight) for a, stage in zip(before, chain, strict=True)]
    assert same_as_before == [False, True, False, False]


def test_a_frozen_output_is_not_refitted():
    x, y, loss = problem()
    chain, state = begin(TikhonovBCD(preset="recommended"), network(), x, y, loss)
    chain[-1].weight.requires_grad_(False)
    before = [stage.weight.clone() for stage in chain]
    chain_sweep = TikhonovBCD(preset="recommended").sweep(chain, state, loss, Alone())
    assert torch.isfinite(chain_sweep.objective)
    assert torch.equal(chain[-1].weight, before[-1])
    assert not torch.equal(chain[0].weight, before[0])


def test_recommended_settings_learn_features_on_the_digits():
    def train(sweeps):
        torch.manual_seed(0)
        data = DigitsDataModule(batch_size=None)
        model = LiftedModule(DenseReLU([64, 60, 60, 10], "chain"), TikhonovBCD(preset="recommended"))
        for parameter in model.network.hidden.parameters():
            parameter.requires_grad_(sweeps > 1)
        runner = trainer(max_epochs=sweeps)
        runner.fit(model, data)
        (result,) = runner.validate(model, data, verbose=False)
        return result["val_acc"]

    frozen, trained = train(1), train(15)
    assert frozen > 0.8
    assert trained > frozen + 0.01


def test_row_sparse_weights_stay_row_sparse():
    x, y, loss = problem()
    algorithm = TikhonovBCD(weight_penalty=[RowSparse(3)] * 3 + [Ridge(0.1)], relaxation=0.5)
    chain, state = begin(algorithm, network(), x, y, loss)
    for _ in range(4):
        report = algorithm.sweep(chain, state, loss, Alone())
        assert [int((stage.weight.norm(dim=1) > 0).sum()) for stage in chain][:-1] == [3, 3, 3]
        assert torch.isfinite(report.objective)


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_chunks_change_rounding_only(chunk_size):
    x, y, loss = problem()
    found = []
    for size in (None, chunk_size):
        algorithm = TikhonovBCD(chunk_size=size, damping=0.1)
        chain, state = begin(algorithm, network(), x, y, loss)
        for _ in range(4):
            algorithm.sweep(chain, state, loss, Alone())
        found.append([stage.weight.detach() for stage in chain])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("loss_name", "nonnegative", "refit"),
    [
        ("squared", "exact", False),
        ("squared", "project", False),
        ("squared", "project", True),
        ("hinge", "exact", False),
    ],
)
def test_a_sweep_takes_no_more_memory_than_announced(loss_name, nonnegative, refit):
    widths = (40, 40, 40, 4)
    x, y, loss = problem(6000, widths, loss_name)
    algorithm = TikhonovBCD(damping=0.1, nonnegative=nonnegative, refit=refit, iterations=5, chunk_size=256)
    chain, state = begin(algorithm, network(widths), x, y, loss)
    algorithm.sweep(chain, state, loss, Alone())
    with LiveBytes() as live:
        algorithm.sweep(chain, state, loss, Alone())
    promised = algorithm.temporary_bytes(chain, x)
    assert promised / 6 < live.peak < promised + 20 * 124**2 * 8  # sums over samples


@pytest.mark.parametrize("loss_name", ["squared", "hinge"])
def test_a_sweep_factors_one_matrix_per_block(loss_name, monkeypatch):
    sizes, real = [], linalg.factor

    def counting(matrix, *arguments, **options):
        sizes.append(len(matrix))
        return real(matrix, *arguments, **options)

    for place in (linalg, tikhonov_sweep, nonnegative):
        monkeypatch.setattr(place, "factor", counting)
    x, y, loss = problem(loss=loss_name)
    algorithm = TikhonovBCD(damping=0.1, relaxation=0.5)
    chain, state = begin(algorithm, network(), x, y, loss)
    algorithm.sweep(chain, state, loss, Alone())
    # U of 8 + 7 + 5 entries, V of 5 columns, W that read 6, 6 + 8, 6 + 8 + 7.
    assert sizes == [20, 5, 6, 14, 21]


def test_frozen_layers_stay():
    x, y, loss = problem()
    net = network()
    net.hidden[1].weight.requires_grad_(False)
    chain, state = begin(TikhonovBCD(damping=0.1), net, x, y, loss)
    before = [stage.weight.detach().clone() for stage in chain]
    for _ in range(2):
        TikhonovBCD(damping=0.1).sweep(chain, state, loss, Alone())
    assert [torch.equal(a, stage.weight) for a, stage in zip(before, chain, strict=True)] == [False, True, False, False]


# -- Trainer ----------------------------------------------------------------------------------------------------


def labelled(samples=60):
    x, _, _ = problem(samples)
    return x, (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()


def module(loss="squared", seed=0, **arguments):
    algorithm = TikhonovBCD(**{"damping": 0.1, "relaxation": 0.5, **arguments.pop("algorithm", {})})
    return LiftedModule(network(seed=seed), algorithm, loss, **arguments)


@pytest.mark.parametrize(
    ("loss", "algorithm"), [*((name, {}) for name in LOSSES), ("squared", {"preset": "recommended"})]
)
def test_a_resumed_run_equals_an_uninterrupted_one(loss, algorithm, tmp_path):
    whole, part, resumed = (module(loss, seed, save_auxiliary=True, algorithm=dict(algorithm)) for seed in (0, 0, 5))
    torch.manual_seed(0)  # of the initial weights of a preset
    trainer(max_epochs=7).fit(whole, full_batch(labelled()))
    runner = trainer(max_epochs=3)
    torch.manual_seed(0)
    runner.fit(part, full_batch(labelled()))
    runner.save_checkpoint(tmp_path / "part.ckpt")
    trainer(max_epochs=7).fit(resumed, full_batch(labelled()), ckpt_path=tmp_path / "part.ckpt")
    assert same(weights(resumed.network), weights(whole.network))
    (result,) = trainer().validate(whole, full_batch(labelled()), verbose=False)
    assert result["val_acc"] > 0.6


def test_the_svm_replaces_the_last_layer_when_training_ends():
    pytest.importorskip("sklearn", reason="the classifier is scikit-learn's")
    from sklearn.svm import LinearSVC

    plain, model = module(), module(algorithm={"classifier": "svm"})
    for m in (plain, model):
        trainer(max_epochs=5).fit(m, full_batch(labelled()))
    assert same(weights(plain.network)[:-1], weights(model.network)[:-1])
    x, labels = labelled()
    *_, (_, features), _ = Chain(model.network).forward(x)
    svm = LinearSVC(fit_intercept=False, random_state=0).fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(model.network.output.weight.detach(), torch.from_numpy(svm.coef_))
    predicted = model(x).argmax(1).numpy()
    assert (predicted == svm.predict(features.numpy())).all()


def test_the_svm_of_two_classes_fills_both_outputs():
    pytest.importorskip("sklearn", reason="the classifier is scikit-learn's")
    from sklearn.svm import LinearSVC

    x, labels = problem(50)[0], (problem(50)[0][:, 0] > 0).long()
    for outputs, loss in ((2, "squared"), (1, "hinge")):
        net = network([6, 8, outputs])
        model = LiftedModule(net, TikhonovBCD(damping=0.1, classifier="svm"), loss)
        trainer(max_epochs=3).fit(model, full_batch((x, labels)))
        out = model(x)
        predicted = out.argmax(1) if outputs == 2 else (out[:, 0] > 0).long()
        *_, (_, features), _ = Chain(net).forward(x)
        svm = LinearSVC(fit_intercept=False, random_state=0).fit(features.numpy(), labels.numpy())
        assert (predicted.numpy() == svm.predict(features.numpy())).all()


def test_the_svm_needs_scikit_learn_and_all_samples(monkeypatch):
    pytest.importorskip("sklearn", reason="the classifier is scikit-learn's")
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*labelled()), batch_size=20)
    model = module(algorithm={"classifier": "svm"})
    with pytest.raises(MisconfigurationException, match=r"one batch .* of TikhonovBCD, but got 3 batches"):
        trainer(max_epochs=1).fit(model, batches)
    assert model.sweeps == 0
    model = module(algorithm={"preset": "recommended"})
    with pytest.raises(MisconfigurationException, match=r"one batch .* of TikhonovBCD, but got 3 batches"):
        trainer(max_epochs=1).fit(model, batches)
    monkeypatch.setattr(tikhonov, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn to be installed .* pip install"):
        TikhonovBCD(classifier="svm")


SHARED = [*((name, False) for name in LOSSES), ("squared", True)]


def shared(rank, directory):
    init_process_group("gloo")
    found = {}
    for loss_name, refit in SHARED:
        x, y, loss = problem(23, loss=loss_name)
        rows = (slice(0, 15), slice(15, 23))[rank]
        algorithm = TikhonovBCD(damping=0.1, relaxation=0.7, refit=refit)
        chain, state = begin(algorithm, network(), x[rows], y[rows], loss, comm := AllReduce())
        value = [float(algorithm.sweep(chain, state, loss, comm).objective) for _ in range(5)][-1]
        found[loss_name, refit] = value, [stage.weight.detach() for stage in chain]
    try:
        begin(TikhonovBCD(classifier="svm"), network(), x, y, loss, comm)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def test_two_processes_equal_one(tmp_path):
    first, second = run_processes(shared, tmp_path)
    assert "`classifier` to be None with 2 processes" in first["refused"]
    for loss_name, refit in SHARED:
        value, found = first[loss_name, refit]
        assert value == second[loss_name, refit][0]
        x, y, loss = problem(23, loss=loss_name)
        algorithm = TikhonovBCD(damping=0.1, relaxation=0.7, refit=refit)
        chain, state = begin(algorithm, network(), x, y, loss)
        wanted = [float(algorithm.sweep(chain, state, loss, Alone()).objective) for _ in range(5)][-1]
        assert value == pytest.approx(wanted, rel=1e-9)
        for a, stage in zip(found, chain, strict=True):
            torch.testing.assert_close(a, stage.weight.detach(), rtol=1e-8, atol=1e-9)


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relaxation": 0.0}, r"`relaxation` to give numbers in \(0, 1\], but got 0.0"),
        ({"relaxation": 1.5}, "`relaxation` to give numbers"),
        ({"relaxation": "1/t^3"}, "`relaxation` to be one of"),
        ({"damping": -1.0}, "`damping` to be finite and at least 0"),
        ({"proximal": float("nan")}, "`proximal` to be finite and at least 0"),
        ({"gamma": 0.0}, "`gamma` to be positive"),
        ({"nonnegative": "clip"}, "`nonnegative` to be one of"),
        ({"iterations": 0}, "`iterations` to be at least 1"),
        ({"refit": "yes"}, "`refit` to be one of"),
        ({"classifier": "tree"}, "`classifier` to be one of"),
        ({"svm_c": 0.0}, "`svm_c` to be positive"),
        ({"preset": "best"}, "`preset` to be one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TikhonovBCD(**arguments)


def test_networks_and_losses_that_do_not_fit_are_refused():
    algorithm = TikhonovBCD()
    for net in (MLP([6, 8, 3]), MLP([6, 8, 3], "Tanh", bias=False), nn.Sequential(nn.Linear(6, 3, bias=False))):
        with pytest.raises(ValueError, match="ReLU layers without biases and a linear output"):
            algorithm.check(Chain(net), resolve_loss("squared"))
    algorithm.check(Chain(MLP([6, 8, 3], bias=False)), resolve_loss("squared"))
    with pytest.raises(ValueError, match="`nonnegative` to be 'exact' with HingeLoss"):
        TikhonovBCD(nonnegative="project").check(Chain(network()), resolve_loss("hinge"))
    with pytest.raises(ValueError, match="`refit` to be False with HingeLoss, but got True"):
        TikhonovBCD(refit=True).check(Chain(network()), resolve_loss("hinge"))
    with pytest.raises(ValueError, match="`gamma` to be one number or 3"):
        TikhonovBCD(gamma=[1.0, 2.0]).check(Chain(network()), resolve_loss("squared"))
    x, y, loss = problem()
    late = TikhonovBCD(relaxation=lambda t: 2.0 - t)
    chain, state = begin(late, network(), x, y, loss)
    late.sweep(chain, state, loss, Alone())
    with pytest.raises(ValueError, match=r"but got 0.0 for t = 2"):
        late.sweep(chain, state, loss, Alone())
