"""tools/plot_log.py: which values are read from log.txt, and where they are drawn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_python
from test_visualize import assert_axes_do_not_overlap

from tools import plot_log
from util.io.errors import UserError
from util.vis.figures import figure_to_array

ROOT = Path(__file__).resolve().parent.parent


def write_log(folder: Path, lines: list[dict | str]) -> Path:
    folder.mkdir(parents=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log.txt").write_text("\n".join(texts) + "\n")
    return folder


def test_reading(tmp_path):
    """The later line of an epoch counts; lists and strings are no curves."""
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
    with pytest.raises(UserError, match="name a run's output folder"):
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


def draw(out: Path, *flags) -> None:
    plot_log.main(plot_log.get_args_parser().parse_args([*map(str, flags), "--out", str(out)]))


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn instead of saved."""
    found = []
    monkeypatch.setattr(plot_log, "save_figure", lambda figure, out: found.append(figure))
    return found


def labels_of(figure) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes]


def test_curves_labels_and_colors(tmp_path, figures):
    """A panel per key with the logged points; a run has one color and one name everywhere."""
    points = [{"train_loss": 3 - i, "test_acc1": 20.0 * i, "epoch": i} for i in range(3)]
    first, second = (write_log(tmp_path / name, points[: 3 - i]) for i, name in enumerate("a_"))
    draw("x.png", first, second, "--caption", "Mine.")
    (figure,) = figures
    assert labels_of(figure) == ["train_loss (cross-entropy)", "test_acc1 (%)"]
    for axes, values in zip(figure.axes, ([3, 2, 1], [0, 20, 40]), strict=True):
        assert axes.get_xlabel() == "epoch" and axes.get_yscale() == "linear"
        assert [line.get_ydata().tolist() for line in axes.lines] == [values, values[:2]]
        assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1, 2], [0, 1]]
        assert [line.get_color() for line in axes.lines] == ["C0", "C1"]
        assert all(line.get_visible() for line in axes.get_xgridlines() + axes.get_ygridlines())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["a", "_"]
    assert [line.get_color() for line in legend.get_lines()] == ["C0", "C1"]
    assert figure.get_supxlabel() == "Mine."
    draw("x.png", first)
    assert figures[1].get_supxlabel() == "" and not figures[1].texts


def test_points_are_where_they_belong():
    """In pixels: the line goes through the middle of the axes, dots mark few points."""
    figure = plot_log.draw_curves({("x", ""): {"a": [(0, 0.0), (10, 1.0)], "b": [(5, 1.0)]}})
    page = figure_to_array(figure).transpose(1, 2, 0)
    axes = figure.axes[0]
    blue, orange = (31, 119, 180), (255, 127, 14)
    for point, color in (((0, 0), blue), ((5, 0.5), blue), ((10, 1), blue), ((5, 1), orange)):
        x, y = axes.transData.transform(point)
        assert tuple(page[len(page) - 1 - int(y), int(x)]) == color
    x, y = axes.transData.transform((5, 0.25))
    assert tuple(page[len(page) - 1 - int(y), int(x) + 9]) == (255, 255, 255)


@pytest.mark.parametrize("num_panels, columns, rows", [(1, 1, 1), (2, 2, 1), (4, 3, 2)])
def test_panels_have_one_size_and_do_not_overlap(num_panels, columns, rows):
    panels = {(f"key{i}", ""): {"a": [(0, 0.0), (1, 1.0)]} for i in range(num_panels)}
    figure = plot_log.draw_curves(panels)
    width, height = figure.get_size_inches()
    assert width == pytest.approx(3.3 * columns)
    assert height == pytest.approx(2.4 * rows, abs=0.3)
    figure_to_array(figure)  # the layout is made when it is drawn
    assert_axes_do_not_overlap(figure)


def test_runs_of_more_than_all_colors_differ():
    curves = {f"run {i}": [(0, i), (1, i)] for i in range(25)}
    figure = plot_log.draw_curves({("x", ""): curves})
    lines = figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 25
    assert figure.get_figheight() == pytest.approx(2.4 + 9 * 0.16)  # 3 of these names in a row


def test_losses_of_different_kinds_get_a_panel_each(tmp_path, figures):
    """By run.json, and by the test results that only fine-tuning logs."""
    runs = []
    for i, norm_pix_loss in enumerate((True, False, None, True)):
        runs.append(write_log(tmp_path / f"run{i}", [{"train_loss": i, "epoch": 0}]))
        if norm_pix_loss is not None:
            text = json.dumps({"args": {"norm_pix_loss": norm_pix_loss}}, indent=1)
            (runs[i] / "run.json").write_text(text)
    fine = [{"train_loss": 4, "test_loss": 5, "test_acc1": 6, "train_lr": 7, "epoch": 0}]
    runs.append(write_log(tmp_path / "fine", fine))
    runs[0] = runs[0] / "log.txt"
    draw("x.png", *runs)
    drawn = {
        axes.get_ylabel(): [line.get_ydata()[0] for line in axes.lines] for axes in figures[0].axes
    }
    assert drawn == {
        "train_loss (MSE of normalized pixels)": [0, 3],
        "train_loss (MSE of pixels)": [1],
        "train_loss (MSE)": [2],
        "train_loss (cross-entropy)": [4],
        "test_loss (cross-entropy)": [5],
        "test_acc1 (%)": [6],
    }
    draw("x.png", *runs, "--keys", "train_lr")
    assert labels_of(figures[1]) == ["train_lr"]


def test_values_that_are_not_finite_are_gaps(tmp_path, figures):
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0]
    points = [{"train_loss": value, "epoch": i} for i, value in enumerate(values)]
    draw("x.png", write_log(tmp_path / "a", points))
    (line,) = figures[0].axes[0].lines
    expected = [1, 2, math.nan, 3, math.nan, 4]
    assert np.array_equal(line.get_ydata(), expected, equal_nan=True)
    figure_to_array(plot_log.draw_curves({("x", ""): {"a": [(0, math.nan)]}}))  # empty axes


def test_log_scale(tmp_path, figures):
    run = write_log(tmp_path / "a", [{"train_loss": i, "epoch": i} for i in range(4)])
    draw("x.png", run)
    draw("x.png", run, "--log_scale")  # the 0 is left out
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear", "log"]
    figure_to_array(figures[1])
    assert figures[1].axes[0].get_ylim()[0] > 0


def test_a_folder_of_runs_lists_them(tmp_path):
    for name in ("b", "a/deep"):
        write_log(tmp_path / name, [{"epoch": 0, "train_loss": 1.0}])
    with pytest.raises(UserError, match=f"below it: {tmp_path}/a/deep {tmp_path}/b"):
        plot_log.read_log(str(tmp_path))


def test_command(tmp_path):
    """In a process of its own, two runs of different keys; equal commands give equal files."""
    first = write_log(tmp_path / "a", [{"train_loss": 1 / (i + 1), "epoch": i} for i in range(9)])
    second = write_log(
        tmp_path / "$b$", [{"train_loss": 1.0, "test_acc1": 10.0 * i, "epoch": i} for i in range(3)]
    )
    out = tmp_path / "deep" / "curves.png"
    done = run_python("-m", "tools.plot_log", first, second, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(out) in done.stdout and len(done.stdout.splitlines()) == 1
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > image.height > 500
        colors = {color[:3] for _, color in image.getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_vector_formats(tmp_path, suffix, start):
    run = write_log(tmp_path / "a", [{"train_loss": 1.0, "epoch": 0}])
    first, second = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
    for out in (first, second):
        draw(out, run)
    assert first.read_bytes().startswith(start) and first.read_bytes() == second.read_bytes()


def test_other_formats_are_refused_before_reading(tmp_path):
    with pytest.raises(UserError, match="curves.jpg; it must end in .png, .pdf, .svg"):
        draw("curves.jpg", tmp_path / "nowhere")


def test_a_run_named_twice_is_one_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/log.txt").write_text('{"train_loss": 1.0, "epoch": 0}\n')
    flags = [str(tmp_path / "a"), str(tmp_path / "a/log.txt"), "--out", str(tmp_path / "a.png")]
    plot_log.main(plot_log.get_args_parser().parse_args(flags))
    assert (tmp_path / "a.png").stat().st_size
