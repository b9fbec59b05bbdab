"""BlockLossTracker: alone, in real Trainer runs on several loggers, and as seen in TensorBoard."""

import csv
import io
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from toolbox import Classifier, MemoryLogger, loader, mlp, trainer
from torch.nn import functional as F

from lightning_bcd import BCDCallback, BCDModule, BlockLossTracker

NAMES = ["net.0", "net.2", "net.4"]
PER_BLOCK = ["loss", "loss_decrease", "grad_norm", "update_norm", "visits"]
KEYS = {f"bcd/{key}/{name}" for key in PER_BLOCK for name in NAMES} | {"bcd/active", "bcd/optimizer_bytes"}


# -- alone -------------------------------------------------------------------------------------------------------


def test_a_summary_is_the_mean_of_every_block_in_this_epoch():
    tracker = BlockLossTracker(num_blocks=3)
    for block, loss in ((0, 3.0), (1, torch.tensor(5.0)), (0, 1.0)):
        tracker.record(block, loss)
    summary = tracker.get_epoch_summary()
    assert list(summary) == ["block_0", "block_1", "block_2"]
    assert (summary["block_0"], summary["block_1"]) == (2.0, 5.0)
    assert math.isnan(summary["block_2"])
    assert tracker.get_epoch_summary()["block_0"] == 2.0  # asking twice changes nothing
    tracker.record(0, 7.0)  # a new epoch
    summary = tracker.get_epoch_summary()
    assert summary["block_0"] == 7.0
    assert math.isnan(summary["block_1"])


def test_curves_go_over_all_epochs_and_count_records_or_take_a_step():
    tracker = BlockLossTracker(names=["encoder", "decoder"])
    tracker.record(0, 3.0)
    tracker.record(1, torch.tensor([2.0]))
    tracker.get_epoch_summary()
    tracker.record(0, 1.0)
    tracker.record(0, 0.5, step=10)
    assert tracker.losses == {"encoder": [(0, 3.0), (2, 1.0), (10, 0.5)], "decoder": [(1, 2.0)]}


def test_a_plot_is_a_figure_and_a_png(tmp_path):
    figure_module = pytest.importorskip("matplotlib.figure")
    tracker = BlockLossTracker(names=["encoder", "decoder"])
    for step in range(6):
        tracker.record(step % 2, 1 / (1 + step))
    figure = tracker.plot_block_losses(str(tmp_path / "losses.png"))
    assert isinstance(figure, figure_module.Figure)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    for name, curve in tracker.losses.items():
        assert drawn[name] == [list(point) for point in curve]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [{}, {"num_blocks": 2, "names": ["a", "b"]}])
def test_both_or_neither_argument_is_refused(arguments):
    with pytest.raises(ValueError, match="either `num_blocks` or `names`"):
        BlockLossTracker(**arguments)


@pytest.mark.parametrize("arguments", [{"num_blocks": 0}, {"names": []}, {"names": ["a", "b", "a"]}])
def test_no_block_and_repeated_names_are_refused(arguments):
    with pytest.raises(ValueError, match="at least one block and different names"):
        BlockLossTracker(**arguments)


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_out_of_range_is_refused(index):
    tracker = BlockLossTracker(num_blocks=2)
    with pytest.raises(IndexError, match=rf"range\(2\), but got {index}"):
        tracker.record(index, 1.0)
    assert all(math.isnan(mean) for mean in tracker.get_epoch_summary().values())


# -- in a Trainer ------------------------------------------------------------------------------------------------


class Witness(Callback):
    """Measures for itself, at every optimizer step, what the tracker should report."""

    def __init__(self):
        self.steps = []
        self.losses = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.losses:
            self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [None if p.grad is None else p.grad.detach().double().clone() for p in pl_module.parameters()]
        self.gradients = gradients

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        after = [p.detach().clone() for p in pl_module.parameters()]
        moved = {i // 2 for i, (a, b) in enumerate(zip(after, self.before, strict=True)) if not torch.equal(a, b)}
        if not moved:
            return  # inside an accumulation window
        (block,) = moved
        mine = [g for i, g in enumerate(self.gradients) if i // 2 == block and g is not None]
        self.steps.append(
            {
                "block": block,
                "loss": sum(self.losses) / len(self.losses),
                "grad_norm": math.sqrt(sum(float(g.square().sum()) for g in mine)),
                "before": self.before,
                "after": after,
                "bytes": sum(
                    value.numel() * value.element_size()
                    for state in trainer.optimizers[0].state.values()
                    for value in state.values()
                ),
            }
        )
        self.losses = []


def fit(*, steps_per_block=2, strategy="cyclic", epochs=3, make=None, batch_size=8, bcd=None, **arguments):
    """Train and return (logger, what really happened, the callback)."""
    logger, witness = MemoryLogger(), Witness()
    callback = BCDCallback(strategy=strategy, steps_per_block=steps_per_block, **(bcd or {}))
    defaults = {"logger": logger, "log_every_n_steps": 1, "max_epochs": epochs}
    trainer(witness, callback, **{**defaults, **arguments}).fit(Classifier(make), loader(batch_size=batch_size))
    return logger, witness.steps, callback


def finished_visits(steps, length):
    """(first step, last step, block) of every visit that came to its end."""
    ends = range(length, len(steps) + 1, length)
    return [(end - length, end - 1, steps[end - 1]["block"]) for end in ends]


def of_block(values, block):
    return [(step, value) for step, owner, value in values if owner == block]


@pytest.mark.parametrize("strategy", ["cyclic", "random", "greedy"])
@pytest.mark.parametrize("mode", ["freeze", "mask"])
def test_every_key_is_written_once_where_it_belongs_with_the_right_value(strategy, mode):
    logger, steps, callback = fit(strategy=strategy, steps_per_block=3, epochs=7, bcd={"mode": mode})
    assert len(steps) == 42
    visits = finished_visits(steps, 3)
    written = {key for _, metrics in logger.rows for key in metrics if key.startswith("bcd/")}
    assert written == KEYS | ({"bcd/probes"} if strategy == "greedy" else set())
    assert logger.series("bcd/active") == [(first, float(block)) for first, _, block in visits]
    assert logger.series("bcd/optimizer_bytes") == [(last, float(steps[last]["bytes"])) for _, last, _ in visits]

    decreases, gradients, updates, counts = [], [], [], []
    for number, (first, last, block) in enumerate(visits):
        pairs = zip(steps[last]["after"], steps[first]["before"], strict=True)
        moves = [(a.double() - b.double()).square().sum() for a, b in pairs]
        decreases.append((last, block, steps[first]["loss"] - steps[last]["loss"]))
        gradients.append((last, block, steps[last]["grad_norm"]))
        updates.append((last, block, math.sqrt(float(sum(moves)))))
        counts.append((last, block, float(sum(block == other for *_, other in visits[: number + 1]))))
    losses = [(number, step["block"], step["loss"]) for number, step in enumerate(steps)]
    expected = {
        "loss": losses,
        "loss_decrease": decreases,
        "grad_norm": gradients,
        "update_norm": updates,
        "visits": counts,
    }
    for key, values in expected.items():
        for block, name in enumerate(NAMES):
            got, wanted = logger.series(f"bcd/{key}/{name}"), of_block(values, block)
            assert [step for step, _ in got] == [step for step, _ in wanted], key
            assert [value for _, value in got] == pytest.approx([v for _, v in wanted], rel=1e-5, abs=1e-6), key
    assert callback.tracker.update_norms == [
        (block, last, pytest.approx(norm, rel=1e-5)) for last, block, norm in updates
    ]


def test_losses_stand_where_lightning_writes_its_own():
    logger, steps, _ = fit()
    lightning = dict(logger.series("train_loss_step"))
    blocks = [pair for name in NAMES for pair in logger.series(f"bcd/loss/{name}")]
    assert dict(blocks) == lightning
    assert len(blocks) == len(lightning) == len(steps)


def test_a_value_is_never_repeated_for_a_block_that_is_not_active():
    logger, steps, _ = fit(strategy="random", epochs=4)
    for block, name in enumerate(NAMES):
        active = {number for number, step in enumerate(steps) if step["block"] == block}
        for key in PER_BLOCK:
            points = [step for step, _ in logger.series(f"bcd/{key}/{name}")]
            assert set(points) <= active
            assert len(points) == len(set(points))


def test_an_unfinished_visit_writes_its_losses_only():
    logger, steps, _ = fit(steps_per_block=4, epochs=1)
    assert [step["block"] for step in steps] == [0, 0, 0, 0, 1, 1]
    assert [step for step, _ in logger.series("bcd/loss/net.2")] == [4, 5]
    for key in PER_BLOCK[1:]:
        assert logger.series(f"bcd/{key}/net.0")
        assert not logger.series(f"bcd/{key}/net.2")


def test_losses_are_thinned_and_the_end_of_a_visit_is_always_written():
    logger, _, _ = fit(steps_per_block=10, epochs=5, log_every_n_steps=4)
    # Every fourth step of the block and the last one of the visit.
    assert [step for step, _ in logger.series("bcd/loss/net.0")] == [3, 7, 9]
    assert [step for step, _ in logger.series("bcd/loss/net.2")] == [13, 17, 19]
    assert [step for step, _ in logger.series("bcd/update_norm/net.0")] == [9]


def test_no_block_is_thinned_away_when_visits_are_shorter_than_the_interval():
    logger, _, _ = fit(steps_per_block=2, epochs=3, log_every_n_steps=50)
    for block, name in enumerate(NAMES):
        last = [2 * block + 1 + 6 * sweep for sweep in range(3)]
        for key in PER_BLOCK:
            assert [step for step, _ in logger.series(f"bcd/{key}/{name}")] == last


def test_an_accumulation_window_is_one_step_with_its_mean_loss():
    logger, steps, _ = fit(batch_size=4, accumulate_grad_batches=3)
    assert len(steps) == 12
    losses = sorted(pair for name in NAMES for pair in logger.series(f"bcd/loss/{name}"))
    assert [step for step, _ in losses] == list(range(12))
    assert [value for _, value in losses] == pytest.approx([step["loss"] for step in steps], rel=1e-5)
    norms = sorted(pair for name in NAMES for pair in logger.series(f"bcd/grad_norm/{name}"))
    assert norms == [
        (last, pytest.approx(steps[last]["grad_norm"], rel=1e-5)) for _, last, _ in finished_visits(steps, 2)
    ]


def test_gradient_norms_are_those_before_clipping():
    logger, steps, _ = fit(gradient_clip_val=1e-3)
    norms = sorted(pair for name in NAMES for pair in logger.series(f"bcd/grad_norm/{name}"))
    assert [value for _, value in norms] == pytest.approx([step["grad_norm"] for step in steps[1::2]], rel=1e-5)
    assert min(value for _, value in norms) > 2e-3


@pytest.mark.parametrize("policy", ["reset", "offload", "keep"])
def test_optimizer_bytes_follow_the_policy(policy):
    logger, _, _ = fit(bcd={"optimizer_state": policy})
    layers = [mlp()[i] for i in (0, 2, 4)]
    # Adam: two float32 moments per element, one float32 counter per parameter.
    sizes = [sum(8 * p.numel() + 4 for p in layer.parameters()) for layer in layers]
    seen = [value for _, value in logger.series("bcd/optimizer_bytes")]
    assert seen == ([sizes[0], sum(sizes[:2])] + [sum(sizes)] * 7 if policy == "keep" else sizes * 3)


def test_probes_count_the_full_backward_passes():
    logger, steps, _ = fit(strategy="greedy", epochs=4, bcd={"refresh_every": 3})
    assert len(finished_visits(steps, 2)) == 12
    # The pass over three blocks ends with a measurement, then every third visit does.
    assert [value for _, value in logger.series("bcd/probes")] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_every_logger_gets_the_same(tmp_path):
    memory, rows = MemoryLogger(), CSVLogger(tmp_path, name="", version="csv")
    board = TensorBoardLogger(tmp_path, name="", version="board")
    fit(strategy="greedy", epochs=4, logger=[memory, rows, board])
    with open(tmp_path / "csv" / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for key in sorted(KEYS | {"bcd/probes"}):
        expected = memory.series(key)
        assert expected
        assert [(int(row["step"]), float(row[key])) for row in table if row[key]] == expected
        in_events = [(event.step, event.value) for event in events.Scalars(key)]
        assert in_events == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_without_a_logger_losses_are_kept_at_the_logging_interval():
    _, steps, callback = fit(steps_per_block=6, logger=False, log_every_n_steps=3)
    assert callback.tracker.losses == {
        name: [(step, pytest.approx(steps[step]["loss"], rel=1e-6)) for step in (6 * block + 2, 6 * block + 5)]
        for block, name in enumerate(NAMES)
    }


def test_the_trackers_curves_are_what_was_written():
    logger, _, callback = fit()
    assert callback.tracker.losses == {name: logger.series(f"bcd/loss/{name}") for name in NAMES}


def test_a_resumed_run_goes_on_where_the_curves_ended(tmp_path):
    def run(epochs, checkpoint=None):
        logger = MemoryLogger()
        save = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        callback = BCDCallback(strategy="random", steps_per_block=4, optimizer_state="keep")
        settings = {"log_every_n_steps": 1, "max_epochs": epochs, "enable_checkpointing": True}
        fitter = trainer(callback, save, logger=logger, **settings)
        fitter.fit(Classifier(), loader(), ckpt_path=checkpoint)
        return logger, callback.tracker

    whole_logger, whole = run(4)
    run(1)
    logger, tracker = run(4, tmp_path / "epoch=0.ckpt")
    assert tracker.losses == whole.losses
    for name in NAMES:
        # The visit that the checkpoint cut in two (steps 4-7) has no update norm, everything else is there.
        for key in PER_BLOCK:
            expected = [(step, value) for step, value in whole_logger.series(f"bcd/{key}/{name}") if step >= 6]
            if key == "update_norm":
                expected = [(step, value) for step, value in expected if step != 7]
            assert logger.series(f"bcd/{key}/{name}") == expected
    assert [step for _, step, norm in tracker.update_norms if math.isnan(norm)] == [7]


def test_manual_optimization_writes_the_same_keys():
    class Net(BCDModule):
        def __init__(self):
            super().__init__(inner_steps=2, optimizer=torch.optim.Adam)
            self.net = mlp()

        def block_loss(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

    logger, net = MemoryLogger(), Net()
    trainer(logger=logger, log_every_n_steps=1, max_epochs=1).fit(net, loader())
    assert {key for _, metrics in logger.rows for key in metrics if key.startswith("bcd/")} == KEYS
    assert logger.series("bcd/active") == [(batch, float(batch % 3)) for batch in range(6)]
    assert logger.series("bcd/visits/net.2") == [(1, 1.0), (4, 2.0)]
    for block, name in enumerate(NAMES):
        losses = logger.series(f"bcd/loss/{name}")
        assert [step for step, _ in losses] == [block, block, block + 3, block + 3]  # two inner steps per batch
        decreases = [(step, first - last) for (step, first), (_, last) in zip(losses[::2], losses[1::2], strict=True)]
        assert logger.series(f"bcd/loss_decrease/{name}") == decreases
        assert all(value > 0 for _, value in decreases)


# -- in TensorBoard ----------------------------------------------------------------------------------------------


def test_tensorboard_has_a_chart_of_all_blocks_and_an_image_of_update_norms(tmp_path):
    pytest.importorskip("matplotlib")
    fit(logger=TensorBoardLogger(tmp_path, name="", version="run"))
    events = EventAccumulator(str(tmp_path / "run")).Reload()

    tag = metadata.CONFIG_SUMMARY_TAG
    assert events.SummaryMetadata(tag).plugin_data.plugin_name == metadata.PLUGIN_NAME
    layout = layout_pb2.Layout.FromString(events.Tensors(tag)[0].tensor_proto.string_val[0])
    (category,) = layout.category
    (chart,) = category.chart
    (pattern,) = chart.multiline.tag
    assert (category.title, chart.title) == ("bcd", "loss per block")
    scalars = events.Tags()["scalars"]
    assert sorted(tag for tag in scalars if re.match(pattern, tag)) == [f"bcd/loss/{name}" for name in NAMES]

    assert events.Tags()["images"] == ["bcd/update_norms"]
    image = events.Images("bcd/update_norms")[-1]
    assert image.step == 18
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert min(image.width, image.height) > 100


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url):
    # Without the proxies of the environment: the server is on this machine.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
        return json.load(answer)


@pytest.fixture
def tensorboard(tmp_path):
    """The address of a TensorBoard that shows one short run."""
    fit(logger=TensorBoardLogger(tmp_path / "logs", name="", version="run"))
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "logs")]
    with open(tmp_path / "server.txt", "w") as output:
        server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None, (tmp_path / "server.txt").read_text()
            assert time.monotonic() < deadline, "TensorBoard did not show the run within a minute"
            try:
                if len(get(f"{address}/data/plugin/scalars/tags").get("run", ())) >= len(KEYS):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.slow
def test_the_tensorboard_page_shows_the_loss_of_every_block(tensorboard, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium to open TensorBoard with")
    tags = get(f"{tensorboard}/data/plugin/scalars/tags")["run"]
    assert set(tags) >= KEYS
    (category,) = get(f"{tensorboard}/data/plugin/custom_scalars/layout")["category"]
    assert category["chart"][0]["multiline"]["tag"] == ["bcd/loss/.*"]

    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--no-proxy-server", "--window-size=1400,2000"]
    # Cards are drawn when they come into view, so every frame of the virtual time must be drawn.
    command += ["--virtual-time-budget=20000", "--run-all-compositor-stages-before-draw", "--dump-dom"]
    command += [f"{tensorboard}/?tagFilter=bcd%2Floss%2F#timeseries"]
    # Virtual time does not wait for the server: on a busy machine the page may be dumped before its data came.
    for attempt in range(6):
        profile = f"--user-data-dir={tmp_path / f'profile{attempt}'}"
        page = subprocess.run([*command, profile], capture_output=True, text=True, timeout=90, check=True).stdout
        missing = [name for name in NAMES if f'title="bcd/loss/{name}"' not in page]
        if not missing:
            break
    assert "<title>TensorBoard</title>" in page
    assert not missing


def test_a_saved_tracker_continues_in_the_middle_of_an_epoch():
    first, second = BlockLossTracker(num_blocks=2), BlockLossTracker(num_blocks=2)
    for loss in (4.0, 2.0, 3.0):
        first.record(0, loss)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.record(1, 100.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for tracker in (first, second):
        tracker.record(0, 7.0)
        tracker.record(1, 1.0)
    assert first.get_epoch_summary() == second.get_epoch_summary() == {"block_0": 4.0, "block_1": 1.0}
    assert first.losses == second.losses


def test_a_saved_state_does_not_change_when_the_tracker_goes_on():
    tracker, other = BlockLossTracker(num_blocks=1), BlockLossTracker(num_blocks=1)
    tracker.record(0, 1.0)
    state = tracker.state_dict()
    tracker.record(0, 9.0)
    other.load_state_dict(state)
    assert other.get_epoch_summary() == {"block_0": 1.0}
