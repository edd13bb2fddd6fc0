"""Labels in shards: fine-tuning, evaluation and kNN as from class folders of the same images."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import FINETUNE, fork_server, read_log, small_images

import main_finetune
from tools import extract, knn
from util.data.checks import check_trained_classes
from util.data.image_io import open_image
from util.data.labels import find_labels, list_labeled
from util.data.sources import list_images, list_pretrain_images
from util.datasets import build_dataset
from util.eval.knn import list_splits
from util.io.errors import UserError


def pack(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def pack_like(folder: Path, out: Path, kind: str) -> None:
    """Shards of 10 images with the images of class folders, in the same order.

    Args:
        kind: of the labels: "folder" in the key, or the class index as KEY.cls.
    """
    for split in ("train", "val"):
        members = []
        for label, name in enumerate(find_labels(folder / split)):
            for path in sorted((folder / split / name).iterdir(), key=lambda path: path.name):
                if kind == "folder":
                    members.append({f"./{name}/{path.name}": path.read_bytes()})
                else:  # the label before its image, and after it
                    key = f"{name}{path.stem}"
                    pair = {f"{key}.cls": str(label).encode(), f"{key}.png": path.read_bytes()}
                    members.append(dict(sorted(pair.items(), reverse=label == 0)))
        for start in range(0, len(members), 10):
            part = {name: data for one in members[start : start + 10] for name, data in one.items()}
            pack(out / split / f"{split}-{start // 10:04d}.tar", part)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """{kind: data folder}, all with the same images."""
    root, plain = tmp_path_factory.mktemp("labels"), small_images()
    for kind in ("folder", "cls"):
        pack_like(plain, root / kind, kind)
    return {"plain": plain, "folder": root / "folder", "cls": root / "cls"}


def test_labels_are_those_of_the_class_folders(folders):
    for split in ("train", "val"):
        expected = list_labeled(folders["plain"] / split)
        for kind, classes in (("folder", ["a", "b"]), ("cls", ["0", "1"])):
            found = list_labeled(folders[kind] / split)
            assert found.classes == find_labels(folders[kind] / split) == classes
            assert len(found.samples) == len(expected.samples)
            for (member, label), (path, expected_label) in zip(
                found.samples, expected.samples, strict=True
            ):
                assert label == expected_label
                assert member.open().read() == Path(path).read_bytes()
            assert list_images(folders[kind] / split).classes == classes
    assert list_pretrain_images(str(folders["cls"])).classes == []
    assert [len(part) for part in knn.list_splits(str(folders["folder"]))] == [2, 34, 12]
    assert extract.list_images_with_labels([str(folders["cls"] / "val")]).classes == ["0", "1"]


def test_fine_tuning_and_evaluation_equal_those_on_folders(folders, tmp_path):
    """On two ranks: bitwise the same log, then the same confusion matrix, with the class names."""
    size, logs, reports = 2, [], []
    for kind, data in folders.items():
        out = tmp_path / kind
        out.mkdir()
        flags = ["--data_path", data, "--output_dir", out, "--log_dir", "", "--epochs", "1"]
        flags += ["--warmup_epochs", "0"]
        runs = fork_server.start_group(size, [*FINETUNE, *flags], out)
        assert [run.wait(120) for run in runs] == [0] * size, runs[0].text()
        logs.append(read_log(out))
        evaluation = out / "evaluation"
        evaluation.mkdir()
        flags = ["--data_path", data, "--resume", out / "checkpoint.pth", "--report", evaluation]
        command = [*FINETUNE, "--eval", *flags, "--output_dir", ""]
        runs = fork_server.start_group(size, command, evaluation)
        assert [run.wait(120) for run in runs] == [0] * size, runs[0].text()
        rows = (evaluation / "per_class.csv").read_text()
        assert all(f"\n{name}," in rows for name in ("01" if kind == "cls" else "ab"))
        counts = (evaluation / "confusion.csv").read_text().splitlines()[1:]
        reports.append([row.partition(",")[2] for row in counts])
    assert logs[0] == logs[1] == logs[2] and len(logs[0]) == 1
    assert reports[0] == reports[1] == reports[2]


def test_knn_of_a_checkpoint(folders, tmp_path, capsys):
    """The command gives the same results."""
    flags = ["--data_path", folders["plain"], "--output_dir", tmp_path, "--log_dir", ""]
    flags += ["--epochs", "1", "--warmup_epochs", "0"]
    run = fork_server.start([*FINETUNE, *flags], tmp_path / "out")
    assert run.wait(120) == 0, run.text()
    results = []
    for data in (folders["plain"], folders["cls"]):
        flags = ["--checkpoint", tmp_path / "checkpoint.pth", "--data_path", data, "--k", "1", "5"]
        flags += ["--num_workers", "0", "--json", "--device", "cpu"]
        knn.main(knn.get_args_parser().parse_args(list(map(str, flags))))
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1])["knn"])
    assert results[0] == results[1]


def test_names_of_classes(tmp_path):
    """Numbers sort by value, words by letters; dots in keys are no trouble."""
    numbered = {f"{i}.npy": b"x" for i in range(12)} | {f"{i}.cls": b"%d\n" % i for i in range(12)}
    pack(tmp_path / "numbers/0.tar", numbered)
    images = list_labeled(tmp_path / "numbers")
    assert images.classes == [str(i) for i in range(12)]
    assert [label for _, label in images.samples] == list(range(12))
    words = {"x/1.a.png": b"", "x/1.a.cls": b"owl", "x/2.left.png": b"", "x/2.cls": b"cat"}
    pack(tmp_path / "words/0.tar", words | {"x/2.right.png": b"", "x/._2.cls": b"hidden"})
    images = list_labeled(tmp_path / "words")
    assert images.classes == ["cat", "owl"] and [y for _, y in images.samples] == [1, 0, 0]
    assert np.array_equal(images.samples.index["shard"], [0, 0, 0])


@pytest.mark.parametrize(
    "members, reason",
    [
        ([{"1.png": b""}], r"0.tar:1.png has neither KEY.cls nor a folder"),
        ([{"1.png": b"", "1.cls": b"3", "2.png": b""}], r"0.tar:2.png has no KEY.cls"),
        ([{"1.png": b"", "1.cls": b""}], r"0.tar:1.png has no KEY.cls"),
        ([{"1.png": b"", "1.cls": b"3"}, {"a/2.png": b""}], "only some of them hold KEY.cls"),
    ],
)
def test_missing_labels_are_named(members, reason, tmp_path):
    """Where labels are needed; elsewhere the images have no classes."""
    for index, part in enumerate(members):
        pack(tmp_path / f"train/{index}.tar", part)
    with pytest.raises(UserError, match=rf"no labels \(.*{reason}.*\); labels are needed here"):
        list_labeled(tmp_path / "train")
    images = list_images(tmp_path / "train")
    assert images.classes == [] and {label for _, label in images.samples} == {0}


def test_a_tar_file_beside_class_folders_is_not_the_data(image_folder, tmp_path):
    pack(tmp_path / "train.tar", {"1.png": b""})
    (tmp_path / "a").symlink_to(image_folder / "train" / "a")
    assert find_labels(tmp_path) == list_labeled(tmp_path).classes == ["a"]


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Class folders 0..10 in train/, sorted as text, and shards sorted by value in val/."""
    names = [str(i) for i in range(11)]
    for i, name in enumerate(names):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / "train" / name / "a.png")
    members = {}
    for name in names:
        members[f"k{name}.png"] = (tmp_path / "train" / name / "a.png").read_bytes()
        members[f"k{name}.cls"] = name.encode()
    pack(tmp_path / "val" / "val-0000.tar", members)
    return tmp_path


def test_folders_and_shards_have_one_order_of_classes(mixed):
    """The red value of an image is 20 times its class's name, in both splits."""
    classes, train, val = list_splits(mixed)
    for samples in (train, val):
        assert {20 * int(classes[label]) for _, label in samples} == set(range(0, 220, 20))
        for path, label in samples:
            assert np.asarray(open_image(path))[0, 0, 0] == 20 * int(classes[label])


def test_evaluation_has_the_order_of_the_checkpoint(mixed):
    flags = ["--eval", "--resume", "c.pth", "--data_path", str(mixed), "--input_size", "8"]
    args = main_finetune.parse_args([*flags, "--mean", "0.5", "--std", "0.5"])
    args.mean, args.std = [0.5] * 3, [0.5] * 3
    order = [str(i) for i in reversed(range(11))]
    check_trained_classes(args, {"model": {"head.bias": torch.zeros(11)}, "class_names": order})
    dataset = build_dataset(False, args)
    assert dataset.classes == order
    for path, label in dataset.samples:
        assert np.asarray(open_image(path))[0, 0, 0] == 20 * int(order[label])
