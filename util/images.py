"""Finding and opening pictures: one place, so that every fault names its file.

Letters: C channels, H height, W width.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.functional import pil_to_tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
READ_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
JPEG_MAGIC = b"\xff\xd8\xff"


class BadImage(RuntimeError):
    """A file of the data set cannot be used as a picture."""


def open_image(path: str, in_chans: int = 3) -> Image.Image:
    """Read a picture as PIL with `in_chans` channels.

    Raises:
        BadImage: the file is not a readable picture; the message names it.
    """
    try:
        with Image.open(path) as img:
            return img.convert(PIL_MODES[in_chans])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"Cannot read the image {path} ({error}); repair or remove it.") from error


def read_image(path: str, in_chans: int = 3) -> Tensor:
    """Read a picture as a uint8 tensor (C, H, W); JPEG without Pillow, which takes half the time.

    The pixels are those of `open_image`.

    Raises:
        BadImage: the file is not a readable picture; the message names it.
    """
    if in_chans in READ_MODES and has_jpeg_start(path):
        try:
            return decode_jpeg(read_file(str(path)), READ_MODES[in_chans])
        except RuntimeError:  # a JPEG of a rare kind, or a damaged one: Pillow decides
            pass
    return pil_to_tensor(open_image(path, in_chans))


def has_jpeg_start(path: str) -> bool:
    """Whether the file begins as JPEG files do, whatever its name."""
    try:
        with open(path, "rb") as file:
            return file.read(3) == JPEG_MAGIC
    except OSError:
        return False


def find_classes(folder: str | Path) -> list[str]:
    """Names of the class folders, alphabetically; hidden ones do not count.

    Raises:
        FileNotFoundError: the folder does not exist, cannot be read or holds no class folder.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise FileNotFoundError(
            f"Cannot read the folder {folder} ({error.strerror}); --data_path must name a folder "
            f"that "
            f"holds {Path(folder).name}/."
        ) from error
    classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise FileNotFoundError(
            f"There is no class folder in {folder}; put the pictures of each class into a folder "
            f"of "
            "its own there."
        )
    return classes


def find_images(folder: str | Path) -> Iterator[str]:
    """Paths of the pictures below a folder, in a fixed order; hidden entries and link loops are
    left out.
    """
    seen = set()
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        entries = sorted(
            (e for e in os.scandir(here) if not e.name.startswith(".")), key=lambda e: e.name
        )
        yield from (e.path for e in entries if is_image_name(e.name) and e.is_file())
        waiting += [e.path for e in reversed(entries) if e.is_dir()]


def is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def normalize(imgs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 pictures (B, C, H, W) -> float32 with the given channel statistics, in one kernel.

    Args:
        mean, std: (1, C, 1, 1), of pictures in 0..1.
    """
    return torch.addcmul(-mean / std, imgs, 1 / (255 * std))
