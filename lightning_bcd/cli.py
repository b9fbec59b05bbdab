"""The command line `lightning-bcd`: demo, fit, validate, test, predict, blocks.

Bad input ends with one line on stderr and exit code 2. Errors that are not about the input keep their traceback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn, optim

import lightning_bcd
from lightning_bcd.blocks import create_blocks_from_model, describe_blocks
from lightning_bcd.demo import run_demo, tensor_bytes
from lightning_bcd.memory import estimate_memory, weight_dtype
from lightning_bcd.optim.block import OptimizerFactory
from lightning_bcd.optim.store import STATE_POLICIES

LIGHTNING_COMMANDS = {
    "fit": "train a model described by a YAML file (LightningCLI)",
    "validate": "run its validation loop",
    "test": "run its test loop",
    "predict": "run its prediction loop",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program name; those of the process if None.

    Returns:
        The exit code: 0, or 2 for bad input.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A console script does not see the current folder, but users name their own modules.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if arguments and arguments[0] in LIGHTNING_COMMANDS:
            run_lightning(arguments)
        else:
            options = _make_parser().parse_args(arguments)
            options.run(options)
    except SystemExit as end:  # --help and --version
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        if not _is_bad_input(error):
            raise
        _report(error)
        return 2
    return 0


class _UsageError(Exception):
    """Arguments that argparse does not accept."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first and exit; the error is one line here.
        raise _UsageError(f"{message} (see `{self.prog} --help`)")


def _make_parser() -> _Parser:
    parser = _Parser(prog="lightning-bcd", description="Block coordinate descent for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"lightning-bcd {lightning_bcd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    summary = "train an MLP by BCD and by plain Adam; table, plots, TensorBoard log"
    demo = commands.add_parser("demo", help=summary, description=summary)
    demo.add_argument("--epochs", type=_positive, help="passes over the data (default: 30, with --data-dir 3)")
    demo.add_argument("--data-dir", type=Path, help="train on the MNIST files in this folder instead of the digits")
    demo.add_argument("--output", type=Path, default=Path("lightning_bcd_demo"), help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.set_defaults(
        run=lambda options: run_demo(
            options.output, epochs=options.epochs, data_dir=options.data_dir, seed=options.seed
        )
    )

    for name, about in LIGHTNING_COMMANDS.items():
        commands.add_parser(name, help=about)

    blocks = commands.add_parser("blocks", help="show how a model is cut into blocks", description=run_blocks.__doc__)
    blocks.add_argument(
        "--model", required=True, metavar="IMPORT.PATH", help="package.module.Name or package.module:Name"
    )
    blocks.add_argument("--model-args", type=_json_object, default={}, metavar="JSON", help="keyword arguments")
    blocks.add_argument(
        "--block-type", default="auto", help="auto, transformer, layer, linear or child (default: %(default)s)"
    )
    blocks.add_argument("--num-blocks", type=_positive, help="merge neighbours into this many blocks")
    blocks.add_argument("--max-parameters", type=_positive, help="split larger blocks")
    blocks.add_argument(
        "--optimizer",
        default="AdamW",
        metavar="NAME",
        help="class of torch.optim, or the import path of a function from parameters to an optimizer "
        "(default: %(default)s)",
    )
    blocks.add_argument("--optimizer-args", type=_json_object, default={}, metavar="JSON", help="keyword arguments")
    blocks.add_argument("--precision", default="32-true", help="precision of the Trainer (default: %(default)s)")
    blocks.add_argument(
        "--optimizer-state",
        choices=STATE_POLICIES,
        default="reset",
        help="what happens to the state of a block that leaves (default: %(default)s)",
    )
    blocks.add_argument("--step-in-backward", action="store_true", help="step each parameter inside the backward pass")
    blocks.set_defaults(run=run_blocks)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, but got {text!r}")
    return int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, but got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object like {{"width": 64}}, but got {text!r}')
    return value


# -- errors ---------------------------------------------------------------------------------------------------

#: Lines of a jsonargparse message that say what a type looks like, not what is wrong with the value.
_NOISE = re.compile(
    r"^(- )?(Does not validate against any|Subtypes: |Errors:$|Not a valid subclass of|Subclass types expect|"
    r"a class path \(str\)|a dict with|Expected a <class 'NoneType'>|Expected a path but|Given value)"
)


_BAD_INPUT = (_UsageError, argparse.ArgumentError, MisconfigurationException, ModuleNotFoundError, OSError)


def _origin(error: Exception) -> str:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).split(".")[0]


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, _BAD_INPUT):
        return True
    # What these packages raise themselves is about their arguments; from anywhere else it is a bug to be found.
    return isinstance(error, (ValueError, TypeError)) and _origin(error) in ("lightning_bcd", "jsonargparse")


def _report(error: Exception) -> None:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, argparse.ArgumentError) or _origin(error) == "jsonargparse":
        # Nested explanations, one line per level.
        parts = [line.strip() for line in lines if not _NOISE.match(line.strip())]
        lines = [" ".join(part.removeprefix("- ") for part in parts)]
    print(f"lightning-bcd: error: {lines[0]}", file=sys.stderr)
    # A coverage table may follow: that is output.
    print(*lines[1:], sep="\n", end="\n" if lines[1:] else "")


# -- fit, validate, test, predict -----------------------------------------------------------------------------


def run_lightning(arguments: Sequence[str]) -> None:
    """Run a LightningCLI sub-command; classes of this package have short names in its configuration."""
    try:
        from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}. Run: pip install 'lightning-bcd[cli]'") from error

    class SaveConfigBesideLogs(SaveConfigCallback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            # Without a logger the file would land in the current folder, perhaps on the one being read.
            if trainer.loggers:
                super().setup(trainer, pl_module, stage)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
        LightningCLI(
            save_config_callback=SaveConfigBesideLogs,
            parser_kwargs={"prog": "lightning-bcd", "exit_on_error": False},
            args=list(arguments),
        )


# -- blocks ---------------------------------------------------------------------------------------------------


def run_blocks(options: argparse.Namespace) -> None:
    """Show how a model is cut into blocks and what memory training one block at a time needs."""
    model = _load_model(options.model, options.model_args)
    optimizer = _load_optimizer(options.optimizer, options.optimizer_args)
    dtype = weight_dtype(options.precision)
    if dtype is not None:  # as the Trainer does, so that the table of the blocks counts the same
        model.to(dtype)
    blocks = create_blocks_from_model(
        model, options.block_type, num_blocks=options.num_blocks, max_parameters=options.max_parameters
    )
    estimate = estimate_memory(
        model,
        blocks,
        optimizer,
        options.precision,
        optimizer_state=options.optimizer_state,
        step_in_backward=options.step_in_backward,
    )
    tensors = sum(block.total for block in estimate.blocks) / sum(tensor_bytes(block.parameters) for block in blocks)
    print(describe_blocks(blocks, states_per_parameter=max(round(tensors) - 1, 0)), estimate, sep="\n\n")


def _load_model(path: str, arguments: dict[str, Any]) -> nn.Module:
    target = _import("--model", path)
    if not isinstance(target, nn.Module):
        if not callable(target):
            raise _import_error("--model", "a class, a function without arguments or an nn.Module", repr(target))
        try:
            target = target(**arguments)
        except Exception as error:
            got = f"{type(error).__name__} from {path}: {error}"
            remedy = """Give its arguments as JSON, e.g. --model-args '{"width": 64}'"""
            raise _import_error("--model", "callable with --model-args", got, remedy) from error
    elif arguments:
        wanted = "a class or function when --model-args is given"
        raise _import_error("--model", wanted, f"the finished model {path}")
    if not isinstance(target, nn.Module):
        raise _import_error("--model", "the path of an nn.Module or of what makes one", f"a {type(target).__name__}")
    return target


def _load_optimizer(name: str, arguments: dict[str, Any]) -> OptimizerFactory:
    target = getattr(optim, name, None) if name.isidentifier() else _import("--optimizer", name)
    if not callable(target):
        wanted = "a class of torch.optim or the import path of a function that makes an optimizer"
        raise _import_error("--optimizer", wanted, repr(name), "Name it like AdamW or package.module.name")
    return partial(target, **arguments)


def _import(argument: str, path: str) -> Any:
    """Return the object at `package.module:Name` or `package.module.Name`."""
    parts = path.replace(":", ".").split(".")
    lengths = [path.split(":")[0].count(".") + 1] if ":" in path else range(len(parts) - 1, 0, -1)
    for length in lengths:
        name = ".".join(parts[:length])
        try:
            target: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and f"{name}.".startswith(f"{error.name}."):
                continue  # perhaps the name of a class; try the module above it
            raise
        except Exception as error:
            raise _import_error(argument, "importable", f"{type(error).__name__} from {name}: {error}") from error
        for attribute in parts[length:]:
            if not hasattr(target, attribute):
                raise _import_error(argument, "an import path", f"{path!r}: {name} has no {attribute!r}")
            target = getattr(target, attribute)
        return target
    raise _import_error(
        argument, "an import path", f"{path!r}: there is no such module", "Run from the folder it is in"
    )


def _import_error(argument: str, wanted: str, got: str, remedy: str = "Name it like package.module.Name") -> ValueError:
    got = " ".join(got.split())
    return ValueError(f"Expected argument `{argument}` to be {wanted}, but got {got}. {remedy}.")
