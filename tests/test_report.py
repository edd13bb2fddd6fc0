"""util/report.py: predictions and tables against plain loops and numbers worked out by hand."""

import csv
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from util import report

ARGS = dict(input_size=32, in_chans=3, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3])
FLAGS = dict(batch_size=3, num_workers=0, device="cpu", amp="off")
MATRIX = torch.tensor([[3, 1, 0], [0, 4, 0], [2, 2, 4]])  # 16 pictures, 11 right


def make_args(**changes) -> Namespace:
    args = Namespace(**(ARGS | changes))
    report.set_evaluation(args, Namespace(**FLAGS))
    return args


def prepared(path, mean=ARGS["mean"], std=ARGS["std"]) -> torch.Tensor:
    """A picture by the recipe in Pillow and numpy: short side 36, middle 32 x 32, normalised."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    width, height = picture.size
    scale = 36 / min(width, height)
    picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((picture.width - 32) / 2), round((picture.height - 32) / 2)
    pixels = np.asarray(picture.crop((left, top, left + 32, top + 32))) / 255
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).float()


def read_csv(path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_files_are_listed_in_order(image_folder, tmp_path):
    val = image_folder / "val"
    files = report.list_files([val, str(val / "b" / "3.png")])
    assert files == [str(p) for p in sorted(val.glob("*/*"))] + [str(val / "b" / "3.png")]
    with pytest.raises(FileNotFoundError, match="no picture in .*name another"):
        report.list_files([tmp_path])
    with pytest.raises(FileNotFoundError, match="no file or folder .*nowhere"):
        report.list_files([tmp_path / "nowhere"])


@pytest.mark.parametrize("flag", ["batch_size", "num_workers"])
def test_senseless_flags_are_refused(flag):
    with pytest.raises(ValueError, match=f"--{flag} is -1"):
        report.set_evaluation(Namespace(**ARGS), Namespace(**(FLAGS | {flag: -1})))


def test_transform_in_words():
    text = report.describe_transform(make_args())
    assert "short side 36, centre crop 32 x 32, mean 0.5 0.4 0.3, std 0.2 0.25 0.3" in text
    assert "cover 36 x 73, centre crop 32 x 64" in report.describe_transform(
        make_args(input_size=(32, 64))
    )


@pytest.mark.parametrize("which", report.FEATURES)
def test_features_are_those_of_timm(image_folder, tiny_vit, which):
    """The same weights in timm's class, on pictures prepared without torchvision."""
    from timm.models.vision_transformer import VisionTransformer

    model = tiny_vit(global_pool=False)
    timm_model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5
    ).eval()
    timm_model.load_state_dict(model.state_dict())
    files = report.list_files([image_folder / "val"])
    loader = report.build_files_loader([(file, i) for i, file in enumerate(files)], [], make_args())
    parts = list(report.run_features(model, loader, which, torch.device("cpu")))
    features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    with torch.no_grad():
        tokens = timm_model.forward_features(torch.stack([prepared(file) for file in files]))
    expected = dict(cls=tokens[:, 0], patches=tokens[:, 1:], mean=tokens[:, 1:].mean(dim=1))
    # 8-bit rounding of the resize is the same; float32 normalisation is not quite.
    torch.testing.assert_close(features, expected[which], rtol=1e-4, atol=1e-4)
    assert labels.tolist() == list(range(8))


def test_default_feature_is_what_the_head_reads(tiny_vit, tiny_cross):
    models = tiny_vit(global_pool=True), tiny_vit(global_pool=False), tiny_cross()
    assert [report.default_feature(model) for model in models] == ["mean", "cls", "cls"]


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "new" / "out.csv"
    with report.whole_file(path) as waiting:
        waiting.write_text("first")
        waiting.chmod(0o600)
        assert not path.exists()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(RuntimeError, match="on the way"), report.whole_file(path) as waiting:
        waiting.write_text("second, ha")
        raise RuntimeError("on the way")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    for bad in (path.parent, path / "below a file"):
        with pytest.raises(OSError, match="Cannot write"), report.whole_file(bad):
            pytest.fail("the block must not begin")


def test_predictions(image_folder, tiny_vit, tmp_path):
    """Every row against a softmax written out; the five likeliest of six classes."""
    model, classes = tiny_vit(num_classes=6), ["ant", "bee", "cat", "dog", "elk, big", "fly"]
    files = report.list_files([image_folder / "val"])
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
    files = report.list_files([image_folder / "val"])
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
