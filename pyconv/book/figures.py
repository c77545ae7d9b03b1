"""The figures of the report as SVG: curves over epochs, digits with label and prediction, filters.

What is drawn follows from the arguments alone: no clock, no random ids, no settings of the user's matplotlib.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

_PAPER, _TEXT, _SOFT, _LINE, _WRONG = "#ffffff", "#1b2127", "#59646f", "#d8dee4", "#c2410c"
_SERIES = ("#1f6fb5", "#d35f00", "#0a8f6a", "#a8479a", "#7a6a00")

_VARIABLES = {
    _PAPER: "background",
    _TEXT: "text",
    _SOFT: "soft",
    _LINE: "line",
    _WRONG: "loss",
    **{color: f"series-{number}" for number, color in enumerate(_SERIES, 1)},
}
"""Of the page's style sheet, by the colour that stands for them in a figure of its own."""

_STYLE = {
    "font.size": 10,
    "text.color": _TEXT,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "grid.color": _LINE,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.facecolor": _PAPER,
    "svg.fonttype": "none",  # text that can be read, searched and scaled, in the reader's font
    "svg.hashsalt": "pyconv.book",
}
# A phone shows a figure at three quarters of this width, so that its text stays readable there.
_WIDTH = 4.6  # inches


@dataclass(frozen=True)
class Series:
    """One thing measured in several runs.

    Attributes:
        label: for the legend.
        runs: one list for each run, with a value for each epoch; all of one length. Zeros leave a gap.
    """

    label: str
    runs: Sequence[Sequence[float]]


def curves(series: Sequence[Series], title: str) -> str:
    """Values, on a logarithmic axis with this title, over the epochs: runs thin, means bold; five series at most."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, 2.9 + 0.19 * len(series)), layout="constrained")
        axes = figure.add_subplot()
        for one, color in zip(series, _SERIES):
            values = np.array(one.runs, dtype=float)
            epochs = np.arange(1, values.shape[1] + 1)
            # With few epochs lines are too short to be seen.
            marker = "o" if len(epochs) <= 5 else ""
            if len(values) > 1:
                for run in values:
                    axes.plot(epochs, run, color=color, linewidth=0.7, alpha=0.45)
            axes.plot(
                epochs, values.mean(axis=0), color=color, linewidth=2.2, marker=marker, markersize=5, label=one.label
            )
        positive = [value for one in series for run in one.runs for value in run if value > 0]
        if positive:
            axes.set_yscale("log", nonpositive="mask")
            decades = math.log10(max(positive) / min(positive))
            subs = (1, 1.5, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 2.5 else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epochs of training")
        axes.set_ylabel(title)
        figure.legend(loc="outside upper left", ncols=1)
        return _svg(figure)


_GAP, _NUMBERS = 4, 9  # pixels of a digit: between two of them, and for the two numbers on the right


def digits(images: Tensor, labels: Sequence[int], predictions: Sequence[int], columns: int = 8) -> str:
    """Digits (n, side, side), 0 to 1, with the label top right and the prediction bottom right of each."""
    pictures = images.numpy()
    n, side = len(pictures), pictures.shape[1]
    columns = min(columns, n)
    rows = -(-n // columns)
    tile_height, tile_width = side, side + _NUMBERS
    sheet = np.zeros((rows * (tile_height + _GAP) - _GAP, columns * (tile_width + _GAP) - _GAP))
    with matplotlib.style.context(["default", _STYLE]):
        figure, axes = _sheet(sheet.shape, _WIDTH * sheet.shape[1] / (8 * (tile_width + _GAP) - _GAP))
        for number, picture in enumerate(pictures):
            top = number // columns * (tile_height + _GAP)
            left = number % columns * (tile_width + _GAP)
            sheet[top : top + tile_height, left : left + tile_width] = 0.06  # the tile can be seen
            ink = sheet[top : top + tile_height, left : left + side]
            np.maximum(ink, picture, out=ink)
            for text, place, align, color in (
                (labels[number], top + 1, "top", _TEXT),
                (predictions[number], top + tile_height - 1, "bottom", _WRONG),
            ):
                axes.text(left + tile_width - 1, place, str(text), ha="right", va=align, fontsize=9, color=color)
        # Ink of some opacity on nothing: the page's own background is the paper.
        pixels = np.zeros((*sheet.shape, 4), dtype=np.uint8)
        pixels[..., 3] = np.rint(255 * sheet)
        _draw(axes, pixels)
        return _svg(figure)


def filters(weights: Tensor, limit: float, columns: int = 5) -> str:
    """Filters (filters, maps, height, width), the darker the larger: black from `limit` on, white from its negative.

    Several maps make a row for each filter, with a column for each map; a single one is set in `columns`.
    """
    values = weights.numpy()
    if values.shape[1] == 1:
        columns = min(columns, len(values))
        rows = -(-len(values) // columns)
    else:
        rows, columns = values.shape[:2]
    height, width = values.shape[2:]
    tiles = values.reshape(-1, height, width)
    pixels = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 4), dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * (height + 1), number % columns * (width + 1)
        place = pixels[top : top + height, left : left + width]
        place[..., :3] = np.rint(127.5 * (1 - (tile / limit).clip(-1, 1)))[..., None]
        place[..., 3] = 255
    with matplotlib.style.context(["default", _STYLE]):
        figure, axes = _sheet(pixels.shape[:2], min(_WIDTH, 0.11 * pixels.shape[1]))
        _draw(axes, pixels)
        return _svg(figure)


def themed(svg: str, name: str) -> str:
    """The SVG for the inside of an HTML page, in colours of its style sheet: ``var(--text)`` and so on.

    Args:
        name: of the figure, which makes its ids those of no other figure of the page.
    """
    inside = svg[svg.index("<svg") :]
    inside = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"| *<style.*?</style>\n', "", inside, flags=re.DOTALL)
    inside = re.sub(r'(\bid="|="#|url\(#)', rf"\g<1>{name}-", inside)
    inside = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*; ", "", inside)
    return re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found.group()]})", inside)


def _sheet(shape: tuple[int, ...], width: float) -> tuple[Figure, Axes]:
    """Axes of rows x columns pixels without anything around, `width` inches wide."""
    rows, columns = shape
    figure = Figure(figsize=(width, width * rows / columns))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    return figure, axes


def _draw(axes: Axes, pixels: np.ndarray) -> None:
    """RGBA pixels on the axes of `_sheet`, as they are: whoever shows the figure scales them."""
    rows, columns = pixels.shape[:2]
    axes.imshow(pixels, interpolation="none", extent=(0, columns, rows, 0))


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    FigureCanvasSVG(figure)  # without pyplot, which would look for a display
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    return file.getvalue()
