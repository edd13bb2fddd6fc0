"""Finding and opening pictures: one place, so that every fault names its file.

A picture is a file, or a member of a tar file (util.data.shards). Pillow and torchvision read 8-bit
pictures with 1, 3 or 4 channels; NumPy arrays (.npy) and TIFF files of several pages hold any
number of channels and more than 8 bits, and become float32.

Letters: C channels, H height, W width.
"""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from util.io.errors import BadImage, UserError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    ".npy",
)
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
READ_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
JPEG_MODES = {1: ("L",), 3: ("L", "RGB")}  # of files that torchvision reads as Pillow does
PAGE_MODES = ("L", "LA", "RGB", "RGBA", "F", "I;16", "I;16B", "I;16L")  # without loss as arrays
JPEG_MAGIC = b"\xff\xd8\xff"
FAULTS = (  # what decoders raise on damaged files
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError),
    *(MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)


def open_image(path, in_chans: int = 3) -> Image.Image | Tensor:
    """Read a picture with `in_chans` channels: as PIL, or as a float32 tensor (C, H, W) where it
    is a NumPy array or Pillow has no mode for so many channels.

    Turned as it is stored, whatever its EXIF entry says; of 16-bit grey the upper 8 bits.

    Args:
        path: of a file, or a util.data.shards.Member.

    Raises:
        BadImage: it is not a readable picture; the message names it.
    """
    with naming(path), as_file(path) as file:
        if is_array(path):
            return to_tensor(np.lib.format.read_array(file), in_chans)
        with Image.open(file) as img:
            if in_chans in PIL_MODES:
                return convert(img, PIL_MODES[in_chans])
            return to_tensor(stack_pages(img), in_chans)


def read_image(path, in_chans: int = 3) -> Tensor:
    """Read a picture as a uint8 tensor (C, H, W); JPEG without Pillow, which takes half the time.

    The pixels are those of `open_image`.

    Args:
        in_chans: 1, 3 or 4.

    Raises:
        BadImage: it is not a readable picture; the message names it.
    """
    if in_chans in READ_MODES:
        with naming(path), as_file(path) as file:
            data = file.read() if file.read(3) == JPEG_MAGIC else b""
        with contextlib.suppress(RuntimeError, *FAULTS):  # then Pillow decides
            if data and (pixels := decode(bytearray(JPEG_MAGIC + data), in_chans)) is not None:
                return pixels
    return pil_to_tensor(open_image(path, in_chans))


def decode(data: bytearray, in_chans: int) -> Tensor | None:
    """A JPEG file as uint8 (C, H, W); None where torchvision's pixels might not be Pillow's."""
    with Image.open(io.BytesIO(data)) as header:  # refuses sizes that would fill the memory
        if header.mode not in JPEG_MODES[in_chans]:
            return None
    return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), READ_MODES[in_chans])


@contextlib.contextmanager
def naming(path):
    """Turn what decoders raise into a BadImage that names the picture."""
    try:
        yield
    except FAULTS as error:
        raise BadImage(
            f"Cannot read the image {path} ({reason_of(error)}); repair or remove it (training "
            "with --skip_bad_images passes it over)."
        ) from error


def reason_of(error: Exception) -> str:
    """Why a picture could not be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "empty, or no kind of picture that Pillow knows"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def as_file(path) -> io.BufferedIOBase:
    """The bytes of a picture as an open file."""
    return path.open() if hasattr(path, "shard") else open(path, "rb")


def is_array(path) -> bool:
    """Whether this is a NumPy array, by its name."""
    return path.is_array if hasattr(path, "shard") else str(path).lower().endswith(".npy")


def convert(img: Image.Image, mode: str) -> Image.Image:
    """The picture in this mode.

    Pillow would cut 16-bit values off at 255, a white picture: they are divided by 256 here.

    Raises:
        ValueError: the picture has 32 bits per value, whose range nobody knows.
    """
    if img.mode.startswith("I;16") or (img.mode == "I" and img.format == "PPM"):  # 0..65535
        img = Image.fromarray((np.asarray(img) >> 8).astype(np.uint8))
    elif img.mode in ("I", "F"):
        raise ValueError("it has 32 bits per value; store it as a .npy array of float32")
    return img.convert(mode)


def stack_pages(img: Image.Image) -> np.ndarray:
    """All pages of a picture file side by side, (H, W, C).

    Raises:
        ValueError: the pages differ in size, or are of a kind that has no plain numbers.
    """
    pages = []
    for page in ImageSequence.Iterator(img):
        if page.mode not in PAGE_MODES:
            raise ValueError(f"its mode {page.mode} has no plain numbers; store it as .npy")
        pages.append(np.asarray(page).reshape(page.height, page.width, -1))
    return np.concatenate(pages, axis=2)


def to_tensor(array: np.ndarray, in_chans: int) -> Tensor:
    """(H, W, C) or (H, W) -> float32 (C, H, W): 8 and 16 bits to 0..1, floats as they are.

    Raises:
        ValueError: the array has another shape or type, or values that are not finite.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != in_chans or 0 in array.shape:
        raise ValueError(f"its shape is {array.shape}, --in_chans {in_chans} needs (H, W, C)")
    largest = {"u1": 255, "u2": 65535, "f2": 1, "f4": 1, "f8": 1}.get(array.dtype.str[1:])
    if largest is None:
        raise ValueError(f"it holds {array.dtype}; use uint8, uint16 or float32")
    values = np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32) / largest
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return torch.from_numpy(values)


def find_classes(folder: str | Path) -> list[str]:
    """Names of the class folders, alphabetically; hidden ones do not count.

    Raises:
        UserError: the folder does not exist, cannot be read or holds no class folder.
    """
    try:
        with os.scandir(folder) as entries:
            classes = sorted(e.name for e in entries if e.name[0] != "." and is_folder(e))
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {folder} ({error.strerror}); --data_path must name a folder "
            f"that holds {Path(folder).name}/."
        ) from error
    if not classes:
        raise UserError(
            f"There is no class folder in {folder}; put the pictures of each class into a folder "
            "of its own there."
        )
    return classes


def find_images(folder: str | Path) -> Iterator[str]:
    """Paths of the pictures below a folder, in a fixed order.

    Hidden entries are left out, and what links lead to a second time or from above. Links that
    lead nowhere are not: they are pictures that cannot be read.

    Raises:
        UserError: a folder cannot be read; the message names it.
    """
    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        entries = list_folder(here)
        folders = {e.name for e in entries if is_folder(e)}
        yield from (e.path for e in entries if is_image_name(e.name) and e.name not in folders)
        waiting += [e.path for e in reversed(entries) if e.name in folders]


def list_folder(folder: str | Path) -> list[os.DirEntry]:
    """What is in a folder, by name, without hidden entries.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {folder} ({error.strerror}); correct its name or its rights."
        ) from error


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or leads to one; a link that leads to itself does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def normalize(imgs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 pictures (B, C, H, W) -> float32 with the given channel statistics, in one kernel.

    Args:
        mean, std: (1, C, 1, 1), of pictures in 0..1.
    """
    return torch.addcmul(-mean / std, imgs, 1 / (255 * std))
