import pytest
import torch
from torch import nn

from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.initialisation import initialise
from lightning_bcd.lifted.layers import MLP, Abs, Residual, Sign

F64 = torch.float64


def convolutions():
    torch.manual_seed(0)
    yield nn.Sequential(nn.Conv2d(2, 4, 3)), (2, 7, 6)
    yield nn.Sequential(nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))), (2, 9, 8)
    yield nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding="same")), (4, 5, 5)
    yield nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", bias=False)), (2, 5, 5)
    yield nn.Sequential(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.Flatten()), (2, 8, 8)
    yield nn.Sequential(nn.Conv2d(2, 4, 2), nn.AvgPool2d(3, stride=2, ceil_mode=True)), (2, 9, 9)
    yield nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)), (2, 4, 4)


CONVOLUTIONS = list(convolutions())


@pytest.mark.parametrize("index", range(len(CONVOLUTIONS)))
def test_an_operator_is_the_matrix_product_its_least_squares_problem_assumes(index):
    network, shape = CONVOLUTIONS[index]
    stage = Chain(network.double())[0]
    x = torch.randn(3, *shape, dtype=F64)
    rows, columns = stage.rows(x), stage.columns(stage.forward(x))
    weights = stage.weight.flatten(1).chunk(stage.groups)
    biases = [0] * stage.groups if stage.bias is None else stage.bias.chunk(stage.groups)
    parts = zip(rows.chunk(stage.groups, 1), weights, biases, strict=True)
    torch.testing.assert_close(torch.cat([r @ w.T + b for r, w, b in parts], 1), columns)
    torch.testing.assert_close(stage.forward(x), network(x))


@pytest.mark.parametrize("index", range(len(CONVOLUTIONS)))
def test_the_adjoint_is_the_transpose(index):
    network, shape = CONVOLUTIONS[index]
    stage = Chain(network.double())[0]
    x = torch.randn(3, *shape, dtype=F64)
    image = stage.apply(x, stage.weight, None)
    t = torch.randn_like(image)
    torch.testing.assert_close((image * t).sum(), (x * stage.adjoint(x, t)).sum())


def test_a_chain_walks_like_the_network():
    network = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Tanh(), nn.Identity())),
        Residual(nn.Linear(5, 5), nn.LeakyReLU(0.2)),
        nn.Linear(5, 5),
        nn.Linear(5, 4),
        Abs(),
        Residual(nn.Linear(4, 4)),
    ).double()
    chain = Chain(network)
    names = ["1.0", "2.stage.0", "3", "4", "6.stage.0"]
    assert [stage.name for stage in chain] == names
    assert [stage.residual for stage in chain] == [False, True, False, False, True]
    parameters = dict(network.named_parameters())
    assert all(stage.weight is parameters[f"{name}.weight"] for name, stage in zip(names, chain, strict=True))
    x = torch.randn(3, 2, 3, dtype=F64)
    *_, (_, output) = chain.forward(x)
    torch.testing.assert_close(output, network(x))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([nn.Linear(2, 2), nn.MaxPool2d(2)], r"Cannot lift module '1' \(MaxPool2d\).*nn.AvgPool2d"),
        ([nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)], "BatchNorm1d.*Remove it"),
        ([nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)], "Dropout.*ridge"),
        ([nn.Linear(2, 2), nn.Softmax(1)], "cross_entropy"),
        ([nn.LSTM(2, 2)], r"\(LSTM\). Use Sequential"),
        ([nn.Linear(2, 2), nn.ReLU()], "end with a linear module, but got ReLU"),
        ([nn.ReLU(), nn.Linear(2, 2)], "linear module before activation '0'"),
        ([nn.Linear(2, 2), nn.ReLU(), nn.ReLU(), nn.Linear(2, 2)], "linear module before activation '2'"),
        ([nn.Flatten()], "without any"),
        ([nn.Linear(2, 2), nn.ReLU(), nn.Flatten()], "end with a linear module, but"),
        ([Residual(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))], "holds 2 stage"),
        ([nn.Conv2d(1, 1, 3), nn.AvgPool2d(2, divisor_override=1), nn.ReLU(), nn.Conv2d(1, 1, 1)], "divisor_override"),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))], "Cannot lift module '0'"),
        ([nn.Conv2d(1, 1, 3), nn.AvgPool2d(2, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 1)], "padding=0"),
    ],
)
def test_what_cannot_be_lifted_is_named_with_a_remedy(modules, message):
    with pytest.raises(ValueError, match=message):
        Chain(nn.Sequential(*modules))


def test_a_module_used_twice_is_refused():
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'2' is used twice"):
        Chain(nn.Sequential(shared, nn.ReLU(), shared))


def test_shared_parameters_and_sequentials_with_a_forward_of_their_own_are_refused():
    tied = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="'2' is used twice"):
        Chain(tied)

    class Own(nn.Sequential):
        def forward(self, x):
            return -super().forward(x)

    with pytest.raises(ValueError, match=r"Cannot lift module '0' \(Own\)"):
        Chain(nn.Sequential(Own(nn.Linear(2, 2))))


def test_input_that_does_not_fit_is_refused_at_its_stage():
    chain = Chain(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(5, 2)))
    with pytest.raises(ValueError, match=r"fit stage '2' .* got shape \(3,\)"):
        chain.check_input(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"shape \(2, 4\). Add nn.Flatten"):
        Chain(nn.Sequential(nn.Linear(4, 3))).check_input(torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match=r"Residual stage '0.stage.0' to keep the shape \(4,\)"):
        Chain(nn.Sequential(Residual(nn.Linear(4, 1)))).check_input(torch.zeros(2, 4))


def test_initial_weights():
    chain = Chain(MLP([6, 5, 5, 3], activation="Tanh"))
    first, second, last = chain
    initialise(chain, "reference", torch.zeros(6))
    assert float(first.weight.std()) < 0.02
    assert bool((first.bias == 0.1).all())
    initialise(chain, "identity", torch.zeros(6))
    torch.testing.assert_close(first.weight @ first.weight.T, torch.eye(5))
    torch.testing.assert_close(second.weight, torch.eye(5))
    torch.testing.assert_close(last.weight, torch.eye(3, 5))
    initialise(chain, "orthogonal", torch.zeros(6))
    torch.testing.assert_close(last.weight @ last.weight.T, torch.eye(3))
    wide = Chain(MLP([400, 300, 3]))
    initialise(wide, "he", torch.zeros(6))
    assert float(wide[0].weight.std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    mean = torch.arange(6.0)
    initialise(chain, "looks_linear", mean)
    x = torch.randn(4, 6)
    u = first.forward(x)  # 5 units: 3 of M, 2 of −M
    torch.testing.assert_close(u[:, 3:], -u[:, :2])
    torch.testing.assert_close(first.forward(mean[None]), torch.zeros(1, 5), atol=1e-5, rtol=0)
    assert not last.weight.any()
    even = Chain(MLP([6, 8, 8, 3]))
    initialise(even, "looks_linear", mean)
    centred = even[0].forward(x)[:, :4]
    passed = even[1].forward(even[0].forward(x).relu())
    # ReLU pairs hand a linear map on: lengths are kept.
    torch.testing.assert_close(passed[:, :4].norm(dim=1), centred.norm(dim=1))
    conv = Chain(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)))
    initialise(conv, "identity", torch.zeros(6))
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(conv[1].forward(x), x)


def test_mlp_builds_stages():
    network = MLP([6, 4, 4, 2], activation="Sign", residual=True)
    assert [type(stage.activation).__name__ for stage in Chain(network)] == ["Sign", "Sign", "Identity"]
    assert [stage.residual for stage in Chain(network)] == [False, True, False]
    assert network(torch.zeros(3, 2, 3)).shape == (3, 2)
    with pytest.raises(ValueError, match="`widths` to be at least two"):
        MLP([4])
    with pytest.raises(ValueError, match="`activation` to be one of"):
        MLP([4, 2], activation="Mish")


def test_sign_and_residual_are_ordinary_modules():
    assert Sign()(torch.tensor([-1.0, -0.0, 0.0, 2.0])).tolist() == [-1.0, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="at least one module in Residual"):
        Residual()
