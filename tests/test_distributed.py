"""Two gloo processes: every rank trains the same block and ends with the same weights, for the traffic of one block."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import Classifier, StatefulLoader, data, mlp, run_processes, same, trainer, weights
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bcd import BCDCallback, BCDModule, BCDStrategy, create_blocks_from_model
from lightning_bcd.distributed.block_sync import BlockGradientSync

ADAM = partial(torch.optim.Adam, lr=1e-2)


class Net(BCDModule):
    def __init__(self, **arguments):
        super().__init__(optimizer=partial(torch.optim.SGD, lr=0.1), **arguments)
        self.net = mlp()

    def block_loss(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def fit(model, *callbacks, devices=2, batch_size=8, strategy="ddp", precision="64-true", **arguments):
    run = trainer(
        *callbacks,
        strategy=strategy if devices > 1 else "auto",
        devices=devices,
        max_epochs=3,
        precision=precision,
        use_distributed_sampler=False,
        **arguments,
    )
    # In fixed order: Lightning's own sampler would shuffle.
    sampler = DistributedSampler(data(), 2, run.global_rank, shuffle=False) if devices > 1 else None
    run.fit(model, DataLoader(data(), batch_size=batch_size, sampler=sampler))
    return weights(model)


def close(first, second, rtol=1e-10):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


# -- the callback ---------------------------------------------------------------------------------------------

STRATEGIES = ("cyclic", "backward", "random", "uniform", "greedy", "importance")
CASES = {
    f"{strategy}-{mode}-{policy}": {"strategy": strategy, "mode": mode, "optimizer_state": policy}
    for strategy, (mode, policy) in zip(
        STRATEGIES, itertools.product(("auto", "mask"), ("reset", "keep", "offload")), strict=True
    )
}
CASES |= {
    "in backward": {"step_in_backward": True},
    "expanded": {"expand": "sgd", "expand_lr": 0.05},
    "expanded by sign, in backward": {"expand": "sign", "expand_lr": 1e-3, "step_in_backward": True},
}
PLAIN = ("in backward", "expanded", "expanded by sign, in backward")


def train_with_callback(name, devices, **trainer_arguments):
    # Clipping and accumulation where they are possible.
    window = {} if name in PLAIN else {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    callback = BCDCallback(**CASES[name], steps_per_block=2 if name in PLAIN else 1)
    trained = fit(Classifier(ADAM), callback, devices=devices, **window, **trainer_arguments)
    return {
        "weights": trained,
        "visits": callback.strategy.visits,
        "summary": callback.tracker.get_epoch_summary(),
        "steps": [row.steps for row in callback.report],
    }


def all_cases(rank, directory):
    return {name: train_with_callback(name, 2) for name in CASES}


def test_callback_ranks_stay_equal_and_match_one_process(tmp_path):
    first, second = run_processes(all_cases, tmp_path)
    for name, case in CASES.items():
        one, other = first[name], second[name]
        assert same(one["weights"], other["weights"]), name
        assert one["visits"] == other["visits"], name
        assert sum(one["visits"]) >= 4, name
        assert one["summary"] == pytest.approx(other["summary"], nan_ok=True), name
        assert not same(one["weights"], weights(mlp().double())), name
        if case.get("strategy") not in ("greedy", "importance"):
            # The ranks hold samples 0, 2, 4 … and 1, 3, 5 …: together the batches of 16 of one process. (Scores are
            # the mean norm over the ranks, not the norm of the mean: those rules may choose other blocks.)
            alone = train_with_callback(name, 1, batch_size=16)
            assert one["steps"] == alone["steps"], name
            close(one["weights"], alone["weights"])


# -- traffic --------------------------------------------------------------------------------------------------


class Counter:
    """Counts what is given to `torch.distributed.all_reduce`, by optimizer step."""

    def __init__(self, run_step):
        self.by_step, self.run_step, self.original = {}, run_step, dist.all_reduce

    def __call__(self, tensor, *args, **kwargs):
        step = self.by_step.setdefault(self.run_step(), [])
        step.append((tensor.numel() * tensor.element_size(), tensor.dtype))
        return self.original(tensor, *args, **kwargs)


def count_traffic(rank, directory):
    callback, model = BCDCallback(strategy="cyclic", steps_per_block=3), Classifier(ADAM)
    counter = Counter(lambda: model.trainer.global_step)
    dist.all_reduce = counter
    try:
        fit(model, callback)
    finally:
        dist.all_reduce = counter.original
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters) for block in callback.blocks]
    wrapped = type(model.trainer.strategy.model).__name__
    return {"traffic": counter.by_step, "sizes": sizes, "wrapped": wrapped}


def test_only_the_gradients_of_the_active_block_travel(tmp_path):
    for result in run_processes(count_traffic, tmp_path):
        assert result["wrapped"] == "Classifier"
        assert len(result["traffic"]) == 9
        for step, messages in result["traffic"].items():
            gradients = sum(size for size, dtype in messages if dtype == torch.float64)
            assert gradients == result["sizes"][step // 3]
            # At the first step of a visit the ranks also say which of the two parameters they use.
            # (int64: the Trainer's own barriers before the first step.)
            others = [(size, dtype) for size, dtype in messages if dtype not in (torch.float64, torch.int64)]
            assert others == ([(8, torch.int32)] if step % 3 == 0 else [])


def order_of_events(rank, directory):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = nn.Sequential(*[nn.Linear(600, 600) for _ in range(3)])
    block, events = create_blocks_from_model(net, {"all": "."}, num_blocks=1)[0], []
    sync, original = BlockGradientSync(), dist.all_reduce
    sync.enter(block.parameters)
    net[0].weight.register_hook(lambda gradient: events.append("first layer"))

    def note(tensor, *args, **kwargs):
        events.append("sent")
        return original(tensor, *args, **kwargs)

    dist.all_reduce = note
    sync.begin()
    net(torch.ones(2, 600)).sum().backward()
    dist.all_reduce = original
    sync.finish()
    small = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    sync.enter(list(small.parameters()))
    sync.begin()
    small(torch.ones(2, 8)).sum().backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in small.parameters()}
    sync.finish()
    return {"events": events, "storages": len(storages)}


def test_gradients_are_sent_while_backward_still_runs(tmp_path):
    for result in run_processes(order_of_events, tmp_path):
        events = result["events"]
        assert events.index("first layer") >= 2
        assert events[0] == "sent"
        # Small gradients lie in the one message they travel in, and nowhere else.
        assert result["storages"] == 1


# -- ranks that differ ----------------------------------------------------------------------------------------


class ByRank(BCDStrategy):
    def select(self):
        return dist.get_rank()


class Partial(Classifier):
    """A layer that only rank 0 uses, always or from some step on; with one that nobody uses."""

    def __init__(self, start):
        super().__init__(ADAM)
        torch.manual_seed(0)
        self.extra, self.nobody = nn.Linear(6, 3), nn.Linear(2, 2)
        self.start = start

    def loss(self, batch):
        if self.global_rank == 0 and self.global_step >= self.start:
            return F.cross_entropy(self.net(batch[0]) + self.extra(batch[0]), batch[1])
        return super().loss(batch)


def raised(function):
    try:
        function()
    except MisconfigurationException as error:
        return str(error)
    return ""


def disagreements(rank, directory):
    results = {"block": raised(lambda: fit(Classifier(ADAM), BCDCallback(strategy=ByRank(), steps_per_block=2)))}
    blocks = {"net": "^net", "rest": "extra|nobody"}
    # All of a block goes from unused to used by rank 0 alone, or is used by it alone from the start.
    model = Partial(start=0)
    results["parameters"] = raised(lambda: fit(model, BCDCallback({"a": "nobody|net", "b": "extra"}, "backward", 3)))
    results["restored"] = all(p.requires_grad for p in model.parameters())
    model = Partial(start=4)
    before = weights(model.double())
    callback = BCDCallback(blocks, "cyclic", steps_per_block=3)
    fit(model, callback, strategy="ddp_find_unused_parameters_true")
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    return results | {"found unused": weights(model), "moved": moved}


def test_ranks_that_would_train_different_blocks_are_stopped_with_their_names(tmp_path):
    first, second = run_processes(disagreements, tmp_path)
    for result in (first, second):
        assert "rank 0: net.0, rank 1: net.2" in result["block"]
        assert "self.generator" in result["block"]
        assert "ddp_find_unused_parameters_true" in result["parameters"]
        assert result["restored"]
        # The net, the layer that rank 0 uses, and not the one that nobody uses.
        assert result["moved"] == [True] * 8 + [False] * 2
    assert same(first["found unused"], second["found unused"])


class Experts(Classifier):
    """Each rank uses a layer of its own, of the same shape."""

    def __init__(self):
        super().__init__(ADAM)
        self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]) + self.experts[self.global_rank](batch[0]), batch[1])


def mixed_experts(rank, directory):
    blocks = {"net": "net", "experts": "experts"}
    options = {"in backward": {"step_in_backward": True}, "expanded": {"expand": "sgd", "expand_lr": 0.1}}
    return {
        name: raised(partial(fit, Experts(), BCDCallback(blocks, "cyclic", 3, **each)))
        for name, each in options.items()
    }


def test_gradients_averaged_inside_backward_must_belong_together(tmp_path):
    for result in run_processes(mixed_experts, tmp_path):
        assert "step_in_backward" in result["in backward"]
        assert "expand" in result["expanded"]


class Odd(Classifier):
    """Parameters and buffers that are not plain memory."""

    def __init__(self, rank):
        super().__init__(ADAM)
        torch.manual_seed(rank)
        self.net[0].weight = nn.Parameter(torch.randn(6, 8).t())
        self.register_buffer("gaps", torch.arange(10.0)[::2] + rank)
        self.register_buffer("strided", torch.zeros(10)[::2])
        self.strided += rank


def odd_memory(rank, directory):
    model = Odd(rank)
    results = {"weights": fit(model, BCDCallback(strategy="cyclic", steps_per_block=2))}
    return results | {"buffers": [model.gaps.clone(), model.strided.clone()]}


def test_tensors_with_gaps_are_sent_as_they_are(tmp_path):
    first, second = run_processes(odd_memory, tmp_path)
    assert same(first["weights"], second["weights"])
    assert same(first["buffers"], second["buffers"])
    assert torch.equal(first["buffers"][0], torch.arange(10.0)[::2].double())


class Save(Callback):
    """Writes a checkpoint inside an accumulation window."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            trainer.save_checkpoint(self.path)


def resume_inside_a_window(rank, directory):
    def run(*callbacks, **arguments):
        # In float64 from the start: Lightning restores weights before it converts the module.
        model, callback = Classifier(ADAM).double(), BCDCallback(strategy="random", steps_per_block=2)
        setting = {"strategy": "ddp", "devices": 2, "precision": "64-true", "use_distributed_sampler": False}
        each = trainer(callback, *callbacks, max_epochs=3, accumulate_grad_batches=2, **setting)
        # Other batches on each rank.
        each.fit(model, StatefulLoader(seed=10 + rank), **arguments)
        return weights(model)

    return {"whole": run(Save(directory / "window.ckpt")), "resumed": run(ckpt_path=directory / "window.ckpt")}


def test_a_checkpoint_inside_an_accumulation_window_holds_the_gradients_of_all_ranks(tmp_path):
    first, second = run_processes(resume_inside_a_window, tmp_path)
    assert same(first["resumed"], second["resumed"])
    close(first["whole"], first["resumed"])


# -- what DDP did besides ---------------------------------------------------------------------------------------


def besides(rank, directory):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.add_(rank)  # DDP starts from the weights and buffers of rank 0
    model = Classifier(ADAM, net=net)
    statistics = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            statistics.extend(buffer.clone() for buffer in pl_module.buffers())

    fit(model, BCDCallback("layer", "cyclic", 2), Watch())
    strategy = DDPStrategy()
    plain = Classifier(ADAM)
    fit(plain, BCDCallback(steps_per_block=2), strategy=strategy)
    hook = DDPStrategy(ddp_comm_hook=fp16_compress_hook)
    return {
        "weights": weights(model),
        "statistics": statistics,
        "restored": "configure_ddp" not in vars(strategy),
        "hook": raised(lambda: fit(Classifier(ADAM), BCDCallback(steps_per_block=2), strategy=hook)),
        "in backward": raised(
            lambda: fit(
                Classifier(ADAM), BCDCallback(step_in_backward=True), strategy="ddp_find_unused_parameters_true"
            )
        ),
        "plain": fit(Classifier(ADAM)),
        "bf16": fit(Classifier(ADAM), BCDCallback(strategy="cyclic", steps_per_block=2), precision="bf16-true"),
    }


def test_initial_weights_and_buffers_come_from_rank_0_and_the_strategy_is_given_back(tmp_path):
    first, second = run_processes(besides, tmp_path)
    assert same(first["weights"], second["weights"])
    # As under DDP every batch begins with the running statistics of rank 0.
    assert len(first["statistics"]) == 27
    assert same(first["statistics"], second["statistics"])
    assert first["restored"]
    assert "ddp_comm_hook" in first["hook"]
    assert "find_unused_parameters" in first["in backward"]
    assert same(first["plain"], second["plain"])
    assert same(first["bf16"], second["bf16"])
    assert first["bf16"][0].dtype == torch.bfloat16


# -- the module -------------------------------------------------------------------------------------------------


def train_modules(rank, directory):
    results = {}
    for strategy in ("random", "greedy"):
        model = Net(strategy=strategy, inner_steps=2)
        results[strategy] = {"weights": fit(model), "visits": model.bcd_strategy.visits}
    return results


def test_module_ranks_stay_equal_and_match_one_process(tmp_path):
    first, second = run_processes(train_modules, tmp_path)
    for strategy in ("random", "greedy"):
        assert same(first[strategy]["weights"], second[strategy]["weights"])
        assert first[strategy]["visits"] == second[strategy]["visits"]
    close(first["random"]["weights"], fit(Net(strategy="random", inner_steps=2), devices=1, batch_size=16))
