"""tools/demo_data.py: the documented split, and how an existing folder is treated."""

import gzip
import hashlib
import json
import re
import struct
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_python
from torchvision.datasets import FashionMNIST

from tools import demo_data
from tools.formats import image_set
from util.io.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def relative_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("demo") / "deep" / "digits"
    demo_data.write_demo_data(out_dir, labels_per_class=3)
    return out_dir


def test_folders_and_counts(written):
    counts = Counter(path.rsplit("/", 2)[0] for path in relative_files(written) if "/" in path)
    assert counts == {"train": 1297, "val": 500, "few/train": 30, "few/val": 500}
    for folder in counts:
        assert sorted(path.name for path in (written / folder).iterdir()) == list("0123456789")
    per_class = Counter(path.parent.name for path in (written / "few/train").glob("*/*.png"))
    assert set(per_class.values()) == {3}


def test_splits_do_not_overlap_and_few_is_a_subset_of_train(written):
    def names(folder):
        return relative_files(written / folder)

    assert not names("train") & names("val")
    assert names("few/train") < names("train")
    assert names("few/val") == names("val")


def test_images_are_the_resized_scans(written):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index in (0, 1296):
        path = written / "train" / str(digits.target[index]) / f"digit_{index:04d}.png"
        with Image.open(path) as image:
            assert image.mode == "RGB" and image.size == (32, 32)
            small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float)
        # Averaged back to 8x8, the image is the scan except for the interpolation's blur.
        scan = digits.images[index] * (255 / 16)
        assert np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.97


def test_second_call_writes_nothing(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*.png")}
    counts = demo_data.write_demo_data(written, labels_per_class=3)
    assert counts == {"train": 1297, "val": 500, "few/train": 30, "few/val": 500}
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*.png")} == before


def test_interrupted_or_damaged_folder_is_completed(tmp_path, monkeypatch):
    out_dir = tmp_path / "digits"
    monkeypatch.setattr(demo_data, "NUM_TRAIN", 1790)  # leaves 7 for val: less to write
    demo_data.write_demo_data(out_dir, labels_per_class=1)
    complete = relative_files(out_dir)

    victim = next((out_dir / "val").glob("*/*.png"))
    victim.unlink()
    demo_data.write_demo_data(out_dir, labels_per_class=1)
    assert relative_files(out_dir) == complete

    record = out_dir / demo_data.RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"complete": False}))
    victim.write_bytes(b"half a pic")
    demo_data.write_demo_data(out_dir, labels_per_class=1)
    Image.open(victim).verify()


def test_other_folder_is_refused_and_unchanged(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not written by this tool"):
        demo_data.write_demo_data(tmp_path)
    assert relative_files(tmp_path) == {"thesis.txt"}
    with pytest.raises(UserError, match="is a file"):
        demo_data.write_demo_data(tmp_path / "thesis.txt")


def test_other_settings_are_refused(written):
    with pytest.raises(UserError, match="other settings"):
        demo_data.write_demo_data(written, labels_per_class=4)


def test_another_set_with_equal_settings_is_refused(tmp_path):
    """Fashion-MNIST and solar cells have equal settings; only their names differ."""

    def load() -> image_set.ImageSet:
        pixels = np.zeros((4, 8, 8), np.uint8)
        return image_set.ImageSet(pixels, np.array([0, 1, 0, 1]), ["a", "b"], 2, list("wxyz"))

    write = partial(demo_data.write_demo_data, tmp_path / "data", 1, load, None)
    counts = write(name="fashion-mnist")
    assert write(name="fashion-mnist") == counts
    with pytest.raises(UserError, match="other settings .*fashion-mnist.* instead of .*elpv"):
        write(name="elpv")


@pytest.mark.parametrize("labels_per_class", [0, 1000])
def test_invalid_labels_per_class_is_refused(tmp_path, labels_per_class):
    with pytest.raises(ValueError, match=f"--labels_per_class {labels_per_class} is not possible"):
        demo_data.write_demo_data(tmp_path / "digits", labels_per_class)
    assert not (tmp_path / "digits").exists()


def test_missing_scikit_learn_is_reported_with_the_remedy(tmp_path):
    blocked = "import sys; sys.modules['sklearn'] = None; sys.argv = ['demo_data', sys.argv[1]]; "
    run = "import runpy; runpy.run_module('tools.demo_data', run_name='__main__')"
    result = run_python("-c", blocked + run, tmp_path / "digits")
    assert result.returncode == 1
    assert "Error: " in result.stdout and len(result.stdout.splitlines()) == 1, result.stderr
    assert "pip install -r scripts/requirements-demo.txt" in result.stdout
    assert not (tmp_path / "digits").exists()


@pytest.fixture
def fashion_files(tmp_path) -> Path:
    """Files of Fashion-MNIST's format and size; pixel 0 of image i is i % 256, its label i % 10."""
    folder = tmp_path / "files"
    folder.mkdir()
    for part, count in (("train", 60000), ("t10k", 10000)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(count) % 256
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            data = gzip.compress(header + values.tobytes(), 1)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(data)
    return folder


def test_fashion_mnist(fashion_files, tmp_path, monkeypatch):
    """Read as torchvision reads it; gray images of 28 pixels under their class names."""
    raw = tmp_path / "FashionMNIST"
    raw.mkdir()
    (raw / "raw").symlink_to(fashion_files)
    for path in list(fashion_files.iterdir()):
        (fashion_files / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    expected = [FashionMNIST(tmp_path, train=train) for train in (True, False)]
    data = image_set.load_fashion_mnist(fashion_files)
    assert np.array_equal(data.images, np.concatenate([part.data.numpy() for part in expected]))
    assert data.labels.tolist() == sum((part.targets.tolist() for part in expected), [])
    names = [re.sub("[ /]", "_", name.lower()) for name in FashionMNIST.classes]
    assert data.class_names == names
    assert data.names[::69_999] == ["fashion_0000", "fashion_69999"]
    parts = dict(images=data.images[-40:], labels=data.labels[-40:], names=data.names[:40])
    small = data._replace(**parts, num_train=30)
    monkeypatch.setattr(demo_data, "load_fashion_mnist", lambda folder: small)
    flags = ["--set", "fashion-mnist", "--from", str(fashion_files), "--labels_per_class", "2"]
    args = demo_data.get_args_parser().parse_args([str(tmp_path / "out"), *flags, "--draw", "1"])
    demo_data.main(args)
    counts = Counter(path.rsplit("/", 2)[0] for path in relative_files(tmp_path / "out"))
    counts.pop("demo_data.json", None)
    assert {k: v for k, v in counts.items() if "/" in k or k in ("train", "val")} == {
        **{"train": 30, "val": 10, "few/train": 20, "few/val": 10}
    }
    with Image.open(tmp_path / "out/val/coat/fashion_0034.png") as image:
        assert image.mode == "L" and image.size == (28, 28)
        assert image.getpixel((0, 0)) == (9960 + 34) % 256


def test_elpv(tmp_path):
    """Four classes by defect probability; about a fifth held out, by the names alone."""
    source, rows = tmp_path / "data", []
    (source / "images").mkdir(parents=True)
    levels = ["0.0", "0.3333333333333333", "0.6666666666666666", "1.0"]
    for i in range(60):
        Image.new("L", (300, 300), i).save(source / f"images/cell{i:04d}.png")
        rows.append(f"images/cell{i:04d}.png  {levels[i % 4]}  {'mono' if i % 2 else 'poly'}")
    (source / "labels.csv").write_text("\n".join(reversed(rows)) + "\n")
    flags = ["--set", "elpv", "--from", str(source), "--labels_per_class", "1"]
    demo_data.main(demo_data.get_args_parser().parse_args([str(tmp_path / "out"), *flags]))
    files = relative_files(tmp_path / "out") - {"demo_data.json"}
    expected = set()
    for i in range(60):
        name = f"cell{i:04d}.png"
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 5 == 0
        label = ("defect_000", "defect_033", "defect_067", "defect_100")[i % 4]
        expected.add(f"{'val' if held_out else 'train'}/{label}/{name}")
    assert {path for path in files if not path.startswith("few")} == expected
    assert 5 <= sum(path.startswith("val") for path in expected) <= 20
    (path,) = tmp_path.glob("out/*/defect_033/cell0005.png")
    with Image.open(path) as image:
        assert image.mode == "L" and image.size == (300, 300) and image.getpixel((9, 9)) == 5
    (source / "images/cell0007.png").unlink()
    with pytest.raises(UserError, match="cell0007.*--from must name"):
        image_set.load_elpv(source)


def test_elpv_without_its_package(monkeypatch):
    monkeypatch.setattr(image_set, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install elpv-dataset"):
        image_set.load_elpv()


def test_draws_of_few_labels_differ():
    data = demo_data.load_digits()
    draws = [demo_data.choose_few(data, 5, draw) for draw in (None, 0, 1, 1)]
    assert draws[2] == draws[3] and len({tuple(draw) for draw in draws}) == 3
    zeros = np.flatnonzero(data.labels[: demo_data.NUM_TRAIN] == 0)
    assert {zeros[0], zeros[-1]} <= set(draws[0])  # evenly spaced, to both ends
    for draw in draws:
        assert Counter(data.labels[draw].tolist()) == dict.fromkeys(range(10), 5)
        assert max(draw) < demo_data.NUM_TRAIN and len(set(draw)) == 50


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--set", "fashion-mnist"], "needs --from DIR or --download"),
        (["--set", "fashion-mnist", "--from", "x", "--download"], "one of them"),
        (["--from", "x"], "--from is for --set fashion-mnist or elpv"),
        (["--set", "elpv", "--download"], "--download is for --set fashion-mnist"),
        (["--set", "elpv", "--from", "nowhere"], "Cannot read the solar cells in nowhere"),
        (["--set", "fashion-mnist", "--from", "nowhere"], "Cannot read nowhere/train-images"),
        (["--draw", "-1"], "--draw is -1"),
    ],
)
def test_refused_flags(flags, message, tmp_path):
    args = demo_data.get_args_parser().parse_args([str(tmp_path / "out"), *flags])
    with pytest.raises(UserError, match=message):
        demo_data.main(args)
    assert not (tmp_path / "out").exists()


def test_damaged_file_is_refused(fashion_files):
    path = fashion_files / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + bytes(100)))
    with pytest.raises(UserError, match="t10k-labels.*does not hold 10000 bytes"):
        image_set.load_fashion_mnist(fashion_files)
    path.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="t10k-labels.*--from must name"):
        image_set.load_fashion_mnist(fashion_files)


def test_a_damaged_record_and_an_impossible_folder_are_one_line(tmp_path):
    (tmp_path / "demo_data.json").write_text("")
    with pytest.raises(UserError, match="is damaged"):
        demo_data.write_demo_data(tmp_path)
    with pytest.raises(UserError, match="name another OUT_DIR"):
        demo_data.write_demo_data(Path("/dev/null/x"))
