"""Pre-training on every layout of folders, lists and channels; mistakes end in one line.

Every layout and kind of image is trained on for a step.
"""

import json
import logging
import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import fork_server

import main_finetune
import main_pretrain
from util.data.sources import list_pretrain_images
from util.datasets import build_dataset, build_pretrain_dataset
from util.io.errors import BadImage
from util.run.checks import set_mean_std
from util.run.launch import launch

TINY = (
    "--patch_size 16 --input_size 32 --batch_size 2 --epochs 1 --warmup_epochs 0 --num_workers 0 "
    "--device cpu"
).split()
PRETRAIN = ["--model", "mae_vit_mini_patch4", "--cross_mae", "--decoder_depth", "1", *TINY]
FINETUNE = ["--model", "vit_mini_patch4", "--aa", "", *TINY]


@pytest.fixture(autouse=True)
def own_logging():
    """Runs set up logging; put pytest's back."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:], logger.level = handlers, level


def pretrain(capsys, data, out="", *more) -> str:
    """One epoch in this process; what it printed."""
    flags = [*PRETRAIN, "--data_path", str(data), "--output_dir", str(out), *map(str, more)]
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags))
    text = capsys.readouterr().out
    assert re.search(r"Averaged stats: lr: .*loss: \d+\.\d+", text)
    return text


def finetune(data, *more) -> None:
    flags = [*FINETUNE, "--data_path", str(data), "--output_dir", "", *map(str, more)]
    main_finetune.main(main_finetune.get_args_parser().parse_args(flags))


def save(path: Path, mode: str = "RGB", seed: int = 0) -> None:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (40, 36, *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


LAYOUTS = {
    "train_classes": ("train/cat/1.png train/cat/2.png train/dog/more/3.png val/cat/4.png", 2),
    "train_flat": ("train/1.png train/2.png train/3.png val/4.png", 0),
    "classes": ("cat/1.png cat/2.png dog/3.png", 2),
    "flat": ("1.png 2.png 3.png", 0),
    "nested": ("2019/jan/1.png 2019/2.png 2020/jan/a/3.png", 0),
    "partly_flat": ("1.png more/2.png more/3.png", 0),
}
FOUND = {
    "train_classes": "in 2 class folders of {data}/train",
    "train_flat": "in the flat folder {data}/train (without classes)",
    "classes": "in 2 class folders of {data}",
    "flat": "in the flat folder {data} (without classes)",
    "nested": "in the folders below {data} (without classes)",
    "partly_flat": "in the folders below {data} (without classes)",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, capsys, tmp_path):
    """Found as what they are, said so, and trained on; class names reach the checkpoint."""
    files, num_classes = LAYOUTS[layout]
    data, out = tmp_path / "data", tmp_path / "out"
    for index, name in enumerate(files.split()):
        save(data / name, seed=index)
    (data / "notes.txt").write_text("no image")
    text = pretrain(capsys, data, out)
    assert f"3 images {FOUND[layout].format(data=data)}, 1 batches per epoch" in text
    names = torch.load(out / "checkpoint.pth", weights_only=True)["class_names"]
    assert names == ["cat", "dog"][:num_classes]
    labels = [label for _, label in list_pretrain_images(str(data)).samples]
    assert labels == ([0, 0, 1] if num_classes else [0, 0, 0])


def test_a_list_of_files(capsys, tmp_path):
    """Names are relative to the list; absolute ones work, and blank lines do not matter."""
    for index in range(3):
        save(tmp_path / "images" / f"{index} of 3.png", seed=index)
    save(tmp_path / "elsewhere.jpg")
    lines = ["images/0 of 3.png", "", "images/2 of 3.png", str(tmp_path / "elsewhere.jpg"), ""]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    text = pretrain(capsys, tmp_path / "train.txt")
    assert f"3 images of the list {tmp_path / 'train.txt'}, 1 batches" in text


def bands(path: Path, seed: int, dtype: str) -> None:
    largest = {"u1": 255, "u2": 65535, "f4": 1}[dtype]
    np.save(path, (np.random.RandomState(seed).rand(40, 36, 13) * largest).astype(dtype))


def pages(path: Path, seed: int) -> None:
    """A TIFF of five gray pages with 16 bits."""
    values = np.random.RandomState(seed).randint(0, 65536, (5, 40, 36)).astype(np.uint16)
    first, *others = (Image.fromarray(page) for page in values)
    first.save(path, save_all=True, append_images=others)


KINDS = {
    "gray": (1, ".png", lambda path, seed: save(path, "L", seed)),
    "color": (3, ".jpg", lambda path, seed: save(path, "RGB", seed)),
    "transparent": (4, ".png", lambda path, seed: save(path, "RGBA", seed)),
    "bands_8_bit": (13, ".npy", lambda path, seed: bands(path, seed, "u1")),
    "bands_16_bit": (13, ".npy", lambda path, seed: bands(path, seed, "u2")),
    "bands_float": (13, ".npy", lambda path, seed: bands(path, seed, "f4")),
    "pages": (5, ".tif", pages),
}


@pytest.mark.parametrize("kind", KINDS)
def test_channels(kind, capsys, tmp_path):
    """With own mean, std and a non-square size; a file of other channels is named."""
    in_chans, extension, write = KINDS[kind]
    data = tmp_path / "data"
    data.mkdir()
    for index in range(2):
        write(data / f"{index}{extension}", index)
    values = [f"{0.4 + 0.01 * i:.2f}" for i in range(in_chans)]
    flags = ["--in_chans", in_chans, "--mean", *values, "--std", "0.25", "--input_size", 32, 48]
    text = pretrain(capsys, data, tmp_path / "out", *flags)
    assert f"{in_chans} x 32 x 48" in text and "2 images in the flat folder" in text
    stored = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)["args"]
    assert stored["in_chans"] == in_chans and list(stored["input_size"]) == [32, 48]
    assert stored["mean"] == [float(x) for x in values] and stored["std"] == [0.25] * in_chans
    if in_chans in (5, 13):
        with pytest.raises(BadImage, match=rf"{data}/.\{extension} \(its shape is \(40, 36, "):
            pretrain(capsys, data, "", "--in_chans", in_chans + 1)


def test_arrays_have_the_crops_of_images(tmp_path):
    """An 8-bit array and the same image: same boxes and flips, the pixels of torch's resize."""
    pixels = np.asarray(Image.effect_noise((90, 70), 60).resize((900, 700), Image.BICUBIC))
    for kind in ("image", "array"):
        (tmp_path / kind).mkdir()
    Image.fromarray(pixels).save(tmp_path / "image/0.png")
    np.save(tmp_path / "array/0.npy", pixels)
    args = Namespace(input_size=64, in_chans=1, mean=[0.5], std=[0.5], loader="pillow", seed=0)
    datasets = []
    for kind in ("image", "array"):
        args.data_path = str(tmp_path / kind)
        datasets.append(build_pretrain_dataset(args))
    for epoch in range(6):
        image, array = (dataset[epoch, 0][0] for dataset in datasets)
        assert (image - array).abs().mean() < 1 / 127.5  # half a gray level of 255


def test_fine_tuning_on_arrays(capsys, tmp_path):
    """Thirteen bands through training and evaluation."""
    for split in ("train", "val"):
        for label in ("field", "water"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(2):
                bands(tmp_path / split / label / f"{index}.npy", index, "u2")
    finetune(tmp_path, "--in_chans", "13", "--reprob", "1", "--input_size", "32", "48")
    text = capsys.readouterr().out
    assert "4 training and 4 validation images of 2 classes" in text and "* Acc@1" in text


def test_color_augmentation_is_not_for_arrays(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    np.save(tmp_path / "train/a/0.npy", np.zeros((8, 8, 3), np.uint8))
    args = main_finetune.get_args_parser().parse_args(["--data_path", str(tmp_path)])
    main_finetune.check_args(args)
    set_mean_std(args)
    with pytest.raises(ValueError, match="--aa and --color_jitter work on 8-bit images"):
        build_dataset(True, args)


def nothing(folder: Path) -> None:
    pass


def only_val(folder: Path) -> None:
    save(folder / "val/cat/0.png")


def only_train(folder: Path) -> None:
    save(folder / "train/cat/0.png")


def an_empty_class(folder: Path) -> None:
    for split in ("train", "val"):
        save(folder / split / "cat/0.png")
        (folder / split / "dog").mkdir()


def a_hidden_class(folder: Path) -> None:
    for split in ("train", "val"):
        save(folder / split / ".cat/.0.png")


def other_classes(folder: Path) -> None:
    save(folder / "train/cat/0.png")
    save(folder / "val/dog/0.png")


def two_classes(folder: Path) -> None:
    for split in ("train", "val"):
        save(folder / split / "cat/0.png")
        save(folder / split / "dog/0.png")


def images_in_symlink_cycles(folder: Path) -> None:
    """Two images, and symlink cycles."""
    two_classes(folder)
    (folder / "train/cat/up").symlink_to(folder / "train")
    (folder / "train/dog/self").symlink_to(folder / "train/dog/self")


def a_list_of(*lines: str):
    def write(folder: Path) -> None:
        (folder / "list.txt").write_text("\n".join(lines))

    return write


def a_file_of_bytes(folder: Path) -> None:
    (folder / "list.txt").write_bytes(bytes(range(128, 256)))


PRETRAIN_MISTAKES = [
    (nothing, "nowhere", "Cannot read .*/nowhere .No such file.*check the path"),
    (nothing, "", "There is no image in .*; name a folder of images, a list"),
    (only_val, "", "There is val/ but no train/ in "),
    (an_empty_class, "", "no image in the class folder .*/train/dog; add some or remove it"),
    (a_hidden_class, "", "no class folder in .*/train"),
    (only_train, "", "1 training images give 0 batches per epoch"),
    (images_in_symlink_cycles, "", "2 training images give 0 batches .*--batch_size 64"),
    (a_list_of(), "list.txt", "There is no line in the list .*/list.txt"),
    (a_list_of("a.png", "b.csv"), "list.txt", "holds 'b.csv', not an image"),
    (a_list_of("a.png", "b.png"), "list.txt", "Cannot read the image .*/[ab].png .No such file"),
    (a_file_of_bytes, "list.txt", "list.txt is neither a folder nor a text file"),
]


@pytest.mark.parametrize("arrange, name, message", PRETRAIN_MISTAKES)
def test_pretraining_says_what_is_wrong(arrange, name, message, capsys, tmp_path):
    """In one line and with status 1, before a model is built."""
    arrange(tmp_path)
    batch_size = "64" if arrange is images_in_symlink_cycles else "2"
    flags = [*PRETRAIN, "--data_path", str(tmp_path / name), "--output_dir", ""]
    args = main_pretrain.get_args_parser().parse_args([*flags, "--batch_size", batch_size])
    assert_one_line_error(main_pretrain.main, args, message, capsys)


FINETUNE_MISTAKES = [
    (nothing, [], "Cannot read the folder .*/train .No such file.*name a folder that holds"),
    (only_train, [], "Cannot read the folder .*/val "),
    (an_empty_class, [], "no image in the class folder .*/train/dog; add some or remove it"),
    (other_classes, [], "have different classes .such as cat, dog"),
    (two_classes, ["--nb_classes", "3"], "--nb_classes is 3 but .* has 2 classes"),
    (two_classes, ["--batch_size", "64"], "2 training images give 0 batches"),
]


@pytest.mark.parametrize("arrange, flags, message", FINETUNE_MISTAKES)
def test_fine_tuning_says_what_is_wrong(arrange, flags, message, capsys, tmp_path):
    arrange(tmp_path)
    flags = [*FINETUNE, "--data_path", str(tmp_path), "--output_dir", "", *flags]
    args = main_finetune.get_args_parser().parse_args(flags)
    assert_one_line_error(main_finetune.main, args, message, capsys)


def assert_one_line_error(main, args, message: str, capsys) -> None:
    """A run with these arguments ends with status 1 and this error, without a traceback."""
    with pytest.raises(SystemExit) as stop:
        launch(main, args)
    text = capsys.readouterr().out
    assert stop.value.code == 1
    errors = [line for line in text.splitlines() if "Error:" in line]
    assert len(errors) == 1 and re.search(message, errors[0]), text
    assert text.splitlines()[-1] == errors[0] and "Traceback" not in text


def test_classes_are_checked_without_listing_the_images(monkeypatch, tmp_path):
    """Only train/ and val/ are opened, and not the folders with a million files below."""
    opened = []
    two_classes(tmp_path)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(Path(path).name) or scandir(path))
    args = main_finetune.get_args_parser().parse_args(["--data_path", str(tmp_path)])
    main_finetune.check_classes(args)
    assert opened == ["train", "val"] and args.nb_classes == 2


def test_no_image_is_looked_at_before_it_is_used(monkeypatch, tmp_path):
    """Folders are listed, each class once; a million files are a million names."""
    opened, looked_at = [], []
    two_classes(tmp_path)
    scandir, stat = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(Path(path).name) or scandir(path))
    monkeypatch.setattr(os, "stat", lambda *a, **k: looked_at.append(str(a[0])) or stat(*a, **k))
    list_pretrain_images(str(tmp_path))
    assert sorted(opened) == ["cat", "dog", "train", "train"]
    assert not [path for path in looked_at if path.endswith(".png")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_in_the_real_script(num_workers, tmp_path):
    """Status 1 and one line with the path; with --skip_bad_images status 0 and a warning."""
    data = tmp_path / "data"
    for index in range(8):
        save(data / f"{index}.jpg", seed=index)
    bad = data / "5.jpg"
    bad.write_bytes(bad.read_bytes()[:-300])
    flags = ["main_pretrain", *PRETRAIN, "--data_path", data, "--num_workers", num_workers]
    output = ["--output_dir", tmp_path / "output", "--skip_bad_images"]
    stopped = fork_server.start([*flags, "--output_dir", ""], tmp_path / "stopped")
    skipped = fork_server.start([*flags, *output], tmp_path / "skipped")
    assert stopped.wait(60) == 1
    (error,) = [line for line in stopped.text().splitlines() if "Error:" in line]
    assert f"Cannot read the image {bad} (image file is truncated" in error
    assert "Traceback" not in stopped.text()
    assert skipped.wait(60) == 0
    assert f"Epoch: [0] replaced 1 unreadable images by others: {bad}" in skipped.text()
    epochs = (tmp_path / "output/log.txt").read_text().splitlines()
    assert [json.loads(line)["train_replaced"] for line in epochs] == [1] * len(epochs)


def test_bad_images_are_never_skipped_in_evaluation():
    args = main_finetune.get_args_parser().parse_args(
        ["--eval", "--resume", "x.pth", "--skip_bad_images", "--data_path", "x"]
    )
    with pytest.raises(ValueError, match="--skip_bad_images is for training"):
        main_finetune.check_args(args)
