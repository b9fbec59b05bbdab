"""The memory estimate against bytes counted in real runs."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from toolbox import FEATURES, Classifier, loader, mlp, trainer
from torch import nn

from lightning_bcd.blocks import LayerBlock, create_blocks_from_model
from lightning_bcd.callback import BCDCallback
from lightning_bcd.memory import estimate_memory, weight_dtype
from lightning_bcd.optim.block import BlockOptimizer
from lightning_bcd.optim.in_backward import StepInBackward
from lightning_bcd.optim.masters import MasterWeights
from lightning_bcd.optim.store import OptimizerStateStore

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "amsgrad": partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-3),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-3),
}
optimizers = pytest.mark.parametrize("factory", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Transformer(nn.Module):
    """A layer list between an embedding and a head tied to it; a frozen parameter, and buffers of two dtypes."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Linear(width, FEATURES, bias=False)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0) for _ in range(3))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, FEATURES)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.frozen(x @ self.embed.weight)
        for layer in self.layers:
            x = layer(x[:, None])[:, 0]
        return self.head(self.norm(x))


def tensor_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def state_bytes(optimizer):
    return tensor_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))


def gradient_bytes(module):
    return tensor_bytes(p.grad for p in module.parameters() if p.grad is not None)


def classifier(net, factory):
    # Adagrad would make state for frozen parameters, too.
    return Classifier(lambda parameters: factory([p for p in parameters if p.requires_grad]), net=net)


class Meter(Callback):
    """Counts what exists right before and after every optimizer step."""

    def __init__(self):
        self.largest = {"weights": 0, "buffers": 0, "gradients": 0, "optimizer_state": 0, "total": 0}
        self.host = self.start = 0

    def count(self, trainer, module):
        now = {
            "weights": tensor_bytes(module.parameters()),
            "buffers": tensor_bytes(module.buffers()),
            "gradients": gradient_bytes(module),
            "optimizer_state": state_bytes(trainer.optimizers[0]),
        }
        now["total"] = sum(now.values())
        self.largest = {name: max(count, now[name]) for name, count in self.largest.items()}

    def on_train_start(self, trainer, module):
        self.start = state_bytes(trainer.optimizers[0])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.count(trainer, module)

    def on_train_batch_end(self, trainer, module, *args):
        self.count(trainer, module)


def measure(net, factory, policy, **arguments):
    """Train every block twice by the callback; return the estimate for that module and what was counted."""
    module = classifier(net, factory)
    meter = Meter()
    bcd = BCDCallback(strategy="cyclic", steps_per_block=1, optimizer_state=policy)
    precision = arguments.get("precision", "32-true")
    estimate = estimate_memory(module, create_blocks_from_model(module), factory, precision, optimizer_state=policy)
    steps = 2 * len(estimate.blocks)
    trainer(bcd, meter, max_epochs=-1, max_steps=steps, **arguments).fit(module, loader())
    assert [block.name for block in bcd.blocks] == [block.name for block in estimate.blocks]
    return estimate, meter


# -- against training by the callback -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The run takes")
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
@optimizers
def test_the_estimate_is_the_bytes_counted_in_training(factory, policy, precision):
    estimate, meter = measure(Transformer(), factory, policy, precision=precision)
    counted = meter.largest
    assert estimate.weights == counted["weights"]
    assert estimate.buffers == counted["buffers"]
    assert estimate.gradients == counted["gradients"]
    assert estimate.optimizer_state == counted["optimizer_state"]
    assert estimate.early_state == meter.start
    assert estimate.total == max(counted["total"], estimate.weights + estimate.buffers + meter.start)


@optimizers
def test_the_estimate_for_all_at_once_is_the_bytes_of_plain_training(factory):
    module, meter = classifier(Transformer(), factory), Meter()
    estimate = estimate_memory(module, create_blocks_from_model(module), factory)
    trainer(meter, max_epochs=1).fit(module, loader())
    assert estimate.full == meter.largest["total"]
    assert estimate.at_once.optimizer_state == meter.largest["optimizer_state"]
    assert estimate.total < estimate.full


def test_all_at_once_in_bfloat16_is_plain_training_in_bfloat16():
    module, meter = classifier(mlp(), OPTIMIZERS["adamw"]), Meter()
    estimate = estimate_memory(module, create_blocks_from_model(module), OPTIMIZERS["adamw"], "bf16-true")
    trainer(meter, max_epochs=1, precision="bf16-true").fit(module, loader())
    assert estimate.full == meter.largest["total"]
    assert estimate.weights == meter.largest["weights"]


def test_with_offload_the_state_is_on_the_host_but_for_one_block():
    model, factory = Transformer(), OPTIMIZERS["adamw"]
    blocks = create_blocks_from_model(model)
    optimizer = factory(model.parameters())
    store = OptimizerStateStore(optimizer, "offload")
    device = 0
    for block in blocks:
        for parameter in block.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        device = max(device, store.state_bytes())
        store.leave(block.parameters)
        optimizer.zero_grad()
    estimate = estimate_memory(model, blocks, factory, optimizer_state="offload")
    assert estimate.optimizer_state == device
    assert estimate.host == sum(tensor_bytes(state.values()) for state in store.host.values())
    pairs = [a.total + b.optimizer_state for a in estimate.blocks for b in estimate.blocks if a is not b]
    assert estimate.handover == estimate.weights + estimate.buffers + max(pairs)
    assert estimate.total == estimate_memory(model, blocks, factory).total


def test_only_offload_has_a_handover():
    model = mlp()
    estimate = estimate_memory(model, create_blocks_from_model(model), torch.optim.AdamW, optimizer_state="keep")
    assert estimate.handover == estimate.total
    assert estimate.host == 0


# -- bfloat16 and steps in backward ---------------------------------------------------------------------------


def activate(block, blocks):
    for other in blocks:
        other.freeze()
    block.unfreeze()


@pytest.mark.parametrize("largest_last", [True, False])
def test_bfloat16_counts_masters_and_the_gradient_being_converted(largest_last):
    net = mlp().to(torch.bfloat16)
    blocks = create_blocks_from_model(net)
    estimate = estimate_memory(net, blocks, torch.optim.AdamW)
    weights = tensor_bytes(net.parameters())
    optimizer, masters = torch.optim.AdamW(net.parameters()), MasterWeights()
    store = OptimizerStateStore(optimizer, "reset")
    peak = masters_peak = 0
    for block in blocks:
        activate(block, blocks)
        masters.enter(block.parameters)
        for _ in range(2):
            net(torch.randn(4, FEATURES, dtype=torch.bfloat16)).sum().backward()
            for p in sorted(block.parameters, key=torch.numel) if largest_last else block.parameters:
                converting = gradient_bytes(net) + 4 * p.numel()
                peak = max(peak, converting + store.state_bytes() + masters.master_bytes())
                masters.lift([p])
            optimizer.step()
            masters.lower()
        assert store.state_bytes() == next(b.optimizer_state for b in estimate.blocks if b.name == block.name)
        masters_peak = max(masters_peak, masters.master_bytes())
        masters.leave(block.parameters)
        store.leave(block.parameters)
    assert estimate.weights == weights
    assert estimate.masters == masters_peak
    # The order that needs most is counted: the others stay a little below.
    assert estimate.total == pytest.approx(weights + peak, rel=0 if largest_last else 0.05, abs=0)
    assert estimate.total >= weights + peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_step_in_backward_one_gradient_is_there_at_a_time(dtype):
    net = mlp().to(dtype)
    blocks = create_blocks_from_model(net)
    estimate = estimate_memory(net, blocks, torch.optim.AdamW, step_in_backward=True)
    optimizer, masters = torch.optim.AdamW(net.parameters()), MasterWeights()
    inside = StepInBackward(optimizer, masters=masters)
    inside.armed = True
    counted = []

    def count(gradient):
        # A bfloat16 gradient is about to get its float32 copy.
        copy = 4 * gradient.numel() if gradient.dtype == torch.bfloat16 else 0
        counted[-1] = max(counted[-1], gradient_bytes(net) + copy)
        return gradient.square().sum()

    inside.measure = count
    for block in blocks:
        activate(block, blocks)
        masters.enter(block.parameters)
        inside.enter(block.parameters)
        counted.append(0)
        net(torch.randn(4, FEATURES, dtype=dtype)).sum().backward()
        masters.leave(block.parameters)
    inside.leave()
    assert [block.gradients for block in estimate.blocks] == counted
    assert sum(block.optimizer_state for block in estimate.blocks) == state_bytes(optimizer)


def test_the_residual_takes_two_bytes_of_host_memory_per_bfloat16_weight():
    model = mlp()
    elements = sum(p.numel() for p in model.parameters())
    blocks = create_blocks_from_model(model)
    assert estimate_memory(model, blocks, torch.optim.SGD, "bf16-true", keep_residual=True).host == 2 * elements
    assert estimate_memory(model, blocks, torch.optim.SGD, "bf16-true").host == 0
    assert estimate_memory(model, blocks, torch.optim.SGD, keep_residual=True).host == 0
    both = estimate_memory(model, blocks, torch.optim.AdamW, "bf16-true", keep_residual=True, optimizer_state="offload")
    assert both.host == 2 * elements + sum(block.optimizer_state for block in both.blocks)


# -- the optimizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"],
)
@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}])
def test_the_state_of_every_torch_optimizer_is_counted_exactly(name, settings):
    model = mlp()
    make = getattr(torch.optim, name, None)
    try:
        factory = partial(make, **settings)
        optimizer = factory(model.parameters())
    except TypeError:
        pytest.skip("not in this torch")
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()
    counted = state_bytes(optimizer)
    blocks = create_blocks_from_model(model)
    for given in (factory, optimizer):
        estimate = estimate_memory(model, blocks, given, optimizer_state="keep")
        assert estimate.optimizer_state == estimate.at_once.optimizer_state == counted


def test_an_optimizer_counts_with_the_settings_of_its_groups():
    model = mlp()
    first, *_, last = blocks = create_blocks_from_model(model)
    rest = [p for block in blocks[1:] for p in block.parameters]
    groups = [{"params": first.parameters, "momentum": 0.9}, {"params": rest}]
    estimate = estimate_memory(model, blocks, torch.optim.SGD(groups, lr=0.1))
    assert estimate.blocks[0].optimizer_state == tensor_bytes(first.parameters)
    assert estimate.blocks[-1].optimizer_state == 0
    factories = {first.name: torch.optim.SGD, ".*": torch.optim.AdamW}
    estimate = estimate_memory(model, blocks, BlockOptimizer(blocks, factories))
    assert estimate.blocks[0].optimizer_state == 0
    assert estimate.blocks[-1].optimizer_state == 2 * tensor_bytes(last.parameters) + 2 * 4


def test_an_optimizer_of_named_parameters_is_accepted():
    model = mlp()
    blocks = create_blocks_from_model(model)
    try:
        optimizer = torch.optim.AdamW(model.named_parameters())
    except TypeError:
        pytest.skip("not in this torch")
    assert estimate_memory(model, blocks, optimizer) == estimate_memory(model, blocks, torch.optim.AdamW)


@pytest.mark.parametrize("history", [1, 3])
def test_lbfgs_counts_its_full_history(history):
    model = mlp(layers=2).double()
    x, y = torch.randn(32, FEATURES).double(), torch.randn(32, 3).double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, history_size=history)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    state = optimizer.state[next(model.parameters())]
    assert len(state["ro"]) == history
    tensors = [t for value in state.values() for t in (value if isinstance(value, list) else [value])]
    counted = tensor_bytes(t for t in tensors if isinstance(t, torch.Tensor))
    blocks = [LayerBlock("all", model.parameters())]
    factory = partial(torch.optim.LBFGS, history_size=history)
    assert estimate_memory(model, blocks, factory).optimizer_state == pytest.approx(counted, rel=0.01)


def test_an_optimizer_that_evaluates_the_loss_gets_a_closure():
    class Twice(torch.optim.AdamW):
        requires_closure = True

        def step(self, closure):
            assert float(closure()) == float(closure()) == 0
            return super().step()

    model = mlp()
    blocks = create_blocks_from_model(model)
    assert estimate_memory(model, blocks, Twice) == estimate_memory(model, blocks, torch.optim.AdamW)


def test_layers_of_the_same_shapes_are_stepped_once():
    sizes = []

    def factory(parameters):
        sizes.append(len(parameters))
        return torch.optim.AdamW(parameters)

    model = mlp(layers=6)  # four equal ones in the middle
    estimate = estimate_memory(model, create_blocks_from_model(model), factory)
    assert sizes == [2, 2, 2]
    assert len({block.optimizer_state for block in estimate.blocks[1:-1]}) == 1


def test_no_weight_gradient_or_optimizer_is_changed():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    random = torch.get_rng_state()
    estimate_memory(model, create_blocks_from_model(model), optimizer, "bf16-true")
    assert all(
        torch.equal(p, old) and bool((p.grad == 1).all()) for p, old in zip(model.parameters(), before, strict=True)
    )
    assert not optimizer.state
    assert optimizer.param_groups[0]["fused"] is True
    assert torch.equal(random, torch.get_rng_state())


class Needy(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("only on a Tuesday")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Needy, r"work on block '0' with gradients of zeros, but it raised RuntimeError: only on a Tuesday\. Pass"),
        (torch.optim.SparseAdam, "does not support dense gradients"),
        (lambda parameters: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1), "every parameter of block '0'"),
        (lambda parameters: torch.optim.SGD(list(parameters)[:1], lr=1), "every parameter of block '0'"),
        (torch.optim.SGD(mlp().parameters(), lr=1), "every parameter of block '0'"),
    ],
)
def test_an_optimizer_that_cannot_be_counted_is_refused(factory, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        estimate_memory(model, create_blocks_from_model(model), factory)


# -- the model and the other arguments ------------------------------------------------------------------------


def test_frozen_parameters_count_as_weights_only():
    model = mlp()
    whole = estimate_memory(model, create_blocks_from_model(model), torch.optim.AdamW)
    model[0].requires_grad_(False)
    part = estimate_memory(model, create_blocks_from_model(model), torch.optim.AdamW)
    assert part.weights == whole.weights
    assert [block.name for block in part.blocks] == ["2", "4"]
    by_hand = [LayerBlock(str(i), model[i].parameters()) for i in (0, 2, 4)]
    assert [block.total for block in estimate_memory(model, by_hand, torch.optim.AdamW).blocks] == [
        0,
        *(block.total for block in part.blocks),
    ]


def test_in_the_middle_of_training_the_estimate_is_the_same():
    model = mlp()
    blocks = create_blocks_from_model(model)
    before = estimate_memory(model, blocks, torch.optim.AdamW)
    for block in blocks[1:]:
        block.freeze()
    assert estimate_memory(model, blocks, torch.optim.AdamW) == before


def test_a_model_without_data_is_enough():
    with torch.device("meta"):
        model = nn.ModuleList(nn.TransformerEncoderLayer(4096, 32, 16384) for _ in range(32))
    estimate = estimate_memory(model, create_blocks_from_model(model), torch.optim.AdamW, "bf16-true")
    elements = sum(p.numel() for p in model.parameters())
    assert estimate.weights == 2 * elements
    assert estimate.masters == 4 * elements // 32
    assert estimate.total / elements == pytest.approx(2 + 16 / 32, rel=0.02)
    assert estimate.full / elements == pytest.approx(8, rel=0.001)


@pytest.mark.parametrize(
    ("precision", "size"),
    [
        *(("32-true", 4), ("32", 4), (32, 4), ("64-true", 8), (64, 8), ("bf16-true", 2), ("16-true", 2)),
        *(("16-mixed", 4), ("bf16-mixed", 4), (16, 4), ("bf16", 4)),
    ],
)
def test_precision_says_what_floating_point_weights_become(precision, size):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    estimate = estimate_memory(model, create_blocks_from_model(model, "linear"), torch.optim.SGD, precision)
    assert estimate.weights == size * (9 + 6 + 4)
    assert estimate.buffers == size * 6 + 8  # num_batches_tracked stays an integer
    assert estimate.at_once.gradients == estimate.weights
    assert (estimate.masters > 0) == (precision == "bf16-true")


def test_lightning_agrees_on_what_precision_does():
    for precision in ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", 32, 64, "bf16"):
        plugin = trainer(precision=precision).strategy.precision_plugin
        for dtype in (torch.float32, torch.float64):
            converted = plugin.convert_module(nn.Linear(2, 2, dtype=dtype)).weight.dtype
            assert converted == (weight_dtype(precision) or dtype)


def test_bad_arguments_are_refused():
    model = mlp()
    blocks = create_blocks_from_model(model)
    with pytest.raises(ValueError, match=r"32-true, 64-true.*but got 'fp8'"):
        estimate_memory(model, blocks, torch.optim.SGD, "fp8")
    with pytest.raises(ValueError, match=r"reset, keep, offload, but got 'drop'"):
        estimate_memory(model, blocks, torch.optim.SGD, optimizer_state="drop")
    with pytest.raises(TypeError, match="`optimizer` to be an optimizer or a function"):
        estimate_memory(model, blocks, "adam")
    with pytest.raises(ValueError, match="0 blocks"):
        estimate_memory(model, [], torch.optim.SGD)
    with pytest.raises(ValueError, match="6 parameters of another model"):
        estimate_memory(mlp(), blocks, torch.optim.SGD)
    with pytest.raises(ValueError, match="2 in several blocks"):
        estimate_memory(model, [*blocks, LayerBlock("again", model[0].parameters())], torch.optim.SGD)


# -- the table ------------------------------------------------------------------------------------------------


def test_the_table_shows_each_term_and_the_largest_block():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    estimate = estimate_memory(model, create_blocks_from_model(model), torch.optim.AdamW)
    assert str(estimate).splitlines() == [
        "memory without activations  one block  all at once",
        "weights                       9.4 KiB      9.4 KiB",
        "buffers                           0 B          0 B",
        "gradients                     8.1 KiB      9.4 KiB",
        "optimizer state              16.3 KiB     18.8 KiB",
        "float32 masters                   0 B          0 B",
        "peak                         33.8 KiB     37.7 KiB",
        "largest block: 0; peak: 0.90x of all at once",
    ]


def test_the_table_names_what_only_some_runs_have():
    model = mlp()
    blocks = create_blocks_from_model(model)
    text = str(estimate_memory(model, blocks, torch.optim.Adagrad, optimizer_state="offload"))
    for row in ("state before the first visit", "peak while the next state is fetched", "in host memory"):
        assert row in text


def test_with_keep_the_largest_block_is_that_of_the_largest_gradient():
    model = mlp()
    blocks = create_blocks_from_model(model)
    factories = {"0": torch.optim.SGD, "2": torch.optim.SGD, "4": partial(torch.optim.AdamW, amsgrad=True)}
    optimizer = BlockOptimizer(blocks, factories)
    assert estimate_memory(model, blocks, optimizer).largest.name == "4"
    kept = estimate_memory(model, blocks, optimizer, optimizer_state="keep")
    assert kept.largest.name == "2"
    assert kept.total == kept.weights + tensor_bytes(blocks[1].parameters) + kept.blocks[2].optimizer_state
