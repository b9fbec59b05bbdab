"""examples/finetune_causal_lm.py: from random weights, from a folder, and what its options do."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_bcd import create_blocks_from_model
from lightning_bcd.checkpointing import check_checkpointing, remove_input_gradient_hooks

transformers = pytest.importorskip("transformers")

FILE = Path(__file__).parent.parent / "examples" / "finetune_causal_lm.py"
SMALL = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
SHORT = ["--steps", "24", "--steps-per-block", "3", "--length", "16", "--batch-size", "4", "--lr", "0.02"]


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    """The example as a module, with smaller models."""
    spec = importlib.util.spec_from_file_location("finetune_causal_lm", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZES", SMALL)
    return module


def tags(folder: Path) -> set[str]:
    """Tags of block losses in all event files: training and each evaluation write one."""
    found: set[str] = set()
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        found |= set(events.Tags()["scalars"])
    assert "eval_loss" in found
    return {tag for tag in found if tag.startswith("bcd/loss/")}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_loss_falls_and_every_block_has_its_curve(example, architecture, tmp_path, capsys):
    result = example.main([*SHORT, "--architecture", architecture, "--output", str(tmp_path / "logs")])
    assert result["before"] == pytest.approx(math.log(256), abs=0.2)
    assert result["after"] < result["before"] - 1
    layers = {"gpt2": "model.transformer.h", "llama": "model.model.layers"}[architecture]
    blocks = ["embeddings", f"{layers}.0", f"{layers}.1", "head"]
    assert tags(tmp_path / "logs" / "bcd") == {f"bcd/loss/{block}" for block in blocks}

    printed = capsys.readouterr().out
    assert all(block in printed for block in blocks)
    assert f"tensorboard --logdir {tmp_path / 'logs'}" in printed
    assert f"{result['before']:.3f} before, {result['after']:.3f} after 24 steps" in printed
    # One block's gradient and two states of Adam, and its step counters.
    model = example.load(example.parse(["--architecture", architecture, "--length", "16"]))[0]
    largest = max(block.num_parameters() for block in create_blocks_from_model(model, "transformer"))
    assert 3 * 4 * largest <= result["bytes"] <= 3 * 4 * largest + 200
    assert result["full_bytes"] == 3 * 4 * sum(p.numel() for p in model.parameters())


def test_full_training_holds_all_gradients_and_states(example, tmp_path):
    result = example.main([*SHORT, "--full", "--output", str(tmp_path / "logs")])
    assert result["after"] < result["before"] - 1
    assert result["full_bytes"] <= result["bytes"] <= result["full_bytes"] + 200
    assert tags(tmp_path / "logs" / "full") == set()


@pytest.mark.filterwarnings("ignore:The run takes")
def test_a_model_and_its_tokenizer_are_loaded_from_a_folder(example, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learning = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(example.TEXT)], learning)
    folder = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.LlamaConfig(
        **SMALL["llama"], vocab_size=300, tie_word_embeddings=True, max_position_embeddings=64
    )
    saved = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    saved.save_pretrained(folder)

    options = example.parse(["--model", str(folder), "--precision", "32-true"])
    assert options.lr == 2e-5
    model, tokens = example.load(options)
    assert tokenizer.decode(tokens.tolist()) == example.TEXT.read_text()
    assert model.training
    assert not model.config.use_cache
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.float()) for p, q in zip(model.parameters(), saved.parameters(), strict=True))
    result = example.main(["--model", str(folder), *SHORT, "--output", str(tmp_path / "logs")])
    assert result["after"] < result["before"] - 0.5


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_checkpointing_is_on_and_backward_can_stop_at_the_active_block(example, architecture):
    model, tokens = example.load(example.parse(["--architecture", architecture, "--length", "16"]))
    check_checkpointing(model)
    remove_input_gradient_hooks(model)
    layers = model.transformer.h if architecture == "gpt2" else model.model.layers
    for block in create_blocks_from_model(model, "transformer")[:2]:  # embeddings and the first layer
        block.freeze()
    reached = []
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda layer, inputs, index=index: note(inputs[0], index))

    def note(states: torch.Tensor, index: int) -> None:
        if states.requires_grad:
            reached.append(index)

    batch = tokens[:16].unsqueeze(0)
    model(input_ids=batch, labels=batch).loss.backward()
    assert reached == []  # the second layer is the first that trains; its input needs no gradient
    assert all(p.grad is not None for p in layers[1].parameters())
    assert all(p.grad is None for p in layers[0].parameters())


def test_checkpointing_can_be_left_out(example):
    model, _ = example.load(example.parse(["--no-gradient-checkpointing"]))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert remove_input_gradient_hooks(model) == []


def test_all_options_reach_the_callback(example, monkeypatch):
    seen = []
    monkeypatch.setattr(example, "BCDCallback", lambda **arguments: seen.append(arguments))
    example.bcd(example.parse([]))
    schedule = ["--block-strategy", "cyclic", "--optimizer-state", "offload", "--steps-per-block", "7"]
    example.bcd(example.parse([*schedule, "--step-in-backward", "--expand", "sign", "--expand-lr", "1e-4"]))
    common = {"blocks": "transformer", "strategy": "random", "steps_per_block": 5, "optimizer_state": "reset"}
    common |= {"step_in_backward": False, "expand": None, "expand_lr": None}
    assert seen[0] == common
    changed = {"strategy": "cyclic", "steps_per_block": 7, "optimizer_state": "offload"}
    assert seen[1] == {**common, **changed, "step_in_backward": True, "expand": "sign", "expand_lr": 1e-4}


def test_a_text_that_is_too_short_says_what_to_do(example, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(SystemExit, match=r"10 tokens; lower --length to at most 2"):
        example.main(["--text", str(tmp_path / "short.txt")])


def test_the_bundled_text_names_its_sources(example):
    text = example.TEXT.read_text(encoding="ascii")
    assert text.startswith("Public-domain texts")
    assert 15_000 < len(text) < 25_000
