"""MasterWeights: bfloat16 weights that train through fp32 ones, and the rounding between them."""

import io
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from toolbox import FEATURES, data, run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F

from lightning_bcd import BlockOptimizer, create_blocks_from_model
from lightning_bcd.optim.masters import MasterWeights, stochastic_round

ADAMW = partial(torch.optim.AdamW, lr=1e-3)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
MODES = {
    "stochastic": {"rounding": "stochastic"},
    "nearest": {"rounding": "nearest"},
    "residual": {"keep_residual": True},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def patterns(*bits):
    """Float32 tensor of the given 32-bit patterns."""
    return torch.tensor([b - (1 << 32) if b >= 1 << 31 else b for b in bits], dtype=torch.int32).view(torch.float32)


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def layer(size=8, dtype=torch.bfloat16, scale=0.1):
    module = nn.Linear(size, size)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=seeded(1)))
    return module.to(dtype)


def set_gradients(module, step):
    for i, parameter in enumerate(module.parameters()):
        gradient = torch.randn(parameter.shape, generator=seeded(100 * step + i))
        parameter.grad = gradient.to(torch.bfloat16).to(parameter.dtype)


class Names(dict):
    def __missing__(self, parameter):
        return str(id(parameter))


def master_of(masters, parameter):
    return masters.state_dict(Names({parameter: "p"}))["masters"]["p"]


def all_masters(masters, module):
    return masters.state_dict({p: n for n, p in module.named_parameters()})["masters"]


def take_step(module, optimizer, masters):
    masters.lift()
    optimizer.step()
    masters.lower()


def visit(module, optimizer, masters, steps):
    masters.enter(module.parameters())
    for step in steps:
        set_gradients(module, step)
        take_step(module, optimizer, masters)
    values = {name: value.clone() for name, value in all_masters(masters, module).items()}
    masters.leave(module.parameters())
    return values


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Rounding


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1.0, 1e30])
def test_stochastic_rounding_has_no_bias_and_picks_neighbours(scale):
    values = torch.randn(200_000, generator=seeded()) * scale
    rounded = stochastic_round(values, seeded(1))
    lower = (values.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    upper = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert rounded.dtype is torch.bfloat16
    assert ((rounded.float() == lower) | (rounded.float() == upper)).all()
    # In units of the spacing: error of a Bernoulli variable.
    spacing = (upper.double() - lower.double()).abs()
    share = (values.double() - lower.double()).abs() / spacing
    error = (rounded.double() - values.double()) / spacing
    sigma = (share * (1 - share)).sum().sqrt()
    assert error.sum().abs() < 4 * sigma
    assert (error * values.sign()).sum().abs() < 4 * sigma  # nor a bias in magnitude
    assert error.square().sum() == pytest.approx((share * (1 - share)).sum().item(), rel=0.02)


@pytest.mark.parametrize("numerator", [1, 7, 0x4000, 0x8000, 0xFFFF])
@pytest.mark.parametrize("sign", [0, 0x80000000])
def test_the_chance_to_go_up_is_the_distance_for_either_sign(numerator, sign):
    count = 400_000
    value = patterns(sign | 0x3F800000 | numerator).expand(count).contiguous()
    up = (stochastic_round(value, seeded(3)).abs() > 1).sum().item()
    chance = numerator / 0x10000
    assert abs(up - count * chance) < 4 * (count * chance * (1 - chance)) ** 0.5


def test_what_bfloat16_holds_is_unchanged():
    every = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]  # among them zeros, denormals, the largest numbers and infinities
    for seed in range(3):
        assert torch.equal(bits(stochastic_round(every.float(), seeded(seed))), bits(every))


def test_nan_of_any_pattern_stays_nan():
    nan = patterns(0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF).repeat(100)
    assert nan.isnan().all()
    assert stochastic_round(nan, seeded()).isnan().all()


def test_denormals_and_the_largest_number_go_to_their_neighbours():
    values = patterns(0x00000001, 0x00008000, 0x80008000, 0x7F7F8000, 0xFF7F8000).repeat(2000, 1)
    rounded = bits(stochastic_round(values, seeded())).int() & 0xFFFF
    found = [set(column.tolist()) for column in rounded.T]
    assert found[0] <= {0, 1}
    assert found[1:] == [{0, 1}, {0x8000, 0x8001}, {0x7F7F, 0x7F80}, {0xFF7F, 0xFF80}]


def test_stochastic_rounding_depends_on_its_generator_alone():
    values = torch.randn(1000, generator=seeded())
    torch.manual_seed(0)
    first = stochastic_round(values, seeded(5))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(first, stochastic_round(values, seeded(5)))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, stochastic_round(values, seeded(6)))


def test_only_float32_is_rounded():
    with pytest.raises(TypeError, match="float32"):
        stochastic_round(torch.zeros(3, dtype=torch.float64))


def test_non_contiguous_values_are_rounded_in_place_of_their_own():
    values = torch.randn(50, 70, generator=seeded()).T
    rounded = stochastic_round(values, seeded(1))
    assert ((rounded.float() - values).abs() <= values.abs() * 2**-7).all()
    exact = values.bfloat16().float()
    assert torch.equal(stochastic_round(exact, seeded(1)).float(), exact)


# What the masters are for


def travel(visits, steps, **arguments):
    """Mean way of bfloat16 weights against a constant gradient, and of an exact fp32 run."""
    module, reference = layer(256), layer(256).float()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, weight_decay=0.0) for m in (module, reference)]
    start = module.weight.detach().double()
    masters = MasterWeights(**arguments)
    gradient = torch.randn(start.shape, generator=seeded(2))
    for _ in range(visits):
        masters.enter(module.parameters())
        for _ in range(steps):
            module.weight.grad = gradient.bfloat16()
            take_step(module, optimizers[0], masters)
            reference.weight.grad = gradient.bfloat16().float()
            optimizers[1].step()
        masters.leave(module.parameters())
    direction = -gradient.sign().double()
    return [((m.weight.detach().double() - start) * direction).mean().item() for m in (module, reference)]


def test_five_short_visits_move_the_weights_as_far_as_a_long_one():
    many, exact = travel(5, 2, rounding="stochastic")
    one, _ = travel(1, 10, rounding="stochastic")
    assert exact == pytest.approx(1e-4, rel=0.01)  # ten steps of lr 1e-5
    assert many == pytest.approx(one, rel=0.05)
    assert many == pytest.approx(exact, rel=0.05)


def test_rounding_to_nearest_loses_most_of_the_way():
    many, exact = travel(5, 2, rounding="nearest")
    assert many < exact / 2


@pytest.mark.parametrize("factory", [ADAMW, SGD])
def test_with_residuals_visits_change_no_bit(factory):
    runs = []
    for visits in ([range(10)], [range(i, i + 2) for i in range(0, 10, 2)]):
        module, masters = layer(32), MasterWeights(keep_residual=True)
        optimizer = factory(module.parameters())
        for steps in visits:
            values = visit(module, optimizer, masters, steps)
        runs.append((values, [p.detach() for p in module.parameters()]))
    (one, low_one), (many, low_many) = runs
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(low_one, low_many, strict=True))


def test_residuals_rebuild_any_float32():
    values = (torch.rand(200_000, generator=seeded()) * 2**32).long() - 2**31
    extremes = patterns(0, 0x80000000, 0x7FFF, 0x80007FFF, 0x8000, 0x80008000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F808000)
    values = torch.cat([values.to(torch.int32).view(torch.float32), extremes, -patterns(0x7F800000)])
    finite = values[~values.isnan()]
    masters = MasterWeights(keep_residual=True)
    for wanted in (finite, values):
        parameter = nn.Parameter(torch.zeros_like(wanted, dtype=torch.bfloat16))
        masters.enter([parameter])
        parameter.grad = torch.zeros_like(parameter)
        masters.lift()
        with torch.no_grad():
            parameter.copy_(wanted)
        masters.lower()
        within = wanted.abs() < torch.finfo(torch.bfloat16).max
        error, least = ((low.double() - wanted.double()).abs()[within] for low in (parameter, wanted.bfloat16()))
        assert torch.equal(error, least)
        masters.leave([parameter])
        assert masters.master_bytes() == 0
        residual = masters.state_dict(Names({parameter: "p"}))["residuals"]["p"]
        assert residual.dtype is torch.int16
        assert residual.device.type == "cpu"
        masters.enter([parameter])
        again = master_of(masters, parameter)
        if wanted is finite:
            assert torch.equal(bits(again), bits(wanted))
        else:
            assert torch.equal(again.isnan(), wanted.isnan())
            assert torch.equal(parameter.isnan(), wanted.isnan())
        masters.leave([parameter])


def test_weights_that_were_written_between_visits_keep_their_value_with_residuals():
    module, masters = layer(32), MasterWeights(keep_residual=True)
    optimizer = SGD(module.parameters())
    visit(module, optimizer, masters, range(3))
    written = torch.randn(32, 32, generator=seeded(7)).bfloat16()
    written[:16] = 0.0
    written[:8] = -0.0
    with torch.no_grad():
        module.weight.copy_(written)
    masters.enter(module.parameters())
    master = master_of(masters, module.weight)
    # Half the spacing of bfloat16 at most; next to zero that is the smallest denormal.
    assert ((master - written.float()).abs() <= written.float().abs() * 2**-8 + 2**-133).all()


def test_a_residual_does_not_blow_up_when_the_weights_are_written_before_the_block_leaves():
    module, masters = layer(32), MasterWeights(keep_residual=True)
    masters.enter(module.parameters())
    set_gradients(module, 0)
    take_step(module, SGD(module.parameters()), masters)
    written = 10 * torch.randn(32, 32, generator=seeded(7)).bfloat16()
    with torch.no_grad():
        module.weight.copy_(written)
    masters.leave(module.parameters())
    visit(module, SGD(module.parameters()), masters, [])
    masters.enter(module.parameters())
    error = (master_of(masters, module.weight) - written.float()).abs()
    assert (error <= written.float().abs() * 2**-8).all()


# The step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_visit_is_fp32_training_to_the_bit(mode, fused):
    module, reference = layer(16), layer(16).float()
    factory = partial(torch.optim.AdamW, lr=1e-3, fused=fused)
    optimizer, exact = factory(module.parameters()), factory(reference.parameters())
    masters = MasterWeights(**MODES[mode])
    values = visit(module, optimizer, masters, range(10))
    for step in range(10):
        set_gradients(reference, step)
        exact.step()
    for name, parameter in reference.named_parameters():
        assert torch.equal(values[name], parameter.detach())
        low = module.get_parameter(name).detach()
        assert ((low.float() - parameter).abs() <= parameter.abs() * 2**-7).all()
    for parameter, other in zip(module.parameters(), reference.parameters(), strict=True):
        for key, value in optimizer.state[parameter].items():
            assert value.dtype is torch.float32
            assert torch.equal(value, exact.state[other][key])


def test_rounding_to_nearest_is_that_of_torch():
    module = layer()
    values = visit(module, SGD(module.parameters()), MasterWeights(rounding="nearest"), range(4))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, values[name].bfloat16())


def test_the_weights_stay_in_their_memory():
    module, masters = layer(), MasterWeights()
    view, pointer, weight = module.weight.data[0], module.weight.data_ptr(), module.weight
    before = view.clone()
    visit(module, SGD(module.parameters()), masters, range(2))
    assert module.weight is weight
    assert weight.data_ptr() == pointer
    assert weight.dtype is torch.bfloat16
    assert weight.grad is None
    assert not torch.equal(view, before)
    assert torch.equal(view, weight[0])


def test_during_the_step_the_parameter_is_the_master_and_the_low_gradient_is_gone():
    module, masters = layer(), MasterWeights()
    module.note = module.weight.note = "mine"
    masters.enter(module.parameters())
    master = master_of(masters, module.weight)
    pointer = master.data_ptr()
    assert masters.master_bytes() == 4 * (8 * 8 + 8)
    set_gradients(module, 0)
    expected, low_gradient = module.weight.grad.float(), weakref.ref(module.weight.grad)
    masters.lift()
    assert low_gradient() is None
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.note == "mine"
    assert module.weight.data_ptr() == pointer
    assert module.weight.dtype is module.weight.grad.dtype is torch.float32
    assert module.weight.requires_grad
    assert torch.equal(module.weight.grad, expected)
    assert torch.equal(master_of(masters, module.weight), module.weight)
    gradient = weakref.ref(module.weight.grad)
    masters.lift()  # once more changes nothing
    assert module.weight.grad is gradient()
    masters.enter(module.parameters())
    masters.lower()
    assert gradient() is None
    masters.lower()
    assert module.weight.dtype is torch.bfloat16


def test_only_given_parameters_and_those_with_a_gradient_are_lifted():
    module, masters = layer(), MasterWeights()
    masters.enter(module.parameters())
    set_gradients(module, 0)
    masters.lift([module.bias])
    assert (module.weight.dtype, module.bias.dtype) == (torch.bfloat16, torch.float32)
    module.weight.grad = None
    masters.lift()
    assert module.weight.dtype is torch.bfloat16
    masters.lower([module.weight])
    assert module.bias.dtype is torch.float32
    masters.lower([module.bias])
    assert module.bias.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_parameters_that_are_not_bfloat16_are_left_alone(dtype):
    module, plain, masters = layer(dtype=dtype), layer(dtype=dtype), MasterWeights(keep_residual=True)
    optimizer, other = SGD(module.parameters()), SGD(plain.parameters())
    visit(module, optimizer, masters, range(3))
    for step in range(3):
        set_gradients(plain, step)
        other.step()
    assert masters.master_bytes() == 0
    for parameter, expected in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        assert torch.equal(parameter.grad, expected.grad)


def test_masters_of_other_parameters_stay_and_those_that_exist_are_kept():
    module, masters = layer(), MasterWeights()
    optimizer = SGD(module.parameters())
    masters.enter([module.weight])
    set_gradients(module, 0)
    take_step(module, optimizer, masters)
    value = master_of(masters, module.weight).clone()
    assert not torch.equal(value, module.weight.float())  # else entering again would not show
    masters.enter(module.parameters())
    names = {p: n for n, p in module.named_parameters()}
    state = masters.state_dict(names)["masters"]
    assert torch.equal(state["weight"], value)
    assert torch.equal(state["bias"], module.bias.float())
    masters.leave([module.bias])
    assert list(masters.state_dict(names)["masters"]) == ["weight"]


def test_restore_brings_the_weights_back_unchanged():
    module, masters = layer(), MasterWeights()
    optimizer = SGD(module.parameters())
    before = module.weight.detach().clone()
    pointer = module.weight.data_ptr()
    masters.enter(module.parameters())
    set_gradients(module, 0)
    masters.lift()
    gradient = weakref.ref(module.weight.grad)
    optimizer.step()
    masters.restore()
    assert module.weight.dtype is torch.bfloat16
    assert module.weight.data_ptr() == pointer
    assert module.weight.grad is gradient() is None
    assert torch.equal(module.weight, before)
    masters.restore()
    masters.leave(module.parameters())
    visit(module, optimizer, masters, range(1))
    assert not torch.equal(module.weight, before)


def test_a_lifted_parameter_cannot_leave():
    module, masters = layer(), MasterWeights()
    masters.enter(module.parameters())
    set_gradients(module, 0)
    masters.lift()
    with pytest.raises(ValueError, match="lower"):
        masters.leave(module.parameters())


def test_an_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="rounding"):
        MasterWeights(rounding="up")


# Random numbers


def rounded_run(seed=0):
    module, masters = layer(32), MasterWeights(seed=seed)
    optimizer = SGD(module.parameters())
    before = torch.get_rng_state()
    visit(module, optimizer, masters, range(4))
    assert torch.equal(before, torch.get_rng_state())
    return module.weight.detach()


def test_rounding_depends_on_the_seed_alone():
    torch.manual_seed(0)
    first = rounded_run()
    torch.manual_seed(1)
    assert torch.equal(first, rounded_run())
    assert not torch.equal(first, rounded_run(seed=1))
    assert rounded_run(seed=-1).isfinite().all()


def test_steps_draw_different_numbers():
    parameter = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    masters = MasterWeights()
    masters.enter([parameter])
    rounded = []
    for _ in range(20):
        parameter.grad = torch.zeros_like(parameter)
        masters.lift()
        with torch.no_grad():
            parameter.fill_(1 + 2**-8)  # half way
        masters.lower()
        rounded.append((parameter.detach() > 1).double())
    ups = torch.stack(rounded)
    # Every weight goes up in half of the steps, independently: variance 1/4 per step.
    assert ups.mean() == pytest.approx(0.5, abs=4 * 0.5 / ups.numel() ** 0.5)
    assert ups.mean(0).var() == pytest.approx(0.25 / 20, rel=0.08)


# Checkpoints


def train(module, optimizer, masters, steps, active=None):
    """Steps on the parameters of `active` alone, or on all."""
    x, y = data(16).tensors
    for _ in range(steps):
        F.cross_entropy(module(x.bfloat16()).float(), y).backward()
        for parameter in module.parameters():
            if active is not None and parameter not in set(active.parameters()):
                parameter.grad = None
        take_step(module, optimizer, masters)
        optimizer.zero_grad()


def small(factory):
    module = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 8)).bfloat16()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=seeded(4)))
    optimizer = (
        BlockOptimizer(create_blocks_from_model(module, "linear"), ADAMW)
        if factory is None
        else factory(module.parameters())
    )
    return module, optimizer


def activate(module, optimizer, masters, block):
    masters.enter(module[2 * block].parameters())
    if isinstance(optimizer, BlockOptimizer):
        optimizer.active = block


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factory", [ADAMW, SGD, None], ids=["adamw", "sgd", "block"])
def test_a_checkpoint_within_a_visit_continues_with_the_same_bits(mode, factory):
    module, optimizer = small(factory)
    masters = MasterWeights(**MODES[mode], seed=3)
    activate(module, optimizer, masters, 0)
    train(module, optimizer, masters, 3, module[0])
    masters.leave(module[0].parameters())
    activate(module, optimizer, masters, 1)
    train(module, optimizer, masters, 2, module[2])
    names = {p: n for n, p in module.named_parameters()}
    states = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "masters": masters.state_dict(names)}
    saved = reloaded(states)

    resumed, other = small(factory)
    again = MasterWeights(**MODES[mode], seed=3)
    again.keep_state_precision(other)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["masters"], dict(resumed.named_parameters()))
    for model, owner, weights in ((module, optimizer, masters), (resumed, other, again)):
        activate(model, owner, weights, 1)
        train(model, owner, weights, 2, model[2])
        weights.leave(model[2].parameters())
        activate(model, owner, weights, 0)
        train(model, owner, weights, 2, model[0])
    for (name, a), b in zip(module.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert optimizer.state[a].keys() == other.state[b].keys()
        for key, value in optimizer.state[a].items():
            assert value.dtype is torch.float32
            assert torch.equal(value, other.state[b][key]), (name, key)
    one = masters.state_dict(names)
    two = again.state_dict({p: n for n, p in resumed.named_parameters()})
    assert one["draws"] == two["draws"] == (9 if mode == "stochastic" else 0)
    assert set(one["masters"]) == {"0.weight", "0.bias"}
    assert set(one["residuals"]) == ({"2.weight", "2.bias"} if mode == "residual" else set())
    for part in ("masters", "residuals"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])


def test_a_loaded_state_shares_no_memory_with_the_saved_one():
    module, optimizer = small(ADAMW)
    masters = MasterWeights(keep_residual=True)
    masters.enter(module.parameters())
    train(module, optimizer, masters, 1)
    masters.leave(module[0].parameters())
    names = {p: n for n, p in module.named_parameters()}
    state = masters.state_dict(names)
    again = MasterWeights(keep_residual=True)
    again.load_state_dict(state, {n: p for p, n in names.items()})
    loaded = again.state_dict(names)
    for part in ("masters", "residuals"):
        assert len(state[part]) == 2
        for name, tensor in state[part].items():
            assert torch.equal(loaded[part][name], tensor)
            assert loaded[part][name].data_ptr() != tensor.data_ptr()


def test_loading_during_a_step_puts_the_weights_back_first():
    module, masters = layer(), MasterWeights()
    optimizer = SGD(module.parameters())
    visit(module, optimizer, masters, range(2))
    masters.enter(module.parameters())
    parameters = dict(module.named_parameters())
    state = reloaded(masters.state_dict({p: n for n, p in parameters.items()}))
    weight, pointer = module.weight.detach().clone(), module.weight.data_ptr()
    set_gradients(module, 0)
    masters.lift()
    optimizer.step()
    masters.load_state_dict(state, parameters)
    assert module.weight.data_ptr() == pointer
    assert torch.equal(module.weight, weight)
    assert torch.equal(master_of(masters, module.weight), state["masters"]["weight"])


def test_residuals_are_used_by_a_run_that_keeps_none():
    module, masters = layer(), MasterWeights(keep_residual=True)
    values = visit(module, SGD(module.parameters()), masters, range(2))
    names = {p: n for n, p in module.named_parameters()}
    again = MasterWeights()
    again.load_state_dict(masters.state_dict(names), {n: p for p, n in names.items()})
    again.enter(module.parameters())
    assert all(torch.equal(value, values[name]) for name, value in all_masters(again, module).items())
    again.leave(module.parameters())
    assert again.state_dict(names)["residuals"] == {}


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    module, masters = layer(), MasterWeights()
    masters.enter(module.parameters())
    state = masters.state_dict({p: n for n, p in module.named_parameters()})
    other, fresh = layer(4), MasterWeights()
    with pytest.raises(ValueError, match=r"'weight' of shape \(8, 8\) where the model has \(4, 4\)"):
        fresh.load_state_dict(state, dict(other.named_parameters()))
    with pytest.raises(ValueError, match="no such parameter"):
        fresh.load_state_dict(state, {"weight": module.weight})
    assert fresh.master_bytes() == 0


def test_masters_are_not_loaded_for_a_model_in_full_precision():
    module, masters = layer(), MasterWeights(keep_residual=True)
    visit(module, SGD(module.parameters()), masters, range(1))
    masters.enter([module.weight])
    state = masters.state_dict({p: n for n, p in module.named_parameters()})
    full, again = layer(dtype=torch.float32), MasterWeights(keep_residual=True)
    again.load_state_dict(state, dict(full.named_parameters()))
    again.enter(full.parameters())
    assert again.state_dict({p: n for n, p in full.named_parameters()}) == {"draws": 0, "masters": {}, "residuals": {}}


@pytest.mark.parametrize("factory", [ADAMW, None], ids=["adamw", "block"])
def test_loaded_optimizer_state_keeps_its_precision(factory):
    module, optimizer = small(factory)
    masters = MasterWeights()
    masters.enter(module.parameters())
    train(module, optimizer, masters, 3)
    saved = optimizer.state_dict()
    plain = small(factory)[1]
    plain.load_state_dict(saved)
    _, hooked = small(factory)
    handles = masters.keep_state_precision(hooked)
    hooked.load_state_dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loaded = [p for group in hooked.param_groups for p in group["params"]]
    cast = [p for group in plain.param_groups for p in group["params"]]
    exact = [p for p in parameters if p in optimizer.state]
    assert len(exact) == (2 if factory is None else 4)  # the active block, or all
    for original, parameter, lossy in zip(parameters, loaded, cast, strict=True):
        for key, value in optimizer.state.get(original, {}).items():
            assert hooked.state[parameter][key].dtype is value.dtype is torch.float32
            assert torch.equal(hooked.state[parameter][key], value)
            assert key == "step" or hooked.state[parameter][key].data_ptr() != value.data_ptr()
        if original in optimizer.state:
            assert plain.state[lossy]["exp_avg"].dtype is torch.bfloat16  # what torch does on its own
    if factory is None:
        assert all(inner.state is hooked.state for inner in hooked.optimizers)
    for handle in handles:
        handle.remove()
    hooked.load_state_dict(saved)
    assert {s["exp_avg"].dtype for s in hooked.state.values()} == {torch.bfloat16}


def test_state_in_lists_and_state_saved_in_bfloat16_become_float32():
    parameter, other = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = SGD([{"params": [parameter]}, {"params": [other]}])
    MasterWeights().keep_state_precision(optimizer)
    state = optimizer.state_dict()
    fine = torch.tensor([1 + 2**-20, 2.0, 3.0])
    double = torch.tensor(1 + 2**-40, dtype=torch.float64)
    state["state"] = {
        1: {"history": [fine, {"deep": fine}], "count": 3, "word": None, "double": double},
        0: {"momentum_buffer": torch.full((3,), 0.5, dtype=torch.bfloat16)},
    }
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[other]["history"][0], fine)
    assert torch.equal(optimizer.state[other]["history"][1]["deep"], fine)
    assert optimizer.state[other]["count"] == 3
    assert optimizer.state[other]["double"] == double
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torch.full((3,), 0.5))
    assert optimizer.state[parameter]["momentum_buffer"].dtype is torch.float32


def test_state_of_full_precision_parameters_loads_as_ever():
    module = layer(dtype=torch.float32)
    optimizer = ADAMW(module.parameters())
    set_gradients(module, 0)
    optimizer.step()
    state = reloaded(optimizer.state_dict())
    hooked = ADAMW(layer(dtype=torch.float32).parameters())
    MasterWeights().keep_state_precision(hooked)
    hooked.load_state_dict(state)
    assert hooked.state_dict()["state"][0]["exp_avg"] is state["state"][0]["exp_avg"]


# Autograd


def test_hooks_and_gradients_survive_the_step():
    module, masters = layer(), MasterWeights()
    optimizer = SGD(module.parameters())
    accumulated, seen = [], []
    module.weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p is module.weight))
    module.weight.register_hook(lambda gradient: seen.append(gradient.dtype))
    node = torch.autograd.graph.get_gradient_edge(module.weight).node  # what DDP holds on to
    masters.enter(module.parameters())
    x = torch.randn(4, 8, generator=seeded()).bfloat16()
    for _ in range(3):
        module(x).square().sum().backward()
        expected = module.weight.grad.clone()
        weight = module.weight.detach().clone().requires_grad_()
        F.linear(x, weight, module.bias.detach()).square().sum().backward()
        assert torch.equal(expected, weight.grad)
        take_step(module, optimizer, masters)
        assert torch.autograd.graph.get_gradient_edge(module.weight).node is node
    assert accumulated == [True] * 3
    assert seen == [torch.bfloat16] * 3


def test_a_step_within_the_backward_pass_gives_the_same_weights():
    runs = []
    for inside in (False, True):
        module, masters = layer(16), MasterWeights(rounding="nearest")
        optimizers = {p: SGD([p]) for p in module.parameters()}
        masters.enter(module.parameters())

        def step(parameter, masters=masters, optimizers=optimizers):
            masters.lift([parameter])
            optimizers[parameter].step()
            masters.lower([parameter])

        for parameter in module.parameters() if inside else ():
            parameter.register_post_accumulate_grad_hook(step)
        for i in range(4):
            x = torch.randn(4, 16, generator=seeded(i)).bfloat16()
            loss = module(x).square().sum()
            loss.backward()
            for parameter in () if inside else module.parameters():
                step(parameter)
            assert all(p.grad is None and p.dtype is torch.bfloat16 for p in module.parameters())
        runs.append(all_masters(masters, module))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_graph_from_before_the_step_does_not_use_the_new_weights_unnoticed():
    module, masters = layer(), MasterWeights()
    masters.enter(module.parameters())
    x = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = module(x).square().sum()
    loss.backward(retain_graph=True)
    take_step(module, SGD(module.parameters()), masters)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def train_wrapped(rank, directory):
    dist.init_process_group("gloo")
    result = []
    for views in (False, True):
        module, masters = layer(), MasterWeights()
        wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=views)
        optimizer = ADAMW(module.parameters())
        masters.enter(module.parameters())
        for step in range(4):
            x = torch.randn(4, 8, generator=seeded(10 * rank + step)).bfloat16()
            wrapped(x).square().sum().backward()
            result.append(module.weight.grad.clone())
            take_step(module, optimizer, masters)
            result += [module.weight.detach().clone(), master_of(masters, module.weight).clone()]
    mesh = init_device_mesh("cpu", (2,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 4, dtype=torch.bfloat16), mesh))
    try:
        masters.enter([sharded])
    except ValueError as error:
        message = str(error)
    dist.destroy_process_group()
    return result, message


def test_ddp_still_averages_gradients_after_steps_and_dtensors_are_refused(tmp_path):
    (first, message), (second, _) = run_processes(train_wrapped, tmp_path)
    assert len(first) == 24
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert "MixedPrecisionPolicy" in message
