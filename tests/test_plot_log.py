"""tools/plot_log.py: which numbers are read from log.txt, and where they stand in the picture."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools import plot_log
from util.io.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def write_log(folder: Path, lines: list[dict | str]) -> Path:
    folder.mkdir(parents=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log.txt").write_text("\n".join(texts) + "\n")
    return folder


def test_reading(tmp_path):
    """The later line of an epoch counts; lists and texts are no curves."""
    lines = [
        {"train_loss": 3.0, "epoch": 0, "note": "x"},
        {"train_loss": 2.0, "epoch": 1},
        {"train_loss": 1.5, "test_acc1": 10, "epoch": 1},
    ]
    folder = write_log(tmp_path / "run", lines)
    curves = plot_log.read_log(str(folder))
    assert curves == {"train_loss": [(0, 3.0), (1, 1.5)], "test_acc1": [(1, 10.0)]}
    assert plot_log.read_log(str(folder / "log.txt")) == curves


def test_a_torn_last_line_is_left_out(tmp_path, caplog):
    folder = write_log(tmp_path / "run", [{"train_loss": 3.0, "epoch": 0}, '{"train_lo'])
    assert plot_log.read_log(str(folder)) == {"train_loss": [(0, 3.0)]}
    assert "incomplete" in caplog.text


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="output folder of a run"):
        plot_log.read_log(str(tmp_path))
    other = write_log(tmp_path / "a", ["hello", {"epoch": 0}])
    with pytest.raises(ValueError, match="Line 1"):
        plot_log.read_log(str(other))
    (tmp_path / "a" / "log.txt").write_text("")
    with pytest.raises(ValueError, match="no finished epoch"):
        plot_log.read_log(str(other))


def test_keys():
    logs = {"a": {"train_loss": [], "x": []}, "b": {"test_acc1": []}}
    assert plot_log.choose_keys(logs, None) == ["train_loss", "test_acc1"]
    assert plot_log.choose_keys(logs, ["x"]) == ["x"]
    with pytest.raises(ValueError, match="No run has y; --keys can name test_acc1, train_loss, x"):
        plot_log.choose_keys(logs, ["x", "y"])
    with pytest.raises(ValueError, match="can name x"):
        plot_log.choose_keys({"a": {"x": []}}, None)


def test_names():
    assert plot_log.name_runs(["/p/a/", "/q/b/log.txt"]) == ["a", "b"]
    assert plot_log.name_runs(["/p/a", "/q/a"]) == ["/p/a", "/q/a"]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.71, 1.78), (2.2936, 2.3015), (9.2, 83.7), (-3, 1e-4), (5, 5), (0, 0)],
)
def test_ticks(low, high):
    ticks = plot_log.nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 6
    assert ticks[0] <= low + 1e-9 * step and ticks[-1] >= high - 1e-9 * step
    if high > low:
        assert ticks[0] > low - step and ticks[-1] < high + step
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(mantissa == pytest.approx(nice) for nice in (1, 2, 5))
    assert all(b - a == pytest.approx(step) for a, b in zip(ticks, ticks[1:], strict=False))


def test_ticks_of_epochs():
    assert plot_log.nice_ticks(0, 19, 1.0, 11) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert plot_log.nice_ticks(0, 1, 1.0, 11) == [0, 1]
    assert plot_log.nice_ticks(0, 799, 1.0, 11) == [100 * i for i in range(9)]


def pixels_of(area: Image.Image, color: tuple) -> set[tuple[int, int]]:
    """Places of exactly that colour."""
    return {
        (x, y)
        for x in range(area.width)
        for y in range(area.height)
        if area.getpixel((x, y)) == color
    }


def test_points_stand_where_they_belong():
    """Few points get a dot each; a value in the middle of the axes is in the middle."""
    blue, green = plot_log.COLORS[0], plot_log.COLORS[2]
    curves = {"a": [(0, 0.0), (5, 1.0), (10, 0.5)], "b": [(5, 0.0)]}
    area = plot_log.draw_area(curves, {"a": blue, "b": green}, [0, 10], [0.0, 1.0])
    gap, width, height = plot_log.GAP, plot_log.WIDTH, plot_log.HEIGHT
    assert area.size == (width + 2 * gap, height + 2 * gap)
    found = pixels_of(area, blue)
    places = [(gap, gap + height), (gap + width // 2, gap), (gap + width, gap + height // 2)]
    assert set(places) <= found
    quarter = (gap + width // 4, gap + height // 2)  # on the line between two points
    assert any((x, quarter[1]) in found for x in range(quarter[0] - 2, quarter[0] + 3))
    dot = pixels_of(area, green)
    assert (gap + width // 2, gap + height) in dot
    assert all(abs(x - gap - width // 2) <= 3 and abs(y - gap - height) <= 3 for x, y in dot)


def test_values_that_are_not_finite_cut_the_curve():
    curve = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, math.inf)]
    assert plot_log.finite_parts(curve) == [[(0, 1.0), (1, 2.0)], [(3, 3.0)]]
    assert plot_log.finite_parts([(0, math.nan)]) == []
    plot_log.draw_panel({"a": [(0, math.nan)]}, {"a": plot_log.COLORS[0]})  # axes alone


def test_command(tmp_path):
    """In a process of its own, two runs of different keys."""
    first = write_log(tmp_path / "a", [{"train_loss": 1 / (i + 1), "epoch": i} for i in range(9)])
    second = write_log(
        tmp_path / "b", [{"train_loss": 1.0, "test_acc1": 10.0 * i, "epoch": i} for i in range(3)]
    )
    out = tmp_path / "curves.png"
    command = [sys.executable, "-m", "tools.plot_log", first, second, "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with Image.open(out) as picture:
        assert picture.width > plot_log.WIDTH and picture.height > 2 * plot_log.HEIGHT
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert {plot_log.COLORS[0], plot_log.COLORS[1]} <= colors


def test_main_refuses_another_kind_of_picture(tmp_path):
    args = plot_log.get_args_parser().parse_args([str(tmp_path), "--out", "curves.jpg"])
    with pytest.raises(ValueError, match="must end in .png"):
        plot_log.main(args)
