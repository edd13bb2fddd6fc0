"""16-bit grayscale images: no level is lost between the file, training and the figures."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
from tools import visualize
from util.data.image_io import open_8_bit, open_image, read_image
from util.data.stats import inspect
from util.datasets import prepare_reading
from util.io.errors import BadImage
from util.vis.figures import choose_windows, to_rgb, windows_note

FORMATS = {"png": None, "tif": None, "pgm": None}
TINY = (
    "--patch_size 16 --input_size 32 --batch_size 2 --epochs 1 --warmup_epochs 0 --num_workers 0 "
    "--device cpu --mean 0.03 --std 0.02"
).split()
PRETRAIN = [*"--model mae_vit_mini_patch4 --cross_mae --decoder_depth 1".split(), *TINY]
FINETUNE = ["--model", "vit_mini_patch4", *TINY]


def draw_values(seed: int) -> np.ndarray:
    """What a 12-bit camera gives, (44, 40)."""
    return np.random.RandomState(seed).randint(0, 4096, (44, 40)).astype(np.uint16)


def train(capsys, script, flags: list, out) -> str:
    """One epoch in this process; its line of log.txt without the times."""
    script.main(script.get_args_parser().parse_args([*map(str, flags), "--output_dir", str(out)]))
    capsys.readouterr()
    return (out / "log.txt").read_text()


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("suffix", FORMATS)
def test_values_of_files(suffix, in_chans, tmp_path):
    values = np.random.RandomState(0).randint(0, 65536, (20, 30)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    pixels = open_image(tmp_path / f"deep.{suffix}", in_chans)
    assert pixels.shape == (in_chans, 20, 30) and pixels.dtype == torch.float32
    expected = torch.from_numpy(values.astype(np.float32) / 65535)
    assert all(channel.equal(expected) for channel in pixels[:3])
    assert in_chans < 4 or pixels[3].eq(1).all()


@pytest.mark.parametrize("in_chans", [1, 3])
def test_training_equals_that_on_arrays(in_chans, capsys, tmp_path):
    """Pre-training and fine-tuning give the losses of the same values in .npy files."""
    logs = []
    for kind in ("png", "npy"):
        for index, name in enumerate(("train/a", "train/b", "val/a", "val/b")):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            values = draw_values(index)
            if kind == "png":
                Image.fromarray(values).save(folder / "x.png")
            else:
                np.save(folder / "x.npy", np.repeat(values[..., None], in_chans, axis=2))
        flags = ["--data_path", tmp_path / kind, "--in_chans", in_chans]
        pre, fine = tmp_path / f"{kind}_pre", tmp_path / f"{kind}_fine"
        log = train(capsys, main_pretrain, [*PRETRAIN, *flags], pre)
        logs.append(log + train(capsys, main_finetune, [*FINETUNE, "--aa", "", *flags], fine))
    assert logs[0] == logs[1]
    assert "train_loss" in logs[0] and "test_acc1" in logs[0]


def test_color_augmentation_is_refused(capsys, tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(draw_values(0)).save(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match="16-bit images; leave them out"):
        train(capsys, main_finetune, [*FINETUNE, "--data_path", tmp_path], tmp_path / "out")


def test_mixture_with_8_bit_images(capsys, tmp_path):
    """Pre-training takes both from Pillow; the pipelines of 8-bit images name the other one."""
    for index in range(40):
        Image.fromarray(draw_values(0).astype(np.uint8)).save(tmp_path / f"{index:02}.png")
    Image.fromarray(draw_values(1)).save(tmp_path / "01.png")  # not one of those looked at first
    flags = [*PRETRAIN, "--data_path", tmp_path]
    with pytest.raises(BadImage, match=r"01\.png has 16 bits per value.* --loader pillow"):
        train(capsys, main_pretrain, flags, tmp_path / "fast")
    assert "loss" in train(capsys, main_pretrain, [*flags, "--loader", "pillow"], tmp_path / "both")
    for read in (read_image, open_8_bit):
        with pytest.raises(BadImage, match="16 bits"):
            read(tmp_path / "01.png")


def test_few_levels_are_reported(capsys, tmp_path):
    for index in range(2):
        Image.fromarray((draw_values(index) % 6).astype(np.uint8)).save(tmp_path / f"{index}.png")
    args = main_pretrain.get_args_parser().parse_args(
        [*PRETRAIN, "--data_path", str(tmp_path), "--output_dir", ""]
    )
    main_pretrain.main(args)
    assert "Warning: images have only 6 different values" in capsys.readouterr().out


def test_windows_of_figures():
    """An image that fills 1/16 of the range is shown by its percentiles, others from 0 to 1."""
    narrow = torch.from_numpy(draw_values(0) / np.float32(65535)).expand(3, -1, -1)
    full = torch.rand(3, 44, 40)
    imgs = torch.stack([full, narrow, narrow + 5])
    mean, std = [0.2, 0.3, 0.4], [0.5, 0.6, 0.7]
    normalized = (imgs - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    windows = choose_windows(normalized, mean, std)
    low, high = np.percentile(narrow.numpy(), (0.5, 99.5))
    assert windows[0].tolist() == [0, 1]
    assert windows[1].tolist() == pytest.approx([low, high], rel=1e-3)
    assert windows[2].tolist() == pytest.approx([low + 5, high + 5], rel=1e-3)
    shown = to_rgb(normalized, mean, std, windows)
    expected = ((narrow[0] - low) / (high - low)).clamp(0, 1) * 255
    assert abs(shown[1, ..., 0] - expected.numpy()).max() < 0.6
    assert "2 of 3 images are shown between percentiles 0.5 and 99.5" in windows_note(windows)
    assert windows_note(windows[:1]) == ""


def test_reconstructions_say_their_window(capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for index in range(2):
        Image.fromarray(draw_values(index)).save(data / f"{index}.png")
    train(capsys, main_pretrain, [*PRETRAIN, "--data_path", data], tmp_path / "out")
    out = tmp_path / "grid.svg"
    flags = ["--checkpoint", tmp_path / "out/checkpoint.pth", "--images", data, "--out", out]
    visualize.main(visualize.get_args_parser().parse_args([str(x) for x in flags]))
    assert out.stat().st_size > 10_000
    assert "between percentiles" in out.read_text()


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("num_pages", [2, 3])
def test_first_pages_of_16_bits_are_noticed(in_chans, num_pages, tmp_path):
    """Of TIFF files with several pages, 1, 3 and 4 channels take the first page."""
    first, *others = (Image.fromarray(draw_values(i)) for i in range(num_pages))
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    samples = [(str(tmp_path / "a.tif"), 0)]
    args = Namespace(in_chans=in_chans, mean=[0.5] * in_chans, std=[0.5] * in_chans)
    assert prepare_reading(samples, args)
    stats = inspect(samples[0][0], first_page=True)
    assert stats.mode == "I;16" and len(stats.mean) == 1
    assert stats.mean[0] == pytest.approx(draw_values(0).mean() / 65535, rel=1e-5)
    assert isinstance(inspect(samples[0][0]), type(stats))  # as data_stats describes it
