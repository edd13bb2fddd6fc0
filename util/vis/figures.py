"""What all figures share: layout in whole pixels, heat maps, colors of images, file formats.

Figures are matplotlib's and made without pyplot: no window, no global state.

Notation: B images, C channels, H height, W width.
"""

import logging
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D
from torch import Tensor

from util.io.errors import UserError
from util.io.files import atomic_write

logging.getLogger("fontTools").setLevel(logging.WARNING)  # reports on every font in a PDF file

DPI = 256  # a power of two: inches = pixels / DPI is exact
GAP = 16  # pixels between the parts of a figure
FONT_SIZE = 7  # points
FRAME_WIDTH = 0.5  # points
LINE = round(1.3 * FONT_SIZE / 72 * DPI)  # pixels from one line of text to the next
MIN_TEXT_WIDTH = int(3.4 * DPI)  # pixels
PERCENTILES = (0.5, 99.5)  # of the values of an image that does not fill 0..1
TOLERANCE = 0.05  # beyond 0 and 1, where resizing overshoots
# formats by suffix, with the metadata that would make two equal figures different files
FORMATS = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def new_figure() -> Figure:
    """An empty figure to which the functions below add parts, anywhere; `fit` then crops it.

    Their positions are pixels of the PNG file: left counts to the right, top downwards.
    """
    figure = Figure(figsize=(1, 1), dpi=DPI)  # one inch: matplotlib's fractions are pixels / DPI
    figure.patch.set_in_layout(False)
    return figure


def add_axes(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    axes = figure.add_axes((left / DPI, 1 - (top + height) / DPI, width / DPI, height / DPI))
    style_axes(axes)
    return axes


def add_image(
    figure: Figure, image: np.ndarray, left: int, top: int, width: int, height: int, **kwargs
) -> Axes:
    """Axes without frame that the image fills; kwargs as for imshow."""
    axes = add_axes(figure, left, top, width, height)
    axes.set_axis_off()
    axes.imshow(image, **({"aspect": "auto", "interpolation": "nearest"} | kwargs))
    return axes


def add_text(figure: Figure, text: str, left: int, top: int, width: int | None = None) -> int:
    """Text, wrapped to about `width` pixels; returns where the next line would begin."""
    for line in (wrap(text, width) if width else text).split("\n"):
        baseline = top + round(0.8 * LINE)
        figure.text(left / DPI, 1 - baseline / DPI, plain(line), fontsize=FONT_SIZE)
        top += LINE
    return top


def add_colorbar(figure: Figure, image, left: int, top: int, height: int, label: str = "") -> None:
    """The color bar of what imshow returned, its ticks and label to the right."""
    bar = figure.colorbar(image, cax=add_axes(figure, left, top, GAP, height), label=label)
    bar.ax.locator_params(nbins=max(2, min(5, height // (2 * LINE))))
    bar.outline.set_linewidth(FRAME_WIDTH)


def fit(figure: Figure, *captions: str) -> Figure:
    """The figure with the captions below everything and a margin of GAP around it."""
    left, top, right, bottom = content_box(figure)
    if caption := " ".join(captions).strip():
        add_text(figure, caption, left, bottom + 2 * GAP, right - left)
        left, top, right, bottom = content_box(figure)
    width, height = right - left + 2 * GAP, bottom - top + 2 * GAP
    figure.set_size_inches(width / DPI, height / DPI)
    move = Affine2D().scale(DPI).translate(GAP - left, height - GAP + top - DPI)
    move.scale(1 / width, 1 / height)
    for axes in figure.axes:
        axes.set_position(axes.get_position().transformed(move))
    for text in figure.texts:
        text.set_position(move.transform(text.get_position()))
    return figure


def content_box(figure: Figure) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is drawn, in pixels rounded outwards."""
    box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())  # in inches
    left, top = math.floor(box.x0 * DPI), math.floor((1 - box.y1) * DPI)
    return left, top, math.ceil(box.x1 * DPI), math.ceil((1 - box.y0) * DPI)


def add_heat_map(
    figure: Figure,
    values: np.ndarray,
    left: int,
    top: int,
    cell_width: int,
    cell_height: int,
    names: tuple[Sequence[str] | None, Sequence[str] | None],
    label: str,
    texts: np.ndarray,
    text_size: float = FONT_SIZE,
    **kwargs,
) -> Axes:
    """A matrix (rows, columns) as colored cells, its color bar to the right.

    Args:
        names: of the rows and of the columns; None: ticks by index.
        label: of the color bar.
        texts: (rows, columns) to write into the cells, left out if the longest does not fit.
        kwargs: cmap, vmin and vmax, as for imshow.
    """
    height, width = values.shape[0] * cell_height, values.shape[1] * cell_width
    axes = add_axes(figure, left, top, width, height)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **kwargs)
    for axis, axis_names in zip((axes.yaxis, axes.xaxis), names, strict=True):
        if axis_names is None:
            axis.get_major_locator().set_params(integer=True)
        else:
            axis.set_ticks(range(len(axis_names)), map(plain, axis_names))
            axis.set_tick_params(length=0, labelsize=min(FONT_SIZE, 0.8 * cell_height / DPI * 72))
    em = text_size / 72 * DPI  # pixels; a digit is less than 0.7 of it wide
    if np.char.str_len(texts).max() * 0.7 * em <= cell_width and 1.2 * em <= cell_height:
        is_dark = image.to_rgba(values)[..., :3] @ (0.299, 0.587, 0.114) < 0.5
        for (row, column), text in np.ndenumerate(texts):
            ink = "white" if is_dark[row, column] else "black"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=text_size)
    add_colorbar(figure, image, left + width + GAP, top, height, label)
    return axes


def style_axes(axes: Axes) -> None:
    """Labels of FONT_SIZE and thin lines."""
    axes.tick_params(labelsize=FONT_SIZE, width=FRAME_WIDTH, length=2)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_size(FONT_SIZE)
    axes.spines[:].set_linewidth(FRAME_WIDTH)


def plain(text: str) -> str:
    """Text for matplotlib to draw as it is: `$` is no mathematics, undecodable bytes are `?`."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def wrap(text: str, width: int) -> str:
    """Lines of about `width` pixels, but at least MIN_TEXT_WIDTH."""
    letter = 0.54 * FONT_SIZE / 72 * DPI  # average width in pixels
    letters = int(max(width, MIN_TEXT_WIDTH) / letter)
    return textwrap.fill(text, letters, break_long_words=False, break_on_hyphens=False)


def to_rgb(
    imgs: Tensor, mean: Sequence[float], std: Sequence[float], windows: Tensor | None = None
) -> np.ndarray:
    """Normalized images (B, C, H, W) as pixels, uint8 (B, H, W, 3).

    1 or 2 channels: the first, as gray; more than 3: the first three. `windows` (B, 2) are the
    values shown as black and white (default: 0 and 1).
    """
    values = to_values(imgs, mean, std)
    if windows is not None:
        low, high = windows.view(-1, 2, 1, 1, 1).unbind(1)
        values = (values - low) / (high - low)
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_values(imgs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized images (B, C, H, W) in their own scale: the 3 or 1 channels that are shown."""
    shown = 3 if imgs.shape[1] >= 3 else 1
    mean, std = (torch.tensor(x[:shown], device=imgs.device).view(-1, 1, 1) for x in (mean, std))
    return imgs[:, :shown].float() * std + mean


def choose_windows(imgs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The values of each image to show as black and white, (B, 2).

    0 and 1; or the percentiles PERCENTILES, where the image exceeds these or, as 12 bits stored in
    16, fills less than a quarter of them.
    """
    values = to_values(imgs, mean, std).flatten(1).cpu()
    percentiles = np.percentile(values, PERCENTILES, axis=1).T  # (B, 2)
    low, high = values.min(1).values, values.max(1).values
    fits = (low > -TOLERANCE) & (high < 1 + TOLERANCE) & (high > 0.25) | (low == high)
    windows = np.where(fits[:, None], [0.0, 1.0], percentiles)
    return torch.tensor(windows, dtype=torch.float32, device=imgs.device)


def windows_note(windows: Tensor) -> str:
    """A sentence for the caption; empty if every image is shown from 0 to 1."""
    own = [window for window in windows.tolist() if window != [0, 1]]
    if not own:
        return ""
    which = "The image is" if len(windows) == 1 else f"{len(own)} of {len(windows)} images are"
    first = " (first: {:.3g} to {:.3g})".format(*own[0])
    return f"{which} shown between percentiles {PERCENTILES[0]:g} and {PERCENTILES[1]:g}{first}."


def check_format(path: str | Path) -> None:
    """Raises UserError unless save_figure can write that file; to be called before any work."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"--out is {path}; it must end in {', '.join(FORMATS)}.")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format of the suffix; equal figures give equal files."""
    suffix = Path(path).suffix.lower()
    settings = {"savefig.bbox": None, "svg.hashsalt": "figure", "pdf.fonttype": 42}
    with matplotlib.rc_context(settings), atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, format=suffix[1:], dpi=DPI, metadata=FORMATS[suffix])


def figure_to_array(figure: Figure) -> np.ndarray:
    """The pixels of the PNG file, uint8 (3, H, W)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1).copy()
