"""Figures: loss of each block, loss of each method, size of the parameter updates.

The only file that imports Matplotlib, and only inside functions. Figures are made without pyplot: there is no
global state, no window, and nothing to close.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

#: Okabe and Ito's colours without yellow, which is too light for a line on white; safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
LEGEND_INSIDE = 8  # lines; with more the legend stands beside the axes
LEGEND_OUTSIDE = 24  # lines; with more a colour bar replaces the legend
MAX_LABELS = 40  # names along an axis
MAX_NAME = 32  # characters
PICTURE_SUFFIXES = (".png", ".pdf", ".svg")


def plot_block_losses(
    losses: Mapping[str, Sequence[float] | Sequence[tuple[int, float]]], path: str | Path | None = None
) -> Figure:
    """Plot the loss of every block, one line per block.

    Args:
        losses: Block name → losses in order, drawn over the block's own record index 0, 1, …; or → pairs
            (step, loss). A block without record keeps its place in the legend.
        path: Where to save the figure: `.png` (also without a suffix), `.pdf` or `.svg`.

    Returns:
        The Matplotlib figure.

    Raises:
        ValueError: If there is no block, a curve is neither numbers nor pairs, or the suffix is unknown.
        ModuleNotFoundError: If Matplotlib is not installed.
    """
    curves = {name: _numbers("losses", name, values) for name, values in losses.items()}
    if bad := [name for name, values in curves.items() if values.ndim == 2 and values.shape[1] != 2]:
        raise _expected("losses", f"numbers or (step, loss) pairs for {bad[0]!r}", f"shape {curves[bad[0]].shape}")
    steps = any(values.ndim == 2 for values in curves.values())
    figure, axes = _canvas("losses", losses)
    for name, values, colour in zip(_labels(list(curves)), curves.values(), _colours(len(curves)), strict=True):
        x, y = values.T if values.ndim == 2 else (np.arange(len(values), dtype=np.float64), values)
        _line(axes, x, y, name, colour)
    axes.set_xlabel("optimizer step" if steps else "record of the block")
    axes.set_ylabel("loss")
    _log_scale(axes, [values[:, 1] if values.ndim == 2 else values for values in curves.values()])
    _legend(figure, axes, list(curves))
    return _save(figure, path)


def plot_loss_curves(
    curves: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
    path: str | Path | None = None,
    *,
    ylabel: str = "training loss",
    xlabel: str = "epoch",
) -> Figure:
    """Plot one curve per method; several seeds become their mean with a band of ± one standard deviation.

    The axis of losses is logarithmic when all values are positive and span more than a decade; a band that would
    reach below the smallest seed ends there then.

    Args:
        curves: Method → one loss per epoch, or → one such list per seed, all of one length.
        path: See `plot_block_losses`.
        ylabel: Label of the vertical axis.
        xlabel: Label of the horizontal axis, which counts from 1.

    Returns:
        The Matplotlib figure.

    Raises:
        ValueError: If there is no curve, the seeds of a method differ in length, or the suffix is unknown.
        ModuleNotFoundError: If Matplotlib is not installed.
    """
    seeds = {name: np.atleast_2d(_numbers("curves", name, values)) for name, values in curves.items()}
    figure, axes = _canvas("curves", curves)
    log = _log_scale(axes, list(seeds.values()))
    for name, values, colour in zip(_labels(list(seeds)), seeds.values(), _colours(len(seeds)), strict=True):
        x = np.arange(1, values.shape[1] + 1, dtype=np.float64)
        mean = values.mean(axis=0)
        if len(values) > 1:
            deviation = values.std(axis=0, ddof=1)
            lower = np.maximum(mean - deviation, values.min(axis=0)) if log else mean - deviation
            axes.fill_between(x, lower, mean + deviation, color=colour, alpha=0.2, linewidth=0)
        _line(axes, x, mean, name, colour)
    if (many := max(map(len, seeds.values()))) > 1:
        axes.set_title(f"mean ± standard deviation of {many} seeds", fontsize="medium")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _count_along_x(axes)
    _legend(figure, axes, list(seeds))
    return _save(figure, path)


def visualize_parameter_updates(
    update_norms: Mapping[str, Sequence[float]], path: str | Path | None = None, *, xlabel: str = "visit"
) -> Figure:
    """Draw ‖Δθ_block‖₂ as a heat map of blocks × time, the first block on top.

    NaN and zero mean "not updated" and stay blank. The colours are logarithmic when the norms span more than a
    decade.

    Args:
        update_norms: Block name → L2 norm of its update at each visit (or step, or epoch), in the units of the
            parameters; all of one length.
        path: See `plot_block_losses`.
        xlabel: What a column is; columns count from 1.

    Returns:
        The Matplotlib figure.

    Raises:
        ValueError: If there is no block, the rows differ in length or hold a negative or infinite norm, or the
            suffix is unknown.
        ModuleNotFoundError: If Matplotlib is not installed.
    """
    _require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    names = list(update_norms)
    rows = [_numbers("update_norms", name, values) for name, values in update_norms.items()]
    if not rows or len({row.shape for row in rows}) > 1 or rows[0].ndim != 1:
        raise _expected("update_norms", "one row per block, all of one length", [row.shape for row in rows])
    table = np.stack(rows)
    if (table < 0).any() or np.isinf(table).any():
        raise _expected("update_norms", "non-negative numbers or NaN", "a negative or infinite norm")
    table = np.where(table > 0, table, np.nan)
    positive = table[~np.isnan(table)]

    figure = Figure(figsize=(8, float(np.clip(1.6 + 0.28 * len(names), 2.4, 10))), layout="constrained")
    axes = figure.subplots()
    low, high = (positive.min(), positive.max()) if positive.size else (0.0, 1.0)
    scale: Normalize = LogNorm(low, high) if _spans_decade([positive]) else Normalize(0, high)
    image = axes.imshow(
        np.ma.masked_invalid(table),
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(bad="white"),
        norm=scale,
        extent=(0.5, max(table.shape[1], 1) + 0.5, len(names) - 0.5, -0.5),
    )
    figure.colorbar(image, ax=axes, label="‖Δθ‖₂ (units of θ)")
    axes.set_title("blank: not updated", loc="right", fontsize="small", color="0.4")
    shown = range(0, len(names), -(-len(names) // MAX_LABELS))
    axes.set_yticks(list(shown), [_labels(names)[i] for i in shown], fontsize="small")
    if len(names) <= MAX_LABELS:
        # Faint lines lead from a name to its cells where most are blank.
        axes.set_yticks(np.arange(0.5, len(names) - 1), minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="minor", axis="y", color="0.85", linewidth=0.6)
    _count_along_x(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("block")
    return _save(figure, path)


def _expected(name: str, wanted: str, got: object) -> ValueError:
    return ValueError(f"Expected argument `{name}` to be {wanted}, but got {got}. Correct the values to plot.")


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need Matplotlib, which is not installed. Run: pip install 'lightning-bcd[plot]'"
        ) from error


def _numbers(argument: str, name: str, values: Sequence[Any]) -> Array:
    """Turn numbers, pairs or lists of numbers into an array of one or two dimensions."""
    try:
        array: Array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise _expected(argument, f"numbers, or lists of one length, for {name!r}", f"{values!r:.80}") from error
    if array.ndim not in (1, 2):
        raise _expected(argument, f"numbers, or lists of numbers, for {name!r}", f"shape {array.shape}")
    return array


def _canvas(argument: str, curves: Mapping[str, Any]) -> tuple[Figure, Axes]:
    _require_matplotlib()
    from matplotlib.figure import Figure

    if not curves:
        raise _expected(argument, "a mapping with at least one curve", "an empty one")
    outside = len(curves) > LEGEND_INSIDE
    figure = Figure(figsize=(9.5 if outside else 7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _count_along_x(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _colours(count: int) -> list[Any]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps

    # Blocks come in order, so neighbours may look alike; the light end of the map is left out.
    return [colormaps["viridis"](0.92 * i / (count - 1)) for i in range(count)]


def _line(axes: Axes, x: Array, y: Array, name: str, colour: Any) -> None:
    # A line through one point is invisible.
    axes.plot(x, y, label=name, color=colour, linewidth=1.6, marker="o" if len(y) == 1 else None, markersize=4)


def _labels(names: Sequence[str]) -> list[str]:
    """Shorten long names, but never so far that two of them look the same."""
    if max(map(len, names)) <= MAX_NAME:
        return list(names)
    paths = [name.split(".") for name in names]
    shared = (
        len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*(path[:-1] for path in paths), strict=False))))
        if len(names) > 1
        else 0
    )
    rest = [f"…{'.'.join(path[shared:])}" if shared else name for path, name in zip(paths, names, strict=True)]
    half = MAX_NAME // 2
    cut = [name if len(name) <= MAX_NAME else f"{name[: half - 1]}…{name[-half:]}" for name in rest]
    return cut if len(set(cut)) == len(names) else rest


def _spans_decade(values: Sequence[Array]) -> bool:
    together = np.concatenate([part.ravel() for part in values])
    finite = together[np.isfinite(together)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 10 * finite.min())


def _log_scale(axes: Axes, values: Sequence[Array]) -> bool:
    log = _spans_decade(values)
    if log:
        axes.set_yscale("log")
    return log


def _legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    if len(names) <= LEGEND_INSIDE:
        axes.legend(frameon=False, fontsize="small")
    elif len(names) <= LEGEND_OUTSIDE:
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        scale = ScalarMappable(Normalize(-0.5, len(names) - 0.5), ListedColormap(_colours(len(names))))
        bar = figure.colorbar(scale, ax=axes)
        shown = np.linspace(0, len(names) - 1, 12).round().astype(int).tolist()
        bar.set_ticks(shown, labels=[_labels(names)[i] for i in shown], fontsize="small")
        bar.ax.invert_yaxis()


def _save(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        target = Path(path)
        target = target if target.suffix else target.with_suffix(".png")
        if target.suffix not in PICTURE_SUFFIXES:
            raise _expected("path", f"a file name that ends with one of {PICTURE_SUFFIXES}", repr(str(path)))
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
    return figure
