"""Fine-tune all weights of a Hugging Face causal language model, one block at a time.

Without options a small GPT-2 or Llama of random weights learns the bundled text byte by byte, offline and in less than
a minute. With `--model` it is any causal language model of the hub or of a folder:

    python examples/finetune_causal_lm.py --model Qwen/Qwen2.5-0.5B --text my.txt --precision bf16-true

`--full` trains the same model with AdamW on all weights at once, to compare.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_bcd import BCDCallback, create_blocks_from_model, describe_blocks

TEXT = Path(__file__).parent / "data" / "american_documents.txt"

# Byte-level models: 256 tokens, tied embeddings, no dropout. No cache of keys and values: training does not need it.
SIZES = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4},
}
COMMON = {"vocab_size": 256, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}


class CausalLM(LightningModule):
    """Next-token prediction with AdamW; weight decay for matrices only."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss

    def validation_step(self, tokens: torch.Tensor, batch_idx: int) -> None:
        self.log("eval_loss", self.model(input_ids=tokens, labels=tokens).loss, batch_size=len(tokens))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        matrices = [p for p in self.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr)


class MemoryMeter(Callback):
    """Notes the most bytes of gradients and optimizer state on the model's device after a step."""

    peak = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        held = [p.grad for p in pl_module.parameters() if p.grad is not None]
        for state in trainer.optimizers[0].state.values():
            held += [value for value in state.values() if torch.is_tensor(value)]
        self.peak = max(self.peak, sum(tensor.numel() * tensor.element_size() for tensor in held))


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the model and the text as one row of tokens."""
    text = options.text.read_text(encoding="utf-8")
    if options.model is not None:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokens = AutoTokenizer.from_pretrained(options.model)(text, verbose=False)["input_ids"]
        model.config.use_cache = False
    else:
        positions = {"gpt2": "n_positions", "llama": "max_position_embeddings"}[options.architecture]
        config = {**COMMON, **SIZES[options.architecture], positions: options.length, "use_cache": False}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.architecture, **config))
        tokens = list(text.encode())
    if options.gradient_checkpointing:
        # BCDCallback sees to it that backward, and what it computes again, ends at the active block.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    # Weights may come in another dtype than they are trained in, and always come in evaluation mode.
    model.to(torch.bfloat16 if options.precision == "bf16-true" else torch.float32).train()
    return model, torch.tensor(tokens)


def loaders(tokens: torch.Tensor, options: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Cut the first 80 % into overlapping training windows and the rest into windows to evaluate on."""
    cut = int(0.8 * len(tokens))
    if len(tokens) - cut < options.length:
        raise SystemExit(f"The text has {len(tokens)} tokens; lower --length to at most {len(tokens) - cut}.")
    train = tokens[:cut].unfold(0, options.length, max(options.length // 2, 1))
    test = tokens[cut:].unfold(0, options.length, options.length)
    return DataLoader(train, options.batch_size, shuffle=True), DataLoader(test, options.batch_size)


def bcd(options: argparse.Namespace) -> BCDCallback:
    """Make the callback."""
    return BCDCallback(
        blocks="transformer",
        strategy=options.block_strategy,
        steps_per_block=options.steps_per_block,
        optimizer_state=options.optimizer_state,
        step_in_backward=options.step_in_backward,
        expand=options.expand,
        expand_lr=options.expand_lr,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder; default: a small model with random weights")
    parser.add_argument("--architecture", choices=list(SIZES), default="gpt2", help="of the random model")
    parser.add_argument("--text", type=Path, default=TEXT, help="what to learn, UTF-8")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--steps-per-block", type=int, default=5)
    strategies = ["cyclic", "backward", "random", "uniform", "greedy", "importance"]
    parser.add_argument("--block-strategy", choices=strategies, default="random")
    parser.add_argument("--optimizer-state", choices=["reset", "keep", "offload"], default="reset")
    parser.add_argument("--step-in-backward", action="store_true", help="free each gradient as soon as it is used")
    parser.add_argument("--expand", choices=["sgd", "sign"], help="landscape expansion; needs --expand-lr")
    parser.add_argument("--expand-lr", type=float)
    parser.add_argument("--precision", default="32-true", help="of the Trainer, for example bf16-true or bf16-mixed")
    parser.add_argument("--lr", type=float, help="default: 5e-3 for random weights, 2e-5 with --model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens per window")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--full", action="store_true", help="AdamW on all weights at once")
    parser.add_argument("--output", type=Path, default=Path("finetune_logs"), help="folder for TensorBoard")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.lr is None:
        options.lr = 5e-3 if options.model is None else 2e-5
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, print and return the loss before and after and the bytes."""
    options = parse(arguments)
    seed_everything(options.seed, verbose=False)
    model, tokens = load(options)
    module = CausalLM(model, options.lr)
    train, test = loaders(tokens, options)
    # Parameters outside the layers (the final norm, an untied output layer) make up the last block, "head".
    print(describe_blocks(create_blocks_from_model(module, "transformer")))

    meter = MemoryMeter()
    trainer = Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        devices=1,
        precision=options.precision,
        callbacks=[meter] if options.full else [bcd(options), meter],
        logger=TensorBoardLogger(options.output, name="full" if options.full else "bcd"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = trainer.validate(module, test, verbose=False)[0]["eval_loss"]
    trainer.fit(module, train)
    after = trainer.validate(module, test, verbose=False)[0]["eval_loss"]

    everything = sum(3 * p.numel() * p.element_size() for p in module.parameters())
    print(f"eval loss: {before:.3f} before, {after:.3f} after {trainer.global_step} steps")
    print(f"gradient + optimizer state: {meter.peak / 2**20:.2f} MiB, of {everything / 2**20:.2f} MiB for full AdamW")
    if torch.cuda.is_available():
        print(f"peak memory of the device: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    print(f"losses of the blocks: tensorboard --logdir {options.output}")
    return {"before": before, "after": after, "bytes": meter.peak, "full_bytes": everything}


if __name__ == "__main__":
    main()
