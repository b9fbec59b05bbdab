"""compile_blocks in real Trainer.fit runs: few graphs, the same results; and the warning for whole models."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
import torch._inductor.config
from lightning.pytorch import LightningModule
from toolbox import CLASSES, FEATURES, Classifier, loader, same, trainer, weights
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from lightning_bcd import BCDCallback, LayerBlock, create_blocks_from_model
from lightning_bcd.compiling import compile_blocks, warn_if_recompiling

WIDTH, LAYERS, SWITCHES = 8, 12, 24


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(nn.functional.gelu(self.inner(self.norm(x))))


class Net(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Plain(Classifier):
    """Logs nothing: a compiled training_step cannot."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(batch)


@pytest.fixture(autouse=True)
def _no_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs made so far; fails if a frame was left uncompiled."""
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def fit(model: LightningModule, data: DataLoader, compile_with: dict | None, steps: int = SWITCHES + 1, **arguments):
    """Train a copy of the model for `steps` visits of one step, compiled unless `compile_with` is None."""
    model = copy.deepcopy(model)
    blocks = create_blocks_from_model(model, num_blocks=arguments.pop("num_blocks", None))
    names = [] if compile_with is None else compile_blocks(model, blocks, **compile_with)
    validating = {"val_dataloaders": data} if arguments.pop("validate", False) else {}
    callback = BCDCallback(blocks=blocks, steps_per_block=1, **arguments)
    trainer(callback, max_steps=steps, max_epochs=-1).fit(model, data, **validating)
    assert sum(callback.strategy.visits) == steps
    return model, names


@pytest.mark.parametrize(
    "arguments",
    [
        {"strategy": "cyclic"},
        {"strategy": "random"},
        {"strategy": "greedy"},
        {"strategy": "random", "mode": "mask"},
        {"strategy": "random", "num_blocks": 5},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_twenty_four_switches_make_at_most_four_graphs_and_change_no_bit(arguments):
    module = Classifier(net=Net())
    eager, _ = fit(module, loader(), None, **arguments)
    assert graphs() == 0
    compiled, names = fit(module, loader(), {"backend": "eager", "fullgraph": True}, **arguments)
    assert names == [f"net.layers.{i}" for i in range(LAYERS)]
    assert 1 <= graphs() <= 4
    assert same(weights(eager), weights(compiled))
    assert not same(weights(eager), weights(module))


def test_aot_autograd_needs_no_more_graphs_and_changes_no_bit():
    module = Classifier(net=Net())
    eager, _ = fit(module, loader(), None, strategy="cyclic")
    compiled, _ = fit(module, loader(), {"backend": "aot_eager"}, strategy="cyclic")
    assert graphs() == 3
    assert same(weights(eager), weights(compiled))


def test_validation_adds_two_graphs():
    module = Classifier(net=Net())
    fit(module, loader(), {"backend": "eager"}, strategy="cyclic", validate=True)
    assert graphs() == 3 + 2


def test_a_shorter_last_batch_adds_none_with_dynamic_shapes():
    module = Classifier(net=Net())
    data = loader(batch_size=10)  # and one of 8
    eager, _ = fit(module, data, None, strategy="cyclic")
    compiled, _ = fit(module, data, {"backend": "eager", "dynamic": True}, strategy="cyclic")
    assert graphs() == 3
    assert same(weights(eager), weights(compiled))


def test_the_same_run_with_the_whole_network_compiled_makes_more_and_gives_up():
    module = Plain(net=Net(4))
    module.net.compile(backend="eager")
    blocks = create_blocks_from_model(module)
    callback = BCDCallback(blocks=blocks, strategy="cyclic", steps_per_block=1)
    with torch._dynamo.config.patch(recompile_limit=3):
        trainer(callback, max_steps=len(blocks), max_epochs=-1).fit(module, loader())
    assert counters["stats"]["unique_graphs"] == 3
    assert counters["frames"]["total"] > counters["frames"]["ok"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor_gives_the_same_training_up_to_rounding():
    module = Classifier(net=Net(3))
    eager, _ = fit(module, loader(), None, steps=10, strategy="cyclic")
    with torch._inductor.config.patch(compile_threads=1):
        compiled, _ = fit(module, loader(), {}, steps=10, strategy="cyclic")
    assert graphs() == 3
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-4, atol=1e-5)


class CausalModule(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def hugging_face(kind: str, use_cache: bool = False, layers: int = LAYERS) -> CausalModule:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 32, "use_cache": use_cache, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        sizes = {"n_embd": 8, "n_layer": layers, "n_head": 2, "n_positions": 8}
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes, **drop))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
        config = transformers.LlamaConfig(**common, **sizes, tie_word_embeddings=True, max_position_embeddings=8)
        model = transformers.LlamaForCausalLM(config)
    return CausalModule(model.train())


def tokens() -> DataLoader:
    return DataLoader(torch.randint(32, (12, 8), generator=torch.Generator().manual_seed(0)), batch_size=2)


@pytest.mark.parametrize(("kind", "mode"), [("gpt2", "freeze"), ("llama", "freeze"), ("llama", "mask")])
def test_hugging_face_layers_keep_the_bound_and_every_bit(kind, mode):
    module = hugging_face(kind)
    eager, _ = fit(module, tokens(), None, mode=mode)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*key-value cache")
        compiled, names = fit(module, tokens(), {"backend": "eager", "fullgraph": True}, mode=mode)
    assert len(names) == LAYERS
    assert graphs() <= 4
    assert same(weights(eager), weights(compiled))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradient_checkpointing_and_compiled_layers_work_together(kind):
    module = hugging_face(kind, layers=3)
    eager, _ = fit(module, tokens(), None, steps=10, strategy="cyclic")
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled, _ = fit(module, tokens(), {"backend": "eager"}, steps=10, strategy="cyclic")
    assert graphs() <= 4
    assert same(weights(eager), weights(compiled))


def test_a_key_value_cache_is_warned_of_because_it_breaks_the_bound():
    module = hugging_face("llama", use_cache=True)
    with pytest.warns(UserWarning, match=r"use_cache = False"):
        fit(module, tokens(), {"backend": "eager"}, steps=1, strategy="cyclic")
    assert counters["frames"]["total"] > counters["frames"]["ok"]


def test_names_in_the_state_dict_and_outputs_stay():
    net = Net()
    names, before = list(net.state_dict()), net(torch.ones(1, FEATURES))
    compile_blocks(net, create_blocks_from_model(net), backend="eager")
    assert list(net.state_dict()) == names
    assert torch.equal(net(torch.ones(1, FEATURES)), before)


def test_only_layers_that_are_not_compiled_yet_are_compiled():
    net = Net(4)
    blocks = create_blocks_from_model(net)
    net.layers[2].compile(backend="aot_eager")
    kept = net.layers[2]._compiled_call_impl
    assert compile_blocks(net, blocks, backend="eager") == ["layers.0", "layers.1", "layers.3"]
    assert net.layers[2]._compiled_call_impl is kept
    assert compile_blocks(net, blocks, backend="eager") == []
    assert [m._compiled_call_impl for m in (net, net.embed, net.layers, net.head)] == [None] * 4


def test_parameters_that_the_user_froze_do_not_matter():
    net = Net(4)
    for layer in net.layers:
        layer.norm.requires_grad_(False)
    assert len(compile_blocks(net, create_blocks_from_model(net), backend="eager")) == 4


def test_a_block_that_is_a_list_of_layers_has_each_of_them_compiled():
    net = nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Sequential(Layer(), Layer()))
    halves = [LayerBlock("first", net[0].parameters()), LayerBlock("second", net[1].parameters())]
    assert compile_blocks(net, halves, backend="eager") == ["0", "1"]  # the outermost list counts
    net = copy.deepcopy(net)
    layers = [LayerBlock(f"{i}.{j}", net[i][j].parameters()) for i in (0, 1) for j in (0, 1)]
    assert compile_blocks(net, layers, backend="eager") == ["0.0", "0.1", "1.0", "1.1"]


@pytest.mark.parametrize(
    ("net", "arguments"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), {}),
        (Net(3), {"max_parameters": 150}),  # cuts the layers into pieces
    ],
)
def test_without_a_whole_repeated_layer_there_is_an_error_with_the_remedy(net, arguments):
    blocks = create_blocks_from_model(net, **arguments)
    with pytest.raises(ValueError, match=r"layer\.compile\(\).*mode='mask'"):
        compile_blocks(net, blocks, backend="eager")
    assert all(module._compiled_call_impl is None for module in net.modules())


def whole_model(way: str) -> LightningModule:
    """A LightningModule that is compiled in one of the ways there are."""
    module = Plain(net=Net())
    if way == "submodule":
        module.net = torch.compile(module.net, backend="eager")
    elif way == "in place":
        module.compile(backend="eager")
    else:
        seen = []

        class Seeing(BCDCallback):
            def on_fit_start(self, trainer, pl_module):
                seen.append(pl_module)
                super().on_fit_start(trainer, pl_module)

        callback = Seeing(blocks="transformer", steps_per_block=1)
        trainer(callback, max_steps=1).fit(torch.compile(module, backend="eager"), loader())
        return seen[0]
    return module


@pytest.mark.filterwarnings("ignore:The run takes")
@pytest.mark.filterwarnings("ignore:.*compiled as a whole")  # as the callback says too
@pytest.mark.parametrize("way", ["submodule", "in place", "trainer.fit"])
def test_a_whole_model_with_more_blocks_than_the_limit_is_warned_of(way):
    module = whole_model(way)
    blocks = create_blocks_from_model(module)
    with pytest.warns(UserWarning, match=r"14 blocks.*recompile_limit = 8.*compile_blocks.*mode='mask'") as caught:
        warn_if_recompiling(module, blocks, "freeze")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_recompiling(module, blocks, "mask")
        warn_if_recompiling(module, create_blocks_from_model(module, num_blocks=8), "freeze")
        with torch._dynamo.config.patch(recompile_limit=14):
            warn_if_recompiling(module, blocks, "freeze")


def test_compiled_layers_are_not_warned_of():
    net = Net()
    blocks = create_blocks_from_model(net)
    compile_blocks(net, blocks, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_recompiling(net, blocks, "freeze")
