"""Draw loss and kNN of pre-training against time and FLOPs, from docs/results.

python scripts/experiments/figures.py --data elpv    # docs/images/elpv-cost.png
"""

import sys

import common
from matplotlib.figure import Figure
from pretraining_helps import ARMS

from tools.plot_log import FONT_SIZE, draw_panel
from util.run.flags import add_flag
from util.vis.figures import DPI, save_figure

NUM_IMAGES = {"fashion-mnist": 60_000, "elpv": 2_100}
TRAINING = 3  # FLOPs of a step over those of its forward pass, about: backward takes two


def draw_costs(rows: dict[str, dict], num_images: int) -> Figure:
    """Panels of loss and kNN (rows) against minutes and TFLOP (columns), a line per arm."""
    figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
    styles = {arm: dict(color=f"C{i}") for i, arm in enumerate(rows)}
    units = {
        "minutes": {arm: row["seconds_per_epoch"] / 60 for arm, row in rows.items()},
        "TFLOP": {arm: TRAINING * row["mflop"] * num_images / 1e6 for arm, row in rows.items()},
    }
    curves = {
        "loss (MSE of normalized pixels)": {a: [*enumerate(r["losses"])] for a, r in rows.items()},
        "kNN accuracy, %": {
            a: [(int(e), k) for e, k in r["curve"].items()] for a, r in rows.items()
        },
    }
    for i, (label, by_arm) in enumerate(curves.items()):
        for j, (unit, per_epoch) in enumerate(units.items()):
            axes = figure.add_subplot(2, 2, 1 + 2 * i + j)
            scaled = {
                arm: [((epoch + 1) * per_epoch[arm], value) for epoch, value in curve]
                for arm, curve in by_arm.items()
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
    parser = common.get_args_parser(__doc__)
    text = "data set of pretraining_helps.py"
    add_flag(parser, "--data", str, "elpv", text, choices=list(NUM_IMAGES))
    name = parser.parse_args().data
    found = {row["arm"]: row for row in common.read_results(f"pretraining-{name}")["rows"]}
    rows = {arm: found[arm] for arm in ARMS if arm in found}
    if not rows:
        sys.exit(f"There are no runs of {name} yet: run pretraining_helps.py --data {name} first.")
    save_figure(draw_costs(rows, NUM_IMAGES[name]), common.ROOT / f"docs/images/{name}-cost.png")
