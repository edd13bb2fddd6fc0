"""util/eval/report.py and util/vis/confusion.py against plain loops and hand-computed numbers."""

import csv
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import make_args, prepared

from engine_finetune import evaluate
from util.data.sources import list_images
from util.eval import predict, report
from util.vis.confusion import draw_confusion
from util.vis.figures import figure_to_array

MATRIX = torch.tensor([[3, 1, 0], [0, 4, 0], [2, 2, 4]])  # 16 images, 11 right


def read_csv(path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_predictions(image_folder, tiny_vit, tmp_path):
    """Every row against a softmax written out; the five most probable of six classes."""
    model, classes = tiny_vit(num_classes=6), ["ant", "bee", "cat", "dog", "elk, big", "fly"]
    files = [path for path, _ in list_images(image_folder / "val").samples]
    predict.predict_files(model, files, classes, make_args(), tmp_path / "predictions.csv")
    head, *rows = read_csv(tmp_path / "predictions.csv")
    assert head[:5] == ["file", "class", "probability", "class_2", "probability_2"]
    assert len(head) == 11 and [row[0] for row in rows] == files
    for row in rows:
        with torch.no_grad():
            logits = model(prepared(row[0])[None])[0].double().numpy()
        probs = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-probs)[:5]
        np.testing.assert_allclose([float(x) for x in row[2::2]], probs[order], atol=1e-5)
        for name, label in zip(row[1::2], order, strict=True):
            assert abs(probs[classes.index(name)] - probs[label]) < 1e-5


def test_predictions_of_few_classes_have_fewer_columns(image_folder, tiny_vit, tmp_path):
    files = [path for path, _ in list_images(image_folder / "val").samples]
    names = predict.name_classes(Namespace(class_names=[]), 2)
    predict.predict_files(tiny_vit(num_classes=2), files, names, make_args(), tmp_path / "p.csv")
    head, *rows = read_csv(tmp_path / "p.csv")
    assert len(head) == 5 and {row[1] for row in rows} <= {"0", "1"}
    assert all(abs(float(row[2]) + float(row[4]) - 1) < 2e-6 for row in rows)


@pytest.mark.parametrize("is_split", [False, True])
def test_confusion_counts(is_split, monkeypatch, tmp_path):
    """Against a loop over images; summed over ranks only if each holds a shard."""
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 6, generator=random), torch.randint(6, (40,), generator=random)
    batches = list(zip(logits.split(7), labels.split(7), strict=True))
    expected = torch.zeros(6, 6, dtype=torch.int64)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        expected[label, row.index(max(row))] += 1
    counts = torch.zeros(6, 6, dtype=torch.int64)
    evaluate(batches, torch.nn.Identity(), torch.device("cpu"), None, counts)
    assert counts.equal(expected)
    monkeypatch.setattr(report, "all_reduce_sum", lambda counts: counts.mul_(2))
    args = Namespace(dist_eval=is_split, rank=0, report=tmp_path)
    report.report_evaluation(args, counts, list("abcdef"))
    _, *rows = read_csv(tmp_path / "confusion.csv")
    written = [[int(x) for x in row[1:]] for row in rows]
    assert written == (expected * (2 if is_split else 1)).tolist()


def test_the_matrix_agrees_with_the_accuracy():
    """Also where bfloat16 makes several classes equal."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 50, generator=random).bfloat16()
    labels, counts = torch.arange(1000) % 50, torch.zeros(50, 50, dtype=torch.int64)
    stats = evaluate([(logits, labels)], torch.nn.Identity(), torch.device("cpu"), None, counts)
    assert stats["acc1"] == pytest.approx(counts.trace().item() / 10)


@pytest.mark.filterwarnings("ignore:Glyph")  # the font has no Chinese
def test_report_files(tmp_path):
    notes = report.write_report(tmp_path / "report", MATRIX, ["ant", "bee", "ça va 蜂"])
    assert read_csv(tmp_path / "report" / "per_class.csv") == [
        [
            "class",
            "images",
            "correct",
            "accuracy",
            "predicted",
            "precision",
            "mistaken_for",
            "times",
        ],
        ["ant", "4", "3", "75.00", "5", "60.00", "bee", "1"],
        ["bee", "4", "4", "100.00", "7", "57.14", "", "0"],
        ["ça va 蜂", "8", "4", "50.00", "4", "100.00", "ant", "2"],
    ]
    head, *rows = read_csv(tmp_path / "report" / "confusion.csv")
    assert head[1:] == ["ant", "bee", "ça va 蜂"]
    assert [[int(x) for x in row[1:]] for row in rows] == MATRIX.tolist()
    assert notes[0] == "Mean per-class accuracy 75.000, Acc@1 68.750"
    assert "8 images of ça va 蜂, 4 of ant (2.0 times as many)" in notes[1]
    assert "Acc@5 says nothing with 3 classes" in notes[2] and len(notes) == 3
    with Image.open(tmp_path / "report" / "confusion.png") as image:
        assert image.format == "PNG" and image.width > 500


def test_colors_are_fractions_of_the_row():
    figure = draw_confusion(MATRIX, ["a", "b", "c"])
    axes, bar = figure.axes
    drawn = axes.images[0].get_array()
    for row in range(3):
        for column in range(3):
            fraction = MATRIX[row, column].item() / MATRIX[row].sum().item()
            assert drawn[row, column] == pytest.approx(fraction)
    assert axes.images[0].get_clim() == bar.get_ylim() == (0, 1)
    assert bar.get_ylabel() == "fraction of the true class"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    empty = draw_confusion(torch.zeros(2, 2, dtype=torch.int64), ["a", "b"]).axes[0]
    assert (empty.images[0].get_array() == 0).all()


@pytest.mark.parametrize("num_classes", [1, 2, 10, 24, 60, 100, 300, 1000])
def test_matrix_of_any_size_is_drawn(num_classes):
    """Every cell is a square of whole pixels in the color of its fraction; the rest is legible."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(0, 9, (num_classes, num_classes), generator=generator)
    matrix += 50 * torch.eye(num_classes, dtype=torch.int64)
    names = [f"a class with a rather long name, index {i}" for i in range(num_classes)]
    figure = draw_confusion(matrix, names)
    page = figure_to_array(figure).transpose(1, 2, 0)
    assert max(figure.get_size_inches()) < 10
    axes = figure.axes[0]
    colors = axes.images[0].to_rgba((matrix / matrix.sum(1, keepdim=True)).numpy(), bytes=True)
    box = axes.get_window_extent()
    left, top = round(box.x0), round(len(page) - box.y1)
    side = round(box.width)
    assert side == round(box.height) and side % num_classes == 0
    cell = side // num_classes
    assert cell >= 2
    center = cell // 2 if cell < 30 else 4  # beside the count
    drawn = page[top + center :: cell, left + center :: cell][:num_classes, :num_classes]
    inner = slice(1, -1) if num_classes > 2 else slice(None)  # the frame covers the edge
    assert np.array_equal(drawn[inner, inner], colors[inner, inner, :3])
    labels = [text.get_text() for text in axes.get_yticklabels()]
    if num_classes <= 100:
        assert labels == ["a class with a rather l…"] * num_classes
    else:
        assert 3 < len(labels) < 15 and axes.get_ylabel() == "true class index"
    for border in (page[:8], page[-8:], page[:, :8], page[:, -8:]):
        assert (border == 255).all()  # nothing is cut off


def test_counts_are_in_their_cells_while_they_fit():
    """Row: true class. Text only where something was counted, light on dark cells."""
    axes = draw_confusion(torch.tensor([[97, 3], [0, 50]]), ["ant", "bee"]).axes[0]
    drawn = {text.get_position()[::-1]: text for text in axes.texts if text.get_text()}
    assert {place: text.get_text() for place, text in drawn.items()} == {
        (0, 0): "97",
        (0, 1): "3",
        (1, 1): "50",
    }
    assert [text.get_color() for text in drawn.values()] == ["white", "black", "white"]
    many = [str(i) for i in range(24)]
    assert draw_confusion(torch.full((24, 24), 99), many).axes[0].texts
    assert not draw_confusion(torch.full((24, 24), 99999), many).axes[0].texts
    assert [text.get_text() for text in axes.get_xticklabels()] == ["ant", "bee"]


def test_notes():
    names = ["a", "b", "c"]
    assert report.imbalance_note([10, 9, 8], names) == ""
    assert report.imbalance_note([10, 0, 8], names) == "1 of 3 classes have no image here."
    assert "90 images of a, 3 of c (30.0 times" in report.imbalance_note([90, 9, 3], names)
    assert report.imbalance_note([0, 0, 0], names) == "3 of 3 classes have no image here."
    assert report.few_classes_note(5) and not report.few_classes_note(6)
    assert report.accuracy_note(torch.zeros(3, 3)) == "There were no images to evaluate."
    half = torch.tensor([[9, 1], [0, 0]])
    assert report.accuracy_note(half) == "Mean per-class accuracy 90.000, Acc@1 90.000"
