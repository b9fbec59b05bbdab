import importlib.util
import re
import sys

import pytest
import torch
import yaml

import lightning_bcd
from lightning_bcd.cli import main
from lightning_bcd.models import MLPClassifier

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("jsonargparse", reason="the extra `cli` is not installed")

CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 6,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "BCDCallback", "init_args": {"strategy": "greedy", "steps_per_block": 2}}],
    },
    "model": {"class_path": "MLPClassifier", "init_args": {"widths": [64, 16, 16, 10]}},
    "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 32}},
}


@pytest.fixture(autouse=True)
def _search_path(monkeypatch):
    """The command line makes the current folder importable; forget it after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def config(tmp_path):
    """Return a function that writes CONFIG with changed callback arguments and returns its path."""

    def write(init_args=None, **top):
        content = yaml.safe_load(yaml.safe_dump({**CONFIG, **top}))
        content["trainer"]["callbacks"][0]["init_args"].update(init_args or {})
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def refuse(capsys, *arguments):
    """Run with bad input; check the exit code and that stderr is one line, and return that line."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "UserWarning" not in line and "seed" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("lightning-bcd: error: ")
    return lines[0]


# -- the frame ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("demo",), ("blocks",), ("fit",), ("validate",), ("test",), ("predict",)])
def test_every_command_has_help(command, capsys):
    assert main([*command, "--help"]) == 0
    assert "usage: lightning-bcd" in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-bcd {lightning_bcd.__version__}\n"


def test_arguments_come_from_the_process_by_default(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lightning-bcd", "--version"])
    assert main() == 0
    assert lightning_bcd.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("demo", "--epochs", "0"), "expected a positive integer, but got '0'"),
        (("demo", "--epochs", "two"), "expected a positive integer, but got 'two'"),
        (("demo", "--data-dir", "nowhere"), "train-images-idx3-ubyte.gz"),
        (("blocks",), "required: --model"),
        (("fit", "--config", "nowhere.yaml"), "nowhere.yaml"),
        (("fit", "--model", "NoSuchModel"), "NoSuchModel"),
        (("fit", "--model", "MLPClassifier", "--model.widths", "[64]"), "Expected argument `widths`"),
    ],
)
def test_bad_arguments_end_with_one_line_and_exit_code_2(arguments, message, capsys):
    assert message in refuse(capsys, *arguments)


def test_a_missing_data_folder_leaves_no_output_behind(tmp_path, capsys):
    refuse(capsys, "demo", "--data-dir", "nowhere", "--output", "out")
    assert not (tmp_path / "out").exists()


def test_a_bug_in_the_users_model_keeps_its_traceback(tmp_path, config):
    (tmp_path / "buggy.py").write_text(
        "from lightning_bcd.models import MLPClassifier\n"
        "class Buggy(MLPClassifier):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        raise ValueError('a bug')\n"
    )
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", "--config", config(model={"class_path": "buggy.Buggy"})])


# -- fit, validate, test, predict -----------------------------------------------------------------------------


def test_fit_trains_bfloat16_weights_with_all_memory_options(tmp_path, config):
    options = {
        "optimizer_state": "offload",
        "step_in_backward": True,
        "keep_residual": True,
        "rounding": "nearest",
        "expand": "sign",
        "expand_lr": 0.001,
    }
    trainer = {**CONFIG["trainer"], "precision": "bf16-true"}
    assert main(["fit", "--config", config(options, trainer=trainer)]) == 0
    checkpoint = next((tmp_path / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)
    assert {weight.dtype for weight in saved["state_dict"].values()} == {torch.bfloat16}
    assert len(saved["callbacks"]["BCDCallback"]["run"]["masters"]["residuals"]) == 4


def test_fit_refuses_expansion_without_a_learning_rate(capsys, config):
    assert "`expand_lr`" in refuse(capsys, "fit", "--config", config({"expand": "sgd"}))


def test_fit_writes_a_configuration_that_runs_again_with_the_same_result(tmp_path, config):
    assert main(["fit", "--config", config()]) == 0
    first = tmp_path / "lightning_logs" / "version_0"
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["strategy"] == "greedy"
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    second = tmp_path / "lightning_logs" / "version_1"
    weights = [
        torch.load(next((run / "checkpoints").glob("*.ckpt")), weights_only=True)["state_dict"]
        for run in (first, second)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "init_args",
    [
        {"strategy": {"class_path": "GreedyStrategy", "init_args": {"visit_penalty": 0.5}}},
        {"strategy": {"class_path": "CyclicStrategy", "init_args": {"reverse": True}}, "mode": "mask"},
        {"blocks": {"body": "hidden", "head": "output"}, "optimizer_state": "keep"},
        {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}},
    ],
    ids=["greedy object", "cyclic object", "named blocks", "optimizer"],
)
def test_fit_takes_every_kind_of_callback_argument_from_yaml_and_back(init_args, config, tmp_path):
    assert main(["fit", "--config", config(init_args)]) == 0
    saved = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    assert main(["fit", "--config", str(saved), "--trainer.fast_dev_run", "1"]) == 0


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_loops_run_from_the_same_file(command, config, tmp_path, capsys):
    assert main([command, "--config", config(), "--trainer.logger", "false"]) == 0
    # The configuration that was read is still what it was: without a logger nothing is saved over it.
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG
    if command != "predict":
        assert "_acc" in capsys.readouterr().out


def test_test_loads_a_checkpoint_of_fit(config, tmp_path, capsys):
    path = config()
    assert main(["fit", "--config", path]) == 0
    checkpoint = next((tmp_path / "lightning_logs").rglob("*.ckpt"))
    assert main(["test", "--config", path, "--ckpt_path", str(checkpoint), "--trainer.logger", "false"]) == 0
    assert "test_acc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"steps_per_block": "ten"}, "Parser key \"steps_per_block\": Expected a <class 'int'>. Got value: ten"),
        ({"steps_per_block": 0}, "Expected argument `steps_per_block`"),
        ({"strategy": "gready"}, "'gready'"),
        ({"strategy": {"class_path": "GreedyStrategy", "init_args": {"visit_penalty": -1.0}}}, "`visit_penalty`"),
        ({"blocks": "nonsense"}, "'nonsense'"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_bad_values_in_yaml_end_with_one_line_and_exit_code_2(init_args, message, config, capsys):
    assert message in refuse(capsys, "fit", "--config", config(init_args), "--trainer.logger", "false")


def test_yaml_that_cannot_be_parsed_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("trainer: [1")
    assert "line 1" in refuse(capsys, "fit", "--config", "broken.yaml")


# -- blocks ---------------------------------------------------------------------------------------------------


SMALL = ["blocks", "--model", "lightning_bcd.models.MLPClassifier", "--model-args", '{"widths": [64, 32, 10]}']


def kib(count):
    return f"{count / 1024:.1f} KiB"


def test_blocks_shows_the_table_and_the_memory(capsys):
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    # 2,410 weights of 4 bytes, 2,080 of them in the first block; AdamW keeps two more and a counter per parameter.
    assert re.search(rf"net\.hidden1 +2,080 .* {kib(12 * 2080)}\n", out)
    assert re.search(rf"\nweights +{kib(4 * 2410)} +{kib(4 * 2410)}\n", out)
    assert re.search(rf"\ngradients +{kib(4 * 2080)} +{kib(4 * 2410)}\n", out)
    assert re.search(rf"\noptimizer state +{kib(8 * 2080 + 8)} +{kib(8 * 2410 + 16)}\n", out)
    assert re.search(rf"\npeak +{kib(4 * 2410 + 12 * 2080 + 8)} +{kib(16 * 2410 + 16)}\n", out)
    assert "largest block: net.hidden1" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "block", "rows"),
    [
        (["--optimizer", "SGD"], 4, {"gradients": 4 * 2080, "optimizer state": 0}),
        (["--optimizer", "torch.optim.SGD", "--optimizer-args", '{"momentum": 0.9}'], 8, {"optimizer state": 4 * 2080}),
        (["--precision", "64-true"], 24, {"weights": 8 * 2410, "gradients": 8 * 2080}),
        # The float32 gradients, and in bfloat16 the larger one of the two: 64 × 32 weights.
        (["--precision", "bf16-true"], 18, {"gradients": 4 * 2080 + 2 * 2048, "float32 masters": 4 * 2080}),
        (["--step-in-backward"], 12, {"gradients": 4 * 2048}),
        (["--optimizer-state", "keep"], 12, {"optimizer state": 8 * 2410 + 16}),
        (["--optimizer-state", "offload"], 12, {"in host memory": 8 * 2410 + 16}),
    ],
)
def test_blocks_counts_for_the_training_it_is_told(arguments, block, rows, capsys):
    assert main([*SMALL, *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"net\.hidden1 +2,080 .* {kib(block * 2080)}\n", out)
    for name, count in rows.items():
        assert re.search(rf"\n{name} +{kib(count) if count else '0 B'}", out)


def test_blocks_takes_an_optimizer_from_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "myoptimizers.py").write_text(
        "import torch\ndef make(parameters): return torch.optim.Adam(parameters, amsgrad=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([*SMALL, "--optimizer", "myoptimizers.make"]) == 0
    assert kib(12 * 2080 + 8) in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", ["mymodels.make", "mymodels:make", "mymodels.READY", "mymodels:Space.Net", "mymodels.Space.Net"]
)
def test_blocks_finds_classes_functions_and_models_in_the_current_folder(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "mymodels.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))\n"
        "READY = make()\n"
        "class Space:\n"
        "    class Net(nn.Sequential):\n"
        "        def __init__(self): super().__init__(nn.Linear(2, 3), nn.Linear(3, 1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    assert main(["blocks", "--model", path]) == 0
    assert "blocks: 2" in capsys.readouterr().out


def test_blocks_passes_its_options_on(capsys):
    arguments = ["blocks", "--model", "lightning_bcd.models.MLPClassifier", "--block-type", "linear"]
    assert main([*arguments, "--num-blocks", "2"]) == 0
    assert "blocks: 2" in capsys.readouterr().out
    assert main([*arguments, "--max-parameters", "20000"]) == 0
    assert "net.hidden2.bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.Net"], "'nowhere.Net': there is no such module"),
        (["lightning_bcd.models:Nope"], "has no 'Nope'"),
        (["math.pi"], "a class, a function without arguments or an nn.Module"),
        (["os.getcwd"], "but got a str"),
        (["torch.nn.Linear"], "missing 2 required positional arguments"),
        (["lightning_bcd.models.MLPClassifier", "--model-args", "{"], "expected a JSON object"),
        (["lightning_bcd.models.MLPClassifier", "--model-args", "[1]"], "expected a JSON object"),
        (["lightning_bcd.models.MLPClassifier", "--block-type", "what"], "'what'"),
        (["lightning_bcd.models.MLPClassifier", "--num-blocks", "9"], "at most 3"),
        (["broken_module.Net"], "SyntaxError"),
    ],
)
def test_blocks_explains_bad_models_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_module.py").write_text("def")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert message in refuse(capsys, "blocks", "--model", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "Nope"], "a class of torch.optim or the import path"),
        (["--optimizer", "math.pi"], "a class of torch.optim or the import path"),
        (["--optimizer", "nowhere.make"], "Expected argument `--optimizer` to be an import path"),
        (["--optimizer", "LBFGS", "--optimizer-args", '{"momentum": 1}'], "unexpected keyword argument 'momentum'"),
        (["--optimizer-args", "3"], "expected a JSON object"),
        (["--precision", "fp8"], "`precision` to be one of 32-true"),
        (["--optimizer-state", "drop"], "invalid choice: 'drop'"),
    ],
)
def test_blocks_explains_what_it_cannot_count_in_one_line(arguments, message, capsys):
    assert message in refuse(capsys, *SMALL, *arguments)


def test_an_error_about_blocks_prints_the_coverage_table_as_output(capsys):
    arguments = ["--model", "lightning_bcd.models.MLPClassifier", "--model-args", '{"widths": [64, 10]}']
    assert main(["blocks", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "net.output" in captured.out


# -- demo -----------------------------------------------------------------------------------------------------


def test_demo_trains_both_ways_and_leaves_tables_plots_and_logs(tmp_path, capsys, recwarn):
    threads = torch.get_num_threads()
    assert main(["demo", "--epochs", "2", "--output", "my out"]) == 0
    captured = capsys.readouterr()
    assert "Both runs take 90 optimizer steps" in captured.out
    for block in ("net.hidden1", "net.hidden4", "net.output"):
        assert block in captured.out
    # Measured bytes: the largest of the blocks against all of them, plus Adam's step counters.
    assert "0.30x" in captured.out
    assert "tensorboard --logdir 'my out/tensorboard'" in captured.out
    assert captured.err == ""
    assert not [warning for warning in recwarn if "lightning" in str(warning.filename)]
    assert torch.get_num_threads() == threads
    for name in ("bcd", "adam"):
        assert list((tmp_path / "my out" / "tensorboard" / name).glob("events.out.tfevents.*"))
    if importlib.util.find_spec("matplotlib"):
        for name in ("loss_curves", "block_losses", "update_norms"):
            assert (tmp_path / "my out" / f"{name}.png").stat().st_size > 5000


def test_a_second_demo_replaces_the_logs_of_the_first_and_rich_is_optional(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    events = []
    for _ in range(2):
        assert main(["demo", "--epochs", "1", "--output", "out"]) == 0
        assert re.search(r"^ *net\.hidden1 +16,640 ", capsys.readouterr().out, re.MULTILINE)
        events.append({path.name for path in (tmp_path / "out").rglob("events.out.tfevents.*")})
    assert events[0].isdisjoint(events[1])
    assert len(events[1]) == len(events[0])


# -- the classifier of configurations and demo ----------------------------------------------------------------


@pytest.mark.parametrize(("widths", "lr"), [([64], 1e-3), ([64, 0, 10], 1e-3), ([64, 10], 0.0)])
def test_the_classifier_refuses_bad_arguments(widths, lr):
    with pytest.raises(ValueError, match="Expected argument"):
        MLPClassifier(widths, lr=lr)


def test_the_classifier_has_the_widths_it_was_given():
    model = MLPClassifier([6, 5, 3])
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 6), (5,), (3, 5), (3,)]
    assert model(torch.randn(4, 1, 2, 3)).shape == (4, 3)
    assert model.predict_step(torch.randn(4, 6), 0).dtype == torch.int64
