"""util/eval/report.py: predictions and tables against plain loops and hand-computed numbers."""

import csv
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import make_args, prepared

from util.data.sources import list_images
from util.eval import report

MATRIX = torch.tensor([[3, 1, 0], [0, 4, 0], [2, 2, 4]])  # 16 pictures, 11 right


def read_csv(path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_predictions(image_folder, tiny_vit, tmp_path):
    """Every row against a softmax written out; the five likeliest of six classes."""
    model, classes = tiny_vit(num_classes=6), ["ant", "bee", "cat", "dog", "elk, big", "fly"]
    files = [path for path, _ in list_images(image_folder / "val").samples]
    report.predict_files(model, files, classes, make_args(), tmp_path / "predictions.csv")
    head, *rows = read_csv(tmp_path / "predictions.csv")
    assert head[:5] == ["file", "class", "probability", "class_2", "probability_2"]
    assert len(head) == 11 and [row[0] for row in rows] == files
    for row in rows:
        with torch.no_grad():
            logits = model(prepared(row[0])[None])[0].double().numpy()
        shares = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-shares)[:5]
        np.testing.assert_allclose([float(x) for x in row[2::2]], shares[order], atol=1e-5)
        for name, number in zip(row[1::2], order, strict=True):
            assert abs(shares[classes.index(name)] - shares[number]) < 1e-5


def test_predictions_of_few_classes_have_fewer_columns(image_folder, tiny_vit, tmp_path):
    files = [path for path, _ in list_images(image_folder / "val").samples]
    names = report.name_classes(Namespace(class_names=[]), 2)
    report.predict_files(tiny_vit(num_classes=2), files, names, make_args(), tmp_path / "p.csv")
    head, *rows = read_csv(tmp_path / "p.csv")
    assert len(head) == 5 and {row[1] for row in rows} <= {"0", "1"}
    assert all(abs(float(row[2]) + float(row[4]) - 1) < 2e-6 for row in rows)


def test_confusion_counts(monkeypatch):
    """Against a loop over pictures; added up over processes only where they hold parts."""
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 6, generator=random), torch.randint(6, (40,), generator=random)
    batches = list(zip(logits.split(7), labels.split(7), strict=True))
    expected = torch.zeros(6, 6, dtype=torch.int64)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        expected[label, row.index(max(row))] += 1
    model = torch.nn.Identity()
    assert report.count_confusion(batches, model, 6, torch.device("cpu")).equal(expected)
    monkeypatch.setattr(report, "all_reduce_sum", lambda counts: counts.mul_(2))
    assert report.count_confusion(batches, model, 6, torch.device("cpu")).equal(expected)
    both = report.count_confusion(batches, model, 6, torch.device("cpu"), split=True)
    assert both.equal(2 * expected)


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
    with Image.open(tmp_path / "report" / "confusion.png") as picture:
        assert picture.mode == "RGB"


def test_colours_are_shares_of_the_row():
    pixels = np.asarray(report.color_cells(MATRIX)).astype(int)
    for row in range(3):
        for column in range(3):
            share = MATRIX[row, column].item() / MATRIX[row].sum().item()
            mixed = [255 + share * (dark - 255) for dark in report.DARKEST]
            assert np.abs(pixels[row, column] - mixed).max() <= 0.5001
    empty = np.asarray(report.color_cells(torch.zeros(2, 2, dtype=torch.int64)))
    assert (empty == 255).all()


@pytest.mark.parametrize("num_classes", [1, 24, 60, 300, 1200])
def test_matrix_of_any_size_is_drawn(num_classes):
    """The diagonal is dark from corner to corner, and the picture stays of a size to look at."""
    matrix = torch.eye(num_classes, dtype=torch.int64) * 7
    names = [f"a class with a rather long name, number {i}" for i in range(num_classes)]
    picture = report.draw_confusion(matrix, names)
    assert max(picture.size) <= 1700
    pixels = np.asarray(picture)
    dark = (pixels == report.DARKEST).all(axis=2)
    columns, rows = dark.any(axis=0).nonzero()[0], dark.any(axis=1).nonzero()[0]
    side = columns[-1] - columns[0] + 1
    assert side == rows[-1] - rows[0] + 1 and side % num_classes == 0 and side >= 30
    if num_classes > 1:
        assert (pixels[rows[0], columns[-1]] == 255).all()


def test_counts_stand_in_their_cells():
    """Row: true class. Letters only where something was counted."""
    matrix = torch.tensor([[97, 3], [0, 50]])  # 3 % of a row are nearly white
    picture = np.asarray(report.draw_confusion(matrix, ["ant", "bee"])).astype(int)
    dark = (picture == report.DARKEST).all(axis=2)
    bottom, right = dark.any(axis=1).nonzero()[0][-1] + 1, dark.any(axis=0).nonzero()[0][-1] + 1
    cells = picture[bottom - 68 : bottom, right - 68 : right].reshape(2, 34, 2, 34, 3)
    spread = cells.max(axis=(1, 3, 4)) - cells.min(axis=(1, 3, 4))
    assert spread[0, 1] > 150 and spread[1, 0] == 0


def test_sentences():
    names = ["a", "b", "c"]
    assert report.imbalance_note([10, 9, 8], names) == ""
    assert report.imbalance_note([10, 0, 8], names) == "1 of 3 classes have no image here."
    assert "90 images of a, 3 of c (30.0 times" in report.imbalance_note([90, 9, 3], names)
    assert report.imbalance_note([0, 0, 0], names) == "3 of 3 classes have no image here."
    assert report.few_classes_note(5) and not report.few_classes_note(6)
    assert report.accuracy_note(torch.zeros(3, 3)) == "There were no images to judge."
    half = torch.tensor([[9, 1], [0, 0]])
    assert report.accuracy_note(half) == "Mean per-class accuracy 90.000, Acc@1 90.000"
