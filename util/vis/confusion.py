"""The confusion matrix of a classifier as a figure; K classes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from util.vis.figures import DPI, add_heat_map, fit, new_figure

SIDE = 4 * DPI  # pixels of the matrix, about
MAX_CELL, MIN_CELL = int(0.6 * DPI), 2  # pixels
NAME_CELL = 20  # pixels of a cell beside which a class name fits
MAX_NAMED = 100  # classes
NAME_LENGTH = 24  # letters


def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """Counts (K, K), rows true, columns predicted; the color is the fraction of the true class.

    Class names up to MAX_NAMED classes, else ticks by index; counts while they fit into the cells.
    """
    counts = matrix.cpu().numpy()
    num_classes = len(counts)
    cell = max(MIN_CELL, min(MAX_CELL, SIDE // num_classes))
    names = None
    if num_classes <= MAX_NAMED:
        cell = max(cell, NAME_CELL)
        names = [shorten(name) for name in classes]
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    texts = np.where(counts, np.char.mod("%d", counts), "")
    options = dict(cmap="Blues", vmin=0, vmax=1, texts=texts, text_size=6)
    figure, label = new_figure(), "fraction of the true class"
    axes = add_heat_map(figure, fractions, 0, 0, cell, cell, (names, names), label, **options)
    kind = "class" if names else "class index"
    axes.set_xlabel(f"predicted {kind}")
    axes.set_ylabel(f"true {kind}")
    if names:
        axes.tick_params(axis="x", labelrotation=90)
    return fit(figure)


def shorten(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
