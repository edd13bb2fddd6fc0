"""Unusual and damaged images, and the fast pipeline against the recipe's."""

import io
import struct
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from util.data import image_io
from util.data.image_io import open_image, read_image
from util.data.jpeg import DECODERS
from util.data.transforms import (
    FastPretrainTransform,
    build_pretrain_transform,
    build_transform,
    normalize,
)
from util.io.errors import BadImage

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDOM = np.random.RandomState(0)


def make_image(height: int = 37, width: int = 50) -> Image.Image:
    coarse = Image.fromarray(np.random.RandomState(0).randint(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_bomb() -> bytes:
    """400 million pixels in some 50 KB."""
    return encode(Image.new("1", (20000, 20000)), "PNG")


def jpeg_bomb() -> bytes:
    """A small JPEG that claims to have 60000 x 60000 pixels."""
    data = encode(make_image(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 60000, 60000) + data[at + 4 :]


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


BAD = {
    "empty.jpg": lambda: b"",
    "cut.jpg": lambda: encode(make_image(200, 200), "JPEG")[:-500],
    "cut_in_header.jpg": lambda: encode(make_image(), "JPEG")[:90],
    "cut.png": lambda: encode(make_image(), "PNG")[:-200],
    "page.jpg": lambda: b"<html><body>404 Not Found</body></html>",
    "start_only.jpg": lambda: b"\xff\xd8\xff",
    "bomb.png": png_bomb,
    "bomb.jpg": jpeg_bomb,
    "float.tif": lambda: encode(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
    "objects.npy": lambda: npy(np.array([{}, {}]), allow_pickle=True),
    "other_shape.npy": lambda: npy(np.zeros((3, 8, 9), np.uint8)),
    "signed.npy": lambda: npy(np.zeros((8, 9, 3), np.int16)),
    "nan.npy": lambda: npy(np.full((8, 9, 3), np.nan, np.float32)),
    "zip.npy": lambda: b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("read", [open_image, read_image])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(name, read, tmp_path):
    path = tmp_path / name
    path.write_bytes(BAD[name]())
    with pytest.raises(BadImage, match=rf"^Cannot read the image {path} \(.+\); repair.*\.$") as e:
        read(str(path))
    assert "\n" not in str(e.value) and "object at" not in str(e.value)


def test_reasons(tmp_path):
    """The message says what is wrong, too."""
    for name, reason in (
        ("empty.jpg", "empty"),
        ("cut.jpg", "truncated"),
        ("bomb.jpg", "bomb"),
        ("float.tif", "32 bits"),
        ("other_shape.npy", r"\(3, 8, 9\), --in_chans 3 needs \(H, W, C\)"),
        ("nan.npy", "not finite"),
    ):
        (tmp_path / name).write_bytes(BAD[name]())
        with pytest.raises(BadImage, match=reason):
            read_image(tmp_path / name)
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(BadImage, match="No such file"):
        read_image(tmp_path / "lost.jpg")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[274] = 6  # orientation: show it turned by 90 degrees
    return encode(make_image(30, 50), "JPEG", exif=exif.tobytes())


UNUSUAL = {
    "png_named.jpg": lambda: encode(make_image(), "PNG"),
    "jpeg_named.png": lambda: encode(make_image(), "JPEG"),
    "webp_named.jpeg": lambda: encode(make_image(), "WEBP", lossless=True),
    "cmyk.jpg": lambda: encode(make_image().convert("CMYK"), "JPEG"),
    "gray.jpg": lambda: encode(make_image().convert("L"), "JPEG"),
    "progressive.jpg": lambda: encode(make_image(), "JPEG", progressive=True),
    "palette.png": lambda: encode(make_image().quantize(16), "PNG", transparency=3),
    "transparent.png": lambda: encode(make_image().convert("RGBA"), "PNG"),
    "gray_alpha.png": lambda: encode(make_image().convert("LA"), "PNG"),
    "two_colors.png": lambda: encode(make_image().convert("1"), "PNG"),
    "rotated.jpg": rotated,
    "one_pixel.png": lambda: encode(make_image(1, 1), "PNG"),
    "one_pixel.jpg": lambda: encode(make_image(1, 1), "JPEG"),
    "one_row.png": lambda: encode(make_image(1, 300), "PNG"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_have_pillows_pixels(name, tmp_path):
    """Both ways of reading give what Image.open(...).convert("RGB") gives, and train."""
    path = tmp_path / name
    path.write_bytes(UNUSUAL[name]())
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(np.array(open_image(path)), expected)
    pixels = read_image(path)
    assert pixels.dtype == torch.uint8 and pixels.permute(1, 2, 0).numpy().tolist() == (
        expected.tolist()
    )
    args = Namespace(input_size=32, mean=MEAN, std=STD)
    assert FastPretrainTransform(32)(pixels).shape == (3, 32, 32)
    for transform in (build_pretrain_transform(args), build_transform(False, args)):
        assert transform(open_image(path)).shape == (3, 32, 32)


@pytest.mark.parametrize("decoder", ["torchcodec", "torchvision", "Pillow"])
def test_every_jpeg_decoder_gives_the_same(decoder, tmp_path, monkeypatch):
    """The pixels are Pillow's for photographs in every chroma subsampling, gray, CMYK and rotated
    ones; damaged files and bombs end in the same messages.
    """
    if decoder != "Pillow" and decoder not in DECODERS:
        pytest.skip(f"{decoder} is not installed")
    used = []

    def decode(data, in_chans):
        used.append(in_chans)
        return DECODERS[decoder](data, in_chans)

    monkeypatch.setattr(image_io, "decode_jpeg", None if decoder == "Pillow" else decode)
    paths = photographs(tmp_path)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        paths.append(tmp_path / f"{subsampling.replace(':', '')}.jpg")
        Image.open(paths[0]).save(paths[-1], subsampling=subsampling, quality=80)
    for name in ("gray.jpg", "progressive.jpg", "one_pixel.jpg", "cmyk.jpg", "rotated.jpg"):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(UNUSUAL[name]())
    for in_chans, mode in ((3, "RGB"), (1, "L")):
        for path in paths:
            with Image.open(path) as image:
                expected = np.array(image.convert(mode)).reshape(*image.size[::-1], in_chans)
            pixels = read_image(path, in_chans).permute(1, 2, 0).numpy()
            assert np.array_equal(pixels, expected), path
    # cmyk.jpg and rotated.jpg are Pillow's, and for one channel all but the gray one
    assert used == ([] if decoder == "Pillow" else [3] * (len(paths) - 2) + [1])
    for name in ("cut.jpg", "cut_in_header.jpg", "start_only.jpg", "bomb.jpg"):
        (tmp_path / name).write_bytes(BAD[name]())
        messages = []
        for read in (read_image, open_image):
            with pytest.raises(BadImage) as error:
                read(tmp_path / name)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("in_chans, mode", [(1, "L"), (4, "RGBA")])
def test_other_numbers_of_channels(in_chans, mode, tmp_path):
    """What Pillow converts to."""
    for name in ("jpeg_named.png", "gray.jpg", "transparent.png", "palette.png"):
        (tmp_path / name).write_bytes(UNUSUAL[name]())
        with Image.open(tmp_path / name) as image:
            expected = np.array(image.convert(mode)).reshape(image.height, image.width, in_chans)
        pixels = read_image(tmp_path / name, in_chans).permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the same damage
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP"])
def test_damaged_bytes_are_a_bad_image_or_an_image(kind, tmp_path):
    """Damaged files raise BadImage and nothing else."""
    data, path = encode(make_image(), kind), tmp_path / "damaged"
    random = np.random.RandomState(1)
    outcomes = set()
    for attempt in range(150):
        damaged = bytearray(data)
        for at in random.randint(0, 100 if attempt % 2 else len(data), size=3):
            damaged[at] = random.randint(256)
        path.write_bytes(damaged[: random.randint(len(data))] if attempt % 5 == 0 else damaged)
        try:
            outcomes.add(read_image(path).shape[0])
        except BadImage as error:
            assert str(path) in str(error)
            outcomes.add("bad")
    assert {"bad"} <= outcomes <= {3, "bad"}


@pytest.mark.parametrize("dtype, largest", [("u1", 255), ("u2", 65535), (">u2", 65535), ("f4", 1)])
def test_arrays(dtype, largest, tmp_path):
    """(H, W, 13) integers are scaled to [0, 1], floats unchanged; (H, W) is one channel."""
    values = (RANDOM.rand(9, 11, 13) * largest).astype(dtype)
    np.save(tmp_path / "bands.npy", values)
    read = open_image(tmp_path / "bands.npy", 13)
    assert read.dtype == torch.float32 and read.shape == (13, 9, 11)
    expected = np.moveaxis(values.astype(np.float64) / largest, 2, 0)
    assert np.abs(read.numpy() - expected).max() < 1e-6
    np.save(tmp_path / "one.npy", values[:, :, 0])
    assert open_image(tmp_path / "one.npy", 1).shape == (1, 9, 11)


def test_pages_of_a_tiff(tmp_path):
    """Five pages of 16 bits are five channels; another count is refused with both counts."""
    pages = RANDOM.randint(0, 65536, (5, 9, 11)).astype(np.uint16)
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    read = open_image(tmp_path / "pages.tif", 5)
    assert np.abs(read.numpy() - pages / 65535).max() < 1e-6
    with pytest.raises(BadImage, match=r"\(9, 11, 5\), --in_chans 6"):
        open_image(tmp_path / "pages.tif", 6)


def photographs(folder: Path) -> list[Path]:
    """Two real photographs, in three sizes and qualities, as JPEG."""
    from sklearn.datasets import load_sample_images

    paths = []
    for index, pixels in enumerate(load_sample_images().images):
        for width, height, quality in ((640, 427, 95), (500, 375, 90), (350, 250, 75)):
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
            paths.append(folder / f"{index}_{width}.jpg")
            image.save(paths[-1], quality=quality)
    return paths


@pytest.mark.parametrize("in_chans", [3, 1])
def test_fast_pipeline_equals_the_recipe_on_photographs(in_chans, tmp_path, monkeypatch):
    """Same crop boxes and flips; mean difference 0.1 gray levels, mean PSNR 65 dB."""
    boxes = []
    get_params = transforms.RandomResizedCrop.get_params

    def recorded(img, scale, ratio):
        boxes.append(get_params(img, scale, ratio))
        return boxes[-1]

    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(recorded))
    plain = Namespace(input_size=224, mean=[0.0] * in_chans, std=[1.0] * in_chans)
    recipe, fast = build_pretrain_transform(plain), FastPretrainTransform(224)
    differences, ratios = [], []
    for index, path in enumerate(photographs(tmp_path)):
        image, pixels = open_image(path, in_chans), read_image(path, in_chans)
        for seed in range(4 * index, 4 * index + 4):
            torch.manual_seed(seed)
            expected = 255 * recipe(image)
            torch.manual_seed(seed)
            found = fast(pixels)
            assert found.dtype == torch.uint8 and found.shape == (in_chans, 224, 224)
            assert boxes[-1] == boxes[-2]
            error = found - expected
            differences.append(error.abs().mean().item())
            ratios.append(10 * np.log10(255**2 / max(error.square().mean().item(), 1e-12)))
    assert len(set(boxes)) == len(boxes) // 2
    assert np.mean(differences) <= 0.1 and np.mean(ratios) >= 65, (differences, ratios)


def test_normalize_equals_the_recipe():
    """uint8 on the device against ToTensor and Normalize, on all gray levels."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([pixels, pixels.T, pixels[::-1]], axis=2))
    recipe = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    batch = transforms.functional.pil_to_tensor(image)[None]
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    assert (normalize(batch, mean, std)[0] - recipe(image)).abs().max() <= 1e-6


def test_pages_of_several_types_are_refused(tmp_path):
    """They have no common scale."""
    first = Image.fromarray(np.full((4, 4), 200, np.uint8))
    other = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[other])
    with pytest.raises(BadImage, match="its pages hold uint16 and uint8"):
        open_image(tmp_path / "a.tif", 2)


def test_narrow_arrays_are_refused_as_images_are(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 5000, 3), np.uint8))
    with pytest.raises(BadImage, match="its sides differ more than 1000x"):
        open_image(tmp_path / "a.npy")
