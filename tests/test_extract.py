"""tools/extract.py: what is written for class folders, loose files and mistakes."""

import os
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECODER, ENCODER
from PIL import Image
from processes import run_python

import models_cross
import models_vit
from tools import extract
from util.io.errors import BadImage, UserError

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture
def checkpoints(tmp_path, tiny_cross, tiny_vit, monkeypatch):
    """{name: (file, model)} of tiny models, which the tools know by name for this test."""
    cross = partial(models_cross.MaskedAutoencoderViT, **ENCODER, **DECODER)
    monkeypatch.setattr(models_cross, "mae_vit_tiny", cross, raising=False)
    vit = partial(models_vit.VisionTransformer, **ENCODER)
    monkeypatch.setattr(models_vit, "vit_tiny", vit, raising=False)
    shared = dict(input_size=32, patch_size=8, in_chans=3, mean=MEAN, std=STD)
    flags = dict(cross_mae=True, weight_fm=True, use_input=True, decoder_depth=2)
    files = {}
    for name, model, args in (
        ("cross", tiny_cross(), dict(model="mae_vit_tiny", **flags)),
        ("vit", tiny_vit(), dict(model="vit_tiny")),
    ):
        file = tmp_path / f"{name}.pth"
        torch.save({"model": model.state_dict(), "args": shared | args}, file)
        files[name] = file, model.eval()
    return files


def call(checkpoint, data, out, *more) -> None:
    data = data if isinstance(data, list) else [data]
    flags = ["--checkpoint", checkpoint, "--data", *data, "--out", out, *more]
    flags = [*map(str, flags), "--num_workers", "0", "--device", "cpu"]
    extract.main(extract.get_args_parser().parse_args(flags))


def by_hand(model, paths) -> torch.Tensor:
    """Output of the last block, one image at a time, prepared with Pillow and numpy alone."""
    tokens = []
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB")
        scale = 36 / min(image.size)
        image = image.resize([int(s * scale) for s in image.size], Image.Resampling.BICUBIC)
        left, top = (round((s - 32) / 2) for s in image.size)
        pixels = np.asarray(image.crop((left, top, left + 32, top + 32))) / 255
        image = torch.from_numpy((pixels - MEAN) / STD).float().permute(2, 0, 1)[None]
        patches = torch.nn.functional.conv2d(
            image, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8
        )
        x = torch.cat([model.cls_token, patches.flatten(2).transpose(1, 2)], 1) + model.pos_embed
        for block in model.blocks:
            x = block(x)
        tokens.append(x.detach())
    return torch.cat(tokens)


@pytest.mark.parametrize("kind", ["cross", "vit"])
def test_class_folders(kind, checkpoints, image_folder, tmp_path):
    file, model = checkpoints[kind]
    val = image_folder / "val"
    call(file, val, tmp_path / "f.npz")
    found = np.load(tmp_path / "f.npz")  # refuses pickled objects
    names = ["0.jpg", "1.png", "2.jpg", "3.png"]
    assert found["files"].tolist() == [f"{c}/{name}" for c in "ab" for name in names]
    assert found["labels"].tolist() == [0] * 4 + [1] * 4
    assert found["classes"].tolist() == ["a", "b"]
    tokens = by_hand(model, [val / name for name in found["files"]])
    assert found["which"] == {"cross": "cls", "vit": "mean"}[kind]
    expected = tokens[:, 0] if kind == "cross" else tokens[:, 1:].mean(dim=1)
    np.testing.assert_allclose(found["features"], expected, rtol=1e-4, atol=1e-4)


def test_formats_agree_and_outputs_are_deterministic(checkpoints, image_folder, tmp_path):
    """.npy is .npz; a second call gives the same bits."""
    file, _ = checkpoints["cross"]
    call(file, image_folder / "val", tmp_path / "a.npz", "--which", "patches")
    first = np.load(tmp_path / "a.npz")
    assert first["features"].shape == (8, 16, 32) and first["features"].dtype == np.float32
    call(file, image_folder / "val", tmp_path / "b.npy", "--which", "patches")
    mapped = np.load(tmp_path / "b.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, first["features"])
    assert (tmp_path / "b.txt").read_text().splitlines() == first["files"].tolist()
    call(file, image_folder / "val", tmp_path / "c.npz", "--batch_size", "3", "--which", "mean")
    mean = np.load(tmp_path / "c.npz")["features"]
    np.testing.assert_allclose(mean, first["features"].mean(axis=1), rtol=1e-4, atol=1e-5)
    call(file, image_folder / "val", tmp_path / "d.npz", "--batch_size", "3", "--which", "mean")
    assert np.array_equal(np.load(tmp_path / "d.npz")["features"], mean)


def test_files_and_flat_folders_have_no_labels(checkpoints, image_folder, tmp_path):
    file, _ = checkpoints["vit"]
    call(file, image_folder / "val" / "b", tmp_path / "flat.npz")
    flat = np.load(tmp_path / "flat.npz")
    assert flat["files"].tolist() == ["0.jpg", "1.png", "2.jpg", "3.png"]
    named = [image_folder / "val" / "b" / "3.png", image_folder / "val" / "b" / "0.jpg"]
    call(file, named, tmp_path / "named.npz")
    few = np.load(tmp_path / "named.npz")
    assert few["files"].tolist() == [str(path) for path in named]
    np.testing.assert_allclose(few["features"], flat["features"][[3, 0]], atol=1e-6)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in named))
    call(file, tmp_path / "list.txt", tmp_path / "listed.npz")
    assert np.array_equal(np.load(tmp_path / "listed.npz")["features"], few["features"])
    assert "labels" not in {*flat.keys(), *few.keys()}
    call(file, [image_folder / "train", image_folder / "val"], tmp_path / "both.npz")
    assert len(np.load(tmp_path / "both.npz")["files"]) == 16


def test_shards(checkpoints, image_folder, tmp_path):
    """The features of the same images in a folder; names are shard:member, without labels."""
    file, _ = checkpoints["vit"]
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "set-0000.tar", "w") as tar:
        for name in ("0.jpg", "1.png"):
            tar.add(image_folder / "val" / "b" / name, name)
    call(file, tmp_path / "shards", tmp_path / "shards.npz")
    call(file, image_folder / "val" / "b", tmp_path / "folder.npz")
    found, expected = (np.load(tmp_path / f"{name}.npz") for name in ("shards", "folder"))
    assert found["files"].tolist() == ["set-0000.tar:0.jpg", "set-0000.tar:1.png"]
    assert "labels" not in found
    np.testing.assert_allclose(found["features"], expected["features"][:2], atol=1e-6)


def test_splits_beside_other_folders_are_no_classes(checkpoints, image_folder, tmp_path):
    """As tools.demo_data writes them: few/, train/ and val/."""
    shutil.copytree(image_folder, tmp_path / "data")
    shutil.copytree(image_folder / "val", tmp_path / "data" / "few")
    with pytest.raises(UserError, match="holds train and val: name the one you want"):
        call(checkpoints["vit"][0], tmp_path / "data", tmp_path / "f.npz")


def test_odd_file_names(checkpoints, image_folder, tmp_path):
    """.npz keeps the names; features.txt has a line per image, escaped as Python does."""
    names = [b"a\nb.jpg", b"b\xff.jpg", "c\N{GREEK SMALL LETTER ALPHA} d.jpg".encode(), b"e.jpg"]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        shutil.copy(image_folder / "val" / "a" / "0.jpg", folder / os.fsdecode(name))
    call(checkpoints["vit"][0], folder, tmp_path / "f.npz")
    call(checkpoints["vit"][0], folder, tmp_path / "f.npy")
    assert [os.fsencode(name) for name in np.load(tmp_path / "f.npz")["files"]] == names
    lines = (tmp_path / "f.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [r"a\nb.jpg", r"b\udcff.jpg", "c\N{GREEK SMALL LETTER ALPHA} d.jpg", "e.jpg"]
    assert len(np.load(tmp_path / "f.npy")) == 4


@pytest.mark.parametrize(
    "data, out, message",
    [
        ("val", "f.csv", "must end in .npz, or in .npy"),
        ("", "f.npz", "holds train and val: name the one you want"),
        ("nothing", "f.npz", "Cannot read .*nothing .No such file"),
        ("val", "", "Cannot write .*it is a folder"),
    ],
)
def test_mistakes_end_in_one_line(data, out, message, checkpoints, image_folder, tmp_path):
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    flags = ["--checkpoint", checkpoints["vit"][0], "--data", image_folder / data]
    flags += ["--out", tmp_path / out if out else folder, "--device", "cpu", "--num_workers", "0"]
    args = extract.get_args_parser().parse_args([str(flag) for flag in flags])
    with pytest.raises(UserError) as caught:
        extract.main(args)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_a_bad_image_is_named_and_leaves_no_half_file(form, checkpoints, image_folder, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    good = (image_folder / "val" / "a" / "0.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(good)
    (folder / "b.jpg").write_bytes(good[: len(good) // 2])
    with pytest.raises(BadImage, match="Cannot read the image .*b.jpg"):
        call(checkpoints["vit"][0], folder, tmp_path / "out" / f"f.{form}", "--batch_size", "1")
    assert list((tmp_path / "out").iterdir()) == []


def test_command_line(image_folder, tmp_path):
    """As a user calls it, through DataLoader workers; a pipe gets no bar."""
    torch.manual_seed(0)
    model = models_vit.vit_mini_patch4(img_size=32, patch_size=16, num_classes=2)
    args = dict(model="vit_mini_patch4", input_size=32, patch_size=16)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "c.pth")
    command = ["-m", "tools.extract", "--checkpoint", str(tmp_path / "c.pth")]
    command += ["--data", str(image_folder / "val"), "--out", str(tmp_path / "f.npz")]
    command += ["--num_workers", "1", "--device", "cpu"]
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and "8 images of 2 classes" in result.stdout
    assert np.load(tmp_path / "f.npz")["features"].shape == (8, 128)


def test_the_list_of_images_is_not_overwritten(image_folder, tmp_path):
    names = tmp_path / "images.txt"
    names.write_text(f"{next((image_folder / 'val').rglob('*.png'))}\n")
    flags = ["--checkpoint", "c.pth", "--data", str(names), "--out", str(tmp_path / "images.npy")]
    with pytest.raises(UserError, match="would write file names over"):
        extract.main(extract.get_args_parser().parse_args(flags))
