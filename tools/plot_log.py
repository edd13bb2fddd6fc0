"""Draw the curves of one or several runs from their log.txt, as a PNG, PDF or SVG file.

python -m tools.plot_log DIR [DIR ...] --out curves.png [--keys train_loss test_acc1]

One panel per key. Losses of different kinds (pixels, pixels normalized per patch, cross-entropy)
cannot be compared and get a panel each. Values that are not finite are gaps.
"""

import argparse
import json
import logging
import math
import sys
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from util.io.errors import UserError
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch
from util.vis.figures import DPI, FONT_SIZE, check_format, plain, save_figure, style_axes, wrap

logger = logging.getLogger(__name__)

USUAL_KEYS = ("train_loss", "test_loss", "test_acc1")
PANEL = (3.3, 2.4)  # inches
MAX_COLUMNS = 3
FEW = 25  # points that get a marker each
LINE_STYLES = ("-", "--", ":", "-.")  # each for as many runs as there are colors

Curve = list[tuple[float, float]]  # (epoch, value), epochs ascending


def get_args_parser() -> FlagParser:
    parser = FlagParser("python -m tools.plot_log", description=__doc__.splitlines()[0])
    flag = partial(add_flag, parser)
    flag("runs", str, None, "output folder of a run, or its log.txt", nargs="+", metavar="DIR")
    flag("--out", str, None, "file to write: .png, .pdf or .svg", required=True)
    text = f"entries of log.txt to draw (default: {', '.join(USUAL_KEYS)}, if present)"
    flag("--keys", str, None, text, nargs="+", metavar="KEY")
    flag("--log_scale", bool, False, "logarithmic axes for the values")
    flag("--caption", str, None, "text below the panels")
    return parser


def read_log(source: str) -> dict[str, Curve]:
    """Curves of a run by key; where an epoch was logged twice, the later line counts."""
    path = find_log(source)
    if not path.is_file():
        below = sorted(str(log.parent) for log in Path(source).glob("**/log.txt"))
        remedy = f"name runs below it: {' '.join(below)}" if below else "name a run's output folder"
        raise UserError(f"There is no file {path}; {remedy}.")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    epochs = {}
    for index, line in enumerate(lines):
        stats = parse_line(line)
        if stats is not None:
            epochs[stats.get("epoch", index)] = stats
        elif index == len(lines) - 1:  # the run was interrupted while writing it
            logger.warning("%s: the last line is incomplete and left out", path)
        elif line.strip():
            raise UserError(
                f"Line {index + 1} of {path} is not the JSON of an epoch; name a run's log.txt."
            )
    if not epochs:
        raise UserError(f"{path} holds no finished epoch yet; wait for the first.")
    curves: dict[str, Curve] = {}
    for epoch, stats in sorted(epochs.items()):
        for key, value in stats.items():
            if isinstance(value, int | float) and key != "epoch":
                curves.setdefault(key, []).append((epoch, float(value)))
    return curves


def find_log(source: str) -> Path:
    return Path(source, "log.txt") if Path(source).is_dir() else Path(source)


def parse_line(line: str) -> dict | None:
    """One line of log.txt; None if it is not a JSON object."""
    try:
        stats = json.loads(line)
    except json.JSONDecodeError:
        return None
    return stats if isinstance(stats, dict) else None


def choose_keys(logs: dict[str, dict[str, Curve]], wanted: list[str] | None) -> list[str]:
    """The wanted keys, by default the usual ones that some run has."""
    present = sorted({key for curves in logs.values() for key in curves})
    chosen = wanted or [key for key in USUAL_KEYS if key in present]
    missing = [key for key in chosen if key not in present]
    if missing or not chosen:
        raise UserError(
            f"No run has {', '.join(missing or USUAL_KEYS)}; --keys can name {', '.join(present)}."
        )
    return chosen


def name_runs(sources: list[str]) -> list[str]:
    """The last part of each path, or the whole path if the last parts are not distinct."""
    folders = [Path(s).parent if Path(s).name == "log.txt" else Path(s) for s in sources]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def read_loss_kind(source: str, curves: dict[str, Curve]) -> str:
    """What the losses of a run are: only losses of one kind can be compared.

    The log of a fine-tuning run has test results; run.json beside it holds the flags.
    """
    if any(key.startswith("test_") for key in curves):
        return "cross-entropy"
    path = find_log(source).with_name("run.json")
    flags = (parse_line(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    normalized = flags.get("args", {}).get("norm_pix_loss")
    return {None: "MSE", False: "MSE of pixels", True: "MSE of normalized pixels"}[normalized]


def unit_of(key: str, loss_kind: str) -> str:
    """The unit of a key's values, or the kind of a loss; '' if there is none."""
    if key.endswith("_loss"):
        return loss_kind
    return "%" if "_acc" in key or key.endswith("_mean_class") else ""


def draw_curves(
    panels: dict[tuple[str, str], dict[str, Curve]],
    log_scale: bool = False,
    caption: str | None = None,
) -> Figure:
    """A panel for each (key, unit) with the curves of the runs, {name: curve}."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    styles = {
        name: dict(color=f"C{i % 10}", linestyle=LINE_STYLES[i // 10 % len(LINE_STYLES)])
        for i, name in enumerate(names)
    }
    num_columns = min(len(panels), MAX_COLUMNS)
    num_rows = math.ceil(len(panels) / num_columns)
    width = PANEL[0] * num_columns
    entry = 0.5 + max(map(len, names)) * 0.6 * FONT_SIZE / 72  # of the legend, inches
    legend_columns = max(1, int(width / entry))
    height = PANEL[1] * num_rows + 0.16 * math.ceil(len(names) / legend_columns)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    lines = {}
    for i, ((key, unit), curves) in enumerate(panels.items()):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        lines |= draw_panel(axes, curves, styles)
        axes.set_ylabel(plain(f"{key} ({unit})" if unit else key))
        if log_scale:
            axes.set_yscale("log", nonpositive="mask")  # values that are not positive are gaps
    options = dict(ncols=legend_columns, fontsize=FONT_SIZE, frameon=False)
    figure.legend(lines.values(), map(plain, lines), loc="outside upper left", **options)
    if caption:
        text = wrap(caption, int(width * DPI))
        figure.supxlabel(plain(text), fontsize=FONT_SIZE, x=0.01, ha="left")
    return figure


def draw_panel(axes: Axes, curves: dict[str, Curve], styles: dict[str, dict]) -> dict:
    """The curves of one key and their grid; returns {name: line}."""
    lines = {}
    for name, curve in curves.items():
        values = [value if math.isfinite(value) else math.nan for _, value in curve]
        style = styles[name] | dict(marker="o" if len(curve) < FEW else None, markersize=3)
        (lines[name],) = axes.plot([epoch for epoch, _ in curve], values, linewidth=1.2, **style)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="0.9", linewidth=0.6)
    style_axes(axes)
    return lines


def main(args: argparse.Namespace) -> None:
    check_format(args.out)
    args.runs = list({find_log(run).resolve(): run for run in args.runs}.values())
    names = name_runs(args.runs)
    logs = {name: read_log(source) for name, source in zip(names, args.runs, strict=True)}
    kinds = [read_loss_kind(*run) for run in zip(args.runs, logs.values(), strict=True)]
    panels = {}
    for key in choose_keys(logs, args.keys):
        for (name, log), kind in zip(logs.items(), kinds, strict=True):
            if key in log:
                panels.setdefault((key, unit_of(key, kind)), {})[name] = log[key]
    save_figure(draw_curves(panels, args.log_scale, args.caption), args.out)
    logger.info("Curves in %s", args.out)


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
