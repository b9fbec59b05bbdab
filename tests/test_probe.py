"""Gradient norms of all blocks from one backward pass."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bcd import LayerBlock
from lightning_bcd.probe import GradientNormProbe, squared_norm


class TiedEmbedding(nn.Module):
    """An embedding that is the head too, with a sparse embedding beside it."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(7, 4)
        self.position = nn.Embedding(5, 4, sparse=True)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.token.weight

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1]) // 2  # repeated indices: a sparse gradient that is not coalesced
        return self.head(torch.tanh(self.middle(self.token(tokens) + self.position(places))))


def tied_problem(dtype=torch.float64):
    torch.manual_seed(0)
    model = TiedEmbedding().to(dtype)
    blocks = [
        LayerBlock("token", [model.token.weight, model.head.bias]),
        LayerBlock("position", model.position.parameters()),
        LayerBlock("middle", model.middle.parameters()),
    ]
    tokens = torch.randint(7, (3, 5))
    return blocks, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def deep_problem(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)]).to(dtype)
    x = torch.randn(6, 5, dtype=dtype)
    blocks = [LayerBlock(str(i), layer.parameters()) for i, layer in enumerate(model)]
    return blocks, lambda: model(x).square().mean()


def frozen_problem(dtype=torch.float64):
    blocks, loss = deep_problem(dtype)
    blocks[1].parameters[0].requires_grad_(False)
    return [LayerBlock(block.name, block.parameters) for block in blocks], loss


PROBLEMS = {"deep": deep_problem, "tied and sparse": tied_problem, "partly frozen": frozen_problem}


def exact_norms(blocks, loss):
    """The norms by autograd.grad, summed entry by entry in float64."""
    norms = []
    for block in blocks:
        parameters = [p for p in block.parameters if p.requires_grad]
        gradients = [g.to_dense() for g in torch.autograd.grad(loss(), parameters)]
        norms.append(math.sqrt(sum(float(value) ** 2 for g in gradients for value in g.double().flatten())))
    return norms


@pytest.mark.parametrize("name", PROBLEMS)
def test_norms_are_those_of_plain_autograd(name):
    blocks, loss = PROBLEMS[name]()
    expected = exact_norms(blocks, loss)
    for active in range(len(blocks)):
        probe = GradientNormProbe(blocks, active)
        probe.arm()
        loss().backward()
        assert probe.norms() == pytest.approx(expected, rel=1e-9)
        probe.disarm()
        for block in blocks:
            block.unfreeze()
            for parameter in block.parameters:
                parameter.grad = None


@pytest.mark.parametrize("name", PROBLEMS)
def test_only_the_active_block_keeps_gradients_and_they_have_the_same_bits(name):
    blocks, loss = PROBLEMS[name](torch.float32)
    for active, block in enumerate(blocks):
        for other in blocks:
            other.freeze()
        block.unfreeze()
        loss().backward()
        expected = [None if p.grad is None else p.grad.clone() for p in block.parameters]
        for parameter in block.parameters:
            parameter.grad = None

        probe = GradientNormProbe(blocks, active)
        probe.arm()
        loss().backward()
        for parameter, gradient in zip(block.parameters, expected, strict=True):
            if gradient is None:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad.to_dense(), gradient.to_dense())
        assert all(p.grad is None for other in blocks if other is not block for p in other.parameters)
        probe.disarm()
        for parameter in block.parameters:
            parameter.grad = None


def test_gradients_are_freed_while_backward_still_runs():
    layers = [nn.Linear(4, 4) for _ in range(5)]
    blocks = [LayerBlock(str(i), layer.parameters()) for i, layer in enumerate(layers)]
    held = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            held.append([i for i, block in enumerate(blocks) if any(p.grad is not None for p in block.parameters)])
            return grad

    probe = GradientNormProbe(blocks, active=3)
    probe.arm()
    value = torch.ones(2, 4)
    for layer in layers:
        value = layer(Spy.apply(value) if value.requires_grad else value)
    value.sum().backward()
    assert len(held) == 4
    assert all(set(blocks_with_gradient) <= {3} for blocks_with_gradient in held)
    assert held[-1] == [3]


def test_an_accumulation_window_keeps_its_sum_and_the_norms_are_of_the_last_batch():
    blocks, loss = deep_problem()
    expected = exact_norms(blocks, lambda: 3 * loss())
    for block in blocks[1:]:
        block.freeze()
    loss().backward()
    first = [p.grad.clone() for p in blocks[0].parameters]
    probe = GradientNormProbe(blocks, active=0)
    probe.arm()
    (3 * loss()).backward()
    assert probe.norms() == pytest.approx(expected, rel=1e-9)
    for parameter, gradient in zip(blocks[0].parameters, first, strict=True):
        assert torch.allclose(parameter.grad, 4 * gradient, rtol=1e-12)
    assert all(p.grad is None for block in blocks[1:] for p in block.parameters)


def test_disarming_removes_every_hook_and_freezes_inactive_blocks():
    blocks, loss = deep_problem()
    for block in blocks[1:]:
        block.freeze()
    probe = GradientNormProbe(blocks, active=2)
    probe.arm()
    assert all(p.requires_grad for block in blocks for p in block.parameters)
    loss().backward()
    norms = probe.norms()
    probe.disarm()
    probe.disarm()
    assert [block.parameters[0].requires_grad for block in blocks] == [False, False, True, False]
    for block in blocks:
        block.unfreeze()
    loss().backward()
    assert probe.norms() == norms  # nobody listens any more
    assert all(p.grad is not None for block in blocks for p in block.parameters)


def test_parameters_that_the_user_froze_stay_frozen_while_armed():
    blocks, loss = frozen_problem()
    frozen = blocks[1].parameters[0]
    for active in (0, 1):
        probe = GradientNormProbe(blocks, active)
        probe.arm()
        assert not frozen.requires_grad
        loss().backward()
        probe.disarm()
        assert not frozen.requires_grad
    assert frozen.grad is None


def test_a_block_outside_the_loss_has_norm_zero():
    blocks, loss = deep_problem()
    blocks.insert(1, LayerBlock("unused", [nn.Parameter(torch.ones(3))]))
    probe = GradientNormProbe(blocks, active=1)
    probe.arm()
    loss().backward()
    norms = probe.norms()
    assert norms[1] == 0.0
    assert all(norm > 0 for i, norm in enumerate(norms) if i != 1)
    probe.disarm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    gradient = torch.full((1000,), 1000.0, dtype=dtype)
    square = squared_norm(gradient)
    assert square.dtype == torch.float32
    assert float(square) == pytest.approx(1e9, rel=1e-5)


def test_double_precision_stays_double():
    gradient = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert squared_norm(gradient).dtype == torch.float64
    assert float(squared_norm(gradient * 1e150)) == pytest.approx(1e300, rel=1e-12)


def test_a_sparse_gradient_counts_repeated_rows_once():
    indices = torch.tensor([[0, 2, 0]])
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    gradient = torch.sparse_coo_tensor(indices, values, (4, 2), check_invariants=True)
    assert float(squared_norm(gradient)) == pytest.approx(4.0**2 + 2.0**2)


def test_blocks_of_mixed_precision_are_measured_together():
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    parameters = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
    blocks = [LayerBlock("a", parameters[:2]), LayerBlock("b", parameters[2:])]
    probe = GradientNormProbe(blocks, active=1)
    probe.arm()
    sum(3.0 * parameter.double().sum() for parameter in parameters).backward()
    assert probe.norms() == pytest.approx([math.sqrt(72), 6.0])


def test_in_mask_mode_nothing_is_frozen_afterwards():
    blocks = [LayerBlock(name, [nn.Parameter(torch.ones(2))]) for name in "ab"]
    probe = GradientNormProbe(blocks, active=1, freeze=False)
    probe.arm()
    probe.disarm()
    assert all(p.requires_grad for block in blocks for p in block.parameters)
