"""Draw the curves of one or several runs, from their log.txt, as a PNG file.

python -m tools.plot_log DIR [DIR ...] --out curves.png [--keys train_loss test_acc1]
"""

import argparse
import json
import logging
import math
from pathlib import Path

from PIL import Image, ImageDraw

from util.io.errors import UserError
from util.run.launch import launch
from util.vis.figures import (
    GAP,
    INK,
    PAPER,
    Page,
    check_png,
    font,
    line_height,
    save_png,
    text_width,
)

logger = logging.getLogger(__name__)

USUAL_KEYS = ("train_loss", "test_loss", "test_acc1")
WIDTH, HEIGHT = 640, 260  # of the area inside the axes
FEW = 25  # points that get a dot each
FINE = 3  # curves are drawn so many times larger, then reduced: smooth lines
PALE = (225, 225, 225)
COLORS = (
    (35, 100, 190),
    (215, 95, 20),
    (30, 140, 90),
    (175, 45, 130),
    (120, 90, 200),
    (150, 120, 20),
    (70, 170, 200),
    (90, 90, 90),
)

Curve = list[tuple[float, float]]  # (epoch, value), epochs ascending
Color = tuple[int, int, int]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot_log", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "runs", nargs="+", metavar="DIR", help="output folder of a run, or its log.txt"
    )
    parser.add_argument("--out", required=True, help="PNG file to write")
    parser.add_argument(
        "--keys",
        nargs="+",
        metavar="KEY",
        help=f"entries of log.txt to draw (default: those of {', '.join(USUAL_KEYS)} that there "
        "are)",
    )
    return parser


def read_log(source: str) -> dict[str, Curve]:
    """Curves of a run by key; where an epoch was logged twice, the later line counts.

    A last line that an interrupted run left half written is skipped with a warning.

    Raises:
        UserError: there is no log.txt.
        UserError: it holds no finished epoch, or a line that is not of a log.
    """
    path = Path(source, "log.txt") if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise UserError(f"There is no file {path}; name the output folder of a run.")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    epochs = {}
    for number, line in enumerate(lines):
        stats = parse_line(line)
        if stats is not None:
            epochs[stats.get("epoch", number)] = stats
        elif number == len(lines) - 1:
            logger.warning("%s: the last line is incomplete and left out", path)
        elif line.strip():
            raise UserError(
                f"Line {number + 1} of {path} is not the JSON of an epoch; name a run's log.txt."
            )
    if not epochs:
        raise UserError(f"{path} holds no finished epoch yet; wait for the first.")
    curves: dict[str, Curve] = {}
    for epoch, stats in sorted(epochs.items()):
        for key, value in stats.items():
            if isinstance(value, int | float) and key != "epoch":
                curves.setdefault(key, []).append((epoch, float(value)))
    return curves


def parse_line(line: str) -> dict | None:
    """One line of log.txt; None where it is not a JSON object."""
    try:
        stats = json.loads(line)
    except json.JSONDecodeError:
        return None
    return stats if isinstance(stats, dict) else None


def choose_keys(logs: dict[str, dict[str, Curve]], wanted: list[str] | None) -> list[str]:
    """Which keys to draw.

    Raises:
        UserError: no run has one of the wanted keys, or any of the usual ones.
    """
    there = sorted({key for curves in logs.values() for key in curves})
    chosen = wanted or [key for key in USUAL_KEYS if key in there]
    missing = [key for key in chosen if key not in there]
    if missing or not chosen:
        raise UserError(
            f"No run has {', '.join(missing or USUAL_KEYS)}; --keys can name {', '.join(there)}."
        )
    return chosen


def name_runs(sources: list[str]) -> list[str]:
    """The last part of each path, or all of it where the last parts are not distinct."""
    folders = [Path(s).parent if Path(s).name == "log.txt" else Path(s) for s in sources]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def nice_ticks(low: float, high: float, smallest: float = 0.0, at_most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low to high.

    Args:
        smallest: distance between two of them.
    """
    if high <= low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / (at_most - 1)))
    steps = [max(factor * power, smallest) for factor in (1, 2, 5, 10, 20)]
    step = next(step for step in steps if count_ticks(low, high, step) <= at_most)
    first = math.floor(low / step + 1e-9)
    return [(first + i) * step for i in range(count_ticks(low, high, step))]


def count_ticks(low: float, high: float, step: float) -> int:
    """How many multiples of step reach from at or below low to at or above high."""
    return math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9) + 1


def draw_legend(curves: dict[str, Curve], colors: dict[str, Color]) -> Image.Image:
    """A line per run: its colour, its name, its last value."""
    lines = [
        (colors[name], f"{name}: {curve[-1][1]:.4g} at epoch {curve[-1][0]:g}")
        for name, curve in curves.items()
    ]
    start = 3 * GAP
    width = start + max(text_width(text) for _, text in lines)
    legend = Image.new("RGB", (width, line_height() * len(lines)), PAPER)
    draw = ImageDraw.Draw(legend)
    for i, (color, text) in enumerate(lines):
        middle = int((i + 0.5) * line_height())
        draw.line((0, middle, start - GAP, middle), color, 3)
        draw.text((start, middle), text, INK, font(), anchor="lm")
    return legend


def draw_panel(curves: dict[str, Curve], colors: dict[str, Color]) -> Image.Image:
    """Curves of one key in their axes, with tick labels left and below."""
    points = [point for curve in curves.values() for part in finite_parts(curve) for point in part]
    xs, ys = zip(*(points or [(0.0, 0.0)]), strict=True)
    x_ticks = nice_ticks(min(xs), max(max(xs), min(xs) + 1), smallest=1.0, at_most=11)
    y_ticks = nice_ticks(min(ys), max(ys))
    left = max(text_width(f"{value:g}") for value in y_ticks) + 2 * GAP
    right = max(GAP, text_width(f"{x_ticks[-1]:g}") // 2)
    panel = Image.new("RGB", (left + WIDTH + right, HEIGHT + 2 * GAP + 3 * line_height()), PAPER)
    panel.paste(draw_area(curves, colors, x_ticks, y_ticks), (left - GAP, 0))
    draw = ImageDraw.Draw(panel)
    bottom = GAP + HEIGHT
    for value in y_ticks:
        y = bottom - round(share(value, y_ticks) * HEIGHT)
        draw.text((left - 2 * GAP, y), f"{value:g}", INK, font(), anchor="rm")
    for value in x_ticks:
        x = left + round(share(value, x_ticks) * WIDTH)
        draw.text((x, bottom + GAP), f"{value:g}", INK, font(), anchor="ma")
    draw.text((left + WIDTH // 2, bottom + GAP + line_height()), "epoch", INK, font(), anchor="ma")
    return panel


def draw_area(curves, colors, x_ticks: list[float], y_ticks: list[float]) -> Image.Image:
    """Axes, grid and curves without text; a margin of GAP on all sides."""
    width, height, margin = WIDTH * FINE, HEIGHT * FINE, GAP * FINE
    area = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PAPER)
    draw = ImageDraw.Draw(area)

    def at(x: float, y: float) -> tuple[float, float]:
        return margin + share(x, x_ticks) * width, margin + (1 - share(y, y_ticks)) * height

    for i, y in enumerate(y_ticks):
        draw.line((at(x_ticks[0], y), at(x_ticks[-1], y)), PALE if i else INK, FINE)
    for i, x in reversed(list(enumerate(x_ticks))):
        draw.line((at(x, y_ticks[0]), at(x, y_ticks[-1])), PALE if i else INK, FINE)
    for name, curve in curves.items():
        for part in finite_parts(curve):
            places = [at(x, y) for x, y in part]
            draw.line(places, colors[name], 2 * FINE, joint="curve")
            for x, y in places if len(places) < FEW else ():
                r = 3 * FINE
                draw.ellipse((x - r, y - r, x + r, y + r), colors[name])
    return area.resize((WIDTH + 2 * GAP, HEIGHT + 2 * GAP), Image.Resampling.BOX)


def share(value: float, ticks: list[float]) -> float:
    """Where a value stands on its axis: 0 at the first tick, 1 at the last."""
    return (value - ticks[0]) / (ticks[-1] - ticks[0])


def finite_parts(curve: Curve) -> list[Curve]:
    """The curve, cut where a value is not a finite number."""
    parts: list[Curve] = [[]]
    for point in curve:
        if math.isfinite(point[1]):
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def main(args: argparse.Namespace) -> None:
    check_png(args.out)
    names = name_runs(args.runs)
    logs = {name: read_log(source) for name, source in zip(names, args.runs, strict=True)}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(logs)}
    page = Page()
    for key in choose_keys(logs, args.keys):
        curves = {name: log[key] for name, log in logs.items() if key in log}
        page.add_text(key)
        page.add_picture(draw_legend(curves, colors))
        page.add_picture(draw_panel(curves, colors))
    picture = page.draw()
    save_png(picture, args.out)
    logger.info("%s: %d x %d pixels", args.out, picture.shape[2], picture.shape[1])


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
