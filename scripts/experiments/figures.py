"""Draw loss and kNN of pre-training on Fashion-MNIST against time and FLOPs, from docs/results.

python scripts/experiments/figures.py
"""

import common
from matplotlib.figure import Figure
from pretraining_helps import ARMS

from tools.plot_log import FONT_SIZE, draw_panel
from util.vis.figures import DPI, save_figure

TRAINING = 3  # FLOPs of a step over those of its forward pass, about: backward takes two


def draw_costs(rows: list[dict], num_images: int) -> Figure:
    """Panels of loss and kNN (rows) against minutes and TFLOP (columns), a line for each arm."""
    figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
    styles = {arm: dict(color=f"C{i}") for i, arm in enumerate(ARMS)}
    units = {
        "minutes": {row["arm"]: row["seconds_per_epoch"] / 60 for row in rows},
        "TFLOP": {row["arm"]: TRAINING * row["mflop"] * num_images / 1e6 for row in rows},
    }
    curves = {
        "loss (MSE of normalized pixels)": {r["arm"]: [*enumerate(r["losses"])] for r in rows},
        "kNN accuracy, %": {r["arm"]: [(int(e), k) for e, k in r["curve"].items()] for r in rows},
    }
    for i, (label, by_arm) in enumerate(curves.items()):
        for j, (unit, per_epoch) in enumerate(units.items()):
            axes = figure.add_subplot(2, 2, 1 + 2 * i + j)
            scaled = {
                arm: [((epoch + 1) * per_epoch[arm], value) for epoch, value in by_arm[arm]]
                for arm in ARMS
            }
            lines = draw_panel(axes, scaled, styles)
            axes.set_xlabel(unit)
            axes.set_xlim(left=0)
            axes.set_ylabel(label)
    figure.legend(
        lines.values(), lines, ncols=3, loc="outside upper left", fontsize=FONT_SIZE, frameon=False
    )
    return figure


if __name__ == "__main__":
    common.get_args_parser(__doc__).parse_args()
    rows = [r for r in common.read_results("pretraining-fashion-mnist")["rows"] if r["arm"] in ARMS]
    save_figure(draw_costs(rows, 60_000), common.ROOT / "docs/images/fashion-mnist-cost.png")
