import copy
import importlib.util
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_bcd.blocks import create_blocks_from_model
from lightning_bcd.comparison import compare_training_methods, convergence_epoch
from lightning_bcd.strategy import BCDStrategy, CyclicStrategy

pytest.importorskip("scipy")


def mlp(outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs))


def regression(samples: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1))
    return x, torch.sin(x).sum(1, keepdim=True)


def classification(samples: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1))
    return x, x.argmax(1)


# -- what is compared -------------------------------------------------------------------------------------


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def naive_training(model: nn.Module, x: Tensor, y: Tensor, parts: Sequence[Sequence[nn.Parameter]]) -> list[float]:
    """Ten epochs of mini-batches of 10; step i trains part i modulo their number."""
    optimizers = [torch.optim.Adam(part, lr=0.01) for part in parts]
    order = torch.Generator().manual_seed(5)
    losses, step = [], 0
    for _ in range(10):
        for rows in torch.randperm(len(x), generator=order).split(10):
            model.zero_grad()
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            optimizers[step % len(parts)].step()
            step += 1
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(model(x), y).item())
    return losses


def test_both_methods_agree_with_a_plain_loop_from_the_same_weights_on_the_same_batches() -> None:
    (x, y), model = regression(), mlp()
    results = compare_training_methods(model, x, y, epochs=10, batch_size=10, seeds=[5])
    plain = reinitialised(model, 5)
    assert results["initial_loss"] == pytest.approx(nn.functional.mse_loss(plain(x), y).item(), rel=1e-5)
    assert results["standard_losses"] == pytest.approx(
        naive_training(plain, x, y, [list(plain.parameters())]), rel=1e-5
    )
    blocked = reinitialised(model, 5)
    layers = [list(layer.parameters()) for layer in blocked if isinstance(layer, nn.Linear)]
    assert results["bcd_losses"] == pytest.approx(naive_training(blocked, x, y, layers), rel=1e-5)


@pytest.mark.parametrize(("batch_size", "expected"), [(None, 4), (24, 4), (100, 4), (10, 12), (1, 96)])
def test_both_methods_take_the_same_number_of_gradient_evaluations(batch_size: int | None, expected: int) -> None:
    calls = {True: 0, False: 0}

    def counting(output: Tensor, y: Tensor) -> Tensor:
        calls[torch.is_grad_enabled()] += 1
        return nn.functional.mse_loss(output, y)

    results = compare_training_methods(
        mlp(), *regression(), epochs=4, batch_size=batch_size, criterion=counting, seeds=[0]
    )
    assert results["gradient_evaluations"] == {"bcd": expected, "standard": expected}
    assert calls[True] == 2 * expected


@pytest.mark.parametrize("strategy", ["cyclic", "backward", "random", "uniform", "greedy", "importance"])
def test_every_strategy_learns_within_the_same_budget(strategy: str) -> None:
    results = compare_training_methods(
        mlp(), *regression(), epochs=30, strategy=strategy, batch_size=8, steps_per_block=2, seeds=[0]
    )
    assert results["bcd_losses"][-1] < 0.5 * results["initial_loss"]
    assert results["gradient_evaluations"] == {"bcd": 90, "standard": 90}


def test_scored_strategies_see_the_gradient_norms_of_all_blocks() -> None:
    class Recorder(CyclicStrategy):
        needs_scores = True
        seen: list[list[float]]

        def observe(self, grad_norms: Sequence[float]) -> None:
            self.seen.append(list(grad_norms))

    recorder = Recorder()
    recorder.seen = []
    (x, y), model = regression(), mlp()
    compare_training_methods(model, x, y, epochs=4, strategy=recorder, steps_per_block=2, seeds=[3])
    # Two visits of two steps. The first block alone moved before the measurement at the second step.
    assert len(recorder.seen) == 2
    plain = reinitialised(model, 3)
    optimizer = torch.optim.Adam(plain[0].parameters(), lr=0.01)
    nn.functional.mse_loss(plain(x), y).backward()
    optimizer.step()
    plain.zero_grad()
    nn.functional.mse_loss(plain(x), y).backward()
    norms = [
        torch.cat([p.grad.flatten() for p in block.parameters]).norm().item()
        for block in create_blocks_from_model(plain)
    ]
    assert recorder.seen[0] == pytest.approx(norms, rel=1e-5)


def test_blocks_change_after_the_steps_given_and_a_strategy_object_starts_anew_for_every_seed() -> None:
    class Logged(BCDStrategy):
        chosen: list[int]

        def select(self) -> int:
            self.chosen.append(self.num_visits % self.num_blocks)
            return self.chosen[-1]

    rule = Logged()
    rule.chosen = []
    compare_training_methods(
        mlp(), *regression(), epochs=2, batch_size=8, steps_per_block=2, strategy=rule, seeds=[0, 1]
    )
    assert rule.chosen == [0, 1, 2] * 2


def test_update_norms_are_zero_for_a_block_that_was_not_trained() -> None:
    results = compare_training_methods(mlp(), *regression(), epochs=3, seeds=[0, 1])
    bcd, standard = results["bcd_update_norms"], results["standard_update_norms"]
    assert list(bcd) == list(standard) == ["0", "2", "4"]
    # One step per epoch, one block per step.
    assert [[norm > 0 for norm in norms] for norms in bcd.values()] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert all(norm > 0 for norms in standard.values() for norm in norms)
    # The first step of Adam moves every parameter by the learning rate.
    assert bcd["0"][0] == pytest.approx(0.01 * math.sqrt(3 * 8 + 8), rel=1e-3)


def test_all_seeds_are_averaged_and_a_seed_gives_the_same_curve_alone() -> None:
    results = compare_training_methods(mlp(), *regression(), epochs=4, batch_size=10, seeds=(0, 1, 2))
    assert results["seeds"] == [0, 1, 2]
    for method in ("bcd", "standard"):
        curves = torch.tensor(results[f"{method}_curves"], dtype=torch.float64)
        assert curves.shape == (3, 4)
        assert results[f"{method}_losses"] == pytest.approx(curves.mean(0).tolist())
        assert results[f"{method}_losses_std"] == pytest.approx(curves.std(0).tolist())
        assert min(results[f"{method}_losses_std"]) > 0
    alone = compare_training_methods(mlp(), *regression(), epochs=4, batch_size=10, seeds=[1])
    assert alone["bcd_curves"][0] == results["bcd_curves"][1]
    assert alone["bcd_losses_std"] == [0] * 4


def test_the_paired_test_is_that_of_the_final_losses() -> None:
    results = compare_training_methods(mlp(), *regression(), epochs=5, seeds=(0, 1, 2, 3))
    differences = torch.tensor(
        [b[-1] - s[-1] for b, s in zip(results["bcd_curves"], results["standard_curves"], strict=True)],
        dtype=torch.float64,
    )
    assert results["final_loss_difference"] == pytest.approx(differences.mean().item())
    assert results["t_statistic"] == pytest.approx((differences.mean() / differences.std() * 2).item())
    assert 0 < results["p_value"] < 1
    alone = compare_training_methods(mlp(), *regression(), epochs=5, seeds=[0])
    assert math.isnan(alone["p_value"])


def test_classification_learns_and_takes_every_integer_type() -> None:
    x, y = classification(60)
    results = compare_training_methods(mlp(3), x, y.to(torch.int32), epochs=60, lr=0.03, seeds=[0])
    assert results["initial_loss"] == pytest.approx(math.log(3), rel=0.2)
    assert results["bcd_losses"][-1] < 0.5
    assert results["standard_losses"][-1] < 0.5
    as_bytes = compare_training_methods(mlp(3), x, y.to(torch.uint8), epochs=60, lr=0.03, seeds=[0])
    assert as_bytes["bcd_losses"] == results["bcd_losses"]


def test_targets_n_and_n_by_1_are_the_same_regression() -> None:
    x, y = regression()
    column = compare_training_methods(mlp(), x, y, epochs=3, seeds=[0])
    row = compare_training_methods(mlp(), x, y.squeeze(1), epochs=3, seeds=[0])
    flat = compare_training_methods(nn.Sequential(*mlp(), nn.Flatten(0)), x, y, epochs=3, seeds=[0])
    double = compare_training_methods(mlp(), x, y.double(), epochs=3, seeds=[0])
    assert column["bcd_losses"] == row["bcd_losses"] == double["bcd_losses"]
    assert flat["bcd_losses"] == pytest.approx(column["bcd_losses"])


# -- what is left alone -----------------------------------------------------------------------------------


def test_the_model_and_the_random_state_are_not_modified() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    model[0].bias.requires_grad_(False)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    compare_training_methods(model, *regression(), epochs=2, batch_size=8, strategy="greedy", seeds=[0, 1])
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_the_result_does_not_depend_on_the_global_random_state() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    first = compare_training_methods(model, *regression(), epochs=3, seeds=[0])
    torch.rand(3)
    assert compare_training_methods(model, *regression(), epochs=3, seeds=[0])["bcd_losses"] == first["bcd_losses"]


def test_frozen_layers_keep_their_weights_and_statistics() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self[0].weight.detach().clone(), self[1].running_mean.clone()))
            return super().forward(x)

    model = Spy(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 1))
    model[1].running_mean.fill_(0.5)
    model[:2].requires_grad_(False)
    results = compare_training_methods(model, *regression(), epochs=2, seeds=[0, 1])
    assert list(results["bcd_update_norms"]) == ["2", "3"]
    assert all(torch.equal(weight, model[0].weight) for weight, _ in seen)
    # The loss before training is computed with the statistics given, not with fresh ones.
    assert torch.equal(seen[1][1], model[1].running_mean)


def test_a_warning_tells_when_there_is_nothing_to_reinitialise() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class Sum(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum(1)

    x, y = regression()
    with pytest.warns(UserWarning, match="reset_parameters"):
        results = compare_training_methods(nn.Sequential(Scale(), Sum()), x, y, epochs=2, seeds=[0, 1])
    assert math.isnan(results["p_value"])


def test_blocks_can_be_chosen_like_everywhere_else() -> None:
    model = mlp()
    blocks = create_blocks_from_model(model, num_blocks=2)
    listed = compare_training_methods(model, *regression(), epochs=2, block_type=blocks, seeds=[0])
    mapped = compare_training_methods(
        model, *regression(), epochs=2, block_type={"body": "^[02]", "head": "^4"}, seeds=[0]
    )
    assert list(listed["bcd_update_norms"]) == [block.name for block in blocks]
    assert list(mapped["bcd_update_norms"]) == ["body", "head"]


# -- convergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [
        ([0.5, 0.009, 0.0, 0.005], 2),
        ([0.0, 0.5, 0.0, 0.0], 3),
        ([0.005, 0.0], 1),
        ([0.5, 0.0, 0.5], None),
        ([1.5, 2.0], None),
        ([1.0, 1.0], None),
        ([0.5, 0.0, math.nan], None),
        ([math.nan, 0.0], 2),
        ([math.nan], None),
    ],
)
def test_convergence_is_the_first_epoch_that_stays_within_one_percent_of_the_best_improvement(
    losses: list[float], epoch: int | None
) -> None:
    assert convergence_epoch(1.0, losses) == epoch


def test_the_tolerance_moves_the_convergence_epoch() -> None:
    losses = [0.5, 0.2, 0.1, 0.0]
    assert [convergence_epoch(1.0, losses, tolerance) for tolerance in (0.0, 0.1, 0.25, 0.6)] == [4, 3, 2, 1]
    results = compare_training_methods(mlp(), *regression(), epochs=20, seeds=[0], tolerance=0.5)
    for method in ("bcd", "standard"):
        expected = convergence_epoch(results["initial_loss"], results[f"{method}_losses"], 0.5)
        assert results[f"{method}_convergence_epoch"] == expected
    assert results["bcd_convergence_epoch"] < 20


# -- output and errors ------------------------------------------------------------------------------------


def test_verbose_prints_a_table_and_silence_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    compare_training_methods(mlp(), *regression(), epochs=2, seeds=[0, 1])
    assert capsys.readouterr().out == ""
    results = compare_training_methods(mlp(), *regression(), epochs=2, seeds=[0, 1], verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "final", "loss", "std", "converged", "at", "epoch", "gradient", "evaluations"]
    assert lines[1].split()[:2] == ["bcd", f"{results['bcd_losses'][-1]:.4g}"]
    assert lines[2].split()[0] == "standard"
    assert "same number of gradient evaluations" in lines[3]
    assert f"p = {results['p_value']:.3g}" in lines[4]


X, Y = regression()


@pytest.mark.parametrize(
    ("x", "y", "arguments", "message"),
    [
        (X[:0], Y[:0], {}, r"`X_train` to be non-empty, but got shape \(0, 3\)"),
        (X, Y[:-1], {}, r"`y_train` to be as long as `X_train` \(24\), but got 23"),
        (X, Y, {"epochs": 0}, "`epochs` to be at least 1"),
        (X, Y, {"batch_size": 0}, "`batch_size` to be at least 1"),
        (X, Y, {"steps_per_block": 0}, "`steps_per_block` to be at least 1"),
        (X, Y, {"seeds": ()}, "`seeds`"),
        (X, Y, {"seeds": (1, 1)}, "`seeds`"),
        (X, Y, {"tolerance": 1.0}, "`tolerance`"),
        (X.where(X < 1, math.nan), Y, {}, r"`X_train` to be finite, but got \d+ NaN"),
        (X, Y.where(Y < 1, math.inf), {}, "`y_train` to be finite"),
        (X, torch.cat([Y, Y], 1), {}, r"`y_train` to be of shape \(N, \*\(1,\)\), like the output"),
        (X, torch.ones(24, dtype=torch.long), {}, r"`y_train` to be in 0 … 0"),
        (X, torch.ones(24, 1, dtype=torch.long), {}, r"classes for an output of shape \(N, \*\(1,\)\)"),
        (X, Y, {"optimizer_class": torch.optim.LBFGS}, "`optimizer_class`.*LBFGS"),
        (X, Y, {"strategy": "fastest"}, "`strategy`"),
        (X, Y, {"block_type": "nothing"}, "`block_type`"),
        (X, Y * 1e30, {"lr": 1e30}, "finite"),
    ],
)
def test_bad_values_are_refused_by_name(x: Tensor, y: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_training_methods(mlp(), x, y, **{"epochs": 2, "seeds": (0,), **arguments})


def test_bad_types_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="`X_train` to be a tensor, but got ndarray"):
        compare_training_methods(mlp(), X.numpy(), Y)
    with pytest.raises(TypeError, match=r"`y_train` .* got torch.bool"):
        compare_training_methods(mlp(), X, Y > 0)

    class Pair(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (super().forward(x),)

    with pytest.raises(TypeError, match="`model` to be one that returns a tensor, but got tuple"):
        compare_training_methods(Pair(*mlp()), X, Y)
    results = compare_training_methods(
        Pair(*mlp()), X, Y, epochs=2, seeds=[0], criterion=lambda output, y: nn.functional.mse_loss(output[0], y)
    )
    assert len(results["bcd_losses"]) == 2


def test_missing_scipy_names_the_extra_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-bcd\[data\]'"):
        compare_training_methods(mlp(), X, Y, criterion=lambda output, y: pytest.fail("trained"))
    assert len(compare_training_methods(mlp(), X, Y, epochs=2, seeds=[0])["bcd_losses"]) == 2
