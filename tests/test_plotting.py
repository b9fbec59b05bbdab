import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_bcd.plotting import plot_block_losses, plot_loss_curves, visualize_parameter_updates
from lightning_bcd.tracking import BlockLossTracker

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.colors import LogNorm, to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"
FUNCTIONS = [plot_block_losses, plot_loss_curves, visualize_parameter_updates]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_plot_returns_a_figure_and_saves_a_png_without_touching_pyplot(
    function: Callable[..., Figure], tmp_path: Path
) -> None:
    import matplotlib.pyplot as plt

    for path in (tmp_path / "new folder" / "plot.png", str(tmp_path / "no_suffix")):
        assert isinstance(function({"a": [3.0, 2.0], "b": [2.0, 1.0]}, path=path), Figure)
    for file in (tmp_path / "new folder" / "plot.png", tmp_path / "no_suffix.png"):
        assert file.read_bytes().startswith(PNG)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_input_is_refused(function: Callable[..., Figure], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected argument"):
        function({})
    with pytest.raises(ValueError, match=r"Expected argument .*'a'"):
        function({"a": ["high", "low"]})
    with pytest.raises(ValueError, match="`path`"):
        function({"a": [1.0, 2.0]}, path=tmp_path / "plot.docx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_missing_matplotlib_names_the_extra(function: Callable[..., Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-bcd\[plot\]'"):
        function({"a": [1.0]})


# -- block losses -----------------------------------------------------------------------------------------


def test_block_losses_are_drawn_over_the_record_index_or_the_steps_given() -> None:
    plain = plot_block_losses({"a": [3.0, 2.0, 1.0]}).axes[0]
    assert plain.lines[0].get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]]
    steps = plot_block_losses({"a": [(10, 3.0), (50, 2.0)], "b": []}).axes[0]
    assert steps.lines[0].get_xydata().tolist() == [[10, 3], [50, 2]]
    assert (plain.get_xlabel(), steps.get_xlabel()) == ("record of the block", "optimizer step")
    assert [text.get_text() for text in steps.get_legend().get_texts()] == ["a", "b"]


def test_the_tracker_draws_its_own_records(tmp_path: Path) -> None:
    tracker = BlockLossTracker(num_blocks=2)
    for block, loss in ((0, 3.0), (1, 2.0), (0, 1.0)):
        tracker.record(block, loss)
    axes = tracker.plot_block_losses(str(tmp_path / "plot.png")).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 3], [2, 1]], [[1, 2]]]
    # A line through a single point would be invisible.
    assert axes.lines[1].get_marker() == "o"


def test_the_legend_moves_out_of_the_axes_and_then_becomes_a_colour_bar() -> None:
    def drawn(count: int) -> Figure:
        figure = plot_block_losses({f"layers.{i}": [float(i + 1), float(i + 2)] for i in range(count)})
        figure.canvas.draw()
        return figure

    few, some, many = drawn(8), drawn(9), drawn(60)
    boxes = [figure.axes[0].get_legend().get_window_extent() for figure in (few, some)]
    assert boxes[0].x0 < few.axes[0].bbox.x1
    assert boxes[1].x0 >= some.axes[0].bbox.x1
    assert boxes[1].x1 <= some.bbox.x1
    assert many.axes[0].get_legend() is None
    labels = [text.get_text() for text in many.axes[1].get_yticklabels()]
    assert (labels[0], labels[-1], len(labels)) == ("layers.0", "layers.59", 12)


@pytest.mark.parametrize("count", [2, 8, 9, 24, 25])
def test_every_line_has_a_colour_of_its_own_that_stands_out_from_white(count: int) -> None:
    axes = plot_block_losses({f"layers.{i}": [1.0, 2.0] for i in range(count)}).axes[0]
    colours = [to_rgb(line.get_color()) for line in axes.lines]
    assert len(set(colours)) == count
    assert max(float(np.dot(colour, (0.299, 0.587, 0.114))) for colour in colours) < 0.8


def legend_of(names: list[str]) -> list[str]:
    axes = plot_block_losses({name: [1.0] for name in names}).axes[0]
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_long_names_are_shortened_but_stay_different() -> None:
    names = [f"transformer.encoder.layers.{i}.attention.output.dense" for i in (3, 14)]
    assert legend_of(names) == ["…3.attention.output.dense", "…14.attention.output.dense"]
    (short,) = legend_of(names[:1])
    assert len(short) == 32
    assert short.startswith("transformer.enc…")
    # Cutting the middle would make these equal.
    alike = [f"{'x' * 20}{i}{'y' * 20}" for i in range(2)]
    assert legend_of(alike) == alike


def test_what_is_neither_a_loss_nor_a_step_and_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pairs for 'a', but got shape \(1, 3\)"):
        plot_block_losses({"a": [(1, 2.0, 3.0)]})


# -- loss curves ------------------------------------------------------------------------------------------


def test_several_seeds_become_their_mean_and_a_band_of_one_standard_deviation() -> None:
    axes = plot_loss_curves({"bcd": [[3.0, 2.0], [5.0, 4.0]], "adam": [1.0, 1.5]}).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 4], [2, 3]], [[1, 1], [2, 1.5]]]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(3 - math.sqrt(2))
    assert heights.max() == pytest.approx(4 + math.sqrt(2))
    assert "2 seeds" in axes.get_title()


def test_one_curve_has_no_band_and_tensors_are_taken() -> None:
    axes = plot_loss_curves({"bcd": [torch.tensor(2.0), torch.tensor(1.0)]}, ylabel="objective", xlabel="sweep").axes[0]
    assert len(axes.collections) == 0
    assert axes.get_title() == ""
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("objective", "sweep")


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([1.0, 0.09], "log"), ([1.0, 0.11], "linear"), ([1.0, -0.01], "linear"), ([1.0, 0.0], "linear"), ([], "linear")],
)
def test_the_scale_is_logarithmic_for_positive_losses_over_more_than_a_decade(losses: list[float], scale: str) -> None:
    assert plot_loss_curves({"bcd": losses}).axes[0].get_yscale() == scale
    assert plot_block_losses({"a": losses}).axes[0].get_yscale() == scale


def test_a_band_on_a_logarithmic_scale_stays_positive() -> None:
    axes = plot_loss_curves({"bcd": [[1.0, 0.01], [1.0, 1.0], [1.0, 0.02]]}).axes[0]
    assert axes.get_yscale() == "log"
    assert axes.collections[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(0.01)


def test_seeds_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="lists of one length, for 'bcd'"):
        plot_loss_curves({"bcd": [[1.0, 2.0], [1.0]]})


# -- updates ----------------------------------------------------------------------------------------------


def test_the_heat_map_has_one_row_per_block_and_blank_cells_where_nothing_was_updated() -> None:
    figure = visualize_parameter_updates({"first": [1.0, math.nan, 2.0], "second": [0.0, 3.0, math.nan]})
    axes, bar = figure.axes
    (image,) = axes.images
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False, True, False], [True, False, True]]
    assert image.get_array().compressed().tolist() == [1, 2, 3]
    assert image.cmap(np.ma.masked)[:3] == (1, 1, 1)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    # The first block is on top, columns count from 1.
    assert image.get_extent() == [0.5, 3.5, 1.5, -0.5]
    assert "units" in bar.get_ylabel()


def test_norms_over_more_than_a_decade_get_logarithmic_colours() -> None:
    wide = visualize_parameter_updates({"a": [0.01, math.nan], "b": [0.0, 1.0]}).axes[0].images[0]
    narrow = visualize_parameter_updates({"a": [0.5, 1.0]}).axes[0].images[0]
    assert isinstance(wide.norm, LogNorm)
    assert not isinstance(narrow.norm, LogNorm)
    assert (narrow.norm.vmin, narrow.norm.vmax) == (0, 1)


@pytest.mark.parametrize("rows", [{"a": [math.nan], "b": [math.nan]}, {"a": []}, {"a": [2.0, 2.0]}])
def test_heat_maps_of_little_data_are_drawn(rows: dict[str, list[float]], tmp_path: Path) -> None:
    visualize_parameter_updates(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_a_heat_map_of_many_blocks_labels_some_of_them() -> None:
    figure = visualize_parameter_updates({f"layers.{i}": [1.0] for i in range(100)})
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["layers.0", "layers.3"]
    assert len(labels) <= 40
    assert figure.get_figheight() <= 10


@pytest.mark.parametrize("rows", [{"a": [1.0], "b": [1.0, 2.0]}, {"a": [-1.0]}, {"a": [math.inf]}, {"a": [[1.0]]}])
def test_rows_that_make_no_table_of_norms_are_refused(rows: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="`update_norms`"):
        visualize_parameter_updates(rows)


def test_tensorboard_takes_the_figure(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    figure = visualize_parameter_updates({"a": [1.0, math.nan], "b": [math.nan, 1.0]})
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_figure("bcd/update_norms", figure, close=False)
    assert any(file.stat().st_size > 5000 for file in tmp_path.iterdir())
