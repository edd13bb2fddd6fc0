"""tools/data_stats.py: counts and statistics of data sets with known contents."""

import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_python

import main_finetune
import main_pretrain
from tools import data_stats
from util.io.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, name: str, height: int = 40, width: int = 40, mode: str = "RGB", seed=0):
    """An image of noise; returns its pixels in [0, 1] as (H, W, C)."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.RandomState(seed).randint(0, 200, (height, width, *channels), dtype=np.uint8)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    return pixels.reshape(height, width, -1) / 255


def stats(capsys, folder, *more: str) -> str:
    flags = [str(folder), "--num_workers", "0", *more]
    data_stats.main(data_stats.get_args_parser().parse_args(flags))
    return capsys.readouterr().out


def line(text: str, name: str) -> str:
    return re.search(rf"^  {name} +(.*)$", text, re.MULTILINE)[1]


def commands(text: str) -> list[list[str]]:
    return [shlex.split(row)[1:] for row in text.splitlines() if row.startswith("python")]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_mean_and_std(mode, capsys, tmp_path):
    """Every image counts the same, whatever its size: against two passes over all pixels."""
    images = [
        write(tmp_path, f"{i}.png", height, width, mode, seed=i)
        for i, (height, width) in enumerate([(40, 40), (60, 41), (200, 90)])
    ]
    text = stats(capsys, tmp_path)
    mean = np.mean([p.mean(axis=(0, 1)) for p in images], axis=0)
    std = np.sqrt(np.mean([((p - mean) ** 2).mean(axis=(0, 1)) for p in images], axis=0))
    assert line(text, "mean") == " ".join(f"{x:.4f}" for x in mean)
    assert line(text, "std") == " ".join(f"{x:.4f}" for x in std)
    assert line(text, "width") == "min 40, median 41, max 90"
    assert line(text, "height") == "min 40, median 60, max 200"
    assert line(text, "modes") == f"{mode} 3" and line(text, "formats") == "PNG 3"


def test_formats_and_unreadable_files(capsys, tmp_path):
    write(tmp_path, "rgb.png")
    write(tmp_path, "photo.jpg", seed=1)
    write(tmp_path, "really_png.png", seed=2)
    (tmp_path / "really_png.png").rename(tmp_path / "wrong_name.jpg")
    write(tmp_path, "gray.png", mode="L")
    Image.new("P", (40, 40)).save(tmp_path / "palette.png")
    (tmp_path / "empty.jpg").touch()
    whole = (tmp_path / "photo.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("not an image")
    text = stats(capsys, tmp_path)
    assert text.startswith(f"{tmp_path}: 7 images\n")
    assert line(text, "formats") == "PNG 4, JPEG 1"
    assert line(text, "modes") == "RGB 3, L 1, P 1"
    assert line(text, "channels") == "3 4, 1 1"
    assert line(text, "unreadable") == "2"
    assert re.search(rf"^    {tmp_path}/cut.jpg: .*truncated", text, re.MULTILINE)
    assert re.search(rf"^    {tmp_path}/empty.jpg: \S+", text, re.MULTILINE)
    assert "mean and std of the 4 images with 3 channels" in text


def test_arrays_and_pages(capsys, tmp_path):
    """Bands of .npy and TIFF files, read as training reads them."""
    random = np.random.RandomState(0)
    bands = random.rand(40, 50, 13).astype(np.float32)
    np.save(tmp_path / "float.npy", bands)
    deep = random.randint(0, 65536, (40, 50, 13), dtype=np.uint16)
    np.save(tmp_path / "deep.npy", deep)
    np.save(tmp_path / "text.npy", np.array(["not", "numbers"]))
    pages = [Image.fromarray(random.randint(0, 256, (40, 50), dtype=np.uint8)) for _ in range(13)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    text = stats(capsys, tmp_path)
    stacked = np.stack([np.asarray(page) for page in pages], axis=2) / 255
    values = np.stack([bands, deep / 65535, stacked]).reshape(-1, 13)
    assert line(text, "channels") == "13 3" and line(text, "unreadable") == "1"
    assert line(text, "modes") == "uint16 1, float32 1, 13 pages L 1"
    assert line(text, "width") == "min 50, median 50, max 50"
    assert line(text, "mean") == " ".join(f"{x:.4f}" for x in values.mean(axis=0))
    assert line(text, "std") == " ".join(f"{x:.4f}" for x in values.std(axis=0))
    (command,) = commands(text)
    assert command[command.index("--in_chans") + 1] == "13"


def test_three_channels_in_arrays_need_no_color_augmentation(capsys, tmp_path):
    for name in ("train/a/0", "train/b/0", "val/a/0", "val/b/0"):
        write(tmp_path, f"{name}.png")
        array = np.random.RandomState(0).rand(40, 40, 3).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", array)
    _, finetune = commands(stats(capsys, tmp_path))
    assert main_finetune.get_args_parser().parse_args(finetune[1:]).aa == ""


def test_twelve_of_sixteen_bits(capsys, tmp_path):
    """Mean, std and range of the whole values, in digits enough for a narrow range."""
    deep = np.random.RandomState(0).randint(0, 4096, (40, 40)).astype(np.uint16)
    for name in ("train/a/0", "train/b/0", "val/a/0", "val/b/0"):
        write(tmp_path, f"{name}.png")
        Image.fromarray(deep).save(tmp_path / f"{name}.png")
    text = stats(capsys, tmp_path)
    values = deep / 65535
    assert line(text, "mean") == f"{values.mean():.4f}"
    assert line(text, "values") == f"{values.min():.4f} to {values.max():.4f}"
    assert "WARNING" not in text
    pretrain, finetune = commands(text)
    args = main_pretrain.get_args_parser().parse_args(pretrain[1:])
    assert args.in_chans == 1
    assert args.mean == pytest.approx([values.mean()], rel=5e-3)
    assert args.std == pytest.approx([values.std()], rel=5e-3)
    assert main_finetune.get_args_parser().parse_args(finetune[1:]).aa == ""


def test_few_levels(capsys, tmp_path):
    """Where most images have fewer than 32 different values, bits were lost."""
    Image.fromarray((np.arange(1600) % 6).reshape(40, 40).astype(np.uint8)).save(tmp_path / "a.png")
    assert "only 6 different values" in line(stats(capsys, tmp_path), "WARNING")


def test_lists_and_shards(capsys, tmp_path):
    """The same images three times: as a folder, as a list and in a tar file."""
    for i in range(3):
        write(tmp_path, f"folder/{i}.png", 40 + i, 40, seed=i)
    (tmp_path / "folder" / "3.png").write_bytes(b"nothing")
    names = sorted((tmp_path / "folder").iterdir())
    (tmp_path / "list.txt").write_text("".join(f"folder/{name.name}\n" for name in names))
    with tarfile.open(tmp_path / "all-0000.tar", "w") as tar:
        for name in names:
            tar.add(name, name.name)
    texts = [stats(capsys, tmp_path / name) for name in ("folder", "list.txt", "all-0000.tar")]
    bodies = [re.sub(r"(    ).*(3\.png:)|(--data_path )\S+", r"\1\2\3", t) for t in texts]
    assert len({body.split("\n", 1)[1] for body in bodies}) == 1
    assert all("4 images" in text and line(text, "unreadable") == "1" for text in texts)
    assert f"{tmp_path}/all-0000.tar:3.png: " in texts[2]


def test_classes(capsys, tmp_path):
    for i in range(6):
        write(tmp_path, f"train/cat/{i}.png")
    write(tmp_path, "train/dog/0.png")
    (tmp_path / "train" / "elk").mkdir()
    write(tmp_path, "val/cat/0.png")
    text = stats(capsys, tmp_path)
    assert line(text, "classes") == "3; images min 0, median 1, max 6"
    assert "cat 6, dog 1, elk 0" in text
    assert "1 of 3 classes have no image here; classes are unequal: 6 images of cat, 1 of" in text
    assert "different class folders (such as dog, elk)" in text
    assert len(commands(text)) == 1  # fine-tuning would be refused


def test_no_classes_in_a_flat_folder(capsys, tmp_path):
    write(tmp_path, "a.png")
    write(tmp_path, "sub/b.png")
    assert not re.search("^  classes", stats(capsys, tmp_path), re.MULTILINE)


def test_limit(capsys, tmp_path, monkeypatch):
    """Opens that many, from all classes; counts include all images."""
    for i in range(10):
        write(tmp_path, f"{'cat' if i < 5 else 'dog'}/{i}.png", seed=i)
    opened = []
    inspect = data_stats.inspect
    monkeypatch.setattr(data_stats, "inspect", lambda p: opened.append(Path(p).stem) or inspect(p))
    text = stats(capsys, tmp_path, "--limit", "4")
    assert opened == ["0", "2", "5", "7"]
    assert "10 images" in text and "cat 5, dog 5" in text
    assert line(text, "opened").startswith("4 of them, evenly spaced")


def test_gray_images_are_noticed(capsys, tmp_path):
    gray = np.random.RandomState(0).randint(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(gray).convert("RGB").save(tmp_path / "a.png")
    text = stats(capsys, tmp_path)
    assert "every image is gray: --in_chans 1" in text
    assert len(commands(text)[0][commands(text)[0].index("--mean") :]) > 1


@pytest.mark.parametrize(
    "height, width, mode, size, model, patch, chans",
    [
        (32, 32, "RGB", 32, "mini_patch4", None, 3),
        (28, 30, "L", 32, "mini_patch4", None, 1),
        (70, 64, "RGB", 64, "mini_patch4", 8, 3),
        (100, 90, "RGBA", 96, "mini_patch4", 8, 4),
        (150, 150, "RGB", 128, "small_patch16", None, 3),
        (300, 280, "RGB", 224, "small_patch16", None, 3),
        (200, 400, "RGB", (224, 448), "small_patch16", None, 3),
        (64, 32, "RGB", (64, 32), "mini_patch4", None, 3),
    ],
)
def test_suggested_commands_are_valid(
    height, width, mode, size, model, patch, chans, capsys, tmp_path
):
    """The scripts accept them, and the patch size divides the input size."""
    folder = tmp_path / "my images"
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            write(folder, f"{split}/{label}/0.png", height, width, mode)
    pretrain, finetune = commands(stats(capsys, folder))
    assert (pretrain[0], finetune[0]) == ("main_pretrain.py", "main_finetune.py")
    for script, command, prefix in (
        (main_pretrain, pretrain, "mae_vit_"),
        (main_finetune, finetune, "vit_"),
    ):
        args = script.get_args_parser().parse_args(command[1:])
        script.check_args(args)
        assert args.data_path == str(folder) and args.input_size == size
        assert args.model == prefix + model and args.patch_size == patch
        assert args.in_chans == chans == len(args.mean)
        used = patch or int(re.search(r"\d+$", model)[0])
        assert all(side % used == 0 for side in np.atleast_1d(size))
        if prefix == "mae_vit_":  # the measured recipe is for the smallest model
            assert (args.lr, args.decoder_depth) == ((2e-3, 4) if "mini" in model else (None, 8))


def test_default_mean_needs_no_flag(capsys, tmp_path):
    """Images with ImageNet's statistics."""
    half = np.zeros((40, 40, 3))
    half[:20], half[20:] = np.array([0.485, 0.456, 0.406]) + 0.227, [0.258, 0.229, 0.179]
    Image.fromarray((255 * half).round().astype(np.uint8)).save(tmp_path / "a.png")
    (command,) = commands(stats(capsys, tmp_path))
    assert "--mean" not in command and "--std" not in command


@pytest.mark.parametrize(
    "path, more, message",
    [
        ("nowhere", [], "Cannot read .*nowhere"),
        ("", [], "no image in"),
        ("", ["--limit", "0"], "--limit is 0"),
        ("", ["--num_workers", "-1"], "--num_workers is -1"),
    ],
)
def test_invalid_arguments(path, more, message, capsys, tmp_path):
    with pytest.raises(UserError, match=message):
        stats(capsys, tmp_path / path, *more)


def test_command_line(image_folder):
    """As a user runs it, with a DataLoader worker."""
    result = run_python("-m", "tools.data_stats", image_folder, "--num_workers", 1)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert line(result.stdout, "formats") == "JPEG 4, PNG 4"
    assert line(result.stdout, "unreadable") == "0" and len(commands(result.stdout)) == 2


def test_negative_means_are_suggested_as_they_are(capsys, tmp_path):
    random = np.random.RandomState(0)
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", random.normal(-12.5, 3, (40, 40, 2)).astype(np.float32))
    data_stats.main(data_stats.get_args_parser().parse_args([str(tmp_path), "--num_workers", "0"]))
    assert "--mean -12." in capsys.readouterr().out
