"""Every file in examples/ runs: scripts as a user would run them, in a fresh process and another folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_bcd.cli import main

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
MNIST = ROOT.parent / "shared" / "data" / "mnist"
PLANETOID = ROOT.parent / "shared" / "data" / "planetoid"

# File -> arguments for a short run, and what its output must contain (a regular expression).
SCRIPTS = {
    "quickstart.py": (["--epochs", "3"], "test_acc"),
    "custom_strategy.py": (["--epochs", "1"], r"net\.hidden2: 65792 parameters, \d+ visits"),
    "per_block_optimizers.py": (["--epochs", "3"], r"net\.hidden1: Adam\nnet\.hidden2: Adam\nnet\.output: SGD"),
    "manual_bcd.py": (["--epochs", "2"], r"\{'net\.0': \d\.\d+, 'net\.2': \d\.\d+, 'net\.4': \d\.\d+\}"),
    "plain_pytorch.py": (["--epochs", "2", "--plot", "blocks.png"], r"test accuracy: 0\.[89]"),
    "mnist_mlp.py": (
        ["--data-dir", str(MNIST), "--epochs", "1", "--limit-batches", "8", "--steps-per-block", "2"],
        r"BCD with Adam +8 .*0\.\d+\n(.|\n)*Adam +8 .*0\.\d+",
    ),
    "lifted_digits.py": (
        ["--sweeps", "5", "--hidden", "60", "60"],
        r"test_acc +│ +0\.9\d+(.|\n)*stage 5: objective terms",
    ),
    "lifted_warm_start.py": (
        ["--seconds", "2"],
        r"sweeps: [\d.]+ s, test accuracy 0\.9(.|\n)*alone for 2 s: test accuracy 0\.",
    ),
    "lifted_cnn.py": (
        ["--data-dir", str(MNIST), "--epochs", "1", "--batch-size", "500", "--limit-batches", "2"],
        r"2 sweeps, \d+ s, test accuracy 0\.[5-9]",
    ),
    "mnist_dladmm.py": (
        ["--data-dir", str(MNIST), "--samples", "1500", "--hidden", "60", "60", "--sweeps", "4"],
        r"test_acc +│ +0\.[5-9]\d+(.|\n)*stage \S+: Z − P",
    ),
    "tikhonov_mnist.py": (
        ["--data-dir", str(MNIST), "--samples", "1500", "--hidden", "100", "100", "--sweeps", "3", "--svm"],
        r"test_acc +│ +0\.[6-9]\d+",
    ),
    "hybrid_two_layer.py": (["--epochs", "3"], r"epoch 2: hybrid \d\.\d+e[+-]\d+, gradient descent"),
    "hybrid_digits.py": (["--epochs", "6"], r"test_acc +│ +0\.[5-9]\d+(.|\n)*\{'net\.0': "),
    "cora_ga_mlp.py": (
        ["--data-dir", str(PLANETOID), "--sweeps", "4", "--width", "30"],
        r"test_acc +│ +0\.[2-9]",
    ),
    "layer_parallel.py": (
        ["--sweeps", "3", "--bits", "8"],
        r"process [01]: layers \d to \d, 377,400 bytes sent",
    ),
    "finetune_causal_lm.py": (["--steps", "40", "--length", "32"], r"eval loss: 5\.\d+ before"),
}
BENCHMARKS = {
    "memory_and_time.py": (
        ["--size", "mlp", "--precision", "bf16", "--rows", "full", "in-backward", "--rounds", "1"],
        r"step in backward (\| [\d.]+ / [\d.]+ ){2}",
    ),
    "finetune_task.py": (
        ["--rows", "full", "random", "random+expand", "--seeds", "1", "--steps", "24", "--steps-per-block", "2"],
        r"BCD, random, expand=sgd \| \d\.\d+ \| \d\.\d+",
    ),
    "ddp_traffic.py": (["--rows", "bcd"], r"gradient bytes of the active block: True"),
    "three_splitting_sweep.py": (["--check"], r"largest difference of a weight \d\.\de-1\d"),
    "lifted_accuracy.py": (
        [
            *("--data-dir", str(MNIST), "--output", "accuracy", "--nets", "tiny", "--seeds", "0", "--samples", "3000"),
            *("--sweeps", "3", "--warm-sweeps", "1", "--epochs", "1", "--lrs", "0.001"),
        ],
        r"tiny \| three-splitting, recommended \| 1 \| 3 \| 0\.[5-9]",
    ),
    "sign_network.py": (
        [
            *("--data-dir", str(MNIST), "--widths", "784", "60", "10", "--samples", "2000", "--sweeps", "2"),
            *("--epochs", "1", "--seeds", "0"),
        ],
        r"three-splitting \| 0\.\d+ (.|\n)*straight-through estimator, Adam \| 0\.\d+",
    ),
    "dladmm_sweep.py": (["--check"], r"\d\.\de-1\d"),
    "dladmm_accuracy.py": (
        [
            *("--data-dir", str(MNIST), "--output", "dladmm", "--rows", "recommended", "frozen"),
            *("--samples", "1500", "--hidden", "40", "40", "--sweeps", "2", "--every", "1"),
        ],
        r"\| 0\.[2-9]\d",
    ),
    "pdadmm_graph.py": (
        [
            *(
                "--data-dir",
                str(PLANETOID),
                "--output",
                "pdadmm",
                "--graphs",
                "cora",
                "--rows",
                "recommended",
                "logistic",
            ),
            *("--seeds", "0", "--recommended-sweeps", "10", "--width", "20"),
        ],
        r"\| 0\.\d+",
    ),
    "quantized.py": (
        [
            *("--data-dir", str(MNIST.parent), "--samples", "300", "--sweeps", "3", "--width", "20"),
            *("--bits", "32", "4", "--seeds", "0"),
        ],
        r"\| mnist \| 4 \| 1 \| 0\.\d+ \| 6,000 \| 0\.125 \|",
    ),
    "hybrid.py": (
        ["--widths", "8", "--seeds", "1", "--epochs", "3", "--inputs", "20", "--dw", "1.0", "--most", "20"],
        r"\| 8 (.|\n)*hybrid",
    ),
    "tikhonov.py": (
        [
            *("--data-dir", str(MNIST), "--samples", "1000", "--test-samples", "500", "--width", "60"),
            *("--sweeps", "2", "--rows", "reference", "chain", "--svm", "--loop", "--loop-samples", "3"),
        ],
        r"\| mnist \| chain, SVM \| 60 \| 1,000 \| 500 \| 2 \| 0\.[6-9]\d+ \|(.|\n)*\| project \| 120 \|",
    ),
    "mdlam_graph.py": (
        [
            *("--data-dir", str(PLANETOID), "--graphs", "cora", "--seeds", "0", "--sweeps", "12", "--width", "20"),
            *("--figure", "mdlam.png"),
        ],
        r"cora, published \| published\+momentum \| 1 (\| [\d.]+ ){6}\|",
    ),
    "layer_parallel.py": (
        ["--samples", "100", "--width", "20", "--layers", "4", "--sweeps", "2"],
        r"\| 2 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \| 16,000 \|",
    ),
    "prefix_cache.py": (["--rounds", "1", "--inner-steps", "2"], r"speed-up"),
}
CONFIGS = [
    *("digits.yaml", "greedy.yaml", "manual.yaml", "lifted.yaml"),
    *("dladmm.yaml", "mdlam.yaml", "pdadmm.yaml", "pdadmm_gq.yaml", "tikhonov.yaml", "hybrid.yaml"),
]


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
    assert {path.name for path in (EXAMPLES / "configs").iterdir()} == set(CONFIGS)


def run(script, arguments):
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )


def needs_data(arguments):
    for folder in (MNIST, PLANETOID):
        if str(folder) in arguments and not folder.is_dir():
            pytest.skip(f"no files in ../shared/data/{folder.name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_runs_and_prints_its_table(name):
    arguments, result = BENCHMARKS[name]
    needs_data(arguments)
    finished = run(EXAMPLES / "benchmarks" / name, arguments)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert re.search(result, finished.stdout), finished.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs_and_prints_its_result(name, tmp_path):
    arguments, result = SCRIPTS[name]
    needs_data(arguments)
    if name == "finetune_causal_lm.py":
        pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    finished = run(EXAMPLES / name, arguments)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert re.search(result, finished.stdout)
    if "--plot" in arguments:
        assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def contains(saved, given):
    """Whether a saved configuration has all that was given; class paths may be longer there."""
    if isinstance(given, dict):
        return all(key in saved and contains(saved[key], value) for key, value in given.items())
    return saved == given or (isinstance(given, str) and str(saved).endswith(f".{given}"))


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_trains_and_saves_itself(name, tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse", reason="the extra `cli` is not installed")
    monkeypatch.syspath_prepend(str(ROOT))
    small = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(EXAMPLES / "configs" / name), *small]) == 0
    logs = tmp_path / "lightning_logs" / "version_0"
    given, saved = (yaml.safe_load(path.read_text()) for path in (EXAMPLES / "configs" / name, logs / "config.yaml"))
    assert contains(saved["model"]["init_args"], given["model"]["init_args"])
    assert list(logs.glob("checkpoints/*.ckpt"))


def test_quickstart_is_short():
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 20
